"""Operators under the transforms of torch.func: per-sample problems become one problem for the kernels.

Outside of these transforms csrc/autograd.cpp has the derivatives. functorch's own calls come here: the forward and the first
derivative with respect to logits or log-probabilities are the kernels, under ``vmap`` too, and every other derivative is that
of the definition in nllx/_reference.py. csrc/grad_level.cpp has the graph of a level of grad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType, pop_dynamic_layer_stack, push_dynamic_layer_stack
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI
from torch.autograd import forward_ad

from nllx import _C, _reference
from nllx._fake import NONE, SUM, check_arguments, check_log_softmax, holds, is_counted, loss_dtypes

_ops = torch.ops.nllx
_Dims = tuple[int | None, ...]


def _leading(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """A view with the batch dimension in front."""
    if dim == 0:
        return tensor
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


class _Samples:
    """`size` problems (C) or (N, C, d1, ..., dk) as one of (N', C, d1', ...) that reads the logits where they lie.

    The samples go before the rows, between rows and classes, or to the inner dimensions, wherever their dimension joins
    without a copy. The rows of the whole are then in another order, so it is solved without a reduction.
    """

    def __init__(self, logits: Tensor, dim: int | None, size: int) -> None:
        self.size = size
        self.logits = logits = _leading(logits, dim, size)
        self.unbatched = logits.dim() == 2  # a sample is (C)
        self.single = self.unbatched or (
            logits.dim() == 3 and holds(logits.shape[1] == 1)
        )  # a sample is one row of the whole
        self.rows: tuple[int, ...] = ()
        if self.single:
            self.logits = logits if self.unbatched else logits.squeeze(1)
            return
        self.rows = (logits.shape[1], *logits.shape[3:])
        samples, n = logits.shape[0], logits.shape[1]
        of_samples, of_n = logits.stride(0), logits.stride(1)
        if holds(n == 1) or holds(samples == 1) or holds(of_samples == n * of_n):
            self.place = 0
        elif holds(of_n == samples * of_samples):
            self.place = 1
        else:
            self.place = -1
        self.logits = self._join(logits)

    def _join(self, t: Tensor, trailing: int = 0) -> Tensor:
        """(size, N, ...) as the joined problem has it; `trailing` dimensions belong to a row and stay the last."""
        if self.place == -1:
            return t.movedim(0, -1 - trailing)
        return (t if self.place == 0 else t.transpose(0, 1)).flatten(0, 1)

    def split(self, t: Tensor, trailing: int = 0) -> Tensor:
        """The reverse: a result of the joined problem with the samples in front."""
        if self.single:
            return t if self.unbatched else t.unsqueeze(1)
        if self.place == -1:
            return t.movedim(-1 - trailing, 0)
        if self.place == 0:
            return t.unflatten(0, (self.size, self.rows[0]))
        return t.unflatten(0, (self.rows[0], self.size)).transpose(0, 1)

    def join_classes(self, t: Tensor, dim: int | None) -> Tensor:
        """A tensor whose samples have the shape of the logits."""
        t = _leading(t, dim, self.size)
        if self.single:
            return t if self.unbatched else t.squeeze(1)
        return self._join(t)

    def join_rows(self, t: Tensor, dim: int | None, *trailing: int) -> Tensor:
        """A tensor whose samples have one element, or the dimensions `trailing`, for each row."""
        t = _leading(t, dim, self.size)
        if self.single:
            return t.reshape(self.size, *trailing)
        return self._join(t.reshape(self.size, *self.rows, *trailing), len(trailing))

    def each(self, t: Tensor, dim: int | None) -> Tensor:
        """A tensor with one number for each sample, as one number for each row."""
        t = _leading(t, dim, self.size)
        if self.single:
            return t
        return self._join(t.reshape(self.size, *[1] * len(self.rows)).expand(self.size, *self.rows))

    def sum(self, rows: Tensor) -> Tensor:
        """The sums over the rows of each sample, of what the joined problem has for each row."""
        return rows if self.single else self.split(rows).flatten(1).sum(1)


def _flat(weight: Tensor | None) -> Tensor | None:
    """Losses of more than two dimensions take a weight of any shape, and the joined problem has other dimensions."""
    return None if weight is None else weight.reshape(-1)


def _divisors(
    op: str,
    samples: _Samples,
    target: Tensor,
    weight: Tensor | None,
    classes: int,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    probabilities: bool,
    acc: torch.dtype,
) -> Tensor:
    """The divisor of the mean of each sample: the sum of the weights of the targets present, or the number of rows."""
    if probabilities:
        rows = 1
        for size in samples.rows:
            rows = rows * size
        divisor = torch.full([samples.size], rows if classes else 0, dtype=acc, device=target.device)
        return _reference.mean_divisor(divisor, reduction, 0.0)
    valid = is_counted(target, ignore_index)
    if weight is None:
        present = valid.to(acc)
    else:
        index = _ops._checked_target(target, classes, ignore_index, op)
        present = torch.where(
            valid, weight.reshape(-1).to(acc)[index], torch.zeros([], dtype=acc, device=target.device)
        )
    return _reference.mean_divisor(samples.sum(present), reduction, label_smoothing)


def _reduce(samples: _Samples, rows: Tensor, divisors: Tensor, reduction: int) -> Tensor:
    if reduction == NONE:
        return samples.split(rows)
    return samples.sum(rows) if reduction == SUM else samples.sum(rows) / divisors


def _incoming(
    samples: _Samples,
    grad_output: Tensor,
    dim: int | None,
    total_weight: Tensor,
    weight_dim: int | None,
    reduction: int,
) -> Tensor:
    """The incoming gradient of each row."""
    if reduction == NONE:
        return samples.join_rows(grad_output, dim)
    if reduction == SUM:
        return samples.each(grad_output, dim)
    grad_output = _leading(_cast(grad_output, total_weight.dtype), dim, samples.size)
    return samples.each(grad_output / _leading(total_weight, weight_dim, samples.size), 0)


# Batching rules: from the number of samples, the dimension of each argument that holds them (None: it is shared) and the
# arguments, to the results and the dimension that holds the samples; None where there is no kernel (a weight for each
# sample), which leaves the definition.


def _cross_entropy_forward_vmap(size: int, dims: _Dims, *arguments: Any) -> tuple[tuple[Tensor, ...], Any] | None:
    logits, target, weight, reduction, ignore_index, label_smoothing, dtype = arguments
    if dims[2] is not None:
        return None
    samples = _Samples(logits, dims[0], size)
    probabilities = (target.dim() - (dims[1] is not None)) == (logits.dim() - (dims[0] is not None)) and (
        target.is_floating_point()
    )
    joined = (samples.join_classes if probabilities else samples.join_rows)(target, dims[1])
    loss_dtype, acc = loss_dtypes(logits, target, weight, probabilities, dtype)
    rows, row_stats, _ = _ops.cross_entropy_forward(
        samples.logits,
        joined,
        _flat(weight),
        NONE,
        ignore_index,
        label_smoothing,
        loss_dtype if reduction == NONE else acc,
    )
    divisors = _divisors(
        "cross_entropy",
        samples,
        joined,
        weight,
        samples.logits.shape[1],
        reduction,
        ignore_index,
        label_smoothing,
        probabilities,
        acc,
    )
    loss = _cast(_reduce(samples, rows, divisors, reduction), loss_dtype)
    return (loss, samples.split(row_stats, trailing=1), divisors), 0


def _cross_entropy_backward_vmap(size: int, dims: _Dims, *arguments: Any) -> tuple[Tensor, Any] | None:
    grad_output, logits, target, weight, row_stats, total_weight, reduction, ignore_index, label_smoothing = arguments
    if dims[3] is not None:
        return None
    samples = _Samples(logits, dims[1], size)
    probabilities = (target.dim() - (dims[2] is not None)) == (logits.dim() - (dims[1] is not None)) and (
        target.is_floating_point()
    )
    grad = _ops.cross_entropy_backward(
        _incoming(samples, grad_output, dims[0], total_weight, dims[5], reduction),
        samples.logits,
        (samples.join_classes if probabilities else samples.join_rows)(target, dims[2]),
        _flat(weight),
        samples.join_rows(row_stats, dims[4], 2),
        total_weight.new_ones([]),
        NONE,
        ignore_index,
        label_smoothing,
    )
    return samples.split(grad), 0


def _nll_loss_forward_vmap(size: int, dims: _Dims, *arguments: Any) -> tuple[tuple[Tensor, ...], Any] | None:
    log_probs, target, weight, reduction, ignore_index, dtype = arguments
    if dims[2] is not None:
        return None
    samples = _Samples(log_probs, dims[0], size)
    joined = samples.join_rows(target, dims[1])
    loss_dtype, acc = loss_dtypes(log_probs, target, weight, False, dtype)
    rows, _ = _ops.nll_loss_forward(
        samples.logits, joined, _flat(weight), NONE, ignore_index, loss_dtype if reduction == NONE else acc
    )
    divisors = _divisors(
        "nll_loss", samples, joined, weight, samples.logits.shape[1], reduction, ignore_index, 0.0, False, acc
    )
    return (_cast(_reduce(samples, rows, divisors, reduction), loss_dtype), divisors), 0


def _nll_loss_backward_vmap(size: int, dims: _Dims, *arguments: Any) -> tuple[Tensor, Any] | None:
    grad_output, log_probs, target, weight, total_weight, reduction, ignore_index = arguments
    if dims[3] is not None:
        return None
    samples = _Samples(log_probs, dims[1], size)
    grad = _ops.nll_loss_backward(
        _incoming(samples, grad_output, dims[0], total_weight, dims[4], reduction),
        samples.logits,
        samples.join_rows(target, dims[2]),
        _flat(weight),
        total_weight.new_ones([]),
        NONE,
        ignore_index,
    )
    return samples.split(grad), 0


def _sample_dim(dim: int, rank: int, batch_dim: int) -> int:
    """A sample's dimension `dim` among those of all samples."""
    dim = dim % rank
    return dim + (dim >= batch_dim)


def _log_softmax_forward_vmap(size: int, dims: _Dims, *arguments: Any) -> tuple[Tensor, Any] | None:
    input, dim = arguments
    if dims[0] is None or input.dim() == 1:
        return None
    return _ops.log_softmax_forward(input, _sample_dim(dim, input.dim() - 1, dims[0])), dims[0]


def _log_softmax_backward_vmap(size: int, dims: _Dims, *arguments: Any) -> tuple[Tensor, Any] | None:
    grad_output, output, dim = arguments
    batch_dim = dims[1] if dims[1] is not None else 0
    output = output if dims[1] is not None else output.expand(size, *output.shape)
    grad_output = _leading(grad_output, dims[0], size).movedim(0, batch_dim)
    if output.dim() == 1:
        return None
    return _ops.log_softmax_backward(grad_output, output, _sample_dim(dim, output.dim() - 1, batch_dim)), batch_dim


def _any_tangent(tensors: Sequence[Tensor | None]) -> bool:
    """Whether one is a dual number; outside of forward mode without a look at them."""
    return forward_ad._current_level >= 0 and any(_C.has_tangent(t) for t in tensors if t is not None)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``to``, which takes its time where there is nothing to do too."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _transform(
    name: str,
    definition: Callable[..., Any],
    tensors: int,
    batched: Callable[..., Any],
    check: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """An operator, whose first `tensors` arguments are tensors, as a call that functorch can transform.

    It does what the outermost transform asks for, and calls the operator again for the ones inside of it. `check`: of the
    arguments as they are in one sample.
    """
    operator = getattr(_ops, name).default

    def inner(*arguments: Any) -> Any:
        """The operator under the rest of the transforms."""
        return operator(*arguments) if _functorch.peek_interpreter_stack() is None else transform(*arguments)

    def differentiated(interpreter: Any, arguments: Sequence[Any]) -> Any:
        level, lift, grad_mode = interpreter.level(), interpreter._cptr.lift, torch.is_grad_enabled()
        plain = [_functorch._unwrap_for_grad(a, level) if isinstance(a, Tensor) else a for a in arguments]
        torch._C._set_grad_enabled(grad_mode and interpreter.prev_grad_mode())
        layer = pop_dynamic_layer_stack()
        try:
            result = inner(*plain)
        finally:
            push_dynamic_layer_stack(layer)
            torch._C._set_grad_enabled(grad_mode)
        several = isinstance(result, tuple)
        wrapped = tuple(_functorch._wrap_for_grad(t, level) for t in (result if several else (result,)))
        lifted = tuple(lift(a) if isinstance(a, Tensor) else a for a in arguments)
        _C.differentiate_level(name, lifted, tuple(plain), wrapped)
        return wrapped if several else wrapped[0]

    def of_samples(interpreter: Any, arguments: Sequence[Any]) -> Any:
        level = interpreter.level()
        pairs = [_functorch._unwrap_batched(a, level) if isinstance(a, Tensor) else (a, None) for a in arguments]
        plain, in_dims = [pair[0] for pair in pairs], tuple(pair[1] for pair in pairs)
        layer = pop_dynamic_layer_stack()
        try:
            if in_dims.count(None) == len(in_dims):
                return inner(*plain)
            result = batched(interpreter.batch_size(), in_dims, *plain)
            if result is None:
                given, options = plain[:tensors], plain[tensors:]
                result = torch.vmap(lambda *given: definition(*given, *options), in_dims[:tensors])(*given), 0
        finally:
            push_dynamic_layer_stack(layer)
        output, dim = result
        if isinstance(output, tuple):
            return tuple(_functorch._add_batch_dim(t, dim, level) for t in output)
        return _functorch._add_batch_dim(output, dim, level)

    def transform(*arguments: Any) -> Any:
        interpreter: Any = retrieve_current_functorch_interpreter()
        kind = interpreter.key()
        if kind == TransformType.Grad and not _any_tangent(arguments[:tensors]):
            return differentiated(interpreter, arguments)
        if check is not None:
            check(*arguments)
        if kind == TransformType.Vmap:
            return of_samples(interpreter, arguments)
        if kind in (TransformType.Jvp, TransformType.Grad):
            return definition(*arguments)
        level = FunctorchFunctionalizeAPI(interpreter)
        plain = level.unwrap_tensors(tuple(arguments))
        with level.redispatch_to_next():
            result = operator(*plain)
        return level.wrap_tensors(result)

    defaults = [argument.default_value for argument in operator._schema.arguments]

    def call(*given: Any) -> Any:
        arguments = [_functorch.unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in given]
        return transform(*arguments, *defaults[len(arguments) :])  # the dispatcher leaves them out

    return call


def _vjp(definition: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """The gradients of arguments of an operator, from (gradient of its first result, *arguments, which of them)."""

    def vjp(grad: Tensor, *rest: Any) -> list[Tensor]:
        arguments, which = rest[:-1], rest[-1]

        def differentiated(*values: Tensor) -> Tensor:
            full = list(arguments)
            for i, value in zip(which, values, strict=True):
                full[i] = value
            result = definition(*full)
            return result[0] if isinstance(result, tuple) else result

        return list(torch.func.vjp(differentiated, *(arguments[i] for i in which))[1](grad))

    return vjp


def _register(
    library: torch.library.Library,
    name: str,
    tensors: int,
    batched: Callable[..., Any],
    check: Callable[..., None] | None = None,
) -> None:
    """Registers the operator under transforms, and the gradients that csrc/grad_level.cpp asks for."""
    key = "FuncTorchDynamicLayerFrontMode"
    definition = getattr(_reference, name)
    library.impl(name, _transform(name, definition, tensors, batched, check), key)
    for each in (key, "CompositeImplicitAutograd"):
        library.impl(f"_{name}_vjp", _vjp(definition), each)


def register(library: torch.library.Library) -> None:
    """Registers the operators for functorch, which sees these functions and not the kernels."""

    def check_cross_entropy(logits: Any, target: Any, weight: Any, *options: Any) -> None:
        # Of a sample's shape, which the joined problem has no more.
        probabilities = check_arguments("cross_entropy", logits, target, weight, *options[:3])
        if weight is not None and not probabilities:
            _reference.check_weight_gradient("cross_entropy", weight)

    def check_nll_loss(log_probs: Any, target: Any, weight: Any, *options: Any) -> None:
        check_arguments("nll_loss", log_probs, target, weight, *options[:2])
        if weight is not None:
            _reference.check_weight_gradient("nll_loss", weight)

    _register(library, "cross_entropy_forward", 3, _cross_entropy_forward_vmap, check_cross_entropy)
    _register(library, "cross_entropy_backward", 6, _cross_entropy_backward_vmap)
    _register(library, "nll_loss_forward", 3, _nll_loss_forward_vmap, check_nll_loss)
    _register(library, "nll_loss_backward", 5, _nll_loss_backward_vmap)
    _register(library, "log_softmax_forward", 1, _log_softmax_forward_vmap, check_log_softmax)
    _register(library, "log_softmax_backward", 2, _log_softmax_backward_vmap)

"""Operators under the transforms of torch.func: per-sample problems become one problem for the kernels.

Outside of these transforms csrc/autograd.cpp has the derivatives. functorch's own calls come here: the forward and the first
derivative with respect to logits or log-probabilities are the kernels, under ``vmap`` too, and every other derivative is that
of the definition in nllx/_reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType
from torch._functorch.autograd_function import enable_single_level_autograd_function  # type: ignore[attr-defined]
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from nllx import _reference
from nllx._fake import MEAN, NONE, SUM, check_arguments, check_log_softmax, loss_dtypes

_ops = torch.ops.nllx
_Dims = tuple[int | None, ...]


def _leading(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """A view with the batch dimension in front."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


class _Samples:
    """`size` problems (C) or (N, C, d1, ..., dk) as one of (N', C, d1', ...) that reads the logits where they lie.

    The samples go before the rows, between rows and classes, or to the inner dimensions, wherever their dimension joins
    without a copy. The rows of the whole are then in another order, so it is solved without a reduction.
    """

    def __init__(self, logits: Tensor, dim: int | None, size: int) -> None:
        self.size = size
        logits = _leading(logits, dim, size)
        self.unbatched = logits.dim() == 2  # a sample is (C)
        if self.unbatched:
            logits = logits.unsqueeze(1)
        self.rows = (logits.shape[1], *logits.shape[3:])
        samples, n = logits.shape[0], logits.shape[1]
        of_samples, of_n = logits.stride(0), logits.stride(1)
        if n == 1 or samples == 1 or of_samples == n * of_n:
            self.place = 0
        elif of_n == samples * of_samples:
            self.place = 1
        else:
            self.place = -1
        self.logits = self._join(logits)

    def _join(self, t: Tensor, trailing: int = 0) -> Tensor:
        """(size, N, ...) as the joined problem has it; `trailing` dimensions belong to a row and stay the last."""
        if self.place == -1:
            return t.movedim(0, -1 - trailing)
        return (t if self.place == 0 else t.transpose(0, 1)).flatten(0, 1)

    def _split(self, t: Tensor, trailing: int = 0) -> Tensor:
        """The reverse of _join."""
        if self.place == -1:
            t = t.movedim(-1 - trailing, 0)
        elif self.place == 0:
            t = t.unflatten(0, (self.size, self.rows[0]))
        else:
            t = t.unflatten(0, (self.rows[0], self.size)).transpose(0, 1)
        return t.squeeze(1) if self.unbatched else t

    def join_classes(self, t: Tensor, dim: int | None) -> Tensor:
        """A tensor whose samples have the shape of the logits."""
        t = _leading(t, dim, self.size)
        return self._join(t.unsqueeze(1) if self.unbatched else t)

    def join_rows(self, t: Tensor, dim: int | None, *trailing: int) -> Tensor:
        """A tensor whose samples have one element, or the dimensions `trailing`, for each row."""
        t = _leading(t, dim, self.size).reshape(self.size, *self.rows, *trailing)
        return self._join(t, len(trailing))

    def split_classes(self, t: Tensor) -> Tensor:
        return self._split(t)

    def split_rows(self, t: Tensor, trailing: int = 0) -> Tensor:
        return self._split(t, trailing)

    def each(self, t: Tensor, dim: int | None) -> Tensor:
        """A tensor with one number for each sample, as one number for each row."""
        t = _leading(t, dim, self.size).reshape(self.size, *[1] * len(self.rows))
        return self._join(t.expand(self.size, *self.rows))

    def sum(self, rows: Tensor) -> Tensor:
        """The sums over the rows of each sample."""
        return rows.flatten(1).sum(1) if rows.dim() > 1 else rows


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
    valid = target != ignore_index
    if weight is None:
        present = valid.to(acc)
    else:
        index = _ops._checked_target(target, classes, ignore_index, op)
        present = torch.where(
            valid, weight.reshape(-1).to(acc)[index], torch.zeros([], dtype=acc, device=target.device)
        )
    return _reference.mean_divisor(samples.sum(samples.split_rows(present)), reduction, label_smoothing)


def _reduce(samples: _Samples, rows: Tensor, divisors: Tensor, reduction: int) -> Tensor:
    if reduction == NONE:
        return rows
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
    grad_output = _leading(grad_output.to(total_weight.dtype), dim, samples.size)
    return samples.each(grad_output / _leading(total_weight, weight_dim, samples.size), 0)


# Batching rules: (info, in_dims, *arguments) of a Function's vmap. A weight for each sample has no kernel: the definition.


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
    loss = _reduce(samples, samples.split_rows(rows), divisors, reduction).to(loss_dtype)
    return (loss, samples.split_rows(row_stats, trailing=1), divisors), 0


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
    return samples.split_classes(grad), 0


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
    return (_reduce(samples, samples.split_rows(rows), divisors, reduction).to(loss_dtype), divisors), 0


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
    return samples.split_classes(grad), 0


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


def _function(
    name: str,
    definition: Callable[..., Any],
    tensors: int,
    batched: Callable[..., Any],
    gradient: Callable[..., Tensor] | None = None,
) -> Callable[..., Any]:
    """An operator, whose first `tensors` arguments are tensors, as a call that functorch can transform.

    It does what the outermost transform asks for, and calls the operator again for the ones inside of it. (The
    autograd.Function that users write goes the same way, with searches through nested arguments that take longer than the
    kernels.) `gradient`, if there is a kernel for it: that of the first argument, from (grad_output, arguments, results).
    """
    operator = getattr(_ops, name).default

    class Node(_SingleLevelFunction):
        """The derivatives of one level of grad."""

        @staticmethod
        def forward(*arguments: Any) -> Any:
            interpreter = retrieve_current_functorch_interpreter()
            level = interpreter.level()
            plain = [_functorch._unwrap_for_grad(a, level) if isinstance(a, Tensor) else a for a in arguments]
            with torch.enable_grad(), _set_fwd_grad_enabled(True), interpreter.lower():
                result = operator(*plain)
            if isinstance(result, tuple):
                return tuple(_functorch._wrap_for_grad(t, level) for t in result)
            return _functorch._wrap_for_grad(result, level)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            results = output if isinstance(output, tuple) else (output,)
            if len(results) > 1:
                ctx.mark_non_differentiable(*results[1:])
            ctx.options = inputs[tensors:]
            ctx.save_for_backward(*inputs[:tensors], *results)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            grad_output, none = grads[0], [None] * (tensors + len(ctx.options))
            if grad_output is None:
                return tuple(none)
            arguments, results = (*ctx.saved_tensors[:tensors], *ctx.options), ctx.saved_tensors[tensors:]
            which = [i for i in range(tensors) if ctx.needs_input_grad[i] and arguments[i].is_floating_point()]
            if which == [0] and gradient is not None:
                return (gradient(grad_output, arguments, results), *none[1:])

            def differentiated(*values: Tensor) -> Tensor:
                full = list(arguments)
                for i, value in zip(which, values, strict=True):
                    full[i] = value
                result = definition(*full)
                return result[0] if isinstance(result, tuple) else result

            pullback = torch.func.vjp(differentiated, *(arguments[i] for i in which))[1]
            for i, grad in zip(which, pullback(grad_output), strict=True):
                none[i] = grad
            return tuple(none)

    def of_samples(interpreter: Any, arguments: Sequence[Any]) -> Any:
        level = interpreter.level()
        pairs = [_functorch._unwrap_batched(a, level) if isinstance(a, Tensor) else (a, None) for a in arguments]
        plain, in_dims = [pair[0] for pair in pairs], tuple(pair[1] for pair in pairs)
        with interpreter.lower():
            if all(dim is None for dim in in_dims):
                return operator(*plain)
            result = batched(interpreter.batch_size(), in_dims, *plain)
            if result is None:
                given, options = plain[:tensors], plain[tensors:]
                result = torch.vmap(lambda *given: definition(*given, *options), in_dims[:tensors])(*given), 0
        output, dim = result
        if isinstance(output, tuple):
            return tuple(_functorch._add_batch_dim(t, dim, level) for t in output)
        return _functorch._add_batch_dim(output, dim, level)

    def call(*given: Any) -> Any:
        arguments = [_functorch.unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in given]
        interpreter: Any = retrieve_current_functorch_interpreter()
        transform = interpreter.key()
        if transform == TransformType.Vmap:
            return of_samples(interpreter, arguments)
        if transform == TransformType.Grad:
            lift = interpreter._cptr.lift
            with enable_single_level_autograd_function():
                return Node.apply(*[lift(a) if isinstance(a, Tensor) else a for a in arguments])  # type: ignore[attr-defined]
        if transform == TransformType.Jvp:
            return definition(*arguments)
        level = FunctorchFunctionalizeAPI(interpreter)
        plain = level.unwrap_tensors(tuple(arguments))
        with level.redispatch_to_next():
            result = operator(*plain)
        return level.wrap_tensors(result)

    Node.__name__ = Node.__qualname__ = "".join(part.capitalize() for part in name.split("_"))
    return call


def register(library: torch.library.Library) -> None:
    """Registers the operators for functorch, which sees these Functions and not the kernels."""
    key = "FuncTorchDynamicLayerFrontMode"

    cross_entropy = _function(
        "cross_entropy_forward",
        _reference.cross_entropy_forward,
        3,
        _cross_entropy_forward_vmap,
        lambda grad, args, results: _ops.cross_entropy_backward(
            grad, *args[:3], results[1], results[2], args[3], args[4], args[5]
        ),
    )

    def cross_entropy_forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        reduction: int = MEAN,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> Any:
        # Of a sample's shape, which the joined problem has no more.
        probabilities = check_arguments(
            "cross_entropy", logits, target, weight, reduction, ignore_index, label_smoothing
        )
        if weight is not None and not probabilities:
            _reference.check_weight_gradient("cross_entropy", weight)
        return cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing, dtype)

    library.impl("cross_entropy_forward", cross_entropy_forward, key)

    cross_entropy_backward = _function(
        "cross_entropy_backward", _reference.cross_entropy_backward, 6, _cross_entropy_backward_vmap
    )
    library.impl("cross_entropy_backward", cross_entropy_backward, key)

    nll_loss = _function(
        "nll_loss_forward",
        _reference.nll_loss_forward,
        3,
        _nll_loss_forward_vmap,
        lambda grad, args, results: _ops.nll_loss_backward(grad, *args[:3], results[1], args[3], args[4]),
    )

    def nll_loss_forward(
        log_probs: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        reduction: int = MEAN,
        ignore_index: int = -100,
        dtype: torch.dtype | None = None,
    ) -> Any:
        check_arguments("nll_loss", log_probs, target, weight, reduction, ignore_index)
        if weight is not None:
            _reference.check_weight_gradient("nll_loss", weight)
        return nll_loss(log_probs, target, weight, reduction, ignore_index, dtype)

    library.impl("nll_loss_forward", nll_loss_forward, key)

    nll_loss_backward = _function("nll_loss_backward", _reference.nll_loss_backward, 5, _nll_loss_backward_vmap)
    library.impl("nll_loss_backward", nll_loss_backward, key)

    log_softmax = _function(
        "log_softmax_forward",
        _reference.log_softmax_forward,
        1,
        _log_softmax_forward_vmap,
        lambda grad, args, results: _ops.log_softmax_backward(grad, results[0], args[1]),
    )

    def log_softmax_forward(input: Tensor, dim: int) -> Any:
        check_log_softmax(input, dim)
        return log_softmax(input, dim)

    library.impl("log_softmax_forward", log_softmax_forward, key)

    log_softmax_backward = _function(
        "log_softmax_backward", _reference.log_softmax_backward, 2, _log_softmax_backward_vmap
    )
    library.impl("log_softmax_backward", log_softmax_backward, key)

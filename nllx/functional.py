"""The losses as functions, with the signatures of :mod:`torch.nn.functional`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.nn.functional import _get_softmax_dim  # type: ignore[attr-defined]
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from nllx import _C, _operators
from nllx._arguments import (
    LARGEST,
    NAN,
    ONE,
    SMALLEST,
    ZERO,
    as_dtype,
    check_tensors,
    integer,
    is_nested,
    legacy_reduction,
    mean_or_zero,
    real,
    refuse_nested,
    row_options,
    stacklevel_of_caller,
)
from nllx._operators.losses import in_onnx_export
from nllx._operators.shapes import MEAN_OR_ZERO

__all__ = [
    "SoftmaxStatistics",
    "cross_entropy",
    "cross_entropy_value_and_grad",
    "log_softmax",
    "mse_loss",
    "nll_loss",
    "softmax_statistics",
]

# Bound once: looking an overload up costs as much as a small kernel.
_cross_entropy = torch.ops.nllx.cross_entropy.default
_cross_entropy_value_and_grad = torch.ops.nllx.cross_entropy_value_and_grad.default
_cross_entropy_value_and_grad_out = torch.ops.nllx.cross_entropy_value_and_grad_out.default
_nll_loss = torch.ops.nllx.nll_loss.default
_log_softmax = torch.ops.nllx.log_softmax.default
_mse_loss = torch.ops.nllx.mse_loss.default
_softmax_statistics = torch.ops.nllx.softmax_statistics.default


# torch's own, for what knows only those. importlib.reload keeps them: nllx.patch may have put others in their place.
_TORCHS: dict[str, Callable[..., Tensor]] = globals().get("_TORCHS") or {
    name: getattr(torch.nn.functional, name) for name in __all__ if hasattr(torch.nn.functional, name)
}


def _in_onnx(
    name: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    number: int,
    ignore_index: int,
    by_definition: bool = False,
) -> Tensor | None:
    """By torch's operators, since ONNX has no others: as torch's function where torch's exporters keep all options, else None,
    for the definition (of torch 2.13, they leave label smoothing out, without a word, and stop at probabilities)."""
    if number == MEAN_OR_ZERO or by_definition or target.is_floating_point():
        return None
    target = target if target.dtype == torch.int64 else target.long()
    reduction = ("none", "mean", "sum")[number]
    return _TORCHS[name](input, target, weight, ignore_index=ignore_index, reduction=reduction)


def _handle(
    function: Any, tensors: tuple[Any, ...], *arguments: Any, own: dict[str, Any] | None = None, **options: Any
) -> Any:
    """The call as classes of tensors and modes have it: of nllx's function, or of torch's where they know that alone, by
    identity. `own`: the options that torch's has not."""
    try:
        return handle_torch_function(function, tensors, *arguments, **options, **(own or {}))
    except TypeError as error:
        refused = f"no implementation found for '{function.__module__}.{function.__name__}'"
        torchs = _TORCHS.get(function.__name__)
        hints = {"inplace_backward", "zero_division"} if (own or {}).get("zero_division") != 0 else set()
        if torchs is None or not str(error).startswith(refused) or not set(own or {}) <= hints:
            raise
        try:
            return handle_torch_function(torchs, tensors, *arguments, **options)
        except TypeError as again:
            raise (error if str(again).startswith("no implementation found for") else again) from None


def _nested_log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    """Of the parts of a nested tensor, side by side."""
    ragged = input._ragged_idx  # type: ignore[attr-defined]
    axis = dim % input.dim()
    if input.layout != torch.jagged or axis in (0, ragged) or input.lengths() is not None:  # type: ignore[attr-defined]
        raise NotImplementedError(
            "log_softmax: of nested tensors those of the layout torch.jagged without holes are taken, along a dimension "
            f"that is neither ragged nor that of the batch, but got {input.layout}, dim {dim}"
        )
    values = log_softmax(input.values(), axis - 1, dtype=dtype)
    return torch.nested.nested_tensor_from_jagged(values, input.offsets(), jagged_dim=ragged)  # type: ignore[attr-defined]


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    inplace_backward: bool = False,
    zero_division: float = NAN,
    logit_scale: float | Tensor = ONE,
    softcap: float | None = None,
    temperature: float | Tensor = ONE,
    z_loss: float = ZERO,
    sample_weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
) -> Tensor:
    r"""Cross entropy between logits and targets, like :func:`torch.nn.functional.cross_entropy`, in one pass over the logits.

    With :math:`l = \log\operatorname{softmax}(x)`, smoothing :math:`\varepsilon` and weights :math:`w` (ones if not given),
    the loss of a row with class index :math:`y`, and of one with class probabilities :math:`p`, is

    .. math::
        -(1 - \varepsilon) w_y l_y - \frac{\varepsilon}{C} \sum_c w_c l_c
        \qquad\text{and}\qquad
        -\sum_c w_c \left((1 - \varepsilon) p_c + \frac{\varepsilon}{C}\right) l_c .

    Label smoothing is that of Szegedy et al., "Rethinking the Inception architecture for computer vision", 2016. With the
    options of the last lines the classes are compared by :math:`z` in place of :math:`x`, and the loss of a row, times its
    weight :math:`u`, is that with a multiple of the squared log-sum-exp added:

    .. math::
        z = \frac{t}{T} \tanh \frac{s x}{t} \quad\text{(without a softcap } t \text{: } s x / T \text{)},
        \qquad u \left(\text{loss}(z) + \zeta \left(\log \sum_c e^{z_c}\right)^2\right) .

    The z-loss is that of Chowdhery et al., "PaLM", 2022, the softcap that of Gemma 2, 2024.

    Args:
        input: Logits of shape :math:`(C)`, :math:`(N, C)` or :math:`(N, C, d_1, ..., d_k)`; float32, float64, bfloat16 or
            float16, in any layout. Rows (classes adjacent, channels-last images too) and planes (contiguous images) are
            read where they lie.
        target: Class indices of shape :math:`()`, :math:`(N)` or :math:`(N, d_1, ..., d_k)`, any integer
            dtype, unsigned ones too, or bool, each in :math:`[0, C)` or ``ignore_index``; or class probabilities of the shape
            of ``input``, floating point.
        weight: One factor per class, shape :math:`(C)`, dtype of ``input`` (float32 or float64 too beside half precision).
        size_average: Deprecated, see ``reduction``.
        ignore_index: Rows with this class index add nothing to the loss, the gradient or the divisor of the mean. May lie
            in or outside the range of classes. Index targets only.
        reduce: Deprecated, see ``reduction``.
        reduction: ``"mean"`` divides the sum by the sum of :math:`w_y` over the rows that count (index targets) or by the
            number of rows (probabilities); ``"sum"``; ``"none"`` returns one loss per row.
        label_smoothing: :math:`\varepsilon` in [0, 1].
        inplace_backward: The gradient may be written over the logits, which saves its memory and the time to map it. The
            logits hold the gradient after ``backward()``. Nothing may read them during or after it (a checkpoint's
            recomputation, a hook, another thread), nor write to them while a gradient that autograd passes on as it is,
            through sums, views and copies, may be kept by a leaf or a hook. Their version counter rises, so that another
            backward through the same graph, or through an operation that saved the logits, raises RuntimeError. The gradient is
            a fresh tensor as ever where something else lies in the memory of the logits (``logits.detach()``, an array of
            NumPy, another view, an activation that saved them as its output; a capsule of DLPack is not seen; the tensor
            that they are a view of counts as the logits), where hooks
            for saved tensors were installed when the loss was computed (``torch.utils.checkpoint``, ``save_on_cpu``), where
            the gradient is itself differentiated (``create_graph=True``), where ``logit_scale`` gets a gradient too, and under
            ``torch.func`` and ``torch.compile``.
            What an operation saved through such hooks, while the loss was computed outside of them, is not noticed: as with
            all of torch's in-place operations. The logits must be the output of an operation, not a leaf, and not expanded.
        zero_division: What the mean over nothing is: NaN, as torch has it, or 0, with a gradient of 0. Nothing is an empty
            input, rows that are all ignored, or targets whose weights sum to 0.
        logit_scale: :math:`s`: a number, a tensor of no dimension, or one number per row (the shape of class indices). A tensor
            that requires grad gets its gradient, with the same bits for any number of threads (unless a temperature of the rows
            requires grad too). To torch.compile numbers are constants: what changes from step to step is given as a tensor.
        softcap: :math:`t`, a positive number (Gemma 2: 30). A logit of -inf is then -t, and no mask.
        temperature: :math:`T`, positive, as ``logit_scale``. The values of tensors are not looked at.
        z_loss: :math:`\zeta`. Not multiplied by the weights of classes.
        sample_weight: :math:`u`: one factor per row, the shape of class indices, any floating point dtype. The mean divides by
            the sum of :math:`u w_y` over the rows that count, for probabilities by the sum of :math:`u`.
        divisor: A number or a tensor of no dimension that the mean divides by instead: the number of tokens of all
            micro-batches or processes, say. Only with ``"mean"``.

    Returns:
        A scalar, or with ``"none"`` a tensor of the shape of index targets, in the dtype of ``input`` (promoted with that of
        ``target`` and ``weight`` for probabilities); float32 under autocast. Half-precision logits are accumulated in
        float32 and the result is rounded once.

    Raises:
        IndexError: a class index is out of range; the message names position and value.
        ValueError: the batch sizes differ, ``reduction`` is unknown, or an option has a value or shape that makes no sense.
        RuntimeError: another shape, dtype, device or option does not fit.
        TypeError: an argument has another Python type.
        NotImplementedError: ``input`` is not floating point.

    Cost:
        For logits of :math:`L` bytes the forward reads :math:`L` and saves two numbers per row, and the logits themselves; the
        backward reads :math:`L` and writes :math:`L`, the gradient, which is all the memory that is added (with
        ``inplace_backward`` none is). Probabilities are read along with the logits, in either pass. The options add numbers of
        the rows alone; gradients of ``temperature`` beside a softcap or a ``logit_scale``, ``sample_weight`` and ``divisor``
        come from torch's operations. The log-sum-exp is found in one pass as in Milakov and Gimelshein, "Online normalizer
        calculation for softmax", 2018.
    """
    plain = (
        sample_weight is None
        and divisor is None
        and softcap is None
        and logit_scale is ONE
        and temperature is ONE
        and z_loss is ZERO
    )
    if has_torch_function_variadic(input, target, weight) or (
        not plain and has_torch_function_variadic(logit_scale, temperature, sample_weight, divisor)
    ):
        refuse_nested("cross_entropy", input)
        own: dict[str, Any] = {"inplace_backward": inplace_backward, "zero_division": zero_division}
        options = {
            name: value
            for name, value, default in (
                ("logit_scale", logit_scale, ONE),
                ("softcap", softcap, None),
                ("temperature", temperature, ONE),
                ("z_loss", z_loss, ZERO),
                ("sample_weight", sample_weight, None),
                ("divisor", divisor, None),
            )
            if isinstance(value, Tensor) or value != default
        }
        return _handle(
            cross_entropy,
            (input, target, weight, logit_scale, temperature, sample_weight, divisor),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
            own=own | options,
        )
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    if type(ignore_index) is not int or not SMALLEST <= ignore_index <= LARGEST:
        ignore_index = integer("cross_entropy", "ignore_index", ignore_index)
    if type(label_smoothing) is not float:
        label_smoothing = real("cross_entropy", "label_smoothing", label_smoothing)
    number = 1 if reduction == "mean" else _Reduction.get_enum(reduction)
    if zero_division is not NAN:
        number = mean_or_zero("cross_entropy", number, zero_division)
    if plain:
        w = s = t = d = None
        scale, sharpness, cap, z = 1.0, 1.0, 0.0, 0.0
    else:
        check_tensors("cross_entropy", input=input, target=target, weight=weight)
        w, s, t, d, scale, sharpness, cap, z = row_options(
            "cross_entropy", input, logit_scale, softcap, temperature, z_loss, sample_weight, divisor
        )
    if not torch.compiler.is_compiling():
        loss = _C.cross_entropy(
            input,
            target,
            weight,
            w,
            s,
            t,
            d,
            number,
            ignore_index,
            label_smoothing,
            scale,
            sharpness,
            cap,
            z,
            None,
            bool(inplace_backward),
        )
        if loss is not NotImplemented:
            return loss
    # What traces sees operators alone.
    check_tensors("cross_entropy", input=input, target=target, weight=weight)
    arguments = (input, target, weight, w, s, t, d, number, ignore_index, label_smoothing, scale, sharpness, cap, z)
    if in_onnx_export():
        by_definition = not plain or label_smoothing > 0
        exported = _in_onnx("cross_entropy", input, target, weight, number, ignore_index, by_definition)
        return _operators.cross_entropy.forward(*arguments)[0] if exported is None else exported
    # Not in place: a compiler's backends differ in what they let the operator see.
    return _cross_entropy(*arguments)


def cross_entropy_value_and_grad(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    out: Tensor | None = None,
    *,
    zero_division: float = NAN,
    logit_scale: float | Tensor = ONE,
    softcap: float | None = None,
    temperature: float | Tensor = ONE,
    z_loss: float = ZERO,
    sample_weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Loss and gradient of the logits at once, without a graph: the logits are read from memory once, the gradient written.

    The gradient is :math:`k (A \operatorname{softmax}(x) - a)` with the coefficients :math:`a_c` of :math:`-l_c` in the loss
    (see :func:`cross_entropy`), :math:`A` their sum over the classes, and :math:`k` one over the divisor of the mean. To go on
    backward from the logits: ``logits.backward(grad)``.

    Args:
        logits, target, weight, ignore_index, label_smoothing, zero_division: As in :func:`cross_entropy`.
        logit_scale, softcap, temperature, z_loss, sample_weight, divisor: As in :func:`cross_entropy`; none may require grad.
        reduction: ``"mean"`` or ``"sum"``.
        out: Where the gradient goes: a tensor of the shape, dtype and device of ``logits``, which may be ``logits``
            themselves (their values are then lost; autograd sees it as an in-place change), but neither a part of them nor
            a leaf that requires grad.

    Returns:
        The loss, as from :func:`cross_entropy`, and the gradient (``out``, if given). Neither has a graph: the loss and a
        fresh gradient do not require grad, and ``out`` stays what it is (``out=logits`` requires grad if the logits do).

    Raises:
        IndexError, ValueError, RuntimeError, TypeError, NotImplementedError: as in :func:`cross_entropy`; ValueError for
            reduction ``"none"``. A class index out of range raises before anything is written (not on a GPU).

    Cost:
        The logits are read from memory once and the gradient is written once, :math:`2 L` bytes; into ``out`` no memory is
        added. On a GPU that is so where a row fits the chip; longer rows, few long ones and planes are read twice.
    """
    tensors = (logits, target, weight, out, logit_scale, temperature, sample_weight, divisor)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            cross_entropy_value_and_grad,
            tensors,
            logits,
            target,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            out=out,
            zero_division=zero_division,
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature,
            z_loss=z_loss,
            sample_weight=sample_weight,
            divisor=divisor,
        )
    check_tensors("cross_entropy", input=logits, target=target, weight=weight)
    if type(ignore_index) is not int or not SMALLEST <= ignore_index <= LARGEST:
        ignore_index = integer("cross_entropy", "ignore_index", ignore_index)
    if type(label_smoothing) is not float:
        label_smoothing = real("cross_entropy", "label_smoothing", label_smoothing)
    number = _Reduction.get_enum(reduction)
    if zero_division is not NAN:
        number = mean_or_zero("cross_entropy", number, zero_division)
    w, s, t, d, *numbers = row_options(
        "cross_entropy", logits, logit_scale, softcap, temperature, z_loss, sample_weight, divisor, with_graph=False
    )
    arguments = (logits, target, weight, w, s, t, d, number, ignore_index, label_smoothing, *numbers)
    if out is None:
        return _cross_entropy_value_and_grad(*arguments)
    if not isinstance(out, Tensor):
        raise TypeError(f"cross_entropy(): argument 'out' must be Tensor, not {type(out).__name__}")
    return _cross_entropy_value_and_grad_out(*arguments, None, out), out


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    zero_division: float = NAN,
) -> Tensor:
    r"""Negative log likelihood of class indices, like :func:`torch.nn.functional.nll_loss`: :math:`-w_y l_y` for each row.

    Args:
        input: Log-probabilities :math:`l` of shape :math:`(C)`, :math:`(N, C)` or :math:`(N, C, d_1, ..., d_k)`; float32,
            float64, bfloat16 or float16, in any layout.
        target: Class indices of shape :math:`()`, :math:`(N)` or :math:`(N, d_1, ..., d_k)`; dtypes and range as in
            :func:`cross_entropy`.
        weight: One factor per class, shape :math:`(C)`, dtype of ``input`` (float32 or float64 too beside half precision).
        size_average: Deprecated, see ``reduction``.
        ignore_index: Rows with this class index add nothing to the loss, the gradient or the divisor of the mean.
        reduce: Deprecated, see ``reduction``.
        reduction: ``"mean"`` divides the sum by the sum of the weights of the targets present; ``"sum"``; ``"none"``.
        zero_division: What the mean over nothing is, NaN or 0; see :func:`cross_entropy`.

    Returns:
        A scalar, or with ``"none"`` a tensor of the shape of ``target``, in the dtype of ``input``; float32 under autocast.

    Raises:
        IndexError, ValueError, RuntimeError, TypeError, NotImplementedError: as in :func:`cross_entropy`.

    Cost:
        The forward reads one number of each row; the backward writes the gradient, of the size of ``input``, in one pass.
    """
    if has_torch_function_variadic(input, target, weight):
        refuse_nested("nll_loss", input)
        return _handle(
            nll_loss,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            own={"zero_division": zero_division},
        )
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    if type(ignore_index) is not int or not SMALLEST <= ignore_index <= LARGEST:
        ignore_index = integer("nll_loss", "ignore_index", ignore_index)
    number = 1 if reduction == "mean" else _Reduction.get_enum(reduction)
    if zero_division is not NAN:
        number = mean_or_zero("nll_loss", number, zero_division)
    if not torch.compiler.is_compiling():
        loss = _C.nll_loss(input, target, weight, number, ignore_index, None)
        if loss is not NotImplemented:
            return loss
    check_tensors("nll_loss", input=input, target=target, weight=weight)
    if in_onnx_export():
        exported = _in_onnx("nll_loss", input, target, weight, number, ignore_index)
        if exported is None:
            return _operators.nll_loss.forward(input, target, weight, number, ignore_index)[0]
        return exported
    return _nll_loss(input, target, weight, number, ignore_index)


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Logarithm of the softmax along ``dim``, like :func:`torch.nn.functional.log_softmax`.

    .. math:: \log\operatorname{softmax}(x)_c = (x_c - m) - \log \sum_j e^{x_j - m}, \qquad m = \max_j x_j

    Args:
        input: Any shape, float32, float64, bfloat16 or float16 (any dtype with ``dtype``), any layout.
        dim: The dimension of the classes; negative counts from the end. Left out, it is guessed (0 for 0, 1 and 3
            dimensions, else 1) with a warning.
        dtype: ``input`` is cast to it before anything is computed.

    Returns:
        A tensor of the shape of ``input``, in its dtype or ``dtype``.

    Raises:
        IndexError: ``dim`` is out of range.
        NotImplementedError: the dtype that is computed in is not floating point.

    Cost:
        For an input of :math:`L` bytes the forward reads and writes :math:`L`; it saves its output. The backward reads
        :math:`2 L` and writes :math:`L`.
    """
    if has_torch_function_unary(input):
        if is_nested(input) and dim is not None:
            return _nested_log_softmax(input, dim, dtype)
        return _handle(log_softmax, (input,), input, dim=dim, _stacklevel=_stacklevel, dtype=dtype)
    if not isinstance(input, Tensor):
        check_tensors("log_softmax", input=input)
    if dim is None:
        if torch.compiler.is_compiling():  # where a warning would break the graph
            dim = 0 if input.dim() in (0, 1, 3) else 1
        else:
            dim = _get_softmax_dim("log_softmax", input.dim(), _stacklevel)
    if type(dim) is not int or not SMALLEST <= dim <= LARGEST:
        dim = integer("log_softmax", "dim", dim)
    if dtype is not None:
        dtype = as_dtype("log_softmax", dtype)
    if dtype is None and not torch.compiler.is_compiling():
        result = _C.log_softmax(input, dim, None)
        if result is not NotImplemented:
            return result
    if input.is_nested:
        return _nested_log_softmax(input, dim, dtype)
    if in_onnx_export():
        return _TORCHS["log_softmax"](input, dim, dtype=dtype)
    return _log_softmax(input, dim, dtype)


class SoftmaxStatistics(NamedTuple):
    """What :func:`softmax_statistics` returns: tensors of the shape of the rows, or None for what was not asked for."""

    log_prob: Tensor | None
    logsumexp: Tensor | None
    entropy: Tensor | None
    prediction: Tensor | None


def _statistics_of(cls: type[SoftmaxStatistics], *values: Any, **named: Any) -> SoftmaxStatistics:
    """From the statistics, or from an iterable of them, as classes of tensors make torch's named tuples anew."""
    if len(values) == 1 and not named:
        return _new_statistics(cls, *values[0])
    return _new_statistics(cls, *values, **named)


_new_statistics = SoftmaxStatistics.__new__
SoftmaxStatistics.__new__ = _statistics_of  # type: ignore[method-assign, assignment]


def softmax_statistics(
    logits: Tensor,
    target: Tensor | None = None,
    *,
    dim: int = -1,
    ignore_index: int = -100,
    logit_scale: float | Tensor = ONE,
    softcap: float | None = None,
    temperature: float | Tensor = ONE,
    outputs: Iterable[str] | None = None,
) -> SoftmaxStatistics:
    r"""Functions of the softmax of each row of logits, from one pass over them, each with its gradient.

    The classes are compared after :math:`z = t \tanh(s x / t) / T` with softcap :math:`t`, or :math:`z = s x / T` without
    one. With :math:`p = \operatorname{softmax}(z)`:

    .. math::
        \text{log\_prob} = \log p_y, \quad
        \text{logsumexp} = \log \sum_c e^{z_c}, \quad
        \text{entropy} = -\sum_c p_c \log p_c, \quad
        \text{prediction} = \operatorname{argmax}_c z_c .

    The gradient of the logits, from the incoming ones :math:`g`, is

    .. math::
        p_c \left(g_\text{logsumexp} - g_\text{log\_prob} - g_\text{entropy} (\log p_c + H)\right)
        + [c = y]\, g_\text{log\_prob} .

    Args:
        logits: Any shape with a dimension of classes; float32, float64, bfloat16 or float16, in any layout.
        target: A class index for each row: the shape of ``logits`` without ``dim``, any integer dtype.
        dim: The dimension of the classes.
        ignore_index: Rows with this class index have 0 for all statistics, -1 for the prediction, and no gradient, whatever
            they hold.
        logit_scale: :math:`s`: a number, a tensor of no dimension, or one number per row (the shape of ``target``). A tensor
            that requires grad gets its gradient.
        softcap: :math:`t`, a positive number (Gemma 2: 30). A logit of -inf is then -t and no mask.
        temperature: :math:`T`, positive, as ``logit_scale``. The values of tensors are not looked at.
        outputs: The names of the statistics that are wanted. By default all; ``"log_prob"`` where there is a target.

    Returns:
        ``SoftmaxStatistics(log_prob, logsumexp, entropy, prediction)``, each of the shape of ``logits`` without ``dim``:
        float32, or float64 for float64 logits; ``prediction`` is int64, the first class of the largest logit (of NaN, as
        :func:`torch.argmax` has it), without a gradient. None for what is not wanted. A class of -inf has the probability 0
        and adds nothing to the entropy; of a row of nothing else logsumexp is -inf and the entropy NaN.

    Raises:
        IndexError: a class index is neither a class nor ``ignore_index``, ``dim`` is out of range, or rows have no classes.
        RuntimeError: shapes, dtypes or devices do not fit.
        ValueError: an option has a value that makes no sense.
        TypeError: an argument has another Python type.
        NotImplementedError: the dtype has no kernel, or the tensors are nested.

    Cost:
        The forward reads the logits once and saves them with three numbers per row, the backward reads them once and writes
        the gradient once, whatever was asked for, of scaled and capped logits too. The gradient of a ``temperature`` beside a
        softcap comes from torch's operations.
    """
    tensors = (logits, target, logit_scale, temperature)
    if has_torch_function_variadic(*tensors):
        refuse_nested("softmax_statistics", logits)
        return handle_torch_function(
            softmax_statistics,
            tensors,
            logits,
            target,
            dim=dim,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature,
            outputs=outputs,
        )
    check_tensors("softmax_statistics", logits=logits, **({} if target is None else {"target": target}))
    refuse_nested("softmax_statistics", logits)
    dim = integer("softmax_statistics", "dim", dim)
    ignore_index = integer("softmax_statistics", "ignore_index", ignore_index)
    names = SoftmaxStatistics._fields
    if not isinstance(outputs, Iterable | None):
        raise TypeError(f"softmax_statistics(): argument 'outputs' must be names, not {type(outputs).__name__}")
    wanted = {name for name in names if name != "log_prob" or target is not None} if outputs is None else set(outputs)
    if not wanted <= set(names) or isinstance(outputs, str):
        raise ValueError(f"softmax_statistics: outputs must be of {', '.join(names)}, but got {outputs!r}")
    if "log_prob" in wanted and target is None:
        raise ValueError("softmax_statistics: log_prob is of a target, and none was given")
    options = row_options("softmax_statistics", logits, logit_scale, softcap, temperature)
    function = _operators.softmax_statistics.forward if in_onnx_export() else _softmax_statistics
    results = function(
        logits,
        target,
        options.logit_scale,
        options.temperature,
        dim,
        ignore_index,
        *options.map(),
        "entropy" in wanted,
        "prediction" in wanted,
    )
    return SoftmaxStatistics(
        *(result if name in wanted else None for name, result in zip(names, results, strict=False))
    )


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Squared error of each element, like :func:`torch.nn.functional.mse_loss`: :math:`w (x - t)^2`, :math:`w = 1` without
    weights.

    Args:
        input: Any shape, float32, float64, bfloat16 or float16, in any layout.
        target: The shape of ``input``; with another one both are broadcast, with torch's warning. Dtypes are promoted.
        size_average: Deprecated, see ``reduction``.
        reduce: Deprecated, see ``reduction``.
        reduction: ``"mean"`` divides the sum by the number of elements, or by the sum of the weights; ``"sum"``; ``"none"``
            returns one loss per element.
        weight: One factor per element, shape of ``input``.

    Returns:
        A scalar, or with ``"none"`` a tensor of the broadcast shape, in the promoted dtype; float32 under autocast.
        Half-precision inputs are subtracted and summed in float32 and the result is rounded once. Input, target and weight
        have gradients.

    Raises:
        RuntimeError: the shapes do not broadcast, or devices differ.
        ValueError: ``weight`` has another shape than ``input``, or ``reduction`` is unknown.
        TypeError: an argument has another Python type.
        NotImplementedError: the promoted dtype has no kernel.

    Cost:
        The forward reads input, target and weight once and saves them; the backward reads them once and writes the gradients
        that are asked for. The gradient of the weight is that of the definition, in torch's operations.
    """
    if has_torch_function_variadic(input, target, weight):
        return _handle(
            mse_loss,
            (input, target, weight),
            input,
            target,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            weight=weight,
        )
    check_tensors("mse_loss", input=input, target=target, weight=weight)
    if in_onnx_export() or input.is_nested or target.is_nested:
        return _TORCHS["mse_loss"](input, target, size_average, reduce, reduction, weight)
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    number = 1 if reduction == "mean" else _Reduction.get_enum(reduction)
    if target.shape != input.shape:
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=stacklevel_of_caller(),
        )
    if weight is not None:
        if weight.shape != input.shape:
            raise ValueError(
                f"mse_loss: Weights and input must have the same size, but got {weight.size()} and {input.size()}"
            )
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"mse_loss: {reduction} is not a valid value for reduction beside weights")
        if target.shape != input.shape:
            return _broadcast_weighted_mse_loss(input, target, weight, reduction)
    if target.shape != input.shape:
        input, target = torch.broadcast_tensors(input, target)
    if not torch.compiler.is_compiling():
        loss = _C.mse_loss(input, target, weight, number, None)
        if loss is not NotImplemented:
            return loss
    return _mse_loss(input, target, weight, number)


def _broadcast_weighted_mse_loss(input: Tensor, target: Tensor, weight: Tensor, reduction: str) -> Tensor:
    """torch's formula, of shapes that torch itself warns of: its dtypes depend on which of the tensors are numbers, and its
    mean divides by the sum of the weights as they were given."""
    losses = (input - target).square() * weight
    if reduction == "none":
        return losses
    return losses.sum() / weight.sum() if reduction == "mean" else losses.sum()


def _prepare_scriptable(function: Any) -> None:
    """torch.jit.script compiles torch's function, where it meets nllx's."""
    function.__prepare_scriptable__ = lambda: _TORCHS[function.__name__]


for _name in _TORCHS:
    _prepare_scriptable(globals()[_name])

"""The definition of every operator in plain torch operations.

It is three things: the oracle that the kernels are tested against, their documentation, and what torch differentiates where
the kernels have no derivative (higher order, forward mode, functorch's transforms, gradients of probabilities and weights).
Slow and plain on purpose. It differs from torch where nllx documents that it does: sums in float32 or wider, 0 * (-inf) is
0, and a row that is ignored gives nothing and gets nothing, whatever it holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nllx import _C
from nllx._fake import (
    MEAN,
    MEAN_OR_ZERO,
    NONE,
    SUM,
    check_arguments,
    check_log_softmax,
    class_dim,
    holds,
    is_counted,
    is_probabilities,
    loss_dtypes,
    row_shape,
)


def _rows(
    op: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    acc: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The coefficient of each class, a_c = w_c ((1 - eps) p_c + eps / C), and for index targets which rows count.

    Also the divisor of the mean: the sum of the weights of the targets present, or the number of rows.
    """
    dim, classes = class_dim(input), input.shape[class_dim(input)]
    w = None if weight is None else weight.reshape([-1] + [1] * (input.dim() - 1 - dim)).to(acc)
    uniform = label_smoothing / (1 if holds(classes == 0) else classes)
    if op == "cross_entropy" and is_probabilities(input, target):
        a = target.to(acc) * (1 - label_smoothing) + uniform
        rows = 1
        for size in row_shape(input):
            rows = rows * size
        if holds(classes == 0):
            rows = 0  # torch divides by numel / C
        divisor = mean_divisor(torch.full([], rows, dtype=acc, device=input.device), reduction, 0.0)
        return a if w is None else a * w, None, divisor
    if weight is not None:
        check_weight_gradient(op, weight)
    target = target.reshape(row_shape(input))
    index = _checked(op, target, classes, ignore_index)
    valid = is_counted(target, ignore_index).unsqueeze(dim)
    c = torch.arange(classes, device=input.device).reshape([-1] + [1] * (input.dim() - 1 - dim))
    hit = (c == index.unsqueeze(dim)) & valid
    zero = torch.zeros([], dtype=acc, device=input.device)
    one = torch.ones([], dtype=acc, device=input.device) if w is None else w
    # Chosen, not multiplied by one-hot zeros: the weight of a class that no target names may be anything.
    present = torch.where(hit, one, zero)
    a = present * (1 - label_smoothing)
    if label_smoothing > 0:
        a = a + torch.where(valid, one * uniform, zero)
    return a, valid, mean_divisor(present.sum(), reduction, label_smoothing)


def in_onnx_export() -> bool:
    """Whether an exporter to ONNX traces, which has counterparts of torch's operators alone. Dynamo's graphs are for others."""
    return not torch.compiler.is_dynamo_compiling() and torch.onnx.is_in_onnx_export()


def _checked(op: str, target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """The classes as int64, 0 where a row is ignored. IndexError for others, but not in ONNX, which has no counterpart."""
    if in_onnx_export():
        return torch.where(is_counted(target, ignore_index), target.long(), 0)
    return torch.ops.nllx._checked_target(target, classes, ignore_index, op)


def mean_divisor(weight: Tensor, reduction: int, label_smoothing: float) -> Tensor:
    """The divisor of the mean from the sum of the weights, or the number of rows.

    Infinite instead of 0 where loss and gradient of the mean over nothing are to be 0. Otherwise NaN instead of 0 with
    smoothing: torch adds the mean of the targets' own terms, 0 / 0 where they all weigh nothing.
    """
    if reduction == MEAN_OR_ZERO:
        return torch.where(weight == 0, torch.inf, weight)
    return torch.where(weight == 0, torch.nan, weight) if label_smoothing > 0 else weight


def check_weight_gradient(op: str, weight: Tensor) -> None:
    """Raises where a transform differentiates index targets with respect to the weights, as csrc/autograd.cpp does."""
    if (weight.requires_grad and torch.is_grad_enabled()) or _C.has_tangent(weight):
        raise RuntimeError(
            f"The function '{op}' is not differentiable with respect to argument 'weight' for targets that are class "
            "indices. This input cannot have requires_grad True: call weight.detach()"
        )


def _reduce(rows: Tensor, divisor: Tensor, reduction: int) -> Tensor:
    if reduction in (NONE, SUM):
        return rows if reduction == NONE else rows.sum()
    # As one element: of numbers without a dimension vmap divides none where it has no samples, as jacfwd of nothing.
    return (rows.sum().reshape(1) / divisor).reshape([])


def _weighted(a: Tensor, log_probs: Tensor) -> Tensor:
    """a * log_probs where 0 * (-inf) is 0."""
    return a * torch.where((a == 0) & (log_probs == -torch.inf), torch.zeros_like(log_probs), log_probs)


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, maximum and log-sum of each row (zeros where ignored) and the divisor of the mean."""
    probabilities = check_arguments("cross_entropy", logits, target, weight, reduction, ignore_index, label_smoothing)
    loss_dtype, acc = loss_dtypes(logits, target, weight, probabilities, dtype)
    a, valid, total_weight = _rows(
        "cross_entropy", logits, target, weight, reduction, ignore_index, label_smoothing, acc
    )
    x = logits.to(acc)
    if valid is not None:
        x = torch.where(valid, x, torch.zeros_like(x))
    dim = class_dim(logits)
    rows = -_weighted(a, _log_softmax(x, dim)).sum(dim)
    return _reduce(rows, total_weight, reduction).to(loss_dtype), _row_stats(x, valid, dim), total_weight


def _log_softmax(x: Tensor, dim: int) -> Tensor:
    """Of torch's own the forward derivative cannot be differentiated (an exponential is changed in place, which under hooks for
    saved tensors goes unnoticed)."""
    if x.dim() == 0 or holds(x.shape[dim] == 0):
        return torch.log_softmax(x, dim)
    m = x.detach().amax(dim, keepdim=True)
    x = x - torch.where(m.isinf() & (m < 0), torch.zeros_like(m), m)
    return x - x.exp().sum(dim, keepdim=True).log()


def _row_stats(x: Tensor, valid: Tensor | None, dim: int) -> Tensor:
    """Maximum m and log of the sum of exp(x - m), last dimension 2; not differentiated."""
    x = x.detach()
    if holds(x.shape[dim] == 0):
        return x.new_zeros([*row_shape(x), 2])
    m = x.amax(dim, keepdim=True)
    m = torch.where(m == -torch.inf, torch.zeros_like(m), m)
    stats = torch.stack([m.squeeze(dim), (x - m).exp().sum(dim).log()], -1)
    return stats if valid is None else torch.where(valid.squeeze(dim).unsqueeze(-1), stats, torch.zeros_like(stats))


def cross_entropy_backward(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_stats: Tensor,
    total_weight: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Gradient of the logits: k (A softmax(x) - a), with A the sum of a over the classes and k the incoming gradient.

    Made from the logits and not from the rows' statistics, so that its derivative with respect to the logits is whole.
    """
    probabilities = check_arguments("cross_entropy", logits, target, weight, reduction, ignore_index, label_smoothing)
    _, acc = loss_dtypes(logits, target, weight, probabilities, None)
    a, valid, divisor = _rows("cross_entropy", logits, target, weight, reduction, ignore_index, label_smoothing, acc)
    x = logits.to(acc)
    if valid is not None:
        x = torch.where(valid, x, torch.zeros_like(x))
    dim = class_dim(logits)
    k = _incoming(grad_output.to(acc), divisor, logits, reduction)
    grad = k * (a.sum(dim, keepdim=True) * torch.softmax(x, dim) - a)
    if valid is not None:
        grad = torch.where(valid, grad, torch.zeros_like(grad))
    return grad.to(logits.dtype)


def _incoming(grad_output: Tensor, divisor: Tensor, input: Tensor, reduction: int) -> Tensor:
    """The incoming gradient of each row, with a dimension for the classes."""
    if reduction == NONE:
        return grad_output.reshape(row_shape(input)).unsqueeze(class_dim(input))
    return grad_output.reshape([]) if reduction == SUM else grad_output.reshape([]) / divisor


def nll_loss_forward(
    log_probs: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and the divisor of the mean."""
    check_arguments("nll_loss", log_probs, target, weight, reduction, ignore_index)
    loss_dtype, acc = loss_dtypes(log_probs, target, weight, False, dtype)
    a, valid, total_weight = _rows("nll_loss", log_probs, target, weight, reduction, ignore_index, 0.0, acc)
    # Only the target's entry is looked at; others may be anything.
    dim = class_dim(log_probs)
    index = _checked("nll_loss", target.reshape(row_shape(log_probs)), log_probs.shape[dim], ignore_index)
    if holds(log_probs.shape[dim] == 0):
        rows = a.sum(dim)
    else:
        chosen, coefficient = (t.gather(dim, index.unsqueeze(dim)) for t in (log_probs.to(acc), a))
        chosen = torch.where(valid, chosen, torch.zeros_like(chosen)) if valid is not None else chosen
        rows = -_weighted(coefficient, chosen).squeeze(dim)
    return _reduce(rows, total_weight, reduction).to(loss_dtype), total_weight


def nll_loss_backward(
    grad_output: Tensor,
    log_probs: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total_weight: Tensor,
    reduction: int,
    ignore_index: int,
) -> Tensor:
    """Gradient of the log-probabilities: -k w_y at the target, zero elsewhere."""
    check_arguments("nll_loss", log_probs, target, weight, reduction, ignore_index)
    _, acc = loss_dtypes(log_probs, target, weight, False, None)
    a, valid, divisor = _rows("nll_loss", log_probs, target, weight, reduction, ignore_index, 0.0, acc)
    grad = -_incoming(grad_output.to(acc), divisor, log_probs, reduction) * a
    # Nothing but the target's entry, if the divisor is 0 too.
    dim = class_dim(log_probs)
    classes = log_probs.shape[dim]
    index = _checked("nll_loss", target.reshape(row_shape(log_probs)), classes, ignore_index)
    each = torch.arange(classes, device=log_probs.device).view([-1] + [1] * (log_probs.dim() - 1 - dim))
    hit = each == index.unsqueeze(dim)
    return torch.where(hit if valid is None else hit & valid, grad, torch.zeros_like(grad)).to(log_probs.dtype)


def log_softmax_forward(input: Tensor, dim: int) -> Tensor:
    """log_softmax, computed in float32 or wider and rounded once."""
    check_log_softmax(input, dim)
    acc = torch.float64 if input.dtype == torch.float64 else torch.float32
    return _log_softmax(input.to(acc), dim).to(input.dtype)


def log_softmax_backward(grad_output: Tensor, output: Tensor, dim: int) -> Tensor:
    """Gradient of the input: g - exp(output) * sum(g)."""
    acc = torch.float64 if output.dtype == torch.float64 else torch.float32
    g = grad_output.to(acc)
    return (g - output.to(acc).exp() * g.sum(dim, keepdim=True)).to(output.dtype)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The loss alone."""
    return cross_entropy_forward(logits, target, weight, reduction, ignore_index, label_smoothing, dtype)[0]


def nll_loss(
    log_probs: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The loss alone."""
    return nll_loss_forward(log_probs, target, weight, reduction, ignore_index, dtype)[0]


def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Cast to `dtype`, then log_softmax."""
    return log_softmax_forward(input if dtype is None else input.to(dtype), dim)


def register(library: torch.library.Library) -> None:
    """Registers the definitions, by name, for the derivatives that the kernels do not have."""
    for definition in (
        cross_entropy_forward,
        cross_entropy_backward,
        nll_loss_forward,
        nll_loss_backward,
        log_softmax_forward,
        log_softmax_backward,
    ):
        library.impl(f"_{definition.__name__}_definition", definition, "CompositeImplicitAutograd")

    def checked_target_vmap(info, in_dims, target, classes, ignore_index, op):  # type: ignore[no-untyped-def]
        return torch.ops.nllx._checked_target(target, classes, ignore_index, op), in_dims[0]

    torch.library.register_vmap("nllx::_checked_target", checked_target_vmap, lib=library)

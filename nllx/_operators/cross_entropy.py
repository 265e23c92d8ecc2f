"""cross_entropy: definition, shapes, batching rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nllx._operators.losses import check_weight_gradient, coefficients, incoming, log_softmax, reduce, weighted
from nllx._operators.operator import Operator, whole
from nllx._operators.samples import Dims, Samples, cast, flat
from nllx._operators.shapes import (
    MEAN,
    NONE,
    check_arguments,
    check_devices,
    class_dim,
    differ,
    holds,
    loss_dtypes,
    row_shape,
)


def forward(
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
    a, valid, total_weight = coefficients(
        "cross_entropy", logits, target, weight, reduction, ignore_index, label_smoothing, acc
    )
    x = logits.to(acc)
    if valid is not None:
        x = torch.where(valid, x, torch.zeros_like(x))
    dim = class_dim(logits)
    rows = -weighted(a, log_softmax(x, dim)).sum(dim)
    return reduce(rows, total_weight, reduction).to(loss_dtype), _row_stats(x, valid, dim), total_weight


def _row_stats(x: Tensor, valid: Tensor | None, dim: int) -> Tensor:
    """Maximum m and log of the sum of exp(x - m), last dimension 2; not differentiated."""
    x = x.detach()
    if holds(x.shape[dim] == 0):
        return x.new_zeros([*row_shape(x), 2])
    m = x.amax(dim, keepdim=True)
    m = torch.where(m == -torch.inf, torch.zeros_like(m), m)
    stats = torch.stack([m.squeeze(dim), (x - m).exp().sum(dim).log()], -1)
    return stats if valid is None else torch.where(valid.squeeze(dim).unsqueeze(-1), stats, torch.zeros_like(stats))


def backward(
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
    a, valid, divisor = coefficients(
        "cross_entropy", logits, target, weight, reduction, ignore_index, label_smoothing, acc
    )
    x = logits.to(acc)
    if valid is not None:
        x = torch.where(valid, x, torch.zeros_like(x))
    dim = class_dim(logits)
    k = incoming(grad_output.to(acc), divisor, logits, reduction)
    grad = k * (a.sum(dim, keepdim=True) * torch.softmax(x, dim) - a)
    if valid is not None:
        grad = torch.where(valid, grad, torch.zeros_like(grad))
    return grad.to(logits.dtype)


def forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    logits, target, weight, reduction, ignore_index, label_smoothing, dtype = arguments
    probabilities = check_arguments("cross_entropy", logits, target, weight, reduction, ignore_index, label_smoothing)
    loss, acc = loss_dtypes(logits, target, weight, probabilities, dtype)
    rows = row_shape(logits)
    return (
        logits.new_empty(rows if reduction == 0 else [], dtype=loss),
        logits.new_empty([*rows, 2], dtype=acc),
        logits.new_empty([], dtype=acc),
    )


def backward_fake(*arguments: Any) -> Tensor:
    grad_output, logits, target, weight, row_stats, total_weight, reduction, ignore_index, label_smoothing = arguments
    check_arguments("cross_entropy", logits, target, weight, reduction, ignore_index, label_smoothing)
    check_devices("cross_entropy", logits, grad_output=grad_output, row_stats=row_stats, total_weight=total_weight)
    return torch.empty_like(logits)


def value_and_grad_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    logits, reduction = arguments[0], arguments[3]
    loss = forward_fake(*arguments)[0]
    if reduction == NONE:
        raise ValueError("cross_entropy: reduction 'none' gives one loss per row, which has no gradient")
    return loss, torch.empty_like(logits)


def value_and_grad_out_fake(*arguments: Any) -> Tensor:
    logits, out = arguments[0], arguments[-1]
    loss, grad = value_and_grad_fake(*arguments[:-1])
    torch._check(
        not differ(out.shape, grad.shape) and out.dtype == grad.dtype and out.device == grad.device,
        lambda: (
            f"cross_entropy: out must have shape {list(logits.shape)} and dtype {logits.dtype} on {logits.device}, as logits "
            f"has, but got {list(out.shape)} and {out.dtype} on {out.device}"
        ),
    )
    return loss


def forward_batched(size: int, dims: Dims, *arguments: Any) -> tuple[tuple[Tensor, ...], Any] | None:
    logits, target, weight, reduction, ignore_index, label_smoothing, dtype = arguments
    if dims[2] is not None:
        return None
    samples = Samples(logits, dims[0], size)
    probabilities = (target.dim() - (dims[1] is not None)) == (logits.dim() - (dims[0] is not None)) and (
        target.is_floating_point()
    )
    joined = (samples.join_classes if probabilities else samples.join_rows)(target, dims[1])
    loss_dtype, acc = loss_dtypes(logits, target, weight, probabilities, dtype)
    rows, row_stats, _ = torch.ops.nllx.cross_entropy_forward(
        samples.logits,
        joined,
        flat(weight),
        NONE,
        ignore_index,
        label_smoothing,
        loss_dtype if reduction == NONE else acc,
    )
    divisors = samples.divisors(
        "cross_entropy",
        joined,
        weight,
        samples.logits.shape[1],
        reduction,
        ignore_index,
        label_smoothing,
        probabilities,
        acc,
    )
    loss = cast(samples.reduce(rows, divisors, reduction), loss_dtype)
    return (loss, samples.split(row_stats, trailing=1), divisors), 0


def backward_batched(size: int, dims: Dims, *arguments: Any) -> tuple[Tensor, Any] | None:
    grad_output, logits, target, weight, row_stats, total_weight, reduction, ignore_index, label_smoothing = arguments
    if dims[3] is not None:
        return None
    samples = Samples(logits, dims[1], size)
    probabilities = (target.dim() - (dims[2] is not None)) == (logits.dim() - (dims[1] is not None)) and (
        target.is_floating_point()
    )
    grad = torch.ops.nllx.cross_entropy_backward(
        samples.incoming(grad_output, dims[0], total_weight, dims[5], reduction),
        samples.logits,
        (samples.join_classes if probabilities else samples.join_rows)(target, dims[2]),
        flat(weight),
        samples.join_rows(row_stats, dims[4], 2),
        total_weight.new_ones([]),
        NONE,
        ignore_index,
        label_smoothing,
    )
    return samples.split(grad), 0


def check(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    *_: Any,
) -> None:
    """Of a sample's shape, which the joined problem has no more."""
    check_arguments("cross_entropy", logits, target, weight, reduction, ignore_index, label_smoothing)


def refuse(logits: Tensor, target: Tensor, weight: Tensor | None, *_: Any) -> None:
    """Index targets have no gradient of the weights."""
    if weight is not None and not target.is_floating_point():
        check_weight_gradient("cross_entropy", weight)


OPERATORS = (
    Operator("cross_entropy_forward", forward, forward_fake, forward_batched, check, refuse),
    Operator("cross_entropy_backward", backward, backward_fake, backward_batched),
)


def register_value_and_grad() -> None:
    """They have no derivative and, under transforms, no kernel (csrc/operators/cross_entropy.cpp)."""
    for fake, suffix in ((value_and_grad_fake, ""), (value_and_grad_out_fake, "_out")):
        name = f"cross_entropy_value_and_grad{suffix}"
        torch.library.register_fake(f"nllx::{name}", whole(name, fake))

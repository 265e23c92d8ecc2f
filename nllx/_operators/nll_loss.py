"""nll_loss: definition, shapes, batching rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nllx._operators.losses import check_weight_gradient, checked_target, coefficients, incoming, reduce, weighted
from nllx._operators.operator import Operator
from nllx._operators.samples import Dims, Samples, cast, flat
from nllx._operators.shapes import (
    MEAN,
    NONE,
    check_arguments,
    check_devices,
    class_dim,
    holds,
    loss_dtypes,
    row_shape,
)


def forward(
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
    a, valid, total_weight = coefficients("nll_loss", log_probs, target, weight, reduction, ignore_index, 0.0, acc)
    # Only the target's entry is looked at; others may be anything.
    dim = class_dim(log_probs)
    index = checked_target("nll_loss", target.reshape(row_shape(log_probs)), log_probs.shape[dim], ignore_index)
    if holds(log_probs.shape[dim] == 0):
        rows = a.sum(dim)
    else:
        chosen, coefficient = (t.gather(dim, index.unsqueeze(dim)) for t in (log_probs.to(acc), a))
        chosen = torch.where(valid, chosen, torch.zeros_like(chosen)) if valid is not None else chosen
        rows = -weighted(coefficient, chosen).squeeze(dim)
    return reduce(rows, total_weight, reduction).to(loss_dtype), total_weight


def backward(
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
    a, valid, divisor = coefficients("nll_loss", log_probs, target, weight, reduction, ignore_index, 0.0, acc)
    grad = -incoming(grad_output.to(acc), divisor, log_probs, reduction) * a
    # Nothing but the target's entry, if the divisor is 0 too.
    dim = class_dim(log_probs)
    classes = log_probs.shape[dim]
    index = checked_target("nll_loss", target.reshape(row_shape(log_probs)), classes, ignore_index)
    each = torch.arange(classes, device=log_probs.device).view([-1] + [1] * (log_probs.dim() - 1 - dim))
    hit = each == index.unsqueeze(dim)
    return torch.where(hit if valid is None else hit & valid, grad, torch.zeros_like(grad)).to(log_probs.dtype)


def forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    log_probs, target, weight, reduction, ignore_index, dtype = arguments
    check_arguments("nll_loss", log_probs, target, weight, reduction, ignore_index)
    loss, acc = loss_dtypes(log_probs, target, weight, False, dtype)
    return log_probs.new_empty(row_shape(log_probs) if reduction == 0 else [], dtype=loss), log_probs.new_empty(
        [], dtype=acc
    )


def backward_fake(*arguments: Any) -> Tensor:
    grad_output, log_probs, target, weight, total_weight, reduction, ignore_index = arguments
    check_arguments("nll_loss", log_probs, target, weight, reduction, ignore_index)
    check_devices("nll_loss", log_probs, grad_output=grad_output, total_weight=total_weight)
    return torch.empty_like(log_probs)


def forward_batched(size: int, dims: Dims, *arguments: Any) -> tuple[tuple[Tensor, ...], Any] | None:
    log_probs, target, weight, reduction, ignore_index, dtype = arguments
    if dims[2] is not None:
        return None
    samples = Samples(log_probs, dims[0], size)
    joined = samples.join_rows(target, dims[1])
    loss_dtype, acc = loss_dtypes(log_probs, target, weight, False, dtype)
    rows, _ = torch.ops.nllx.nll_loss_forward(
        samples.logits, joined, flat(weight), NONE, ignore_index, loss_dtype if reduction == NONE else acc
    )
    divisors = samples.divisors(
        "nll_loss", joined, weight, samples.logits.shape[1], reduction, ignore_index, 0.0, False, acc
    )
    return (cast(samples.reduce(rows, divisors, reduction), loss_dtype), divisors), 0


def backward_batched(size: int, dims: Dims, *arguments: Any) -> tuple[Tensor, Any] | None:
    grad_output, log_probs, target, weight, total_weight, reduction, ignore_index = arguments
    if dims[3] is not None:
        return None
    samples = Samples(log_probs, dims[1], size)
    grad = torch.ops.nllx.nll_loss_backward(
        samples.incoming(grad_output, dims[0], total_weight, dims[4], reduction),
        samples.logits,
        samples.join_rows(target, dims[2]),
        flat(weight),
        total_weight.new_ones([]),
        NONE,
        ignore_index,
    )
    return samples.split(grad), 0


def check(log_probs: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, *_: Any) -> None:
    """Of a sample's shape, which the joined problem has no more."""
    check_arguments("nll_loss", log_probs, target, weight, reduction, ignore_index)


def refuse(log_probs: Tensor, target: Tensor, weight: Tensor | None, *_: Any) -> None:
    """There is no gradient of the weights."""
    if weight is not None:
        check_weight_gradient("nll_loss", weight)


OPERATORS = (
    Operator("nll_loss_forward", forward, forward_fake, forward_batched, check, refuse),
    Operator("nll_loss_backward", backward, backward_fake, backward_batched),
)

"""cross_entropy: definition, shapes, batching rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nllx._operators.losses import check_weight_gradient, coefficients, incoming, log_softmax, reduce, weighted
from nllx._operators.operator import Operator, whole
from nllx._operators.options import (
    LogitMap,
    check_divisor,
    check_options,
    empty_gradients,
    given_divisor,
    log_sum_exp,
    of_rows,
    to_shape_of_scale,
)
from nllx._operators.samples import Dims, Samples, cast, flat, leading
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

_OP = "cross_entropy"


def _check(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    logit_scale: Tensor | None,
    temperature: Tensor | None,
    divisor: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    scale: float,
    sharpness: float,
    softcap: float,
    z_loss: float,
) -> bool:
    """Whether the target holds class probabilities."""
    probabilities = check_arguments(_OP, logits, target, weight, reduction, ignore_index, label_smoothing)
    check_options(
        _OP, logits, row_shape(logits), sample_weight, logit_scale, temperature, scale, sharpness, softcap, z_loss
    )
    check_divisor(_OP, logits, divisor, reduction)
    return probabilities


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    logit_scale: Tensor | None = None,
    temperature: Tensor | None = None,
    divisor: Tensor | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    sharpness: float = 1.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, maximum and log-sum of each row (zeros where ignored) and the divisor of the mean."""
    probabilities = _check(
        logits,
        target,
        weight,
        sample_weight,
        logit_scale,
        temperature,
        divisor,
        reduction,
        ignore_index,
        label_smoothing,
        scale,
        sharpness,
        softcap,
        z_loss,
    )
    loss_dtype, acc = loss_dtypes(logits, target, weight, probabilities, dtype)
    sample_weight = None if sample_weight is None else sample_weight.to(acc)  # once: two gradients of it may cancel
    a, valid, total_weight = coefficients(
        _OP, logits, target, weight, reduction, ignore_index, label_smoothing, acc, sample_weight
    )
    if divisor is not None:
        total_weight = given_divisor(divisor, reduction, acc)
    x = logits.to(acc)
    if valid is not None:
        x = torch.where(valid, x, torch.zeros_like(x))
    dim = class_dim(logits)
    z = LogitMap(dim, valid, acc, logit_scale, temperature, scale, sharpness, softcap)(x)
    rows = -weighted(a, log_softmax(z, dim)).sum(dim)
    if z_loss != 0:
        rows = rows + z_loss * log_sum_exp(z, dim).square()
    if sample_weight is not None:
        rows = rows * of_rows(sample_weight, dim, valid, acc, 0).squeeze(dim)
    if valid is not None and (z_loss != 0 or sample_weight is not None):
        rows = torch.where(valid.squeeze(dim), rows, torch.zeros_like(rows))
    return reduce(rows, total_weight, reduction).to(loss_dtype), _row_stats(z, valid, dim), total_weight


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
    sample_weight: Tensor | None,
    logit_scale: Tensor | None,
    temperature: Tensor | None,
    divisor: Tensor | None,
    row_stats: Tensor,
    total_weight: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    scale: float,
    sharpness: float,
    softcap: float,
    z_loss: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the logits and of logit_scale. That of z: k (A softmax(z) - a), with k the incoming gradient and A the sum
    of a over the classes, and what the z-loss adds to it.

    Made from the logits and the weights, and not from the rows' statistics and the divisor, so that its derivatives are whole.
    """
    probabilities = _check(
        logits,
        target,
        weight,
        sample_weight,
        logit_scale,
        temperature,
        divisor,
        reduction,
        ignore_index,
        label_smoothing,
        scale,
        sharpness,
        softcap,
        z_loss,
    )
    _, acc = loss_dtypes(logits, target, weight, probabilities, None)
    sample_weight = None if sample_weight is None else sample_weight.to(acc)
    a, valid, divides = coefficients(
        _OP, logits, target, weight, reduction, ignore_index, label_smoothing, acc, sample_weight
    )
    if divisor is not None:
        divides = given_divisor(divisor, reduction, acc)
    x = logits.to(acc)
    if valid is not None:
        x = torch.where(valid, x, torch.zeros_like(x))
    dim = class_dim(logits)
    logit_map = LogitMap(dim, valid, acc, logit_scale, temperature, scale, sharpness, softcap)
    z = logit_map(x)
    k = incoming(grad_output.to(acc), divides, logits, reduction)
    if sample_weight is not None:
        k = k * of_rows(sample_weight, dim, valid, acc, 0)
    mass = a.sum(dim, keepdim=True)
    if z_loss != 0:
        mass = mass + 2 * z_loss * log_sum_exp(z, dim).unsqueeze(dim)
    grad = k * (mass * torch.softmax(z, dim) - a)
    if valid is not None:
        grad = torch.where(valid, grad, torch.zeros_like(grad))
    grad, by_scale = logit_map.derivatives(grad, x)
    return (
        grad.to(logits.dtype) if output_mask[0] else None,
        to_shape_of_scale(by_scale, logit_scale, dim) if output_mask[1] and logit_scale is not None else None,
    )


def forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *checked, dtype = arguments
    logits, target, weight, reduction = *arguments[:3], arguments[7]
    loss, acc = loss_dtypes(logits, target, weight, _check(*checked), dtype)
    rows = row_shape(logits)
    return (
        logits.new_empty(rows if reduction == NONE else [], dtype=loss),
        logits.new_empty([*rows, 2], dtype=acc),
        logits.new_empty([], dtype=acc),
    )


def backward_fake(*arguments: Any) -> tuple[Tensor | None, Tensor | None]:
    grad_output, *tensors, row_stats, total_weight = arguments[:10]
    options, output_mask = arguments[10:-1], arguments[-1]
    logits, logit_scale = tensors[0], tensors[4]
    _check(*tensors, *options)
    check_devices(_OP, logits, grad_output=grad_output, row_stats=row_stats, total_weight=total_weight)
    return empty_gradients(logits, logit_scale, output_mask)


def value_and_grad_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    logits, reduction = arguments[0], arguments[7]
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


def _is_probabilities(target: Tensor, target_dim: int | None, logits: Tensor, logits_dim: int | None) -> bool:
    """Of the shapes of a sample."""
    ranks = target.dim() - (target_dim is not None), logits.dim() - (logits_dim is not None)
    return ranks[0] == ranks[1] and target.is_floating_point()


def _joined_options(samples: Samples, options: Sequence[Tensor | None], dims: Dims) -> list[Tensor | None]:
    """sample_weight, logit_scale and temperature as one number for each row of the joined problem."""
    joined: list[Tensor | None] = []
    for option, dim in zip(options, dims, strict=True):
        if option is None:
            joined.append(None)
        elif option.dim() == (dim is not None) and not samples.unbatched:
            joined.append(samples.each(option, dim))
        else:
            joined.append(samples.join_rows(option, dim))
    return joined


def forward_batched(size: int, dims: Dims, *arguments: Any) -> tuple[tuple[Tensor, ...], Any] | None:
    logits, target, weight, *row_options, divisor = arguments[:7]
    reduction, ignore_index, label_smoothing, *numbers, dtype = arguments[7:]
    if dims[2] is not None:
        return None
    samples = Samples(logits, dims[0], size)
    probabilities = _is_probabilities(target, dims[1], logits, dims[0])
    joined = (samples.join_classes if probabilities else samples.join_rows)(target, dims[1])
    loss_dtype, acc = loss_dtypes(logits, target, weight, probabilities, dtype)
    options = _joined_options(samples, row_options, dims[3:6])
    rows, row_stats, _ = torch.ops.nllx.cross_entropy_forward(
        samples.logits,
        joined,
        flat(weight),
        *options,
        None,
        NONE,
        ignore_index,
        label_smoothing,
        *numbers,
        loss_dtype if reduction == NONE else acc,
    )
    if divisor is not None:
        divisors = given_divisor(leading(divisor, dims[6], size), reduction, acc)
    else:
        divisors = samples.divisors(
            _OP,
            joined,
            weight,
            samples.logits.shape[1],
            reduction,
            ignore_index,
            label_smoothing,
            probabilities,
            acc,
            options[0],
        )
    loss = cast(samples.reduce(rows, divisors, reduction), loss_dtype)
    return (loss, samples.split(row_stats, trailing=1), divisors), 0


def backward_batched(size: int, dims: Dims, *arguments: Any) -> tuple[tuple[Tensor | None, ...], Any] | None:
    grad_output, logits, target, weight, *row_options, _, row_stats, total_weight = arguments[:10]
    reduction, ignore_index, label_smoothing, *numbers, output_mask = arguments[10:]
    if dims[3] is not None:
        return None
    samples = Samples(logits, dims[1], size)
    probabilities = _is_probabilities(target, dims[2], logits, dims[1])
    grad, by_scale = torch.ops.nllx.cross_entropy_backward(
        samples.incoming(grad_output, dims[0], total_weight, dims[9], reduction),
        samples.logits,
        (samples.join_classes if probabilities else samples.join_rows)(target, dims[2]),
        flat(weight),
        *_joined_options(samples, row_options, dims[4:7]),
        None,
        samples.join_rows(row_stats, dims[8], 2),
        total_weight.new_ones([]),
        NONE,
        ignore_index,
        label_smoothing,
        *numbers,
        output_mask,
    )
    of_logits = samples.split(grad) if output_mask[0] else None
    if not output_mask[1] or row_options[1] is None:
        return (of_logits, None), 0
    one_in_all = row_options[1].dim() == (dims[5] is not None) and not samples.unbatched
    return (of_logits, samples.sum(by_scale) if one_in_all else samples.split(by_scale)), 0


def check(*arguments: Any) -> None:
    """Of a sample's shape, which the joined problem has no more."""
    _check(*arguments[:14])


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

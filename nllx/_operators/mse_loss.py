"""mse_loss: definition, shapes, batching rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nllx._operators.operator import Operator
from nllx._operators.samples import Dims, cast, leading
from nllx._operators.shapes import MEAN, NONE, SUM, check_devices, check_dtype, differ, dtype_name


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _divisor(input: Tensor, weight: Tensor | None) -> Tensor:
    """The number of elements, or the sum of their weights."""
    acc = _acc(input.dtype)
    return torch.full([], input.numel(), dtype=acc, device=input.device) if weight is None else weight.to(acc).sum()


def forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = MEAN,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss, w (x - t)^2 of each element or their sum or mean, and the divisor of the mean."""
    check(input, target, weight, reduction)
    acc = _acc(input.dtype)
    losses = (input.to(acc) - target.to(acc)).square()
    losses = losses if weight is None else losses * weight.to(acc)
    divisor = _divisor(input, weight)
    if reduction != NONE:
        losses = losses.sum()
    # As one element: of numbers without a dimension vmap divides none where it has no samples.
    loss = (losses.reshape(1) / divisor).reshape([]) if reduction == MEAN else losses
    return loss.to(dtype or input.dtype), divisor


def backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total_weight: Tensor,
    reduction: int,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients: 2 k w (x - t) of the input, and its negative of the target, with k the incoming gradient.

    Made from the weights and not from the divisor, so that its derivative with respect to them is whole.
    """
    check(input, target, weight, reduction)
    acc = _acc(input.dtype)
    k = grad_output.to(acc)
    if reduction == MEAN:
        k = k / _divisor(input, weight)
    k = 2 * k if weight is None else 2 * k * weight.to(acc)
    grad = k * (input.to(acc) - target.to(acc))
    return (
        grad.to(input.dtype) if output_mask[0] else None,
        (-grad).to(target.dtype) if output_mask[1] else None,
    )


def check(input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, *_: Any) -> None:
    """Raises what the kernels raise for shapes, dtypes, options and devices that do not fit (csrc/elementwise.cpp)."""
    check_dtype("mse_loss", input.dtype)
    acc = _acc(input.dtype)
    for name, tensor, taken in (("target", target, [input.dtype]), ("weight", weight, [input.dtype, acc])):
        if tensor is None:
            continue
        torch._check(
            not differ(tensor.shape, input.shape),
            lambda name=name, tensor=tensor: (
                f"mse_loss: {name} must have the shape of input, {list(input.shape)}, but got {list(tensor.shape)}"
            ),
        )
        torch._check(
            tensor.dtype in taken,
            lambda name=name, tensor=tensor, taken=taken: (
                f"mse_loss: expected scalar type {dtype_name(input.dtype)} but found {dtype_name(tensor.dtype)} for {name}; it "
                f"takes the dtype of input{' or float32' if torch.float32 in taken[1:] else ''}"
            ),
        )
    check_devices("mse_loss", input, target=target, weight=weight)
    if reduction not in (NONE, MEAN, SUM):
        raise ValueError(f"mse_loss: {reduction} is not a valid value for reduction")


def forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    input, target, weight, reduction, dtype = arguments
    check(input, target, weight, reduction)
    if reduction == NONE:
        loss = torch.ops.aten.mse_loss(input, target, NONE).to(dtype or input.dtype)
    else:
        loss = input.new_empty([], dtype=dtype or input.dtype)
    return loss, input.new_empty([], dtype=_acc(input.dtype))


def backward_fake(*arguments: Any) -> tuple[Tensor | None, Tensor | None]:
    grad_output, input, target, weight, total_weight, reduction, output_mask = arguments
    check(input, target, weight, reduction)
    check_devices("mse_loss", input, grad_output=grad_output, total_weight=total_weight)
    return (
        torch.empty_like(input) if output_mask[0] else None,
        torch.empty_like(target) if output_mask[1] else None,
    )


def _of_samples(t: Tensor) -> Tensor:
    """The sums over each sample."""
    return t.flatten(1).sum(1) if t.dim() > 1 else t


def _first(weights: list[Tensor]) -> Tensor | None:
    return weights[0] if weights else None


def _all_leading(size: int, dims: Dims, tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
    return [leading(t, dim, size) for t, dim in zip(tensors, dims, strict=False) if t is not None]


def forward_batched(size: int, dims: Dims, *arguments: Any) -> tuple[tuple[Tensor, ...], Any]:
    """The elements of all samples at once, and then the sums of each."""
    *tensors, reduction, dtype = arguments
    input, target, *weights = _all_leading(size, dims, tuple(tensors))
    acc, dtype = _acc(input.dtype), dtype or input.dtype
    of_elements = dtype if reduction == NONE else acc
    losses, _ = torch.ops.nllx.mse_loss_forward(input, target, _first(weights), NONE, of_elements)
    if weights:
        divisors = _of_samples(weights[0].to(acc))
    else:
        elements = input[0].numel() if size else 0
        divisors = torch.full([size], elements, dtype=acc, device=input.device)
    if reduction != NONE:
        losses = _of_samples(losses)
    return (cast(losses / divisors if reduction == MEAN else losses, dtype), divisors), 0


def backward_batched(size: int, dims: Dims, *arguments: Any) -> tuple[tuple[Tensor | None, ...], Any]:
    grad_output, input, target, weight, total_weight, reduction, output_mask = arguments
    k = leading(grad_output, dims[0], size)
    input, target, *weights = _all_leading(size, dims[1:], (input, target, weight))
    if reduction != NONE:
        if reduction == MEAN:
            k = cast(k, total_weight.dtype) / leading(total_weight, dims[4], size)
        k = k.reshape([size] + [1] * (input.dim() - 1)).expand(input.shape)
    one = total_weight.new_ones([])
    return torch.ops.nllx.mse_loss_backward(k, input, target, _first(weights), one, NONE, output_mask), 0


OPERATORS = (
    Operator("mse_loss_forward", forward, forward_fake, forward_batched, check),
    Operator("mse_loss_backward", backward, backward_fake, backward_batched),
)

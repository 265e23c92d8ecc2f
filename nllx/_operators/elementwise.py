"""What the losses of one element at a time share: checks, shapes, divisors, batching rules.

Their forward takes (input, target, weight, reduction, *options, dtype) and gives (loss, total_weight); their backward takes
(grad_output, input, target, weight, total_weight, reduction, *options, output_mask).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nllx._operators.samples import Dims, cast, leading
from nllx._operators.shapes import MEAN, NONE, SUM, check_devices, check_dtype, differ, dtype_name


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def divisor(input: Tensor, weight: Tensor | None) -> Tensor:
    """Of the mean: the number of elements, or the sum of their weights."""
    acc = acc_dtype(input.dtype)
    return torch.full([], input.numel(), dtype=acc, device=input.device) if weight is None else weight.to(acc).sum()


def reduce(losses: Tensor, total_weight: Tensor, reduction: int) -> Tensor:
    if reduction in (NONE, SUM):
        return losses if reduction == NONE else losses.sum()
    # As one element: of numbers without a dimension vmap divides none where it has no samples.
    return (losses.sum().reshape(1) / total_weight).reshape([])


def check(op: str, input: Tensor, target: Tensor, weight: Tensor | None, reduction: int) -> None:
    """Raises what the kernels raise for shapes, dtypes, options and devices that do not fit (csrc/elementwise.cpp)."""
    check_dtype(op, input.dtype)
    acc = acc_dtype(input.dtype)
    for name, tensor, taken in (("target", target, [input.dtype]), ("weight", weight, [input.dtype, acc])):
        if tensor is None:
            continue
        torch._check(
            not differ(tensor.shape, input.shape),
            lambda name=name, tensor=tensor: (
                f"{op}: {name} must have the shape of input, {list(input.shape)}, but got {list(tensor.shape)}"
            ),
        )
        torch._check(
            tensor.dtype in taken,
            lambda name=name, tensor=tensor, taken=taken: (
                f"{op}: expected scalar type {dtype_name(input.dtype)} but found {dtype_name(tensor.dtype)} for {name}; it "
                f"takes the dtype of input{' or float32' if torch.float32 in taken[1:] else ''}"
            ),
        )
    check_devices(op, input, target=target, weight=weight)
    if reduction not in (NONE, MEAN, SUM):
        raise ValueError(f"{op}: {reduction} is not a valid value for reduction")


def empty_loss(input: Tensor, target: Tensor, reduction: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Loss and divisor without data."""
    dtype = dtype or input.dtype
    if reduction == NONE:  # one for each element, in the strides that torch gives any operation on the two
        loss = torch.ops.aten.mse_loss(input, target, NONE).to(dtype)
    else:
        loss = input.new_empty([], dtype=dtype)
    return loss, input.new_empty([], dtype=acc_dtype(input.dtype))


def empty_gradients(input: Tensor, target: Tensor, output_mask: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    return (
        torch.empty_like(input) if output_mask[0] else None,
        torch.empty_like(target) if output_mask[1] else None,
    )


def _of_samples(t: Tensor) -> Tensor:
    """The sums over each sample."""
    return t.flatten(1).sum(1) if t.dim() > 1 else t


def _all_leading(size: int, dims: Dims, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else leading(t, dim, size) for t, dim in zip(tensors, dims, strict=False)]


def batched_forward(operator: Callable[..., Any], size: int, dims: Dims, arguments: Sequence[Any]) -> Any:
    """The elements of all samples at once, and then the sums of each."""
    *tensors, reduction = arguments[:4]
    *options, dtype = arguments[4:]
    input, target, weight = _all_leading(size, dims, tensors)
    assert input is not None
    acc, dtype = acc_dtype(input.dtype), dtype or input.dtype
    losses, _ = operator(input, target, weight, NONE, *options, dtype if reduction == NONE else acc)
    if weight is not None:
        divisors = _of_samples(weight.to(acc))
    else:
        divisors = torch.full([size], input[0].numel() if size else 0, dtype=acc, device=input.device)
    if reduction != NONE:
        losses = _of_samples(losses)
    return (cast(losses / divisors if reduction == MEAN else losses, dtype), divisors), 0


def batched_backward(operator: Callable[..., Any], size: int, dims: Dims, arguments: Sequence[Any]) -> Any:
    grad_output, *tensors, total_weight, reduction = arguments[:6]
    k = leading(grad_output, dims[0], size)
    input, target, weight = _all_leading(size, dims[1:], tensors)
    assert input is not None
    if reduction != NONE:
        if reduction == MEAN:
            k = cast(k, total_weight.dtype) / leading(total_weight, dims[4], size)
        k = k.reshape([size] + [1] * (input.dim() - 1)).expand(input.shape)
    return operator(k, input, target, weight, total_weight.new_ones([]), NONE, *arguments[6:]), 0

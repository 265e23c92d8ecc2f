"""mse_loss: definition, shapes, batching rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nllx._operators import elementwise
from nllx._operators.operator import Operator
from nllx._operators.samples import Dims
from nllx._operators.shapes import MEAN, check_devices


def forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = MEAN,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss, w (x - t)^2 of each element or their sum or mean, and the divisor of the mean."""
    elementwise.check("mse_loss", input, target, weight, reduction)
    acc = elementwise.acc_dtype(input.dtype)
    losses = (input.to(acc) - target.to(acc)).square()
    losses = losses if weight is None else losses * weight.to(acc)
    divisor = elementwise.divisor(input, weight)
    return elementwise.reduce(losses, divisor, reduction).to(dtype or input.dtype), divisor


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
    elementwise.check("mse_loss", input, target, weight, reduction)
    acc = elementwise.acc_dtype(input.dtype)
    k = 2 * grad_output.to(acc)
    if reduction == MEAN:
        k = k / elementwise.divisor(input, weight)
    k = k if weight is None else k * weight.to(acc)
    grad = k * (input.to(acc) - target.to(acc))
    return (
        grad.to(input.dtype) if output_mask[0] else None,
        (-grad).to(target.dtype) if output_mask[1] else None,
    )


def check(input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, *_: Any) -> None:
    elementwise.check("mse_loss", input, target, weight, reduction)


def forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    input, target, weight, reduction, dtype = arguments
    check(input, target, weight, reduction)
    return elementwise.empty_loss(input, target, reduction, dtype)


def backward_fake(*arguments: Any) -> tuple[Tensor | None, Tensor | None]:
    grad_output, input, target, weight, total_weight, reduction, output_mask = arguments
    check(input, target, weight, reduction)
    check_devices("mse_loss", input, grad_output=grad_output, total_weight=total_weight)
    return elementwise.empty_gradients(input, target, output_mask)


def forward_batched(size: int, dims: Dims, *arguments: Any) -> Any:
    return elementwise.batched_forward(torch.ops.nllx.mse_loss_forward, size, dims, arguments)


def backward_batched(size: int, dims: Dims, *arguments: Any) -> Any:
    return elementwise.batched_backward(torch.ops.nllx.mse_loss_backward, size, dims, arguments)


OPERATORS = (
    Operator("mse_loss_forward", forward, forward_fake, forward_batched, check),
    Operator("mse_loss_backward", backward, backward_fake, backward_batched),
)

"""log_softmax: definition, shapes, batching rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nllx._operators.losses import log_softmax
from nllx._operators.operator import Operator
from nllx._operators.samples import Dims, leading
from nllx._operators.shapes import check_devices, check_dtype


def forward(input: Tensor, dim: int) -> Tensor:
    """log_softmax, computed in float32 or wider and rounded once."""
    check(input, dim)
    acc = torch.float64 if input.dtype == torch.float64 else torch.float32
    return log_softmax(input.to(acc), dim).to(input.dtype)


def backward(grad_output: Tensor, output: Tensor, dim: int) -> Tensor:
    """Gradient of the input: g - exp(output) * sum(g)."""
    acc = torch.float64 if output.dtype == torch.float64 else torch.float32
    g = grad_output.to(acc)
    return (g - output.to(acc).exp() * g.sum(dim, keepdim=True)).to(output.dtype)


def check(input: Tensor, dim: int) -> None:
    """Raises what the kernels raise for a dtype or a dimension that does not fit."""
    check_dtype("log_softmax", input.dtype)
    limit = max(input.dim(), 1)
    if not -limit <= dim < limit:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-limit}, {limit - 1}], but got {dim})")


def forward_fake(input: Tensor, dim: int) -> Tensor:
    check(input, dim)
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def backward_fake(*arguments: Any) -> Tensor:
    grad_output, output, _ = arguments
    check_devices("log_softmax", output, grad_output=grad_output)
    return torch.empty_like(output)


def _sample_dim(dim: int, rank: int, batch_dim: int) -> int:
    """A sample's dimension `dim` among those of all samples."""
    dim = dim % rank
    return dim + (dim >= batch_dim)


def forward_batched(size: int, dims: Dims, *arguments: Any) -> tuple[Tensor, Any] | None:
    input, dim = arguments
    if dims[0] is None or input.dim() == 1:
        return None
    return torch.ops.nllx.log_softmax_forward(input, _sample_dim(dim, input.dim() - 1, dims[0])), dims[0]


def backward_batched(size: int, dims: Dims, *arguments: Any) -> tuple[Tensor, Any] | None:
    grad_output, output, dim = arguments
    batch_dim = dims[1] if dims[1] is not None else 0
    output = output if dims[1] is not None else output.expand(size, *output.shape)
    grad_output = leading(grad_output, dims[0], size).movedim(0, batch_dim)
    if output.dim() == 1:
        return None
    return torch.ops.nllx.log_softmax_backward(
        grad_output, output, _sample_dim(dim, output.dim() - 1, batch_dim)
    ), batch_dim


OPERATORS = (
    Operator("log_softmax_forward", forward, forward_fake, forward_batched, check),
    Operator("log_softmax_backward", backward, backward_fake, backward_batched),
)

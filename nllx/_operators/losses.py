"""What the definitions of the losses of classes share, in plain torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from nllx import _C
from nllx._operators.shapes import MEAN_OR_ZERO, NONE, SUM, class_dim, holds, is_counted, is_probabilities, row_shape


def coefficients(
    op: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    acc: torch.dtype,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The coefficient of each class, a_c = w_c ((1 - eps) p_c + eps / C), and for index targets which rows count.

    Also the divisor of the mean: the sum of the weights of the targets present, or the number of rows; with weights of the rows
    each times that.
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
        divisor = torch.full([], rows, dtype=acc, device=input.device)
        if sample_weight is not None and not holds(classes == 0):
            divisor = sample_weight.to(acc).sum()
        divisor = mean_divisor(divisor, reduction, 0.0)
        return a if w is None else a * w, None, divisor
    if weight is not None:
        check_weight_gradient(op, weight)
    target = target.reshape(row_shape(input))
    index = checked_target(op, target, classes, ignore_index)
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
    if sample_weight is not None:
        present = present.sum(dim) * torch.where(valid.squeeze(dim), sample_weight.to(acc), zero)
    return a, valid, mean_divisor(present.sum(), reduction, label_smoothing)


def in_onnx_export() -> bool:
    """Whether an exporter to ONNX traces, which has counterparts of torch's operators alone. Dynamo's graphs are for others."""
    return not torch.compiler.is_dynamo_compiling() and torch.onnx.is_in_onnx_export()


def checked_target(op: str, target: Tensor, classes: int, ignore_index: int) -> Tensor:
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
    """Raises where index targets are differentiated with respect to the weights (csrc/operators/weight_gradient.h)."""
    if (weight.requires_grad and torch.is_grad_enabled()) or _C.has_tangent(weight):
        raise RuntimeError(
            f"The function '{op}' is not differentiable with respect to argument 'weight' for targets that are class "
            "indices. This input cannot have requires_grad True: call weight.detach()"
        )


def reduce(rows: Tensor, divisor: Tensor, reduction: int) -> Tensor:
    if reduction in (NONE, SUM):
        return rows if reduction == NONE else rows.sum()
    # As one element: of numbers without a dimension vmap divides none where it has no samples, as jacfwd of nothing.
    return (rows.sum().reshape(1) / divisor).reshape([])


def weighted(a: Tensor, log_probs: Tensor) -> Tensor:
    """a * log_probs where 0 * (-inf) is 0."""
    return a * torch.where((a == 0) & (log_probs == -torch.inf), torch.zeros_like(log_probs), log_probs)


def incoming(grad_output: Tensor, divisor: Tensor, input: Tensor, reduction: int) -> Tensor:
    """The incoming gradient of each row, with a dimension for the classes."""
    if reduction == NONE:
        return grad_output.reshape(row_shape(input)).unsqueeze(class_dim(input))
    return grad_output.reshape([]) if reduction == SUM else grad_output.reshape([]) / divisor


def log_softmax(x: Tensor, dim: int) -> Tensor:
    """Of torch's own the forward derivative cannot be differentiated (an exponential is changed in place, which under hooks for
    saved tensors goes unnoticed)."""
    if x.dim() == 0 or holds(x.shape[dim] == 0):
        return torch.log_softmax(x, dim)
    m = x.detach().amax(dim, keepdim=True)
    x = x - torch.where(m.isinf() & (m < 0), torch.zeros_like(m), m)
    return x - x.exp().sum(dim, keepdim=True).log()

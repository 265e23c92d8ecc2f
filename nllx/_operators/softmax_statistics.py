"""softmax_statistics: definition, shapes, batching rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nllx._operators.losses import checked_target, log_softmax
from nllx._operators.operator import Operator
from nllx._operators.samples import Dims, leading
from nllx._operators.shapes import INDICES, check_devices, check_dtype, differ, dtype_name, holds, is_counted

_OP = "softmax_statistics"


def check(logits: Tensor, target: Tensor | None, dim: int, ignore_index: int, *_: Any) -> int:
    """Raises what the kernels raise (csrc/checks.cpp). Returns the dimension of the classes, counted from the first."""
    rank = logits.dim()
    if rank == 0:
        raise IndexError(f"{_OP}: Dimension out of range: logits has no dimension, expected one for classes")
    check_dtype(_OP, logits.dtype)
    if not -rank <= dim < rank:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-rank}, {rank - 1}], but got {dim})")
    dim %= rank
    rows = _row_shape(logits, dim)
    if holds(logits.shape[dim] == 0) and not any(holds(size == 0) for size in rows):
        raise IndexError(
            f"{_OP}: Expected reduction dim {dim} to have non-zero size: logits of shape {list(logits.shape)} have no classes"
        )
    if target is None:
        return dim
    torch._check(
        target.dtype in INDICES,
        lambda: (
            f"{_OP}: expected target dtype to be Long or Byte (or another integer, or Bool), but got "
            f"{dtype_name(target.dtype)}; call target.long()"
        ),
    )
    torch._check(
        not differ(target.shape, rows),
        lambda: (
            f"{_OP}: Expected target size {rows}, got {list(target.shape)}: one class index for each row of logits of shape "
            f"{list(logits.shape)}, whose classes are dimension {dim}"
        ),
    )
    torch._check(
        target.dtype != torch.uint64 or ignore_index != 2**63 - 1,
        lambda: (
            f"{_OP}: ignore_index {ignore_index} cannot be told from larger indices in a target of dtype UInt64; take another "
            "one"
        ),
    )
    check_devices(_OP, logits, target=target)
    return dim


def _row_shape(logits: Tensor, dim: int) -> list[int]:
    return [*logits.shape[:dim], *logits.shape[dim + 1 :]]


def _acc(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _counted(target: Tensor | None, ignore_index: int) -> Tensor | None:
    return None if target is None else is_counted(target, ignore_index)


def _where(counted: Tensor | None, value: Tensor, other: float = 0) -> Tensor:
    return value if counted is None else torch.where(counted, value, torch.full_like(value, other))


def _vanishing(x: Tensor) -> Tensor:
    """x - max where its product with exp(x - max) is wanted, which is 0 for -inf."""
    return torch.where(x == -torch.inf, torch.zeros_like(x), x)


def forward(
    logits: Tensor,
    target: Tensor | None = None,
    dim: int = -1,
    ignore_index: int = -100,
    with_entropy: bool = True,
    with_prediction: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log p_y, log Σ exp x, -Σ p log p and the class of the largest logit of each row, and (max, log s, mean of x - max)."""
    dim = check(logits, target, dim, ignore_index)
    acc = _acc(logits)
    counted = _counted(target, ignore_index)
    x = logits.to(acc)
    if counted is not None:  # a row that does not count may hold anything
        x = torch.where(counted.unsqueeze(dim), x, torch.zeros_like(x))
    if holds(logits.shape[dim] == 0):  # and no rows
        rows = x.sum(dim)
        maximum, prediction = rows, rows.long()
    else:
        maximum, prediction = x.detach().amax(dim), x.detach().argmax(dim)
    maximum = torch.where(maximum == -torch.inf, torch.zeros_like(maximum), maximum)
    shifted = x - maximum.unsqueeze(dim)
    log_sum = shifted.exp().sum(dim).log()
    log_probs = shifted - log_sum.unsqueeze(dim)
    p = log_probs.exp()
    mean = (p * _vanishing(shifted)).sum(dim)
    log_prob = entropy = x.new_empty([0])
    if target is not None:
        index = checked_target(_OP, target, logits.shape[dim], ignore_index)
        if not holds(logits.shape[dim] == 0):
            log_prob = _where(counted, log_probs.gather(dim, index.unsqueeze(dim)).squeeze(dim))
        else:
            log_prob = torch.zeros_like(log_sum)
    if with_entropy:
        entropy = _where(counted, log_sum - mean)
    stats = torch.stack([_where(counted, t) for t in (maximum, log_sum, mean)], -1)
    prediction = _where(counted, prediction, -1) if with_prediction else prediction.new_empty([0])
    logsumexp = torch.where(maximum == torch.inf, maximum, maximum + log_sum)
    return log_prob, _where(counted, logsumexp), entropy, prediction, stats.detach()


def backward(
    grad_log_prob: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    target: Tensor | None,
    row_stats: Tensor,
    dim: int,
    ignore_index: int,
    with_entropy: bool,
    with_prediction: bool,
) -> Tensor:
    """Gradient of the logits: p (g_lse - g_y - g_H (log p + H)), and g_y more at the target.

    Made from the logits and not from row_stats, so that its derivative with respect to them is whole.
    """
    dim = check(logits, target, dim, ignore_index)
    acc = _acc(logits)
    counted = _counted(target, ignore_index)
    x = logits.to(acc)
    if counted is not None:
        x = torch.where(counted.unsqueeze(dim), x, torch.zeros_like(x))
    log_probs = log_softmax(x, dim)
    p = log_probs.exp()
    grad = torch.zeros_like(p)
    if grad_logsumexp is not None:
        grad = grad + p * grad_logsumexp.to(acc).unsqueeze(dim)
    if grad_entropy is not None and with_entropy:
        logs = _vanishing(log_probs)
        entropy = -(p * logs).sum(dim, keepdim=True)
        grad = grad - grad_entropy.to(acc).unsqueeze(dim) * p * (logs + entropy)
    if target is not None:
        index = checked_target(_OP, target, logits.shape[dim], ignore_index).unsqueeze(dim)
        if grad_log_prob is not None:
            g = grad_log_prob.to(acc).unsqueeze(dim)
            classes = torch.arange(logits.shape[dim], device=logits.device)
            hit = classes.view([-1] + [1] * (logits.dim() - 1 - dim)) == index
            grad = grad + torch.where(hit, g, torch.zeros_like(g)) - p * g
    if counted is not None:
        grad = torch.where(counted.unsqueeze(dim), grad, torch.zeros_like(grad))
    return grad.to(logits.dtype)


def forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    logits, target, dim, ignore_index, with_entropy, with_prediction = arguments
    rows, acc = _row_shape(logits, check(logits, target, dim, ignore_index)), _acc(logits)
    return (
        logits.new_empty([0] if target is None else rows, dtype=acc),
        logits.new_empty(rows, dtype=acc),
        logits.new_empty(rows if with_entropy else [0], dtype=acc),
        logits.new_empty(rows if with_prediction else [0], dtype=torch.int64),
        logits.new_empty([*rows, 3], dtype=acc),
    )


def backward_fake(*arguments: Any) -> Tensor:
    _, _, _, logits, target, row_stats, dim, ignore_index, _, _ = arguments
    check(logits, target, dim, ignore_index)
    check_devices(_OP, logits, row_stats=row_stats)
    return torch.empty_like(logits)


def _sample_dim(logits: Tensor, dim: int) -> int:
    """The dimension of the classes among those of all samples, which come first."""
    return dim % (logits.dim() - 1) + 1


def forward_batched(size: int, dims: Dims, *arguments: Any) -> tuple[tuple[Tensor, ...], Any] | None:
    """Samples are rows among others."""
    logits, target, dim, ignore_index, with_entropy, with_prediction = arguments
    if dims[0] is None:
        return None
    logits = logits.movedim(dims[0], 0)
    target = None if target is None else leading(target, dims[1], size)
    results = torch.ops.nllx.softmax_statistics_forward(
        logits, target, _sample_dim(logits, dim), ignore_index, with_entropy, with_prediction
    )
    # What is not asked for has no elements, in each of the samples.
    return tuple(
        t if wanted else t.new_empty([size, 0])
        for t, wanted in zip(results, (target is not None, True, with_entropy, with_prediction, True), strict=True)
    ), 0


def backward_batched(size: int, dims: Dims, *arguments: Any) -> tuple[Tensor, Any] | None:
    *grads, logits, target, row_stats, dim, ignore_index, with_entropy, with_prediction = arguments
    if dims[3] is None:
        return None
    logits = logits.movedim(dims[3], 0)
    grads = [None if g is None else leading(g, d, size) for g, d in zip(grads, dims[:3], strict=True)]
    grad = torch.ops.nllx.softmax_statistics_backward(
        *grads,
        logits,
        None if target is None else leading(target, dims[4], size),
        leading(row_stats, dims[5], size),
        _sample_dim(logits, dim),
        ignore_index,
        with_entropy,
        with_prediction,
    )
    return grad, 0


OPERATORS = (
    Operator("softmax_statistics_forward", forward, forward_fake, forward_batched, check),
    Operator("softmax_statistics_backward", backward, backward_fake, backward_batched),
)

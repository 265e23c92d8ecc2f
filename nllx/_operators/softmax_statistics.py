"""softmax_statistics: definition, shapes, batching rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nllx._operators.losses import checked_target, log_softmax
from nllx._operators.operator import Operator
from nllx._operators.options import LogitMap, check_options, empty_gradients, to_shape_of_scale
from nllx._operators.samples import Dims, leading
from nllx._operators.shapes import INDICES, check_devices, check_dtype, differ, dtype_name, holds, is_counted

_OP = "softmax_statistics"


def check(
    logits: Tensor,
    target: Tensor | None,
    logit_scale: Tensor | None,
    temperature: Tensor | None,
    dim: int,
    ignore_index: int,
    scale: float,
    sharpness: float,
    softcap: float,
    *_: Any,
) -> int:
    """Raises what the kernels raise (csrc/checks.cpp). Returns the dimension of the classes, counted from the first."""
    dim = _check_rows(logits, target, dim, ignore_index)
    check_options(
        _OP, logits, _row_shape(logits, dim), None, logit_scale, temperature, scale, sharpness, softcap, z_loss=0.0
    )
    return dim


def _check_rows(logits: Tensor, target: Tensor | None, dim: int, ignore_index: int) -> int:
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
    logit_scale: Tensor | None = None,
    temperature: Tensor | None = None,
    dim: int = -1,
    ignore_index: int = -100,
    scale: float = 1.0,
    sharpness: float = 1.0,
    softcap: float = 0.0,
    with_entropy: bool = True,
    with_prediction: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log p_y, log Σ exp z, -Σ p log p and the class of the largest z of each row, and (max, log s, mean of z - max)."""
    dim = check(logits, target, logit_scale, temperature, dim, ignore_index, scale, sharpness, softcap)
    acc = _acc(logits)
    counted = _counted(target, ignore_index)
    x = logits.to(acc)
    valid = None if counted is None else counted.unsqueeze(dim)
    if valid is not None:  # a row that does not count may hold anything
        x = torch.where(valid, x, torch.zeros_like(x))
    x = LogitMap(dim, valid, acc, logit_scale, temperature, scale, sharpness, softcap)(x)
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
    logit_scale: Tensor | None,
    temperature: Tensor | None,
    row_stats: Tensor,
    dim: int,
    ignore_index: int,
    scale: float,
    sharpness: float,
    softcap: float,
    with_entropy: bool,
    with_prediction: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the logits and of logit_scale. That of z: p (g_lse - g_y - g_H (log p + H)), and g_y more at the target.

    Made from the logits and not from row_stats, so that its derivative with respect to them is whole.
    """
    dim = check(logits, target, logit_scale, temperature, dim, ignore_index, scale, sharpness, softcap)
    acc = _acc(logits)
    counted = _counted(target, ignore_index)
    valid = None if counted is None else counted.unsqueeze(dim)
    x = logits.to(acc)
    if valid is not None:
        x = torch.where(valid, x, torch.zeros_like(x))
    logit_map = LogitMap(dim, valid, acc, logit_scale, temperature, scale, sharpness, softcap)
    log_probs = log_softmax(logit_map(x), dim)
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
    if valid is not None:
        grad = torch.where(valid, grad, torch.zeros_like(grad))
    grad, by_scale = logit_map.derivatives(grad, x)
    return (
        grad.to(logits.dtype) if output_mask[0] else None,
        to_shape_of_scale(by_scale, logit_scale, dim) if output_mask[1] and logit_scale is not None else None,
    )


def forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    logits, target, *_, with_entropy, with_prediction = arguments
    rows, acc = _row_shape(logits, check(*arguments)), _acc(logits)
    return (
        logits.new_empty([0] if target is None else rows, dtype=acc),
        logits.new_empty(rows, dtype=acc),
        logits.new_empty(rows if with_entropy else [0], dtype=acc),
        logits.new_empty(rows if with_prediction else [0], dtype=torch.int64),
        logits.new_empty([*rows, 3], dtype=acc),
    )


def backward_fake(*arguments: Any) -> tuple[Tensor | None, Tensor | None]:
    _, _, _, *tensors, row_stats = arguments[:8]
    logits, logit_scale, output_mask = tensors[0], tensors[2], arguments[-1]
    check(*tensors, *arguments[8:])
    check_devices(_OP, logits, row_stats=row_stats)
    return empty_gradients(logits, logit_scale, output_mask)


def _sample_dim(logits: Tensor, dim: int) -> int:
    """The dimension of the classes among those of all samples, which come first."""
    return dim % (logits.dim() - 1) + 1


def _of_samples(option: Tensor | None, dim: int | None, size: int, rows: int) -> Tensor | None:
    """logit_scale or temperature, of samples that have `rows` dimensions of rows, as one number per row or one in all."""
    if option is None or (dim is None and option.dim() == 0):
        return option
    option = leading(option, dim, size)
    return option.view([size] + [1] * rows) if option.dim() == 1 else option


def _options_of_samples(
    logits: Tensor, options: Sequence[Tensor | None], dims: Dims, size: int, dim: int
) -> list[Tensor | None]:
    """As one number per row: the kernels take no others."""
    shape = _row_shape(logits, _sample_dim(logits, dim))
    of_samples = [_of_samples(option, d, size, len(shape) - 1) for option, d in zip(options, dims, strict=True)]
    return [t if t is None or t.dim() == 0 else t.expand(shape) for t in of_samples]


def forward_batched(size: int, dims: Dims, *arguments: Any) -> tuple[tuple[Tensor, ...], Any] | None:
    """Samples are rows among others."""
    logits, target, *options = arguments[:4]
    dim, *rest = arguments[4:]
    with_entropy, with_prediction = rest[-2:]
    if dims[0] is None:
        return None
    logits = logits.movedim(dims[0], 0)
    target = None if target is None else leading(target, dims[1], size)
    results = torch.ops.nllx.softmax_statistics_forward(
        logits,
        target,
        *_options_of_samples(logits, options, dims[2:4], size, dim),
        _sample_dim(logits, dim),
        *rest,
    )
    # What is not asked for has no elements, in each of the samples.
    return tuple(
        t if wanted else t.new_empty([size, 0])
        for t, wanted in zip(results, (target is not None, True, with_entropy, with_prediction, True), strict=True)
    ), 0


def backward_batched(size: int, dims: Dims, *arguments: Any) -> tuple[tuple[Tensor | None, ...], Any] | None:
    *grads, logits, target, logit_scale, temperature, row_stats = arguments[:8]
    dim, *rest = arguments[8:]
    if dims[3] is None:
        return None
    logits = logits.movedim(dims[3], 0)
    grads = [None if g is None else leading(g, d, size) for g, d in zip(grads, dims[:3], strict=True)]
    options = _options_of_samples(logits, (logit_scale, temperature), dims[5:7], size, dim)
    one_in_all = logit_scale is not None and logit_scale.dim() == (dims[5] is not None) and logits.dim() > 2
    if options[0] is not None and options[0].dim() == 0:  # each sample has a gradient of its own
        options[0] = options[0].expand(_row_shape(logits, _sample_dim(logits, dim)))
    grad, by_scale = torch.ops.nllx.softmax_statistics_backward(
        *grads,
        logits,
        None if target is None else leading(target, dims[4], size),
        *options,
        leading(row_stats, dims[7], size),
        _sample_dim(logits, dim),
        *rest,
    )
    output_mask = rest[-1]
    of_logits = grad if output_mask[0] else None
    if not output_mask[1] or logit_scale is None:
        return (of_logits, None), 0
    return (of_logits, by_scale.flatten(1).sum(1) if one_in_all else by_scale), 0


OPERATORS = (
    Operator("softmax_statistics_forward", forward, forward_fake, forward_batched, check),
    Operator("softmax_statistics_backward", backward, backward_fake, backward_batched),
)

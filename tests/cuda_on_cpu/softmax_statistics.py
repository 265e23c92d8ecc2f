"""Problems of softmax_statistics through the emulator, against formulas in float64."""

from __future__ import annotations

import dataclasses
from ctypes import c_uint8
from typing import Any

import torch
from emulator import (
    FLOAT_TYPES,
    INDEX_TYPES,
    BadTarget,
    Kernels,
    SoftmaxStatisticsBackward,
    SoftmaxStatisticsForward,
    Targets,
)
from launches import Settings, share_layout
from memory import address
from row_options import NO_OPTIONS, Mapped, Options, OptionTensors, within
from torch import Tensor
from torch.testing import assert_close


@dataclasses.dataclass(frozen=True)
class StatisticsCase:
    """shape: the classes are dimension 1, of rows (N, C) or planes (N, C, K). shift: elements that logits and gradient begin
    past a 16-byte boundary. wanted: which of log_prob, logsumexp, entropy have a gradient."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    has_target: bool = True
    special: bool = False
    shift: tuple[int, int] = (0, 0)
    wanted: tuple[bool, bool, bool] = (True, True, True)
    equal: bool = False  # all logits but the first, which rounds a sum always the same way
    options: Options = NO_OPTIONS


def _logits(case: StatisticsCase) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(case.shape, generator=generator, dtype=torch.float64)).to(case.dtype)
    if case.equal:
        x = torch.full_like(x, -1.2)
        x[:, 0] = 0
    if case.special:
        rows = x.movedim(1, -1).reshape(-1, case.shape[1]).clone()
        rows[0, ::2] = -torch.inf
        rows[1] = -torch.inf
        rows[2, 1:] = torch.finfo(case.dtype).min
        rows[2, 0] = -torch.inf
        rows[3, [-1, 2]] = torch.nan
        rows[4, [1, -1]] = torch.inf
        rows[5, 1:] = rows[5, 1].clone()
        x = rows.reshape(case.shape[0], *case.shape[2:], case.shape[1]).movedim(-1, 1).contiguous()
    return x


def _formulas(x: Tensor, target: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """log_prob (zeros without a target), logsumexp and entropy, and the prediction."""
    counted = torch.ones_like(x.select(1, 0), dtype=torch.bool) if target is None else target != -100
    x = torch.where(counted.unsqueeze(1), x.double(), 0.0)
    lse = torch.logsumexp(x, 1)
    # From the maximum: the logarithm of a sum of lowest numbers would lose its digits.
    m = x.detach().amax(1, keepdim=True)
    shifted = x - torch.where(m.isinf(), 0.0, m)
    log_sum = torch.logsumexp(shifted, 1, keepdim=True)
    log_p = shifted - log_sum
    lse = torch.where(lse.isinf(), lse, (m + log_sum).squeeze(1))
    p = log_p.exp()
    entropy = torch.where(lse.isinf(), torch.nan, -torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, log_p)).sum(1))
    index = torch.zeros_like(lse, dtype=torch.int64) if target is None else torch.where(counted, target, 0)
    log_prob = log_p.gather(1, index.unsqueeze(1)).squeeze(1)
    log_prob = 0 * entropy if target is None else log_prob
    numbers = [torch.where(counted, t, 0.0) for t in (log_prob, lse, entropy)]
    return numbers, torch.where(counted, x.argmax(1), -1)


def run_softmax_statistics(
    kernels: Kernels,
    x: Tensor,
    target: Tensor | None,
    grads: list[Tensor | None],
    settings: Settings,
    shift: tuple[int, int] = (0, 0),
    options: OptionTensors | None = None,
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    """log_prob, logsumexp and entropy, the prediction, what is saved, and the gradient for theirs; classes in dimension 1.
    With options that of logit_scale too, one for each row."""
    memory, rows = settings.memory(), x.select(1, 0).shape
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    (placed, like), arrays = share_layout([x, torch.empty_like(x)], 1)
    logits = memory.copy(placed, shift[0])
    targets = Targets(ignore_index=-100, index_type=INDEX_TYPES[torch.int64])
    index = None if target is None else memory.copy(target.contiguous())
    targets.index = address(index)
    common: dict[str, Any] = {
        "extent": arrays.extent,
        "layout": arrays.layout,
        "logits": address(logits),
        "logits_strides": arrays.strides[0],
        "targets": targets,
        "options": None if options is None else options.pointer(memory),
    }
    numbers = [memory.empty(rows, acc) for _ in range(3)]
    prediction, stats = memory.empty(rows, torch.int64), memory.empty([*rows, 3], acc)
    forward = SoftmaxStatisticsForward(
        **common,
        log_prob=address(None if target is None else numbers[0]),
        logsumexp=address(numbers[1]),
        entropy=address(numbers[2]),
        prediction=address(prediction),
        row_stats=address(stats),
    )
    float_type, bad = c_uint8(FLOAT_TYPES[x.dtype]), BadTarget()
    how = {"order": settings.order, "most_blocks": settings.most_blocks}
    kernels.launch("softmax_statistics_forward", forward, float_type, bad, **how)

    given = [None if g is None else memory.copy(g.contiguous()) for g in grads]
    grad = memory.empty(like.shape, like.dtype, like.stride(), shift[1])
    gradients = [grad] if options is None else [grad, memory.empty(rows, acc)]
    backward = SoftmaxStatisticsBackward(
        **common,
        row_stats=address(stats),
        grad_log_prob=address(None if target is None else given[0]),
        grad_logsumexp=address(given[1]),
        grad_entropy=address(given[2]),
        grad_logits=address(grad),
        grad_strides=arrays.strides[1],
        grad_logit_scale=address(None if options is None else gradients[1]),
    )
    kernels.launch("softmax_statistics_backward", backward, float_type, bad, **how)
    memory.check()
    assert bad.claimed == 0
    return numbers, prediction, stats, gradients


def check_softmax_statistics(kernels: Kernels, case: StatisticsCase, settings: Settings) -> list[Tensor]:
    x = _logits(case)
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32
    rows = x.select(1, 0).shape
    target = torch.randint(case.shape[1], rows, generator=torch.Generator().manual_seed(1)) if case.has_target else None
    if target is not None:
        target.view(-1)[-1] = -100
    grads = [torch.linspace(-1 + i, 1, rows.numel(), dtype=acc).reshape(rows) for i in range(3)]
    given = [g if w else None for g, w in zip(grads, case.wanted, strict=True)]
    if case.options != NO_OPTIONS:
        return _check_options(kernels, case, settings, x, target, given)
    numbers, prediction, stats, (grad,) = run_softmax_statistics(kernels, x, target, given, settings, case.shift)

    leaf = x.clone().requires_grad_()
    expected, predicted = _formulas(leaf, target)
    odd = ~(expected[2].isfinite() & expected[1].isfinite())
    eps = torch.finfo(acc).eps
    for i, (a, b) in enumerate(zip(numbers, expected, strict=True)):
        if i > 0 or case.has_target:
            assert_close(a[~odd].double(), b.detach()[~odd], rtol=32 * eps, atol=64 * eps)
    assert numbers[2][odd].isnan().all()
    assert torch.equal(prediction, predicted)
    finite = ~odd & expected[0].isfinite()
    total = sum(
        (b[finite] * g[finite].double()).sum()
        for i, (b, g) in enumerate(zip(expected, given, strict=True))
        if g is not None and (i > 0 or case.has_target)
    )
    want = torch.autograd.grad(total, leaf)[0] if isinstance(total, Tensor) else torch.zeros_like(x)
    places = finite.unsqueeze(1).expand_as(want)
    assert_close(grad[places].double(), want[places].double(), rtol=16 * torch.finfo(case.dtype).eps, atol=64 * eps)
    return [*numbers[1:], prediction, stats, grad]


def _check_options(
    kernels: Kernels,
    case: StatisticsCase,
    settings: Settings,
    x: Tensor,
    target: Tensor | None,
    given: list[Tensor | None],
) -> list[Tensor]:
    """Of finite logits; in rows that do not count logits and options are NaN."""
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32
    counted = torch.ones_like(x.select(1, 0), dtype=torch.bool) if target is None else target != -100
    x = torch.where(counted.unsqueeze(1), x, torch.nan)
    flat = counted.reshape(-1)
    options = OptionTensors(case.options, flat, acc)
    numbers, prediction, stats, gradients = run_softmax_statistics(
        kernels, x, target, given, settings, case.shift, options
    )

    def rows(tensor: Tensor) -> Tensor:
        return tensor.movedim(1, -1).reshape(-1, case.shape[1])[flat]

    value = rows(x).double()
    mapped = Mapped(value, options)
    z = mapped.z
    lse = torch.logsumexp(z, 1, keepdim=True)
    log_p = torch.log_softmax(z, 1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(1, keepdim=True)
    hit = torch.zeros_like(p)
    if target is not None:
        hit.scatter_(1, target.reshape(-1)[flat].unsqueeze(1), 1.0)
    large = 2 + z.abs().amax(1, keepdim=True)
    of_log_prob = (hit * log_p).sum(1, keepdim=True)
    for name, a, b in zip(("log_prob", "logsumexp", "entropy"), numbers, (of_log_prob, lse, entropy), strict=True):
        if name != "log_prob" or target is not None:
            within(a.reshape(-1)[flat], b.squeeze(1), large.squeeze(1), name)
            assert (a.reshape(-1)[~flat] == 0).all()
    # Of classes that rounding makes equal another one may be the first.
    found = prediction.reshape(-1)
    assert (found[~flat] == -1).all()
    within(z.gather(1, found[flat].unsqueeze(1)).to(acc), z.amax(1, keepdim=True), large, "prediction")

    g = [torch.zeros_like(lse) if t is None else t.reshape(-1)[flat].double().unsqueeze(1) for t in given]
    if target is None:
        g[0] = torch.zeros_like(lse)
    logs = log_p + entropy
    of_x, of_scale = mapped.gradients(value, hit * g[0] + p * (g[1] - g[0] - g[2] * logs))
    size = hit * g[0].abs() + p * large * (g[0].abs() + g[1].abs() + g[2].abs() * (logs.abs() + large))
    size *= (1 + mapped.argument.abs()) * mapped.slope.abs()
    within(rows(gradients[0]), of_x, size * mapped.scale.abs(), "grad")
    within(
        gradients[1].reshape(-1)[flat],
        of_scale,
        ((size * value.abs()).sum(1, keepdim=True) * mapped.per_scale.abs()).squeeze(1),
        "grad_logit_scale",
    )
    for gradient in (gradients[0].movedim(1, -1).reshape(-1, case.shape[1]), gradients[1].reshape(-1)):
        assert (gradient[~flat] == 0).all()
    return [*numbers[1:], prediction, stats, *gradients]

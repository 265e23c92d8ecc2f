"""Errors against more precise arithmetic over a grid, in units in the last place, beside torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nllx

_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
_CLASSES = [2, 10, 100, 1000, 32000, 262144]
_SCALES = [1e-3, 1.0, 30.0, 1e3, 1e4]
# nllx's own error where torch's is smaller: a few roundings of float32, or of the result.
_MOST_ULP = 4.0


def _ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    size = value.abs().clamp_min(torch.finfo(dtype).tiny)
    return torch.exp2(torch.floor(torch.log2(size))) * torch.finfo(dtype).eps


def _exact(logits: Tensor, target: Tensor, weight: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each row, its gradient, and the sum of its coefficients, which the terms of the gradient are as large as: in 64
    bits of precision (80-bit extended), rounded to float64."""
    x, w = logits.double().numpy().astype(np.longdouble), weight.double().numpy().astype(np.longdouble)
    rows, classes = x.shape
    exponentials = np.exp(x - x.max(1, keepdims=True))
    log_p = x - x.max(1, keepdims=True) - np.log(exponentials.sum(1, keepdims=True))
    if target.is_floating_point():
        a = (1 - np.longdouble(smoothing)) * target.double().numpy().astype(np.longdouble)
    else:
        a = np.zeros_like(x)
        a[np.arange(rows), target.numpy()] = 1 - np.longdouble(smoothing)
    a = w * (a + np.longdouble(smoothing) / classes)
    terms = np.where(a == 0, 0, a * log_p)  # 0 · (−inf) = 0
    gradient = a.sum(1, keepdims=True) * np.exp(log_p) - a
    loss, gradient, size = (v.astype(np.float64) for v in (-terms.sum(1), gradient, a.sum(1, keepdims=True)))
    return torch.from_numpy(loss), torch.from_numpy(gradient), torch.from_numpy(size)


def _laid_out(logits: Tensor, layout: str) -> Tensor:
    """The same rows (N, C), or as (1, C, N): planes, whose neighbouring rows are adjacent in memory, and rows of which each
    begins anywhere, padded to an odd length."""
    if layout == "planes":
        return logits.t().contiguous()[None]
    if layout == "padded":
        room = logits.new_empty(logits.shape[0], logits.shape[1] + 3)[:, 2:-1]
        return room.copy_(logits)
    return logits.clone()


def _answer(function: Any, layout: str, logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss of each row, and its gradient."""
    leaf = _laid_out(logits, layout).requires_grad_()
    if layout == "planes":
        target = target.t()[None] if target.is_floating_point() else target[None]
    loss = function(leaf, target, reduction="none", **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    if layout == "planes":
        loss, gradient = loss[0], gradient[0].t()
    return loss.detach().double(), gradient.double()


def _errors(
    function: Any, layout: str, logits: Tensor, target: Tensor, exact: tuple[Tensor, Tensor], **options: Any
) -> tuple[float, float]:
    """The largest error of a loss in its ulp, and of a gradient in the eps of its dtype times the largest of its row."""
    loss, gradient = _answer(function, layout, logits, target, **options)
    size = torch.maximum(exact[0].abs(), exact[2].squeeze(1))
    fits = exact[0].abs() <= torch.finfo(logits.dtype).max
    of_loss = ((loss - exact[0]).abs() / _ulp(size, logits.dtype))[fits]
    of_gradient = (gradient - exact[1]).abs() / (exact[2] * torch.finfo(logits.dtype).eps)
    return of_loss.max().item(), of_gradient.max().item()


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="no extended precision on this machine")
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("option", ["plain", "smoothing", "weight", "probabilities"])
@pytest.mark.parametrize("layout", ["rows", "planes", "padded"])
def test_never_less_exact_than_torch(
    layout: str, option: str, dtype: torch.dtype, amount: Callable[[int, int], int], note: Callable[..., None]
) -> None:
    worst = {"loss": 0.0, "loss, torch": 0.0, "gradient": 0.0, "gradient, torch": 0.0}
    problems = 0
    for classes in _CLASSES[: amount(4, 6)]:
        rows = max(3, min(amount(1 << 12, 1 << 18), amount(1 << 16, 1 << 21) // classes))
        for scale in _SCALES:
            generator = torch.Generator().manual_seed(classes)
            logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale
            logits = logits.clamp(-6e4, 6e4).to(dtype)
            target = torch.randint(classes, (rows,), generator=generator)
            weight = torch.rand(classes, generator=generator, dtype=torch.float64).to(dtype)
            smoothing = 0.1 if option == "smoothing" else 0.0
            options: dict[str, Any] = {"label_smoothing": smoothing}
            if option == "probabilities":
                target = torch.randn(rows, classes, generator=generator, dtype=torch.float64).softmax(1).to(dtype)
            if option == "weight":
                options["weight"] = weight
            exact = _exact(logits, target, weight if option == "weight" else torch.ones(classes), smoothing)
            ours = _errors(nllx.functional.cross_entropy, layout, logits, target, exact, **options)
            theirs = _errors(torch.nn.functional.cross_entropy, layout, logits, target, exact, **options)
            for name, a, b in zip(("loss", "gradient"), ours, theirs, strict=True):
                assert a <= max(_MOST_ULP, b), (name, classes, scale, a, b)
                worst[name] = max(worst[name], a)
                worst[f"{name}, torch"] = max(worst[f"{name}, torch"], b)
            problems += 1
    note(problems=problems, **{name: round(value, 2) for name, value in worst.items()})


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="no extended precision on this machine")
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("option", ["plain", "probabilities"])
@pytest.mark.parametrize("layout", ["rows", "planes", "padded"])
def test_small_probabilities(
    layout: str, option: str, dtype: torch.dtype, amount: Callable[[int, int], int], note: Callable[..., None]
) -> None:
    """Gradients relative to themselves, down to the smallest normal number. One class has so nearly all the probability, and
    the logits are multiples of such a number, that x - m and torch's log-softmax are exact at every scale: what is seen is the
    error of the exponential and of what it is multiplied with."""
    info, acc = torch.finfo(dtype), torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    multiple, lowest = acc.eps * 2**13, math.log(acc.tiny) + 2
    errors = {"gradient": 0.0, "gradient, torch": 0.0}
    for classes in (2, 10, 100, 1000, 100000)[: amount(4, 5)]:
        rows = max(3, amount(1 << 13, 1 << 20) // classes)
        for scale in (1.0, 10.0, 100.0, 1e3, 1e4):
            generator = torch.Generator().manual_seed(classes)
            highest = math.log(acc.eps / classes) - 1
            below = highest + (lowest - highest) * torch.rand(rows, classes, generator=generator, dtype=torch.float64)
            best = torch.randint(classes, (rows,), generator=generator)
            logits = scale + below.scatter_(1, best[:, None], 0.0)
            logits = ((logits / multiple).round() * multiple).to(dtype)
            target = best
            if option == "probabilities":
                target = torch.rand(rows, classes, generator=generator, dtype=torch.float64) * 2 * info.tiny
                target = target.scatter_(1, best[:, None], 1.0).to(dtype)
            exact = _exact(logits, target, torch.ones(classes), 0.0)[1]
            share = target if option == "probabilities" else torch.zeros(rows, classes).scatter_(1, best[:, None], 1.0)
            size = (exact + 2 * share.double()).clamp_min(info.tiny)  # p Σ q + q, as exact is p Σ q - q
            worst = [
                ((_answer(f.cross_entropy, layout, logits, target)[1] - exact).abs() / (size * info.eps)).max().item()
                for f in (nllx.functional, torch.nn.functional)
            ]
            assert worst[0] <= 1.5 * worst[1] + _MOST_ULP, (classes, scale, *worst)
            errors = {name: max(before, now) for (name, before), now in zip(errors.items(), worst, strict=True)}
    note(**{name: round(value, 2) for name, value in errors.items()})


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e6, 1e30, -1e38])
def test_offsets_cancel(offset: float) -> None:
    """The loss depends on differences of logits alone: those that survive the addition."""
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)) * 1000
    moved = logits + offset
    target = torch.arange(64)
    expected = torch.nn.functional.cross_entropy(moved.double(), target, reduction="none")
    actual = nllx.functional.cross_entropy(moved, target, reduction="none").double()
    assert ((actual - expected).abs() <= _MOST_ULP * _ulp(expected, torch.float32)).all()


@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min])
def test_masked_classes(fill: float, layout: str) -> None:
    """Logits at −inf, or at the lowest number: as if the classes were not there."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 50, 96, generator=generator)
    masked = torch.zeros(50, dtype=torch.bool)
    masked[::3] = True
    target = torch.full((4, 96), 1)
    whole = logits.masked_fill(masked[None, :, None], fill)
    kept = logits[:, ~masked]
    if layout == "rows":
        whole, kept = whole.movedim(1, -1).contiguous().movedim(-1, 1), kept.movedim(1, -1).contiguous().movedim(-1, 1)
    actual = nllx.functional.cross_entropy(whole, target, reduction="none")
    expected = nllx.functional.cross_entropy(kept.double(), target - 1, reduction="none")
    torch.testing.assert_close(actual, expected.float(), rtol=1e-6, atol=1e-6)


def test_sums_over_many_rows(amount: Callable[[int, int], int], note: Callable[..., None]) -> None:
    """A mean of equal losses is that loss: what rounding adds up over the rows shows, in float32 and half precision."""
    rows = amount(1 << 20, 100_000_000)
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.tensor([0.5, -0.25], dtype=dtype).expand(rows, 2)
        target = torch.zeros(1, dtype=torch.uint8).expand(rows)
        one = nllx.functional.cross_entropy(logits[:1], target[:1], reduction="none")
        mean = nllx.functional.cross_entropy(logits, target)
        total = torch.ops.nllx.cross_entropy(logits, target, reduction=2, dtype=torch.float32)
        exact = math.log1p(math.exp(-0.75))
        assert mean == one[0]
        assert abs(total.item() / rows - exact) <= 2 * torch.finfo(torch.float32).eps
        note(**{f"{dtype}, {rows} rows, relative error of the sum": abs(total.item() / rows / exact - 1)})

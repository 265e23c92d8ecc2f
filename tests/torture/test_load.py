"""Memory stays flat: while calls fail, over many small calls, and in a long mixed training."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nllx

_MIB = 1 << 20
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")


def _resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _mistakes() -> list[Callable[[], Any]]:
    f, x = nllx.functional, torch.randn(64, 100)
    good, bad = torch.zeros(64, dtype=torch.long), torch.full((64,), 100)
    return [
        lambda: f.cross_entropy(x, bad),
        lambda: f.cross_entropy(x, good[:-1]),
        lambda: f.cross_entropy(x, good.float()),
        lambda: f.cross_entropy(x, good, weight=torch.ones(99)),
        lambda: f.cross_entropy(x, good, label_smoothing=2.0),
        lambda: f.cross_entropy(x.long(), good),
        lambda: f.nll_loss(x, bad),
        lambda: f.cross_entropy_value_and_grad(x, bad, out=torch.empty(64, 100)),
        lambda: f.log_softmax(x, 7),
    ]


def test_calls_that_fail_leak_nothing(amount: Callable[[int, int], int], note: Callable[..., None]) -> None:
    mistakes = _mistakes()

    def fail(times: int) -> None:
        for i in range(times):
            with pytest.raises((IndexError, ValueError, RuntimeError)):
                mistakes[i % len(mistakes)]()

    fail(500)
    before = _resident()
    calls = amount(2_000, 100_000)
    fail(calls)
    grown = _resident() - before
    note(calls=calls, grown_bytes=grown)
    assert grown < 4 * _MIB


def test_small_calls(amount: Callable[[int, int], int], note: Callable[..., None]) -> None:
    """How long each takes is noted, not tested: the machine may do something else meanwhile."""
    x, target = torch.randn(32, 10), torch.zeros(32, dtype=torch.long)
    criterion = nllx.CrossEntropyLoss()
    calls = amount(20_000, 1_000_000)
    took = torch.zeros(calls, dtype=torch.float64)
    expected = criterion(x, target)
    before = _resident()
    for i in range(calls):
        start = time.perf_counter()
        loss = criterion(x, target)
        took[i] = time.perf_counter() - start
    assert torch.equal(loss, expected)
    grown = _resident() - before
    took = took.mul(1e6).sort().values
    at = {f"{p:g} %": round(took[min(calls - 1, int(p / 100 * calls))].item(), 2) for p in (50, 99, 99.9, 100)}
    note(calls=calls, microseconds=at, grown_bytes=grown)
    assert grown < 4 * _MIB + 8 * calls  # `took` is touched page by page


def _steps() -> list[Callable[[], Any]]:
    """Training steps of many kinds; each leaves nothing behind."""
    f = nllx.functional

    def train(*shape: int, dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[], Any]:
        leaf = torch.randn(shape).to(dtype).requires_grad_()
        target = torch.randint(shape[1], (shape[0], *shape[2:]))

        def step() -> None:
            leaf.grad = None
            f.cross_entropy(leaf * 1, target, **options).backward()

        return step

    x, target = torch.randn(256, 500), torch.randint(500, (256,))
    leaf = torch.randn(64, 40, requires_grad=True)

    def second_order() -> None:
        (gradient,) = torch.autograd.grad(f.cross_entropy(leaf, target[:64] % 40), leaf, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), leaf)

    return [
        train(256, 1000, label_smoothing=0.1),
        train(64, 32000, inplace_backward=True),
        train(2048, 1000, dtype=torch.bfloat16),
        train(2, 21, 64, 64, weight=torch.rand(21)),
        train(512, 10, reduction="sum"),
        lambda: f.cross_entropy_value_and_grad(x, target, out=torch.empty_like(x)),
        lambda: torch.func.vmap(torch.func.grad(f.cross_entropy))(x, target),
        lambda: f.nll_loss(f.log_softmax(x, 1), target),
        second_order,
        lambda: f.cross_entropy(x, x.softmax(1)),
    ]


def test_mixed_training_in_flat_memory(amount: Callable[[int, int], int], note: Callable[..., None]) -> None:
    torch.manual_seed(0)
    steps, seconds = _steps(), amount(4, 600)
    start, done, marks = time.monotonic(), 0, []
    while time.monotonic() < start + seconds or len(marks) < 5:
        for step in steps:
            step()
        done += len(steps)
        if time.monotonic() > start + seconds * len(marks) / 5:
            marks.append(_resident())
    note(steps=done, seconds=seconds, resident_MiB=[round(m / _MIB, 1) for m in marks])
    assert marks[-1] - marks[1] < 8 * _MIB  # the first part fills what allocators keep

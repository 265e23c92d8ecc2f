"""More elements than a 32-bit index can name, on the CPU: runs where NLLX_TORTURE=long and the memory is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nllx

_GIB = 1 << 30
_LONG = os.environ.get("NLLX_TORTURE") == "long"


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.fixture(autouse=True)
def _needs_memory() -> Iterator[None]:
    if not _LONG:
        pytest.skip("NLLX_TORTURE=long: 15 GiB and minutes")
    if _available() < 16 * _GIB:
        pytest.skip(f"{_available() / _GIB:.0f} GiB of memory are free, 16 are needed")
    before = torch.get_num_threads()
    torch.set_num_threads(torch.multiprocessing.cpu_count())
    yield
    torch.set_num_threads(before)


def _fill(logits: Tensor) -> None:
    """Values that differ along every dimension, without a random number for each."""
    pattern = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    flat = logits.view(-1)
    for begin in range(0, flat.numel(), pattern.numel()):
        part = flat[begin : begin + pattern.numel()]
        part.copy_(pattern.roll(begin // pattern.numel() * 7919)[: part.numel()])


@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_more_than_2_to_the_31_elements(layout: str, note: Callable[..., None]) -> None:
    shape = (67_200, 32_000) if layout == "rows" else (1, 40, 7_400, 7_400)
    logits = torch.empty(shape, dtype=torch.bfloat16)
    assert logits.numel() > 2**31
    _fill(logits)
    classes = shape[1]
    target = torch.randint(classes, (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(1))
    loss, gradient = nllx.functional.cross_entropy_value_and_grad(logits, target, reduction="sum")
    losses = nllx.functional.cross_entropy(logits, target, reduction="none")
    total, checked = losses.double().sum().item(), 0
    assert abs(loss.double().item() / total - 1) < 2**-8
    # Slices from the beginning, the middle and the end, beyond 2^31, against torch in float64.
    axis = 0 if layout == "rows" else 2
    for begin in (0, shape[axis] // 2, shape[axis] - 8):
        x = logits.narrow(axis, begin, 8).double()
        y = target.narrow(axis if axis == 0 else 1, begin, 8)
        x.requires_grad_()
        expected = torch.nn.functional.cross_entropy(x, y, reduction="none")
        (g,) = torch.autograd.grad(expected.sum(), x)
        actual = losses.narrow(axis if axis == 0 else 1, begin, 8)
        torch.testing.assert_close(actual.double(), expected.detach(), rtol=2**-8, atol=1e-3)
        torch.testing.assert_close(gradient.narrow(axis, begin, 8).double(), g, rtol=2**-8, atol=1e-6)
        checked += x.numel()
    note(elements=logits.numel(), compared=checked)

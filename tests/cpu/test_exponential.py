"""The exponential of the CPU kernels over its whole range, seen through gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import nllx

# Every layout has its own loop over the classes: few classes, rows shorter and longer than a group of vectors, planes.
_LAYOUTS = {"few": (2, False), "short": (40, False), "long": (300, False), "planes": (3, True)}


def _gradient(d: Tensor, layout: str) -> Tensor:
    """exp(d) / (1 + exp(d)): the gradient of class 1 where the logits are 0 (the target), d, -inf, -inf, ..."""
    classes, planes = _LAYOUTS[layout]
    logits = torch.full((len(d), classes), -math.inf, dtype=d.dtype)
    logits[:, 0], logits[:, 1] = 0.0, d
    logits = logits.T.contiguous()[None] if planes else logits
    logits.requires_grad_()
    target = torch.zeros(1, len(d), dtype=torch.int64) if planes else torch.zeros(len(d), dtype=torch.int64)
    nllx.functional.cross_entropy(logits, target, reduction="sum").backward()
    assert logits.grad is not None
    grad = logits.grad[0, 1] if planes else logits.grad[:, 1]
    others = logits.grad[0, 2:] if planes else logits.grad[:, 2:]
    assert (others == 0).all()
    return grad


def _worst(d: Tensor, layout: str) -> float:
    """The largest relative error, in roundings of the dtype."""
    exact = torch.sigmoid(d.double())
    error = ((_gradient(d, layout).double() - exact) / exact).abs()
    return float(error.max()) / torch.finfo(d.dtype).eps


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_float32(layout: str) -> None:
    """A few roundings, down to the smallest normal number: none that grows with the argument."""
    points = 100_001 if layout in ("short", "long") else 1_000_001
    assert _worst(torch.linspace(-87.3, 0, points), layout) < 4
    assert _worst(-torch.logspace(-30, 1.9, 100_001), layout) < 4


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_float64(layout: str) -> None:
    points = 50_001 if layout in ("short", "long") else 200_001
    assert _worst(torch.linspace(-708, 0, points, dtype=torch.float64), layout) < 4


@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_of_the_range(layout: str, dtype: torch.dtype) -> None:
    """exp(0) is exactly 1, and what is too small is at most the smallest normal number, zero in the end."""
    tiny = torch.finfo(dtype).tiny
    grad = _gradient(torch.tensor([0.0, -0.0, -760.0, -1e30, -math.inf], dtype=dtype), layout)
    assert grad.tolist() == [0.5, 0.5, 0.0, 0.0, 0.0]
    lowest = math.log(tiny)
    grad = _gradient(torch.linspace(lowest - 20, lowest, 1001, dtype=dtype), layout)
    assert (grad >= 0).all()
    assert (grad <= 1.001 * tiny).all()

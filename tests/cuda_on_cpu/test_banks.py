"""Shared memory gives a warp one word of each of its 32 banks in a cycle: the rows of a tile do not meet in them."""

from __future__ import annotations

import pytest
import torch
from cases import Case, build
from comparison import variant
from emulator import Kernels
from launches import Settings, run


def _most_tile_classes(dtype: torch.dtype) -> int:
    return 16 if dtype == torch.float64 else 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("together", [False, True])
def test_tile_rows(dtype: torch.dtype, smoothing: float, together: bool, kernels: Kernels) -> None:
    """…from an even and an odd element on."""
    conflicts = {}
    for classes in range(1, _most_tile_classes(dtype) + 1):
        problem = build(variant(Case("", "", (256, classes), dtype=dtype, label_smoothing=smoothing)))
        for shift in (0, 1):
            kernels.count_banks(True)
            run(kernels, problem, Settings(together=together, shifts=(shift, shift)))
            cycles = kernels.count_banks(False)
            assert any(place.startswith("cross_entropy") for place in cycles), cycles
            # Where rows are not of whole words every other one begins within one, and no order parts the two kinds.
            allowed = 2 if classes * dtype.itemsize % 4 else 1
            for place, most in cycles.items():
                if most > allowed:
                    conflicts[place, classes] = max(most, conflicts.get((place, classes), 0))
    assert not conflicts

"""csrc/cuda/plan.cpp: which kernel solves a problem, and that its threads cover it."""

from __future__ import annotations

import itertools

import pytest
from emulator import FAMILIES, PLANES, ROWS, CudaPlan, Extent, Kernels

SIZES = [n + d for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 1000, 2048, 8192, 50257, 2**31) for d in (-1, 0, 1) if n + d]
COUNTS = [1, 2, 7, 33, 128, 1000, 2**20, 2**20 + 1, 2**31 + 1, 2**40]
MOST_BLOCKS = 2**31 - 1  # of a grid, in its first dimension


def fields(plan: CudaPlan) -> tuple[str, int, int, int, int]:
    return FAMILIES[plan.family], plan.threads, plan.threads_per_row, plan.rows_per_block, plan.values_per_thread


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (1, ("register rows", 128, 1, 128, 1)),
        (2, ("register rows", 128, 2, 64, 1)),
        (10, ("register rows", 128, 16, 8, 1)),
        (16, ("register rows", 128, 16, 8, 1)),
        (17, ("register rows", 128, 32, 4, 1)),
        (33, ("register rows", 128, 32, 4, 2)),
        (65, ("register rows", 128, 32, 4, 4)),
        (129, ("register rows", 128, 32, 4, 8)),
        (256, ("register rows", 128, 32, 4, 8)),
        (257, ("block rows", 128, 128, 1, 0)),
        (2049, ("block rows", 256, 256, 1, 0)),
        (8193, ("block rows", 512, 512, 1, 0)),
        (2**31, ("block rows", 512, 512, 1, 0)),
    ],
)
def test_reduction_over_rows(kernels: Kernels, classes: int, expected: tuple) -> None:
    assert fields(kernels.plan("reduction", Extent(1000, classes, 1), ROWS)) == expected


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (1, ("block rows", 128, 1, 128, 0)),
        (10, ("block rows", 128, 16, 8, 0)),
        (256, ("block rows", 128, 32, 4, 0)),
        (257, ("block rows", 128, 128, 1, 0)),
        (50257, ("block rows", 512, 512, 1, 0)),
    ],
)
def test_rows_without_registers(kernels: Kernels, classes: int, expected: tuple) -> None:
    assert fields(kernels.plan("rows", Extent(1000, classes, 1), ROWS)) == expected


@pytest.mark.parametrize(
    ("classes", "element_bytes", "expected"),
    [
        (1, 2, ("block rows", 256, 1, 256, 0)),
        (8, 2, ("block rows", 256, 1, 256, 0)),
        (9, 2, ("block rows", 256, 2, 128, 0)),
        (9, 4, ("block rows", 256, 4, 64, 0)),
        (9, 8, ("block rows", 256, 8, 32, 0)),
        (1000, 4, ("block rows", 256, 256, 1, 0)),
        (50257, 2, ("block rows", 256, 256, 1, 0)),
    ],
)
def test_streaming(kernels: Kernels, classes: int, element_bytes: int, expected: tuple) -> None:
    assert fields(kernels.plan("streaming", Extent(1000, classes, 1), ROWS, element_bytes)) == expected


@pytest.mark.parametrize(("inner", "threads"), [(1, 32), (32, 32), (33, 64), (65, 128), (129, 256), (10**6, 256)])
def test_planes(kernels: Kernels, inner: int, threads: int) -> None:
    extent = Extent(3, 19, inner)
    plans = [kernels.plan("reduction", extent, PLANES), kernels.plan("rows", extent, PLANES)]
    plans.append(kernels.plan("streaming", extent, PLANES, 2))
    for plan in plans:
        assert fields(plan) == ("planes", threads, 1, threads, 0)
        assert plan.blocks == 3 * -(-inner // threads)


@pytest.mark.parametrize("name", ["reduction", "rows", "streaming"])
@pytest.mark.parametrize("layout", [ROWS, PLANES])
def test_invariants(kernels: Kernels, name: str, layout: int) -> None:
    for classes, outer, inner in itertools.product(SIZES, COUNTS, [1, 2, 63, 1025, 2**22]):
        for element_bytes in (2, 4, 8) if name == "streaming" else (0,):
            extent = Extent(outer, classes, inner)
            plan = kernels.plan(name, extent, layout, *([element_bytes] if element_bytes else []))
            where = f"{outer} x {classes} x {inner}, {element_bytes} bytes: {fields(plan)}, {plan.blocks} blocks"
            assert FAMILIES[plan.family] == "planes" if layout == PLANES else "rows" in FAMILIES[plan.family], where
            assert plan.threads in (32, 64, 128, 256, 512), where
            assert plan.threads_per_row * plan.rows_per_block == plan.threads, where
            assert plan.threads_per_row.bit_count() == 1, where
            # Rows are summed by a warp, by part of one, or by the whole block.
            assert plan.threads_per_row <= 32 or plan.threads_per_row == plan.threads or name == "streaming", where
            if FAMILIES[plan.family] == "register rows":
                assert plan.values_per_thread in (1, 2, 4, 8), where
                assert plan.values_per_thread * plan.threads_per_row >= classes, where
            units = outer * -(-inner // plan.threads) if layout == PLANES else -(-extent.rows // plan.rows_per_block)
            # One block for each unit of work, or so many that walking on is no loss.
            assert plan.blocks == units or 2**16 < plan.blocks < min(units, MOST_BLOCKS), where

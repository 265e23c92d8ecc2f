"""csrc/cuda/kernels/plan.cpp: which kernel solves a problem on which device, and that its threads cover it."""

from __future__ import annotations

import itertools

import pytest
from emulator import (
    BACKWARD,
    CONSERVATIVE,
    FAMILIES,
    FORWARD,
    H100,
    LOG_SOFTMAX,
    PLANES,
    ROWS,
    VALUE_AND_GRAD,
    CudaDevice,
    CudaPlan,
    CudaProblem,
    Extent,
    Kernels,
)
from gpus import GPUS

DEVICES = {name: CudaDevice(*gpu) for name, gpu in GPUS.items()}


def rows(count: int, classes: int, element_bytes: int, dense: bool = True, aligned: bool | None = None) -> CudaProblem:
    if aligned is None:
        aligned = classes * element_bytes % 16 == 0
    return CudaProblem(Extent(count, classes, 1), ROWS, dense, aligned, False, element_bytes)


def planes(outer: int, classes: int, inner: int, element_bytes: int, has_terms: bool = False) -> CudaProblem:
    aligned = inner * element_bytes % 16 == 0
    return CudaProblem(Extent(outer, classes, inner), PLANES, False, aligned, has_terms, element_bytes)


def fields(plan: CudaPlan) -> tuple[str, int, int, int, int, int]:
    return FAMILIES[plan.family], plan.threads, plan.threads_per_row, plan.splits, plan.cluster, plan.shared_bytes


@pytest.mark.parametrize(
    ("op", "problem", "expected"),
    [
        (FORWARD, rows(10**6, 1, 2), ("tile rows", 128, 1, 1, 1, 544)),
        (FORWARD, rows(10**6, 32, 4), ("tile rows", 128, 1, 1, 1, 32800)),
        (FORWARD, rows(10**6, 32, 4, dense=False), ("register rows", 128, 1, 1, 1, 0)),
        (FORWARD, rows(10**6, 33, 4), ("register rows", 128, 2, 1, 1, 0)),
        (FORWARD, rows(10**6, 256, 2), ("register rows", 128, 8, 1, 1, 0)),
        (FORWARD, rows(10**6, 1000, 2), ("register rows", 128, 32, 1, 1, 0)),
        (FORWARD, rows(10**6, 1024, 2), ("register rows", 128, 32, 1, 1, 0)),
        (FORWARD, rows(10**6, 1024, 4), ("register rows", 128, 32, 1, 1, 0)),
        (FORWARD, rows(10**6, 1024, 8), ("block rows", 128, 128, 1, 1, 8192)),  # float64: twice the registers
        (FORWARD, rows(10**6, 1024, 2, aligned=False), ("block rows", 128, 128, 1, 1, 16384)),  # one vector more
        (FORWARD, rows(10**6, 8192, 2), ("block rows", 128, 128, 1, 1, 16384)),
        (FORWARD, rows(8192, 32000, 2), ("block rows", 256, 256, 1, 1, 49152)),
        (FORWARD, rows(4096, 50257, 2), ("block rows", 256, 256, 1, 1, 49152)),
        (FORWARD, rows(8, 262144, 2), ("block rows", 256, 256, 33, 1, 32768)),
        (FORWARD, rows(8, 262144, 4), ("block rows", 256, 256, 33, 1, 0)),
        (FORWARD, rows(10**7, 10, 2), ("tile rows", 128, 1, 1, 1, 10304)),
        (BACKWARD, rows(10**6, 10, 2), ("tile rows", 128, 1, 1, 1, 5152)),
        (BACKWARD, rows(10**6, 1000, 2), ("block rows", 256, 32, 1, 1, 0)),
        (BACKWARD, rows(4096, 50257, 2), ("block rows", 256, 256, 1, 1, 0)),
        (BACKWARD, rows(8, 262144, 4), ("block rows", 256, 256, 33, 1, 0)),
        (VALUE_AND_GRAD, rows(10**6, 1000, 2), ("register rows", 128, 32, 1, 1, 0)),
        (VALUE_AND_GRAD, rows(8192, 32000, 2), ("block rows", 256, 256, 1, 1, 65536)),
        (FORWARD, rows(64, 262144, 2), ("block rows", 256, 256, 1, 4, 49152)),
        (FORWARD, rows(33, 262144, 2), ("block rows", 256, 256, 1, 8, 49152)),
        (VALUE_AND_GRAD, rows(4096, 32000, 4), ("block rows", 256, 256, 1, 2, 65536)),
        (VALUE_AND_GRAD, rows(2048, 128256, 2), ("block rows", 256, 256, 1, 4, 65536)),
        (VALUE_AND_GRAD, rows(2048, 262144, 4), ("block rows", 256, 256, 1, 8, 73728)),  # the rest from the cache
        (VALUE_AND_GRAD, rows(2048, 262144, 8), ("block rows", 256, 256, 1, 1, 0)),  # forward, then backward
        (VALUE_AND_GRAD, rows(64, 262144, 2), ("block rows", 256, 256, 1, 8, 65536)),
        (VALUE_AND_GRAD, rows(8, 262144, 2), ("block rows", 256, 256, 1, 1, 0)),  # more blocks than a cluster has
        (LOG_SOFTMAX, rows(2048, 262144, 2), ("block rows", 256, 256, 1, 8, 65536)),
        (LOG_SOFTMAX, rows(10**6, 10, 4), ("register rows", 128, 1, 1, 1, 0)),
        (LOG_SOFTMAX, rows(4096, 5000, 4), ("block rows", 256, 256, 1, 1, 20480)),
        (FORWARD, planes(16, 21, 512 * 512, 2), ("planes", 256, 256, 1, 1, 49152)),
        (FORWARD, planes(2, 1000, 49, 4), ("planes", 256, 32, 1, 1, 0)),
    ],
)
def test_on_h100(op: int, problem: CudaProblem, expected: tuple, kernels: Kernels) -> None:
    plan = kernels.plan(op, problem)
    assert fields(plan) == expected
    assert plan.reason


def test_vectors_of_planes(kernels: Kernels) -> None:
    """Wide, aligned planes are read 8 bytes at a time; with coefficients of the classes, or misaligned, by rows."""
    wide = (16, 21, 512 * 512)
    assert kernels.plan(FORWARD, planes(*wide, 2)).vector_elements == 4
    assert kernels.plan(BACKWARD, planes(*wide, 4)).vector_elements == 2
    assert kernels.plan(FORWARD, planes(*wide, 2, has_terms=True)).vector_elements == 1
    assert kernels.plan(FORWARD, planes(16, 21, 511 * 511, 2)).vector_elements == 1
    assert kernels.plan(FORWARD, planes(1, 21, 64 * 64, 2)).vector_elements == 1  # would leave most of the chip idle


@pytest.mark.parametrize("name", DEVICES)
def test_of_every_architecture(name: str, kernels: Kernels) -> None:
    """The sums of the losses do not depend on the device, and shared memory is never more than there is."""
    for op in (FORWARD, BACKWARD, VALUE_AND_GRAD, LOG_SOFTMAX):
        for classes, element_bytes, has_terms in itertools.product((10, 1000, 32000, 262144), (2, 4, 8), (False, True)):
            problem = rows(4096, classes, element_bytes)
            problem.has_terms = has_terms
            plan, on_h100 = kernels.plan(op, problem, DEVICES[name]), kernels.plan(op, problem)
            assert (plan.rows_per_chunk, plan.chunks) == (on_h100.rows_per_chunk, on_h100.chunks)
            assert plan.shared_bytes + (3 << 10) <= DEVICES[name].shared_bytes
            assert (plan.cluster > 1) <= (DEVICES[name].cluster_blocks > 1)
            # Loads run ahead wherever kernels can have them do so.
            streams = op == FORWARD and (has_terms or element_bytes != 4)
            if FAMILIES[plan.family] == "block rows" and (plan.shared_bytes > 0 or streams):
                assert (plan.ahead > 0) == DEVICES[name].async_copies


def test_conservative(kernels: Kernels) -> None:
    """Blocks that share nothing, and no copy that is asynchronous: of tiles all are, where the GPU can."""
    for op, classes, count, element_bytes in itertools.product(
        (FORWARD, BACKWARD, VALUE_AND_GRAD, LOG_SOFTMAX), (1, 10, 1000, 32000, 262144), (8, 64, 4096, 10**6), (2, 4, 8)
    ):
        for problem in (rows(count, classes, element_bytes), planes(16, classes, 1 << 18, element_bytes)):
            plan = kernels.plan(op, problem, CONSERVATIVE)
            assert FAMILIES[plan.family] != "tile rows"
            assert (plan.cluster, plan.ahead) == (1, 0)
            assert plan.splits == 1 or op == BACKWARD  # there each block writes its part, and nothing is shared


SIZES = [n + d for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 1000, 2048, 8192, 50257, 2**31) for d in (-1, 0, 1) if n + d]
COUNTS = [1, 2, 7, 33, 128, 1000, 2**20, 2**20 + 1, 2**31 + 1, 2**37]


@pytest.mark.parametrize("op", [FORWARD, BACKWARD, VALUE_AND_GRAD, LOG_SOFTMAX])
@pytest.mark.parametrize("element_bytes", [2, 4, 8])
def test_invariants_of_rows(op: int, element_bytes: int, kernels: Kernels) -> None:
    for classes, count, dense, aligned in itertools.product(SIZES, COUNTS, (False, True), (False, True)):
        for device in (H100, DEVICES["sm_75"]):
            plan = kernels.plan(op, rows(count, classes, element_bytes, dense, aligned), device)
            where = f"{count} x {classes}, {element_bytes} bytes: {fields(plan)}, {plan.chunks} chunks"
            assert plan.threads in (128, 256), where
            assert plan.threads_per_row.bit_count() == 1, where
            family = FAMILIES[plan.family]
            assert plan.rows_at_once * plan.threads_per_row == plan.threads, where
            if family == "tile rows":
                assert dense, where
                assert classes <= 32, where
            if family == "register rows":
                held = plan.threads_per_row * (4 if element_bytes == 2 else 8) * (16 // element_bytes)
                assert plan.threads_per_row <= 32, where
                assert held >= classes + (0 if aligned else 16 // element_bytes - 1), where
            if family == "block rows" and op != BACKWARD:
                assert plan.threads_per_row == plan.threads, where
            assert 1 <= plan.splits <= 64, where
            assert plan.cluster in (1, 2, 4, 8), where
            assert plan.cluster <= device.cluster_blocks, where
            assert plan.cluster == 1 or (family, plan.splits) == ("block rows", 1), where
            if plan.splits > 1:
                assert plan.rows_at_once == plan.rows_per_chunk == 1, where
                assert count <= 1024, where
            assert plan.rows_per_chunk % plan.rows_at_once == 0, where
            assert (plan.chunks - 1) * plan.rows_per_chunk < count <= plan.chunks * plan.rows_per_chunk, where
            assert plan.chunks <= 4096 or op == BACKWARD, where


@pytest.mark.parametrize("op", [FORWARD, BACKWARD, VALUE_AND_GRAD, LOG_SOFTMAX])
def test_invariants_of_planes(op: int, kernels: Kernels) -> None:
    for outer, inner, has_terms in itertools.product(COUNTS, [1, 2, 63, 64, 1025, 2**22], (False, True)):
        for element_bytes in (2, 4, 8):
            plan = kernels.plan(op, planes(outer, 19, inner, element_bytes, has_terms))
            ahead = op in (FORWARD, VALUE_AND_GRAD) and plan.vector_elements > 1
            assert (plan.ahead > 0) == ahead, "kernels rely on it"
            where = f"{outer} x {inner}, {element_bytes} bytes: {fields(plan)}, {plan.chunks} chunks"
            assert plan.threads == 256, where
            assert plan.threads_per_row in (32, 64, 128, 256), where
            assert plan.rows_at_once == plan.threads_per_row * plan.vector_elements, where
            if plan.vector_elements > 1:
                assert plan.threads_per_row == plan.threads, where
                assert not has_terms, where
                assert inner % plan.vector_elements == 0, where
            tiles = outer * -(-inner // plan.rows_at_once)
            assert (plan.chunks - 1) * plan.rows_per_chunk < tiles <= plan.chunks * plan.rows_per_chunk, where

"""Values of every kernel over the table of cases, in several orders of threads, on grids of few blocks and at every
alignment."""

from __future__ import annotations

import dataclasses
import itertools
from ctypes import c_int64, c_uint8

import pytest
import torch
from cases import Case, build, select
from comparison import check, check_same, variant
from emulator import (
    ASCENDING,
    CONSERVATIVE,
    DESCENDING,
    FLOAT_TYPES,
    H100,
    INDEX_TYPES,
    RANDOM,
    BadTarget,
    CudaDevice,
    Kernels,
    kernel_bounds,
)
from gpus import GPUS
from launches import Settings, run
from memory import Memory, address

# The entries of the operators launch nothing for an empty tensor and for a number.
CASES = select(lambda case: case.shape != () and case.numel > 0)

TURING = CudaDevice(*GPUS["sm_75"])
# Of so few multiprocessors that rows are not split: each thread has many loads, two batches or one ahead.
SMALL_GPUS = CudaDevice(1, 227 << 10), CudaDevice(1, 99 << 10)
# Few blocks, so that they walk over rows and reuse their shared memory.
SETTINGS = [
    Settings(order=DESCENDING, most_blocks=1),
    Settings(order=RANDOM),
    Settings(order=RANDOM + 1, most_blocks=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value(case: Case, kernels: Kernels) -> None:
    problem = build(case)
    check(case, run(kernels, problem))
    if case.classes > 512:
        for device in (TURING, *SMALL_GPUS):
            check(case, run(kernels, problem, Settings(device=device)))


REDUCED = [case for case in CASES if case.op == "cross_entropy" and case.reduction != "none"]
# So little shared memory that a tile fits, and no row: a part is read again. As on sm_75, nothing is copied asynchronously.
SMALL = CudaDevice(2, 20 << 10, async_copies=False)


@pytest.mark.parametrize("case", REDUCED, ids=str)
def test_value_and_grad(case: Case, kernels: Kernels) -> None:
    problem = build(case)
    for device in (H100, SMALL):
        check(case, run(kernels, problem, Settings(together=True, device=device)))


@pytest.mark.parametrize("case", REDUCED, ids=str)
def test_gradient_over_the_logits(case: Case, kernels: Kernels) -> None:
    problem = build(case)
    expected = run(kernels, problem, Settings(together=True))
    for order in (DESCENDING, RANDOM):
        result = run(kernels, problem, Settings(together=True, order=order, in_place=True))
        check_same(result, expected, "where the gradient is written, and the order")


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_conservative_plans(case: Case, kernels: Kernels) -> None:
    problem, settings = build(case), Settings(device=CONSERVATIVE)
    check(case, run(kernels, problem, settings))
    if case in REDUCED:
        check(case, run(kernels, problem, dataclasses.replace(settings, together=True, in_place=True)))


@pytest.mark.parametrize("shape", [(300, 100), (70, 2000), (9000, 40), (5, 9, 999)], ids=str)
@pytest.mark.parametrize("op", ["cross_entropy", "nll_loss"])
def test_sums_by_one_more_launch(op: str, shape: tuple[int, ...], kernels: Kernels) -> None:
    """The same bits as by the last block to finish."""
    problem = build(variant(Case("", "", shape, op=op, weight="positive", ignored="some")))
    by_last_block = CudaDevice(132, 227 << 10, async_copies=False)
    for together in (False, True):
        results = [
            run(kernels, problem, Settings(device=device, together=together))
            for device in (CONSERVATIVE, by_last_block)
        ]
        check_same(*results, "what adds the losses of its chunks")


# Of the problems with ten thousands of rows nothing is learnt that those with thousands do not show.
@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.rows <= 10_000], ids=str)
def test_same_in_every_order_and_on_every_grid(case: Case, kernels: Kernels) -> None:
    problem = build(case)
    expected = run(kernels, problem)
    for settings in SETTINGS:
        check_same(run(kernels, problem, settings), expected, f"the order of threads or the blocks: {settings}")


@pytest.mark.parametrize("op", ["cross_entropy", "log_softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [1, 5, 33, 300, 1100])
def test_every_alignment(op: str, dtype: torch.dtype, classes: int, kernels: Kernels) -> None:
    """Input and gradient begin anywhere between two 16-byte boundaries, and so does each row."""
    case = Case("", "", (3, classes), op=op, dtype=dtype, layout="padded", reduction="none", ignored="some")
    case = variant(case)
    problem = build(case)
    per_vector = 16 // dtype.itemsize
    for shifts in {(a, b) for a in range(per_vector) for b in (0, 1, a)}:
        check(case, run(kernels, problem, Settings(shifts=shifts)))


@pytest.mark.parametrize("op", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_loss_of_half_logits(op: str, reduction: str, dtype: torch.dtype, kernels: Kernels) -> None:
    for shape in ((9, 10), (3, 300), (2, 9, 5)):
        case = variant(Case("", "", shape, op=op, dtype=dtype, reduction=reduction, weight="positive", ignored="some"))
        result = run(kernels, build(case), Settings(loss_dtype=torch.float32))
        assert result.output.dtype == torch.float32
        check(case, result)


TILE = "cross_entropy_tile_rows_kernel<T, kTerms>"
REGISTERS = "cross_entropy_register_rows_kernel<T, kTerms, {}>"
BLOCK, PLANES = "cross_entropy_block_rows_kernel<T, kTerms>", "cross_entropy_planes_kernel<T, 1, kTerms>"
PLANE_VECTORS = "cross_entropy_planes_kernel<T, kNeighbours<T>, false>"
TILE_BACKWARD = "cross_entropy_backward_tile_rows_kernel<T, kTerms>"
ROWS_BACKWARD = "cross_entropy_backward_rows_kernel<T, kTerms>"
PLANES_BACKWARD = "cross_entropy_backward_planes_kernel<T, 1>"
PLANE_VECTORS_BACKWARD = "cross_entropy_backward_planes_kernel<T, kNeighbours<T>>"
MASS_ROWS, MASS_PLANES = "probability_mass_rows_kernel<T>", "probability_mass_planes_kernel<T>"
DIVISOR, LOSS_SUM = "cross_entropy_divisor_kernel<T>", "loss_sum_kernel<T>"
TOGETHER = Settings(together=True)
# A forward and a backward are one launch each, and the gradient of a mean in the forward needs its divisor before.
LAUNCHES = [
    (Case("", "", (3, 1)), Settings(), [TILE, TILE_BACKWARD]),
    (Case("", "", (3, 32)), Settings(), [TILE, TILE_BACKWARD]),
    (Case("", "", (3, 33)), Settings(), [REGISTERS.format("false"), ROWS_BACKWARD]),
    (Case("", "", (3, 1024)), Settings(), [REGISTERS.format("false"), ROWS_BACKWARD]),
    (Case("", "", (3, 1025)), Settings(), [BLOCK, ROWS_BACKWARD]),
    (Case("", "", (70_000, 2)), Settings(), [TILE, TILE_BACKWARD]),
    (Case("", "", (3, 10)), TOGETHER, [DIVISOR, TILE]),
    (Case("", "", (3, 100)), TOGETHER, [DIVISOR, REGISTERS.format("true")]),
    (Case("", "", (3, 100), reduction="sum"), TOGETHER, [REGISTERS.format("true")]),
    (Case("", "", (3, 1100)), TOGETHER, [DIVISOR, "cross_entropy_value_and_grad_block_rows_kernel<T, kTerms>"]),
    (Case("", "", (3, 70_000)), TOGETHER, [BLOCK, ROWS_BACKWARD]),  # split over blocks
    (Case("", "", (2, 9, 7)), TOGETHER, [PLANES, PLANES_BACKWARD]),
    # Where the last block to finish is not to add the chunks.
    (Case("", "", (300, 10)), Settings(device=CONSERVATIVE), [REGISTERS.format("false"), LOSS_SUM, ROWS_BACKWARD]),
    (
        Case("", "", (5000, 40)),
        Settings(device=CONSERVATIVE, together=True),
        [DIVISOR, LOSS_SUM, REGISTERS.format("true"), LOSS_SUM],
    ),
    (Case("", "", (3, 10), target="probabilities"), Settings(), [TILE, MASS_ROWS, TILE_BACKWARD]),
    (Case("", "", (3, 300), target="probabilities"), Settings(), [REGISTERS.format("false"), MASS_ROWS, ROWS_BACKWARD]),
    (Case("", "", (2, 300, 7)), Settings(), [PLANES, PLANES_BACKWARD]),
    (Case("", "", (2, 9, 8, 1024)), Settings(device=SMALL), [PLANE_VECTORS, PLANE_VECTORS_BACKWARD]),
    (Case("", "", (2, 9, 7), target="probabilities"), Settings(), [PLANES, MASS_PLANES, PLANES_BACKWARD]),
    (Case("", "", (3, 257), layout="transposed"), Settings(), [PLANES, PLANES_BACKWARD]),
    (Case("", "", (2, 9, 5, 7), layout="channels_last"), Settings(), [TILE, TILE_BACKWARD]),
    (Case("", "", (3, 10), op="nll_loss"), Settings(), ["nll_loss_forward_kernel<T>", "nll_loss_backward_kernel<T>"]),
    *(
        (case, Settings(), [f"log_softmax_{way}_{family}_kernel<T>" for way in ("forward", "backward")])
        for case, family in (
            (Case("", "", (3, 10), op="log_softmax"), "register_rows"),
            (Case("", "", (3, 1100), op="log_softmax"), "block_rows"),
            (Case("", "", (3, 300), op="log_softmax", dim=0), "planes"),
        )
    ),
]


def _name(case: object) -> str:
    return f"{case.op}-{case.shape}-{case.target}-{case.layout}" if isinstance(case, Case) else ""


@pytest.mark.parametrize(("case", "settings", "expected"), LAUNCHES, ids=_name)
def test_launches(case: Case, settings: Settings, expected: list[str], kernels: Kernels) -> None:
    kernels.launched.clear()
    case = variant(case)
    result = run(kernels, build(case), settings)
    assert [launch.kernel for launch in kernels.launched] == expected
    check(case, result)


def test_every_kernel_is_launched() -> None:
    launched = {name.split("<")[0] for _, _, names in LAUNCHES for name in names}
    of_options = {
        f"{op}_{name}_kernel"
        for op in ("softmax_statistics", "cross_entropy_options")
        for name in ("rows", "planes", "backward_rows", "backward_planes")
    }
    in_other_files = {"checked_target_kernel", "mse_loss_forward_kernel", "mse_loss_backward_kernel", *of_options}
    assert launched | in_other_files == kernel_bounds().keys()


def test_cases_select_every_plan(kernels: Kernels) -> None:
    """The table has cross_entropy problems of every dtype for every family."""
    selected = set()
    for case in CASES:
        if case.op == "cross_entropy":
            kernels.launched.clear()
            run(kernels, build(case))
            selected |= {(case.dtype, launch.name) for launch in kernels.launched}
    for dtype, family in itertools.product(FLOAT_TYPES, ("tile_rows", "register_rows", "block_rows", "planes")):
        assert (dtype, f"cross_entropy_{family}_kernel") in selected


# A few long rows are split over blocks: states in a workspace, merged by the last block to finish.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_split_rows(dtype: torch.dtype, smoothing: float, kernels: Kernels) -> None:
    case = Case("", "", (3, 70_001), dtype=dtype, label_smoothing=smoothing, ignored="some", weight="positive")
    case = variant(case)
    problem = build(case)
    kernels.launched.clear()
    expected = run(kernels, problem)
    assert all(launch.blocks > 3 for launch in kernels.launched)
    check(case, expected)
    for settings in SETTINGS:
        check_same(run(kernels, problem, settings), expected, f"the order of the blocks: {settings}")


# More rows than chunks of one tile: the tiles of a chunk follow each other through a ring of shared memory.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "shift", "rows"), [(torch.float32, 0, 530_000), (torch.bfloat16, 3, 1_600_000)], ids=str
)
def test_tiles_of_a_chunk(dtype: torch.dtype, shift: int, rows: int, kernels: Kernels) -> None:
    case = variant(Case("", "", (rows, 2), dtype=dtype, ignored="some", weight="positive"))
    problem = build(case)
    for device in (H100, TURING):  # one tile ahead, or three, and none
        settings = Settings(device=device, together=True, shifts=(shift, shift))
        kernels.launched.clear()
        expected = run(kernels, problem, settings)
        assert kernels.launched[-1].blocks < rows / 128 / 1.5
        check(case, expected)
        again = dataclasses.replace(settings, order=RANDOM, most_blocks=1, in_place=True)
        check_same(run(kernels, problem, again), expected, "the order of threads or the blocks")


def _clusters(kernels: Kernels) -> list[int]:
    return [launch.cluster for launch in kernels.launched]


# Of these devices a row of 12 KB does not fit a block's shared memory, but a cluster's, and one of 20 KB not that one
# either, where so many blocks share a multiprocessor. Forwards have more than these devices.
def tight(blocks: int = 3) -> CudaDevice:
    return CudaDevice(1, blocks * (8 << 10), 4)


def too_tight(blocks: int = 3) -> CudaDevice:
    return CudaDevice(1, blocks * 5600, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"target": "probabilities"}], ids=str)
def test_rows_of_a_cluster(dtype: torch.dtype, options: dict, kernels: Kernels) -> None:
    """A row's parts in several blocks: few long rows, and gradients of rows that one block cannot keep."""
    ignored = "none" if "target" in options else "some"
    case = Case("", "", (), dtype=dtype, ignored=ignored, weight="positive", layout="padded", **options)
    blocks = (2 if options else 3) - (dtype == torch.float64)  # as the plan has it
    for device, shape in (
        (CudaDevice(80, 227 << 10, 8), (40, 8_001)),
        (CudaDevice(64, 227 << 10, 8), (16, 65_550 // dtype.itemsize)),
        (tight(blocks), (5, 12_001 // dtype.itemsize)),
        (too_tight(blocks), (3, 20_001 // dtype.itemsize)),
    ):
        case = variant(case, shape=shape)
        problem = build(case)
        for together in (False, True) if device.multiprocessors > 1 else (True,):
            settings = Settings(device=device, together=together)
            kernels.launched.clear()
            expected = run(kernels, problem, settings)
            assert max(_clusters(kernels)) > 1
            check(case, expected)
            for other in SETTINGS:
                other = dataclasses.replace(other, device=device, together=together, in_place=together)
                check_same(run(kernels, problem, other), expected, f"the order of the blocks: {other}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_log_softmax_of_a_cluster(dtype: torch.dtype, kernels: Kernels) -> None:
    blocks = 2 if dtype == torch.float64 else 3
    for device, bytes in ((tight(blocks), 12_001), (too_tight(blocks), 20_001)):
        case = variant(Case("", "", (5, bytes // dtype.itemsize), op="log_softmax", dtype=dtype, layout="padded"))
        problem = build(case)
        kernels.launched.clear()
        expected = run(kernels, problem, Settings(device=device))
        assert min(_clusters(kernels)) > 1
        check(case, expected)
        for settings in SETTINGS:
            settings = dataclasses.replace(settings, device=device)
            check_same(run(kernels, problem, settings), expected, f"the order of the blocks: {settings}")


# A mean over nothing that is 0, from every place that writes a divisor.
@pytest.mark.parametrize("shape", [(5, 4), (3, 1000), (2, 70_001), (3, 12, 7)], ids=str)
@pytest.mark.parametrize("op", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("together", [False, True])
def test_mean_or_zero(op: str, shape: tuple[int, ...], together: bool, kernels: Kernels) -> None:
    smoothing = 0.1 if op == "cross_entropy" else 0.0
    for ignored in ("all", "some"):
        case = variant(Case("", "", shape, op=op, ignored=ignored, label_smoothing=smoothing))
        problem = build(case)
        result = run(kernels, problem, Settings(together=together, mean_or_zero=True))
        usual = run(kernels, problem, Settings(together=together))
        if ignored == "all":
            assert usual.output.isnan()
            assert result.output == 0
            assert (result.grad == 0).all()
        else:
            check_same(result, usual, "what the mean over nothing is")


# Small devices have the wide planes in vectors that the cases are too small for otherwise.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_planes_in_vectors(dtype: torch.dtype, reduction: str, kernels: Kernels) -> None:
    for shape in ((2, 9, 8, 1024), (1, 70, 16_384), (20_000, 3)):
        layout = "transposed" if len(shape) == 2 else "contiguous"
        case = Case("", "", shape, dtype=dtype, reduction=reduction, weight="positive", ignored="some", layout=layout)
        case = variant(case)
        problem = build(case)
        kernels.launched.clear()
        expected = run(kernels, problem, Settings(device=SMALL))
        assert [launch.kernel for launch in kernels.launched] == [PLANE_VECTORS, PLANE_VECTORS_BACKWARD]
        check(case, expected)
        for device in (SMALL, CudaDevice(2, 227 << 10), CudaDevice(2, 99 << 10)):  # no batch ahead, two, one
            for order in (DESCENDING, RANDOM):
                settings = Settings(device=device, order=order, most_blocks=1)
                check_same(run(kernels, problem, settings), expected, f"order, device: {settings}")


@pytest.mark.parametrize("dtype", INDEX_TYPES, ids=str)
def test_checked_target(dtype: torch.dtype, kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = (-20, 120) if dtype.is_signed else (0, 200)
    values = torch.randint(low, high, (300,), generator=generator).to(dtype)
    classes, ignore_index = 100, 7
    for order, most_blocks in ((ASCENDING, 0), (DESCENDING, 1), (RANDOM, 1)):
        memory, bad = Memory(), BadTarget()
        target, out = memory.copy(values), memory.empty(values.shape, torch.int64)
        kernels.launch(
            "checked_target",
            address(target),
            c_uint8(INDEX_TYPES[dtype]),
            c_int64(len(values)),
            c_int64(classes),
            c_int64(ignore_index),
            address(out),
            bad,
            order=order,
            most_blocks=most_blocks,
        )
        memory.check()
        wide = values.long()
        counts = (wide >= 0) & (wide < classes) & (wide != ignore_index)
        assert torch.equal(out, torch.where(counts, wide, 0))
        assert bad.ready == bad.claimed == 1
        assert not counts[bad.row]
        assert (bad.value, bad.classes, bad.ignore_index) == (wide[bad.row], classes, ignore_index)
        assert bad.value != ignore_index

"""Values of every kernel over the table of cases, in several orders of threads, on grids of few blocks and at every
alignment."""

from __future__ import annotations

from ctypes import c_int64, c_uint8

import pytest
import torch
from cases import Case, build, select
from comparison import check, check_same, variant
from emulator import (
    ASCENDING,
    DESCENDING,
    FAMILIES,
    FLOAT_TYPES,
    INDEX_TYPES,
    RANDOM,
    BadTarget,
    Kernels,
    kernel_bounds,
)
from launches import Settings, run, share_layout
from memory import Memory, address

# The entries of the operators launch nothing for an empty tensor and for a number.
CASES = select(lambda case: case.shape != () and case.numel > 0)

# Few blocks, so that they walk over rows and reuse their shared memory.
SETTINGS = [
    Settings(order=DESCENDING, most_blocks=1),
    Settings(order=RANDOM),
    Settings(order=RANDOM + 1, most_blocks=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value(case: Case, kernels: Kernels) -> None:
    check(case, run(kernels, build(case)))


# Of the problems with ten thousands of rows nothing is learnt that those with thousands do not show.
@pytest.mark.parametrize("case", [case for case in CASES if case.rows <= 10_000], ids=str)
def test_same_in_every_order_and_on_every_grid(case: Case, kernels: Kernels) -> None:
    problem = build(case)
    expected = run(kernels, problem)
    for settings in SETTINGS:
        check_same(run(kernels, problem, settings), expected, f"the order of threads or the blocks: {settings}")


@pytest.mark.parametrize("op", ["cross_entropy", "log_softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [1, 5, 33, 300])
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


def _launches(forward: str, *backward: str, partials: int = 1) -> list[str]:
    sums = ["loss_partials_kernel<T>"] + (["loss_total_kernel<T>"] if partials > 1 else [])
    return [forward, *sums, *backward]


ROWS_BACKWARD, PLANES_BACKWARD = "cross_entropy_backward_rows_kernel<T>", "cross_entropy_backward_planes_kernel<T>"
MASS_ROWS, MASS_PLANES = "probability_mass_rows_kernel<T>", "probability_mass_planes_kernel<T>"
REGISTERS = "cross_entropy_forward_register_rows_kernel<T, {}>"
BLOCK, PLANES = "cross_entropy_forward_block_rows_kernel<T>", "cross_entropy_forward_planes_kernel<T>"
LOG_SOFTMAX_ROWS = ["log_softmax_forward_rows_kernel<T>", "log_softmax_backward_rows_kernel<T>"]
LOG_SOFTMAX_PLANES = ["log_softmax_forward_planes_kernel<T>", "log_softmax_backward_planes_kernel<T>"]
LAUNCHES = [
    *(
        (Case("", "", (3, classes)), _launches(REGISTERS.format(values), ROWS_BACKWARD))
        for classes, values in ((1, 1), (32, 1), (33, 2), (64, 2), (65, 4), (128, 4), (129, 8), (256, 8))
    ),
    (Case("", "", (3, 257)), _launches(BLOCK, ROWS_BACKWARD)),
    (Case("", "", (4096, 2)), _launches(REGISTERS.format(1), ROWS_BACKWARD)),
    (Case("", "", (4097, 2)), _launches(REGISTERS.format(1), ROWS_BACKWARD, partials=2)),
    (Case("", "", (3, 10), target="probabilities"), _launches(REGISTERS.format(1), MASS_ROWS, ROWS_BACKWARD)),
    (Case("", "", (3, 300), target="probabilities"), _launches(BLOCK, MASS_ROWS, ROWS_BACKWARD)),
    (Case("", "", (2, 300, 7)), _launches(PLANES, PLANES_BACKWARD)),
    (Case("", "", (2, 9, 7), target="probabilities"), _launches(PLANES, MASS_PLANES, PLANES_BACKWARD)),
    (Case("", "", (3, 257), layout="transposed"), _launches(PLANES, PLANES_BACKWARD)),
    (Case("", "", (2, 9, 5, 7), layout="channels_last"), _launches(REGISTERS.format(1), ROWS_BACKWARD)),
    (Case("", "", (3, 10), op="log_softmax"), LOG_SOFTMAX_ROWS),
    (Case("", "", (3, 300), op="log_softmax"), LOG_SOFTMAX_ROWS),
    (Case("", "", (3, 300), op="log_softmax", dim=0), LOG_SOFTMAX_PLANES),
    (Case("", "", (3, 10), op="nll_loss"), _launches("nll_loss_forward_kernel<T>", "nll_loss_backward_kernel<T>")),
]


def _name(case: object) -> str:
    return f"{case.op}-{case.shape}-{case.target}-{case.layout}" if isinstance(case, Case) else ""


@pytest.mark.parametrize(("case", "expected"), LAUNCHES, ids=_name)
def test_launches(case: Case, expected: list[str], kernels: Kernels) -> None:
    kernels.launched.clear()
    run(kernels, build(variant(case)))
    assert [launch.kernel for launch in kernels.launched] == expected


def test_every_kernel_is_launched() -> None:
    launched = {name.split("<")[0] for _, names in LAUNCHES for name in names} | {"checked_target_kernel"}
    assert launched == kernel_bounds().keys()


def test_cases_select_every_plan(kernels: Kernels) -> None:
    """The table has cross_entropy problems of every dtype for every family, and for every number of registers."""
    selected = set()
    for case in CASES:
        if case.op == "cross_entropy":
            _, arrays = share_layout([build(case).input], case.class_dim)
            plan = kernels.plan("reduction", arrays.extent, arrays.layout)
            selected.add((case.dtype, FAMILIES[plan.family], plan.values_per_thread))
    for dtype in FLOAT_TYPES:
        assert {(dtype, "planes", 0), (dtype, "block rows", 0), (dtype, "register rows", 1)} <= selected
    assert {values for _, _, values in selected} == {0, 1, 2, 4, 8}


@pytest.mark.parametrize("dtype", INDEX_TYPES, ids=str)
def test_checked_target(dtype: torch.dtype, kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = (0, 200) if dtype == torch.uint8 else (-20, 120)
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

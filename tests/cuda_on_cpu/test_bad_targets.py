"""Class indices out of range: the row gets a NaN loss and a zero gradient, the others what they get without it, nothing
out of bounds is read or written, and one record names one of them."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Problem, build
from comparison import variant
from emulator import ASCENDING, DESCENDING, INDEX_TYPES, RANDOM, BadTarget, Kernels
from launches import Settings, run
from memory import bits

IGNORE_INDEX = -7
FAMILIES = {
    "tile rows": ("cross_entropy", (9, 10)),
    "register rows": ("cross_entropy", (9, 100)),
    "block rows": ("cross_entropy", (5, 1100)),
    "planes": ("cross_entropy", (2, 10, 9)),
    "nll_loss rows": ("nll_loss", (9, 10)),
    "nll_loss planes": ("nll_loss", (2, 10, 9)),
}


def bad_values(dtype: torch.dtype, classes: int) -> list[int]:
    """None for bytes beside 300 classes."""
    limits = torch.iinfo(dtype)
    wanted = (-1, -100, classes, classes + 1, 2**32, 2**32 + 1, limits.min, limits.max)
    return sorted({v for v in wanted if limits.min <= v <= limits.max and not 0 <= v < classes and v != IGNORE_INDEX})


def check_record(bad: BadTarget, value: int, rows: list[int], classes: int) -> None:
    assert bad.claimed == bad.ready == 1
    # Of uint64 what no int64 holds is the largest one.
    assert (bad.value, bad.classes, bad.ignore_index) == (min(value, 2**63 - 1), classes, IGNORE_INDEX)
    assert (
        bad.row in rows
    )  # the first that is found, and stays: which, the order of threads behind their shuffles decides


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", INDEX_TYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("order", [ASCENDING, DESCENDING, RANDOM])
def test_out_of_range(family: str, dtype: torch.dtype, reduction: str, order: int, kernels: Kernels) -> None:
    op, shape = FAMILIES[family]
    case = variant(
        Case(
            "", "", shape, op=op, target_dtype=dtype, weight="positive", reduction=reduction, ignore_index=IGNORE_INDEX
        ),
        label_smoothing=0.1 if op == "cross_entropy" else 0.0,
    )
    problem, settings = build(case), Settings(order=order)
    rows = [1, 3, case.rows - 1]
    for value in bad_values(dtype, case.classes):
        indices = problem.target.flatten().tolist()
        for row in rows:
            indices[row] = value
        target = torch.tensor(indices, dtype=dtype).view(problem.target.shape)
        result = run(kernels, Problem(case, problem.input, target, problem.weight), settings)
        for bad in result.bad:
            check_record(bad, value, rows, case.classes)
        # As if those rows were ignored, which the kernels' values are tested for.
        ignored = problem.target.long()
        ignored.view(-1)[rows] = IGNORE_INDEX
        expected = run(kernels, Problem(case, problem.input, ignored, problem.weight), settings)
        if reduction == "none":
            assert result.output.view(-1)[rows].isnan().all()
            result.output.view(-1)[rows] = 0
            assert torch.equal(bits(result.output), bits(expected.output))
        else:
            assert result.output.isnan()
        assert torch.equal(bits(result.grad), bits(expected.grad))
        assert torch.equal(bits(result.total_weight), bits(expected.total_weight))
        per_row = result.grad.movedim(1, -1).reshape(case.rows, case.classes)
        assert (per_row[rows] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_many_bad_rows(family: str, kernels: Kernels) -> None:
    """One atomic over the bus, and none for each of them; none either while the record is the host's to read."""
    op, shape = FAMILIES[family]
    case = variant(Case("", "", (shape[0] * 30, *shape[1:]), op=op, ignore_index=IGNORE_INDEX, reduction="none"))
    problem = build(case)
    result = run(kernels, Problem(case, problem.input, torch.full_like(problem.target, case.classes), problem.weight))
    assert result.output.isnan().all()
    assert (result.grad == 0).all()
    assert kernels.system_atomics == 1  # of the backward, which has a record of its own


def test_every_family_has_bad_values() -> None:
    for dtype in INDEX_TYPES:
        assert bad_values(dtype, 10)

"""Values: every row of the table against torch in float64, and against torch's own error."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, HIGHER_ORDER_CASES, OPERATORS, Case, build, select
from oracle import answer, check_against_torch, check_output

import nllx


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value(case: Case, device: str) -> None:
    problem = build(case, device)
    output = problem.call(nllx.functional)
    expected = build(case).for_torch().call(torch.nn.functional)
    assert output.dtype == expected.dtype
    assert output.shape == expected.shape
    assert output.is_contiguous()
    assert output.device == problem.input.device
    check_output(case, output)


@pytest.mark.parametrize(
    "case",
    # In float64 the exact answer is torch's own.
    select(lambda case: case.same_as_torch and torch.float64 not in (case.dtype, case.target_dtype, case.out_dtype)),
    ids=str,
)
def test_no_less_accurate_than_torch(case: Case, device: str) -> None:
    check_against_torch(case, answer(build(case, device), nllx.functional, input_only=True))


@pytest.mark.parametrize("op", OPERATORS)
def test_operator_is_the_function(op: str, device: str) -> None:
    """``torch.ops.nllx`` takes what ``nllx.functional`` takes, with the reduction as a number."""
    for case in HIGHER_ORDER_CASES:
        if case.op == op:
            problem = build(case, device)
            output = getattr(torch.ops.nllx, op)(*problem.op_arguments())
            assert torch.equal(output, problem.call(nllx.functional)) or output.isnan().all()

"""What a result of the kernels is compared with: the oracle of the other tests, and another result of the kernels."""

from __future__ import annotations

import dataclasses

import torch
from cases import REDUCTIONS, Case, build
from launches import Result
from memory import bits
from oracle import ULPS, check_gradients, check_output, epsilon
from torch import Tensor
from torch.testing import assert_close

from nllx import _operators


def check(case: Case, result: Result) -> None:
    """Output, gradient, statistics of the rows and divisor are as near the exact ones as the oracle allows."""
    check_output(case, result.output)
    check_gradients(case, [result.grad])
    assert [bad.claimed for bad in result.bad] == [0, 0]
    if case.op == "log_softmax":
        return
    problem = build(case).for_torch(torch.float64)
    arguments = (problem.input, problem.target, problem.weight)
    options = {"reduction": REDUCTIONS.index(case.reduction), "ignore_index": case.ignore_index}
    if case.op == "nll_loss":
        _, total_weight = _operators.nll_loss.forward(*arguments, **options)
    else:
        options["label_smoothing"] = case.label_smoothing
        _, row_stats, total_weight = _operators.cross_entropy.forward(*arguments, **options)
        _check_row_stats(result.row_stats, row_stats)
    unit = 2 * epsilon(result.total_weight.dtype)  # of two sums in different orders
    assert_close(result.total_weight.double(), total_weight, rtol=unit, atol=unit, equal_nan=True)


def _check_row_stats(actual: Tensor, expected: Tensor) -> None:
    """Of a row with a NaN the maximum may be anything."""
    unit = ULPS * epsilon(actual.dtype)
    (maximum, log_sum), (expected_maximum, expected_log_sum) = actual.double().unbind(-1), expected.unbind(-1)
    assert_close(log_sum, expected_log_sum, rtol=unit, atol=unit, equal_nan=True)
    known = ~expected_maximum.isnan()
    assert torch.equal(maximum[known], expected_maximum[known])


def check_same(result: Result, expected: Result, what: str) -> None:
    """Two results are equal bit for bit."""
    for name in ("output", "grad", "row_stats", "total_weight"):
        a, b = getattr(result, name), getattr(expected, name)
        same = a is b or torch.equal(bits(a.contiguous()), bits(b.contiguous()))
        assert same, f"{name} depends on {what}"


def variant(case: Case, **changes: object) -> Case:
    """A case like another one; its name is its contents, since tensors are made from it."""
    changed = dataclasses.replace(case, **changes)
    return dataclasses.replace(changed, name=repr(dataclasses.replace(changed, name="", why="")))

"""The definition in plain torch, ``nllx._operators``, against torch's losses and against the formulas, row by row."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, Case, Problem, build, grad_output, select
from oracle import Reference, answer
from torch.testing import assert_close

from nllx import _operators

_DOUBLE = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True}  # sums of a few thousand float64 numbers


@pytest.mark.parametrize("case", select(lambda case: case.same_as_torch and case.out_dtype is None), ids=str)
def test_reference_is_torchs(case: Case) -> None:
    problem = build(case).for_torch(torch.float64)
    grad = grad_output(case, problem.call(torch.nn.functional))
    got, expected = answer(problem, Reference, grad), answer(problem, torch.nn.functional, grad)
    assert_close(got.output, expected.output, **_DOUBLE)
    assert_close(got.grads, expected.grads, **_DOUBLE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_output_like_torchs(case: Case) -> None:
    expected = build(case).for_torch().call(torch.nn.functional)
    output = build(case).call(Reference)
    assert output.dtype == expected.dtype
    assert output.shape == expected.shape


def _by_formula(problem: Problem) -> tuple[list[float], float, list[list[float]]]:
    """Losses of the rows, the divisor of their mean, and the gradient of each row's loss.

    With the coefficients a_c = w_c ((1 - ε) p_c + ε / C) of a row, the loss is -Σ a_c log softmax(x)_c and its
    gradient softmax(x)_c Σ a - a_c. An index target y is p_c = [c = y]; an ignored row has no coefficients. A class
    without a coefficient does not count, whatever its logit is.
    """
    case, smoothing = problem.case, problem.case.label_smoothing
    classes = case.classes
    rows = problem.input.movedim(case.class_dim, -1).reshape(-1, classes).tolist()
    weight = [1.0] * classes if problem.weight is None else problem.weight.flatten().tolist()
    assert problem.target is not None
    if case.has_probabilities:
        targets = problem.target.movedim(case.class_dim, -1).reshape(-1, classes).tolist()
        divisor = float(len(rows))
    else:
        index = problem.target.flatten().tolist()
        targets = [None if y == case.ignore_index else [float(c == y) for c in range(classes)] for y in index]
        divisor = math.fsum(weight[y] for y in index if y != case.ignore_index)
    losses, gradients = [], []
    for row, target in zip(rows, targets, strict=True):
        if target is None:
            losses.append(0.0)
            gradients.append([0.0] * classes)
            continue
        a = [w * ((1 - smoothing) * p + smoothing / classes) for w, p in zip(weight, target, strict=True)]
        if case.op == "cross_entropy":
            largest = max(row)
            log_sum = math.log(math.fsum(math.exp(x - largest) for x in row))
            log_softmax = [x - largest - log_sum for x in row]
            total = math.fsum(a)
            gradients.append([math.exp(lp) * total - ac for lp, ac in zip(log_softmax, a, strict=True)])
        else:
            log_softmax = row
            gradients.append([-ac for ac in a])
        losses.append(-math.fsum(ac * lp for ac, lp in zip(a, log_softmax, strict=True) if ac != 0))
    return losses, divisor, gradients


@pytest.mark.parametrize(
    "case",
    select(
        lambda case: (
            case.op != "log_softmax"
            and 0 < case.numel <= 12_000
            and case.special in ("", "masked", "nan_row", "zero_weight_target_masked")
            and not (case.special == "nan_row" and not case.ignored)
            and not (case.special == "masked" and case.label_smoothing)
            and case.weight != "nan_unused"
            and case.scale < 1e4
        )
    ),
    ids=str,
)
def test_reference_is_the_formula(case: Case) -> None:
    problem = build(case).for_torch(torch.float64)
    losses, divisor, gradients = _by_formula(problem)
    got = answer(problem, Reference, grad := grad_output(case, problem.call(Reference)))
    if case.reduction == "none":
        expected, factors = torch.tensor(losses).view(case.row_shape), grad.flatten()
    else:
        divisor = torch.tensor(divisor if case.reduction == "mean" else 1.0)
        expected, factors = torch.tensor(losses).sum() / divisor, (grad / divisor).expand(len(losses))
    gradient = torch.tensor(gradients) * factors[:, None]
    if not case.has_probabilities:  # zero for an ignored row, also where the divisor is zero
        gradient[problem.target.flatten() == case.ignore_index] = 0
    gradient = gradient.view(*case.row_shape, case.classes).movedim(-1, case.class_dim)
    assert_close(got.output, expected, **_DOUBLE)
    assert_close(got.grads[0], gradient, **_DOUBLE)


@pytest.fixture(autouse=True)
def _float64_literals():
    """Lists of Python numbers become float64 tensors."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


@pytest.mark.parametrize(
    ("dtype", "target", "ignore_index"),
    [
        (torch.uint8, 156, -100),
        (torch.uint8, 255, -1),
        (torch.int8, 1, 257),
        (torch.int16, 1, 2**16 + 1),
        (torch.int32, 1, 2**32 + 1),
    ],
)
@pytest.mark.parametrize("op", ["cross_entropy", "nll_loss", "softmax_statistics"])
def test_an_ignore_index_outside_of_the_targets_dtype(
    op: str, dtype: torch.dtype, target: int, ignore_index: int
) -> None:
    """…names no class: compared in the target's dtype, what is left of it there would."""
    x = torch.randn(1, 300, dtype=torch.float64)
    found = []
    for of in (dtype, torch.int64):
        index = torch.tensor([target], dtype=of)
        if op == "softmax_statistics":
            result = _operators.softmax_statistics.forward(x, index, dim=1, ignore_index=ignore_index)[0]
        else:
            result = getattr(_operators, op).forward(x, index, reduction=1, ignore_index=ignore_index)[0]
        found.append(result)
    assert_close(*found)
    assert found[0] != 0

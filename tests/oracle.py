"""What the results should be and how far from it a result may lie."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from cases import REDUCTIONS, Case, Problem, build, grad_output
from torch import Tensor
from torch.testing import assert_close

from nllx import _operators

# Units in the last place of the accumulation's precision that a kernel may be off, in the largest term that it adds:
# one each for the exponential, the logarithm, the factor and the divisor, and as many again for the sum over the
# classes, which is added in many lanes, so that its error grows slowly. Torch's own kernels need up to 4.
ULPS = 8


class Reference:
    """The definitions under the signatures of ``torch.nn.functional``."""

    takes_row_options = True

    @staticmethod
    def cross_entropy(
        input, target, weight=None, *, ignore_index=-100, reduction="mean", label_smoothing=0.0, logit_scale=1.0, **rows
    ):
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "scale": logit_scale, **rows}
        return _operators.cross_entropy.forward(
            input, target, weight, reduction=REDUCTIONS.index(reduction), **options
        )[0]

    @staticmethod
    def nll_loss(input, target, weight=None, *, ignore_index=-100, reduction="mean"):
        return _operators.nll_loss.forward(input, target, weight, REDUCTIONS.index(reduction), ignore_index)[0]

    @staticmethod
    def mse_loss(input, target, *, weight=None, reduction="mean"):
        return _operators.mse_loss.forward(input, target, weight, REDUCTIONS.index(reduction))[0]

    @staticmethod
    def log_softmax(input, dim, dtype=None):
        return _operators.log_softmax.forward(input if dtype is None else input.to(dtype), dim)


@dataclasses.dataclass
class Answer:
    """A result and the gradients of ``problem.differentiable``, or of the input alone, for some gradient of the output."""

    output: Tensor
    grads: list[Tensor]


def answer(problem: Problem, functional: Any, grad: Tensor | None = None, input_only: bool = False) -> Answer:
    """Computes a problem and its gradients with functional. grad: of the output; by default ``grad_output``'s.

    input_only: with probability targets that need no gradient nllx's kernels compute that of the input, otherwise the
    definition does.
    """
    leaves = problem.requires_grad(input_only)
    output = leaves.call(functional)
    grad = grad_output(problem.case, output) if grad is None else grad.to(output.dtype)
    tensors = [leaves.input] if input_only else leaves.differentiable
    return Answer(output.detach(), list(torch.autograd.grad(output, tensors, grad)))


@functools.cache
def exact(case: Case) -> Answer:
    """The answer in float64 from contiguous inputs: torch's, or the reference's where nllx documents its own."""
    problem = build(case)
    if case.out_dtype is not None:  # the cast comes before the reduction
        problem.input = problem.input.to(case.out_dtype)
    double = dataclasses.replace(problem.for_torch(torch.float64), case=dataclasses.replace(case, out_dtype=None))
    output = problem.for_torch().call(torch.nn.functional)
    functional = torch.nn.functional if case.same_as_torch else Reference
    return answer(double, functional, grad_output(case, output).double())


@functools.cache
def torch_errors(case: Case) -> list[float]:
    """The largest errors of torch's own output and gradients in the case's dtypes."""
    theirs, correct = answer(build(case).for_torch(), torch.nn.functional), exact(case)
    pairs = zip([theirs.output, *theirs.grads], [correct.output, *correct.grads], strict=True)
    return [_largest(their.double() - want) for their, want in pairs]


def _largest(values: Tensor) -> float:
    """The largest finite magnitude, 0 if there is none."""
    values = values.abs()
    return values[values.isfinite()].amax().item() if values.isfinite().any() else 0.0


def _sum(values: Tensor) -> float:
    values = values.abs()
    return values[values.isfinite()].sum().item()


def epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def accumulation(*dtypes: torch.dtype) -> torch.dtype:
    """The coarsest precision in which a result of tensors of these dtypes is accumulated: float32 for the halves."""
    return torch.float64 if all(dtype == torch.float64 for dtype in dtypes) else torch.float32


@functools.cache
def _terms(case: Case) -> tuple[float, float]:
    """The largest magnitudes of what is added up to one element of the output and of the input's gradient."""
    problem = build(case).for_torch(torch.float64)
    output = exact(case).output
    grad = _largest(grad_output(case, output))
    if case.op == "log_softmax":
        return 1.0, grad * max(1, case.classes)
    weight = torch.ones(case.classes) if problem.weight is None else problem.weight.nan_to_num().abs()
    # The terms of the losses: weight · (|log-probability| + 1), the 1 for the logarithm of the sum.
    absolute = dataclasses.replace(problem, weight=weight.double(), case=dataclasses.replace(case, reduction="none"))
    factor = _largest(weight)
    if case.has_probabilities:
        absolute.target = problem.target.abs()
        factor *= max(1.0, _sum(absolute.target) / max(1, case.rows))
    if case.row_options:  # a scale of 3 at most, and the z-loss, whatever the weights are
        factor = 4 * (factor + 1)
    losses = absolute.call(Reference)
    if case.reduction == "none":
        return _largest(losses) + factor, factor * grad
    divisor = 1.0
    if case.reduction == "mean":
        used = problem.target[problem.target != case.ignore_index] if not case.has_probabilities else None
        signed = torch.ones(case.classes) if problem.weight is None else problem.weight
        divisor = float(case.rows) if used is None else abs(signed[used].sum().item())
    return (_sum(losses) + case.rows * factor) / (divisor or 1.0), factor * grad / (divisor or 1.0)


def check_output(case: Case, actual: Tensor) -> None:
    """The output is as near the exact one as its dtype and the precision of its sums allow."""
    dtypes = [case.out_dtype or case.dtype]
    if case.has_probabilities:
        dtypes.append(case.target_dtype or case.dtype)
    # Rows are added in float64, one after another: at most half a unit for each.
    unit = epsilon(accumulation(*dtypes)) + 0.5 * epsilon(torch.float64) * case.rows / ULPS
    _check(case, "output", actual, exact(case).output, unit, _terms(case)[0], actual.dtype)


def check_gradients(case: Case, actual: list[Tensor]) -> None:
    """The same of the gradients: of the input, or of input, target and weight for probabilities."""
    for i, (got, want) in enumerate(zip(actual, exact(case).grads, strict=False)):
        unit, terms, dtype = epsilon(accumulation(case.dtype, got.dtype)), _terms(case)[1], _rounded_to(case, got)
        # The exact answer itself is off by a unit of float64 for every class that torch's smoothing term adds.
        unit += epsilon(torch.float64) * case.label_smoothing * case.classes / ULPS
        if i > 0:
            terms = _largest(want)
        if case.op == "log_softmax":  # made of the rounded output
            unit = epsilon(dtype)
        # Together they come from the definition, which is made of torch's operations.
        definition = torch_errors(case)[1 + i] if len(actual) > 1 else 0.0
        _check(case, f"gradient {i}", got, want, unit, terms, dtype, definition)


def _rounded_to(case: Case, result: Tensor) -> torch.dtype:
    """The coarsest dtype that the result went through."""
    return max((case.out_dtype or result.dtype, result.dtype), key=epsilon)


def _check(
    case: Case,
    name: str,
    actual: Tensor,
    expected: Tensor,
    unit: float,
    terms: float,
    dtype: torch.dtype,
    more: float = 0.0,
) -> None:
    """unit: last place of the accumulation, relative; terms: what it is relative to; dtype: what is rounded to."""
    smallest = torch.finfo(dtype).smallest_normal * epsilon(dtype)
    rounded = expected.to(actual.dtype).double()
    assert_close(
        actual.detach().cpu().double(),
        torch.where(rounded.isinf(), rounded, expected),  # what the dtype cannot hold
        rtol=0.5 * epsilon(dtype) + ULPS * unit,
        atol=ULPS * unit * terms + smallest + more,
        equal_nan=True,
        msg=lambda text: f"{name} of {case.name} ({case.why}): {text}",
    )


def check_against_torch(case: Case, actual: Answer) -> None:
    """The largest errors of output and gradients are no larger than those of torch in the same dtypes: up to two units
    in the last place of the terms, and the rounding of the result."""
    correct = exact(case)
    wanted, terms = [correct.output, *correct.grads], [*_terms(case), *map(_largest, correct.grads[1:])]
    for got, want, size, torchs in zip([actual.output, *actual.grads], wanted, terms, torch_errors(case), strict=False):
        error = _largest(got.cpu().double() - want)
        rounding = 0.5 * epsilon(_rounded_to(case, got)) * _largest(want)
        slack = 2 * epsilon(accumulation(case.dtype, got.dtype)) * size + rounding
        assert error <= torchs + slack, f"{case.name} ({case.why}): error {error}, torch's {torchs}, slack {slack}"

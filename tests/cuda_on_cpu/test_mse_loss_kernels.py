"""Values of mse_loss against float64, at every layout and alignment, and in several orders of threads."""

from __future__ import annotations

import itertools

import pytest
import torch
from elementwise import LAYOUTS, ElementwiseCase, Problem
from emulator import DESCENDING, RANDOM, Kernels
from launches import Settings
from memory import bits
from oracle import epsilon
from torch import Tensor
from torch.testing import assert_close

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REDUCED = [
    ElementwiseCase((n,), dtype, reduction, weight)
    for n, dtype, reduction, weight in itertools.product(
        (1, 7, 1030, 20_001), DTYPES, ("mean", "sum"), (None, "input", "acc")
    )
]
PER_ELEMENT = [
    ElementwiseCase((3, 5, 41), dtype, "none", weight, loss_is_acc=acc, grad_output_is_acc=not acc)
    for dtype, weight, acc in itertools.product(DTYPES, (None, "acc"), (False, True))
]
STRIDED = [
    ElementwiseCase((5, 3, 70), dtype, reduction, "input", layouts, grad_output_is_acc=False)
    for dtype, reduction in itertools.product((torch.float32, torch.bfloat16), ("none", "mean"))
    for layouts in itertools.product(LAYOUTS, repeat=3)
]
OTHERS = [
    ElementwiseCase((5000,), torch.bfloat16, "mean", shift=1),
    ElementwiseCase((5000,), torch.float16, "mean", wanted=(True, False)),
    ElementwiseCase((5000,), torch.float32, "none", wanted=(False, True)),
    ElementwiseCase((1,) * 7 + (9,), torch.float32, "none"),
    # Chunks of more elements than a block takes together.
    ElementwiseCase((4096 * 4096 + 5,), torch.bfloat16, "mean", layouts=("expanded", "expanded", "contiguous")),
]


def check(kernels: Kernels, case: ElementwiseCase, settings: Settings) -> list[Tensor | None]:
    """Compares loss, divisor and gradients with their definition in float64; returns them."""
    problem = Problem(kernels, case, settings)
    loss, total_weight = problem.forward("mse_loss")
    gradients = problem.backward("mse_loss", total_weight)

    x, t, g = (tensor.double() for tensor in (problem.input, problem.target, problem.grad_output))
    w = torch.ones(case.shape, dtype=torch.float64) if problem.weight is None else problem.weight.double()
    unit = 8 * epsilon(case.acc)  # of a term, and of sums of eight terms, which are added in double
    terms, size, divisor = w * (x - t) ** 2, w.abs() * (x - t) ** 2, w.sum()
    assert_close(total_weight.double(), divisor, rtol=0, atol=unit * w.abs().sum().item())
    expected, tolerance = terms, unit * size
    if case.reduction != "none":
        over = total_weight.double() if case.reduction == "mean" else 1
        expected, tolerance = terms.sum() / over, unit * (size.sum() / over).abs()
        g = g / over
    check_near(loss, expected, tolerance, "loss")
    k = 2 * g * w * (x - t)
    for gradient, sign, wanted in zip(gradients, (1, -1), case.wanted, strict=True):
        assert (gradient is not None) == wanted
        if gradient is not None:
            check_near(gradient, sign * k, unit * k.abs(), "gradient")
    return [loss, total_weight, *gradients]


def check_near(actual: Tensor, expected: Tensor, tolerance: Tensor, what: str) -> None:
    """Within tolerance, and the rounding to the dtype of actual."""
    least = torch.finfo(actual.dtype).smallest_normal * epsilon(actual.dtype)
    allowed = tolerance + epsilon(actual.dtype) * expected.abs() + least
    assert ((actual.double() - expected).abs() <= allowed).all(), f"{what} is {actual}, expected {expected}"


@pytest.mark.parametrize("case", REDUCED + PER_ELEMENT + STRIDED + OTHERS, ids=str)
def test_value(case: ElementwiseCase, kernels: Kernels) -> None:
    check(kernels, case, Settings())


@pytest.mark.parametrize("case", [case for case in REDUCED + PER_ELEMENT if case.weight == "acc"], ids=str)
def test_same_in_every_order_and_on_every_grid(case: ElementwiseCase, kernels: Kernels) -> None:
    expected = check(kernels, case, Settings())
    for settings in (
        Settings(order=DESCENDING, most_blocks=1),
        Settings(order=RANDOM),
        Settings(order=RANDOM, most_blocks=2),
    ):
        for a, b in zip(check(kernels, case, settings), expected, strict=True):
            assert torch.equal(bits(a), bits(b)), f"a result depends on the order of threads or the blocks: {settings}"

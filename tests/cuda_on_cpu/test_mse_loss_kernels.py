"""Values of mse_loss against float64, at every layout and alignment, and in several orders of threads."""

from __future__ import annotations

import itertools

import pytest
import torch
from elementwise import LAYOUTS, ElementwiseCase, check_mse_loss
from emulator import DESCENDING, RANDOM, Kernels
from launches import Settings
from memory import bits

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
]


@pytest.mark.parametrize("case", REDUCED + PER_ELEMENT + STRIDED + OTHERS, ids=str)
def test_value(case: ElementwiseCase, kernels: Kernels) -> None:
    kernels.launched.clear()
    check_mse_loss(kernels, case, Settings())
    assert [launch.name for launch in kernels.launched] == ["mse_loss_forward_kernel", "mse_loss_backward_kernel"]


@pytest.mark.parametrize("case", [case for case in REDUCED + PER_ELEMENT if case.weight == "acc"], ids=str)
def test_same_in_every_order_and_on_every_grid(case: ElementwiseCase, kernels: Kernels) -> None:
    expected = check_mse_loss(kernels, case, Settings())
    for settings in (
        Settings(order=DESCENDING, most_blocks=1),
        Settings(order=RANDOM),
        Settings(order=RANDOM, most_blocks=2),
    ):
        for a, b in zip(check_mse_loss(kernels, case, settings), expected, strict=True):
            assert torch.equal(bits(a), bits(b)), f"a result depends on the order of threads or the blocks: {settings}"

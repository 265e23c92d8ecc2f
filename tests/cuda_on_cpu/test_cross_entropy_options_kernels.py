"""Values and gradients of the cross entropy with options, at every layout and alignment, and in several orders of threads."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from cross_entropy_options import OptionsCase, OptionsProblem, check_cross_entropy_options
from emulator import DESCENDING, RANDOM, Kernels
from launches import Settings
from memory import bits
from row_options import Options

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# By a part of a warp, by a warp, by the block; planes.
SHAPES = ((1, 1), (40, 5), (11, 33), (9, 300), (3, 3001), (2, 7, 3), (1, 9, 300), (2, 70, 9))
OPTIONS = [
    Options(),
    Options(logit_scale="rows"),
    Options(logit_scale="one", temperature="rows", z_loss=0.01),
    Options(logit_scale="rows", softcap=3.0, temperature="one", sample_weight=True),
    Options(scale=-0.7, sharpness=1.25, sample_weight=True, z_loss=-0.02),
    Options(scale=50.0, softcap=5.0, logit_scale="one", temperature="rows"),  # saturated
    Options(scale=0.0, softcap=2.0, logit_scale="rows", z_loss=0.1),
    Options(temperature="one", sample_weight=True),
    Options(
        scale=1.5, softcap=30.0, sharpness=0.5, logit_scale="rows", temperature="rows", z_loss=0.1, sample_weight=True
    ),
]
TARGETS = [
    {},
    {"weight": True, "mean": True},
    {"label_smoothing": 0.1, "weight": True},
    {"label_smoothing": 0.2, "loss_is_acc": False, "mean": True},
    {"target": "probabilities"},
    {"target": "acc probabilities", "weight": True, "label_smoothing": 0.1, "mean": True},
    {"target": "probabilities", "weight": True, "loss_is_acc": False, "label_smoothing": 0.3},
]
# 9 options, 7 kinds of targets and 4 dtypes have no divisor in common: all pairs meet.
CASES = [
    OptionsCase(SHAPES[i // 9 % len(SHAPES)], DTYPES[i % 4], OPTIONS[i % 9], **TARGETS[i % 7])
    for i in range(2 * 9 * len(SHAPES))
]
SHIFTED = [
    OptionsCase((4, classes), dtype, OPTIONS[8], shift=shift, **TARGETS[i % 7])
    for i, (classes, dtype, shift) in enumerate(
        itertools.product((6, 131, 3001), DTYPES, ((1, 0), (3, 3), (1, 2))),
    )
]
MASKED = [
    OptionsCase(
        shape, dtype, Options(logit_scale="rows", positive=True, softcap=softcap, z_loss=0.01), target, masked=True
    )
    for shape, dtype, softcap, target in (
        ((8, 9), torch.float32, 0.0, "index"),
        ((8, 9), torch.bfloat16, 4.0, "index"),
        ((3, 3001), torch.float16, 0.0, "probabilities"),
        ((3, 301), torch.float64, 0.0, "acc probabilities"),
        ((1, 70, 8), torch.float32, 0.0, "probabilities"),
        ((1, 9, 8), torch.float64, 4.0, "index"),
    )
]
ONLY_LOGITS = [OptionsCase(shape, options=OPTIONS[8], wants_scale=False) for shape in ((9, 40), (3, 3001), (2, 7, 3))]
BAD = [OptionsCase(shape, options=OPTIONS[8], bad=True) for shape in ((7, 5), (7, 3001), (2, 5, 9))]


@pytest.mark.parametrize("case", CASES + SHIFTED + MASKED + ONLY_LOGITS + BAD, ids=str)
def test_value(case: OptionsCase, kernels: Kernels) -> None:
    kernels.launched.clear()
    check_cross_entropy_options(kernels, case, Settings())
    form = "planes" if len(case.shape) > 2 else "rows"
    names = [f"cross_entropy_options_{form}_kernel", f"cross_entropy_options_backward_{form}_kernel"]
    assert [launch.name for launch in kernels.launched] == names


def _check_same(results: list[torch.Tensor], expected: list[torch.Tensor], what: str) -> None:
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(bits(a.contiguous()), bits(b.contiguous())), f"a result depends on {what}"


@pytest.mark.parametrize("case", CASES[::7] + MASKED[:3], ids=str)
def test_same_in_every_order_and_on_every_grid(case: OptionsCase, kernels: Kernels) -> None:
    problem = OptionsProblem(case)
    expected = problem.run(kernels, Settings()).tensors()
    for settings in (
        Settings(order=DESCENDING, most_blocks=1),
        Settings(order=RANDOM),
        Settings(order=RANDOM, most_blocks=2),
    ):
        _check_same(problem.run(kernels, settings).tensors(), expected, "the order of threads or the blocks")


@pytest.mark.parametrize("case", CASES[4::9] + SHIFTED[::5] + MASKED[:2], ids=str)
def test_gradient_over_the_logits(case: OptionsCase, kernels: Kernels) -> None:
    case = dataclasses.replace(case, shift=(case.shift[0],) * 2)
    problem = OptionsProblem(case)
    expected = problem.run(kernels, Settings()).tensors()
    result = problem.run(kernels, Settings(in_place=True, order=RANDOM)).tensors()
    _check_same(result, expected, "where the gradient is written")

"""Values and gradients of softmax_statistics, at every layout and alignment, and in several orders of threads."""

from __future__ import annotations

import itertools
from ctypes import c_uint8

import pytest
import torch
from emulator import (
    DESCENDING,
    INDEX_TYPES,
    RANDOM,
    BadTarget,
    Kernels,
    SoftmaxStatisticsBackward,
    SoftmaxStatisticsForward,
    Targets,
)
from launches import Settings, share_layout
from memory import address, bits
from row_options import Options
from softmax_statistics import StatisticsCase, check_softmax_statistics

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CASES = [
    StatisticsCase(shape, dtype, has_target)
    for shape, dtype, has_target in itertools.product(
        ((1, 1), (300, 5), (37, 33), (9, 300), (3, 5003), (2, 7, 3), (2, 21, 300), (1, 40, 33)), DTYPES, (True, False)
    )
]
SHIFTED = [
    StatisticsCase((5, classes), dtype, shift=shift)
    for classes, dtype, shift in itertools.product((6, 131, 3001), DTYPES, ((1, 0), (3, 3), (1, 2)))
]
SPECIAL = [StatisticsCase(shape, dtype, special=True) for shape in ((8, 9), (8, 3001), (1, 9, 8)) for dtype in DTYPES]
ALONE = [
    StatisticsCase((5, 40), torch.bfloat16, wanted=tuple(i == j for j in range(3)))  # type: ignore[arg-type]
    for i in range(3)
]
OPTIONS = [
    StatisticsCase(shape, dtype, has_target, shift=(i % 4, 0), options=options)
    for i, (shape, (dtype, has_target, options)) in enumerate(
        itertools.product(
            ((40, 5), (11, 33), (9, 300), (3, 3001), (2, 70, 9)),
            (
                (torch.float32, True, Options(logit_scale="rows", temperature="one")),
                (torch.float64, True, Options(logit_scale="one", temperature="rows", softcap=4.0)),
                (torch.bfloat16, False, Options(scale=-1.2, sharpness=0.7)),
                (torch.float16, True, Options(logit_scale="rows", temperature="rows", softcap=20.0, scale=3.0)),
                (torch.float32, False, Options(scale=60.0, softcap=5.0)),  # saturated
            ),
        )
    )
]
EQUAL = [StatisticsCase(shape, equal=True) for shape in ((1, 50_257, 2), (2, 50_257))]


@pytest.mark.parametrize("case", CASES + SHIFTED + SPECIAL + ALONE + EQUAL + OPTIONS, ids=str)
def test_value(case: StatisticsCase, kernels: Kernels) -> None:
    kernels.launched.clear()
    check_softmax_statistics(kernels, case, Settings())
    form = "planes" if len(case.shape) > 2 else "rows"
    names = [f"softmax_statistics_{form}_kernel", f"softmax_statistics_backward_{form}_kernel"]
    assert [launch.name for launch in kernels.launched] == names


@pytest.mark.parametrize("case", CASES[::3] + SPECIAL + OPTIONS[::3], ids=str)
def test_same_in_every_order_and_on_every_grid(case: StatisticsCase, kernels: Kernels) -> None:
    expected = check_softmax_statistics(kernels, case, Settings())
    for settings in (
        Settings(order=DESCENDING, most_blocks=1),
        Settings(order=RANDOM),
        Settings(order=RANDOM, most_blocks=2),
    ):
        for a, b in zip(check_softmax_statistics(kernels, case, settings), expected, strict=True):
            assert torch.equal(bits(a), bits(b)), "a result depends on the order of threads or the blocks"


@pytest.mark.parametrize("shape", [(7, 5), (7, 2001), (2, 5, 9)])
def test_out_of_range(shape: tuple[int, ...], kernels: Kernels) -> None:
    """NaN, -1 and a zero gradient; the record names one such row."""
    x = torch.randn(shape)
    rows = x.select(1, 0).shape
    target = torch.zeros(rows, dtype=torch.int64)
    target.view(-1)[3] = shape[1]
    (x,), arrays = share_layout([x], 1)
    common = {
        "extent": arrays.extent,
        "layout": arrays.layout,
        "logits": address(x),
        "logits_strides": arrays.strides[0],
        "targets": Targets(index=address(target), index_type=INDEX_TYPES[torch.int64], ignore_index=-100),
    }
    out, stats = torch.empty(3, *rows), torch.empty(*rows, 3)
    prediction, grad, bad = torch.empty(rows, dtype=torch.int64), torch.empty_like(x), BadTarget()
    forward = SoftmaxStatisticsForward(
        **common,
        log_prob=address(out[0]),
        logsumexp=address(out[1]),
        entropy=address(out[2]),
        prediction=address(prediction),
        row_stats=address(stats),
    )
    kernels.launch("softmax_statistics_forward", forward, c_uint8(0), bad)
    assert (bad.ready, bad.row, bad.value, bad.classes) == (1, 3, shape[1], shape[1])
    assert out.flatten(1)[:, 3].isnan().all()
    assert prediction.flatten()[3] == -1
    assert out.flatten(1)[:, [0, 1, 2, 4]].isfinite().all()
    g = torch.ones(rows)
    backward = SoftmaxStatisticsBackward(
        **common,
        row_stats=address(stats),
        grad_log_prob=address(g),
        grad_logsumexp=address(g),
        grad_entropy=address(g),
        grad_logits=address(grad),
        grad_strides=arrays.strides[0],
    )
    kernels.launch("softmax_statistics_backward", backward, c_uint8(0), bad)
    assert (grad.movedim(1, -1).reshape(-1, shape[1])[3] == 0).all()

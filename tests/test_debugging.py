"""nllx.set_debug: a warning for each thing that is probably not meant, at the caller's line, and none for anything else."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nllx
from nllx import _C, functional

_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _warnings(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with nllx.set_debug(True):
            call()
    return [str(w.message) for w in caught]


def _logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)


def _target(rows: int, classes: int) -> Tensor:
    return torch.arange(rows) % classes


_NAN_ROW = torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])
_CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "softmax before cross_entropy": (
        lambda: nllx.functional.cross_entropy(_logits(4, 5).softmax(1), _target(4, 5)),
        "these are probabilities, and logits are expected",
    ),
    "log_softmax before cross_entropy": (
        lambda: nllx.functional.cross_entropy(_logits(4, 5).log_softmax(1), _target(4, 5)),
        "log-probabilities already",
    ),
    "logits given to nll_loss": (lambda: nllx.functional.nll_loss(_logits(4, 5), _target(4, 5)), "values above 0"),
    "negative logits given to nll_loss": (
        lambda: nllx.functional.nll_loss(-_logits(4, 5).abs(), _target(4, 5)),
        "do not sum to 1",
    ),
    "probabilities given to nll_loss": (
        lambda: nllx.functional.nll_loss(_logits(4, 5).softmax(1), _target(4, 5)),
        "log-probabilities are expected",
    ),
    "one-hot counts as a target": (
        lambda: nllx.functional.cross_entropy(_logits(2, 3), torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])),
        "1 of 2 rows of the target do not sum to 1; those of one sum to 2",
    ),
    "negative probabilities": (
        lambda: nllx.functional.cross_entropy(_logits(1, 3), torch.tensor([[1.5, -0.5, 0.0]])),
        "below 0",
    ),
    "NaN": (lambda: nllx.functional.cross_entropy(_NAN_ROW, torch.tensor([0, 1])), "1 of 2 rows that count hold NaN"),
    "NaN in nll_loss": (
        lambda: nllx.functional.nll_loss(_NAN_ROW, torch.tensor([0, 1])),
        "1 of 2 rows that count hold NaN",
    ),
    "weights that sum to 0": (
        lambda: nllx.functional.cross_entropy(_logits(2, 3), torch.tensor([0, 0]), torch.tensor([0.0, 1.0, 1.0])),
        "not finite: a target whose class is at -inf",
    ),
    "target at -inf": (
        lambda: nllx.functional.nll_loss(torch.tensor([[0.0, -torch.inf]]), torch.tensor([1])),
        "not finite: a target whose class is at -inf",
    ),
    "empty": (lambda: nllx.functional.cross_entropy(_logits(0, 3), _target(0, 3)), "the input is empty (shape [0, 3])"),
    "all ignored": (
        lambda: nllx.functional.cross_entropy(_logits(3, 5), torch.full((3,), -100)),
        "all 3 targets are ignore_index",
    ),
    "one class": (lambda: nllx.functional.cross_entropy(_logits(3, 1), torch.zeros(3, dtype=torch.long)), "one class"),
    "images": (
        lambda: nllx.CrossEntropyLoss()(_logits(2, 5, 3, 4).softmax(1), _target(24, 5).view(2, 3, 4)),
        "these are probabilities",
    ),
    "(C)": (lambda: nllx.NLLLoss()(_logits(5).softmax(0), torch.tensor(2)), "these are probabilities"),
}


@pytest.mark.parametrize("name", _CASES)
def test_warns(name: str) -> None:
    call, expected = _CASES[name]
    (message,) = _warnings(call)
    assert expected in message
    assert message.endswith("(nllx.set_debug)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()  # and not while it is off


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (7, 5), (64, 1000), (2, 50257), (2, 21, 6, 5), (0, 5), (3, 0)], ids=str)
def test_says_nothing_of_good_input(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = _logits(*shape, dtype=dtype)
    axis = 0 if len(shape) == 1 else 1
    rows = logits.movedim(axis, -1).shape[:-1]
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(max(shape[axis], 1), rows, generator=generator)
    if shape[axis] == 0:
        target.fill_(-100)
    probabilities = _logits(*shape, dtype=dtype).softmax(axis)

    def calls() -> None:
        nllx.functional.cross_entropy(logits, target, reduction="sum")
        nllx.functional.cross_entropy(logits, probabilities, reduction="sum")
        nllx.functional.nll_loss(nllx.functional.log_softmax(logits, axis), target, reduction="sum")
        nllx.functional.cross_entropy(logits, torch.zeros(rows, dtype=torch.long).fill_(-100), reduction="none")

    assert _warnings(calls) == []


def test_ignored_rows_and_masks_may_hold_anything() -> None:
    logits = _logits(4, 5)
    logits[1] = torch.nan
    logits[2, 3] = -torch.inf
    target = torch.tensor([0, -100, 1, 2])
    assert _warnings(lambda: nllx.functional.cross_entropy(logits, target)) == []
    assert _warnings(lambda: nllx.functional.nll_loss(logits.log_softmax(1), target)) == []


def test_rounded_probabilities_and_rows_of_zeros_are_good_targets() -> None:
    """A teacher's probabilities, stored in half precision; rows to ignore."""
    for half in (torch.bfloat16, torch.float16):
        teacher = _logits(64, 1000).softmax(1).to(half).float()
        teacher[3] = 0
        assert _warnings(lambda teacher=teacher: nllx.functional.cross_entropy(_logits(64, 1000), teacher)) == []
        log_p = _logits(64, 1000).log_softmax(1).to(half).float()
        assert _warnings(lambda log_p=log_p: nllx.functional.nll_loss(log_p, _target(64, 1000))) == []


def test_at_the_line_of_the_caller() -> None:
    probabilities, target = torch.full((1, 2), 0.5), torch.tensor([0])
    with warnings.catch_warnings(record=True) as caught, nllx.set_debug(True), nllx.patched():
        warnings.simplefilter("always")
        frame = inspect.currentframe()
        assert frame is not None
        line = frame.f_lineno
        nllx.functional.cross_entropy(probabilities, target)
        nllx.CrossEntropyLoss()(probabilities, target)
        torch.nn.functional.cross_entropy(probabilities, target)
        torch.nn.CrossEntropyLoss()(probabilities, target)
    assert [(w.filename, w.lineno - line) for w in caught] == [(__file__, n) for n in (1, 2, 3, 4)]


def test_changes_no_value_and_no_gradient() -> None:
    logits, target = _logits(6, 5).requires_grad_(), _target(6, 5)
    expected = nllx.functional.cross_entropy(logits, target)
    with nllx.set_debug(True):
        actual = nllx.functional.cross_entropy(logits, target)
    assert torch.equal(actual, expected)
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in (actual, expected)))


def test_costs_nothing_while_off_and_nests() -> None:
    assert functional._C is _C
    with nllx.set_debug(True):
        with nllx.set_debug(False):
            assert functional._C is _C
        assert functional._C is not _C
    assert functional._C is _C
    nllx.set_debug(True)
    assert functional._C is not _C
    nllx.set_debug(False)
    assert functional._C is _C


def test_does_not_disturb_what_has_no_values() -> None:
    logits, target = _logits(6, 5).softmax(1), _target(6, 5)

    def calls() -> None:
        nllx.functional.cross_entropy(logits.to("meta"), target.to("meta"))
        torch.func.vmap(nllx.functional.cross_entropy)(logits, target)
        torch.func.grad(nllx.functional.cross_entropy)(logits, target)
        torch.compile(nllx.functional.cross_entropy, backend="eager", fullgraph=True)(logits, target)
        with torch._subclasses.FakeTensorMode() as mode:
            nllx.functional.cross_entropy(mode.from_tensor(logits), mode.from_tensor(target))

    assert _warnings(calls) == []


def test_mistakes_raise_as_ever() -> None:
    with nllx.set_debug(True), pytest.raises(IndexError, match="out of bounds"):
        nllx.functional.cross_entropy(_logits(2, 3), torch.tensor([0, 7]))

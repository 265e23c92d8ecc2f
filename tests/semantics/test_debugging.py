"""nllx.set_debug: a warning for each thing that is probably not meant, at the caller's line, and none for anything else."""

from __future__ import annotations

import inspect
import threading
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
    return [str(w.message) for w in caught if w.category is not DeprecationWarning]


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


# Where the border of each check is: just beyond it there is a warning, test_says_nothing_… has what is not.
_CASES |= {
    "infinite logits": (
        lambda: nllx.functional.cross_entropy(torch.tensor([[torch.inf, 0.0]]), torch.tensor([0])),
        "1 of 1 rows that count hold NaN or inf",
    ),
    "a little above 0": (
        lambda: nllx.functional.nll_loss(torch.tensor([[0.02, -30.0]]), torch.tensor([0])),
        "values above 0",
    ),
    "sums of 1.02": (
        lambda: nllx.functional.nll_loss(torch.tensor([[0.51, 0.51]]).log(), torch.tensor([0])),
        "do not sum to 1 (those of one sum to 1.02)",
    ),
    "probabilities that sum to 1.02": (
        lambda: nllx.functional.cross_entropy(_logits(1, 2), torch.tensor([[0.51, 0.51]])),
        "do not sum to 1; those of one sum to 1.02",
    ),
    "all ignored in nll_loss": (
        lambda: nllx.functional.nll_loss(_logits(3, 5).log_softmax(1), torch.full((3,), 2), ignore_index=2),
        "all 3 targets are ignore_index (2)",
    ),
    "NaN in a row whose index is ignore_index modulo 256": (
        lambda: nllx.functional.cross_entropy(
            torch.full((1, 200), torch.nan), torch.full((1,), 156, dtype=torch.uint8)
        ),
        "1 of 1 rows that count hold NaN",
    ),
    **{
        f"{name} in {dtype}": (call, expected)
        for dtype in (torch.bfloat16, torch.float16)
        for name, call, expected in [
            (
                "softmax",
                lambda dtype=dtype: nllx.functional.cross_entropy(
                    _logits(64, 1000).softmax(1).to(dtype), _target(64, 1000)
                ),
                "these are probabilities",
            ),
            (
                "log_softmax",
                lambda dtype=dtype: nllx.functional.cross_entropy(
                    _logits(64, 1000).log_softmax(1).to(dtype), _target(64, 1000)
                ),
                "log-probabilities already",
            ),
            (
                "logits",
                lambda dtype=dtype: nllx.functional.nll_loss(-_logits(64, 1000, dtype=dtype).abs(), _target(64, 1000)),
                "do not sum to 1",
            ),
        ]
    },
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
        wide = 10 * _logits(64, 1000)  # lse is rounded, and so is the difference
        for kept in (half, torch.float32):
            rounded = (wide.to(kept) - wide.to(kept).logsumexp(1, keepdim=True)).to(kept)
            assert _warnings(lambda r=rounded: nllx.functional.nll_loss(r, _target(64, 1000))) == []
        softened = (_logits(64, 10).softmax(1) + 1e-5).log()
        assert _warnings(lambda s=softened: nllx.functional.nll_loss(s, _target(64, 10))) == []
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


_W5 = torch.arange(1.0, 6.0)
_OPTIONS: list[dict[str, Any]] = [
    {"weight": _W5, "label_smoothing": 0.1, "ignore_index": 2},
    {"weight": _W5, "reduction": "none"},
    {"reduction": "sum", "ignore_index": 1},
    {"zero_division": 0, "ignore_index": 0},
]


@pytest.mark.parametrize("options", _OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_changes_no_value_and_no_gradient(name: str, options: dict[str, Any]) -> None:
    options = {k: v for k, v in options.items() if name == "cross_entropy" or k != "label_smoothing"}
    logits, target = _logits(6, 5).requires_grad_(), _target(6, 5)

    def run() -> tuple[Tensor, Tensor]:
        loss = getattr(nllx.functional, name)(nllx.functional.log_softmax(logits, 1), target, **options)
        return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]

    expected = run()
    with warnings.catch_warnings(), nllx.set_debug(True):
        warnings.simplefilter("ignore")
        actual = run()
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_keeps_the_gradient_in_place() -> None:
    hidden = _logits(6, 5).requires_grad_()
    logits = hidden * 1
    with nllx.set_debug(True):
        nllx.functional.cross_entropy(logits, _target(6, 5), inplace_backward=True).backward()
    assert torch.equal(logits, hidden.grad)


def test_zero_division_is_an_answer_to_ignored_batches() -> None:
    assert (
        _warnings(lambda: nllx.functional.cross_entropy(_logits(2, 3), torch.full((2,), -100), zero_division=0)) == []
    )


def test_each_line_is_warned_about_once_for_each_kind() -> None:
    """Counts and values in the text differ from step to step."""

    def steps() -> None:
        for seed in range(3):
            logits = torch.randn(4 + seed, 5, generator=torch.Generator().manual_seed(seed))
            nllx.functional.nll_loss(logits, _target(4 + seed, 5))
        nllx.functional.nll_loss(logits, _target(4 + seed, 5))

    assert len(_warnings(steps)) == 2
    assert len(_warnings(steps)) == 2  # set_debug was called again


def test_memory_of_large_half_precision_logits() -> None:
    """Seen in parts: no copy of all logits in float32."""
    logits, target = torch.zeros(2048, 8192, dtype=torch.bfloat16), torch.zeros(2048, dtype=torch.long)
    with torch.profiler.profile(profile_memory=True) as profile, nllx.set_debug(True):
        nllx.functional.cross_entropy(logits, target)
    assert max(event.cpu_memory_usage for event in profile.events()) < 40 << 20  # the copy would be 64 MiB


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


def test_blocks_of_threads_do_not_leak() -> None:
    """The first to begin is the first to end."""
    inside, ended, seen = threading.Event(), threading.Event(), []

    def second() -> None:
        with nllx.set_debug(True):
            inside.set()
            ended.wait(10)
            seen.append(functional._C is not _C)

    with nllx.set_debug(True):
        thread = threading.Thread(target=second)
        thread.start()
        inside.wait(10)
    ended.set()
    thread.join()
    assert seen == [True]
    assert functional._C is _C


def test_calls_without_a_block_do_not_pile_up() -> None:
    from nllx import debugging

    before = len(debugging._settings)
    for mode in (True, False) * 10:
        nllx.set_debug(mode)
    assert len(debugging._settings) <= before + 2
    assert functional._C is _C


def test_does_not_disturb_what_has_no_values() -> None:
    logits, target = _logits(6, 5).softmax(1), _target(6, 5)

    def calls() -> None:
        nllx.functional.cross_entropy(logits.to("meta"), target.to("meta"))
        torch.func.vmap(nllx.functional.cross_entropy)(logits, target)
        torch.func.grad(nllx.functional.cross_entropy)(logits, target)
        torch.compile(nllx.functional.cross_entropy, backend="eager", fullgraph=True)(logits, target)
        torch.jit.trace(lambda x: nllx.functional.cross_entropy(x, target), logits, check_trace=False)
        with torch._subclasses.FakeTensorMode() as mode:
            nllx.functional.cross_entropy(mode.from_tensor(logits), mode.from_tensor(target))

    assert _warnings(calls) == []


def test_mistakes_raise_as_ever() -> None:
    with nllx.set_debug(True), pytest.raises(IndexError, match="out of bounds"):
        nllx.functional.cross_entropy(_logits(2, 3), torch.tensor([0, 7]))


def test_every_function_runs_while_debugging() -> None:
    x, t = torch.randn(3, 5), torch.tensor([0, 4, 2])
    arguments = {"log_softmax": (x, 1), "mse_loss": (x, x.flip(0)), "SoftmaxStatistics": (x, x, x, t)}
    for name in nllx.functional.__all__:
        function = getattr(nllx.functional, name)
        expected = function(*arguments.get(name, (x, t)))
        with nllx.set_debug(True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(function(*arguments.get(name, (x, t))), expected, rtol=0, atol=0)

"""Warnings about input that is allowed and probably not meant (:func:`set_debug`)."""

from __future__ import annotations

import math
import re
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nllx import _C, functional

__all__ = ["set_debug"]

# Values are looked at in parts of so many, so that float32 copies of half-precision logits stay small.
_AT_ONCE = 1 << 22

_lock = threading.RLock()
_settings: list[set_debug] = []  # the last one holds
_warned: set[tuple[str, int, str]] = set()


def _warn(message: str) -> None:
    """At the line of the first caller outside of nllx and torch; once for each line and kind of trouble."""
    frame: types.FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and (frame.f_globals.get("__name__") or "").partition(".")[0] in ("nllx", "torch"):
        frame, level = frame.f_back, level + 1
    where = (frame.f_code.co_filename, frame.f_lineno) if frame is not None else ("", 0)
    kind = (*where, re.sub(r"\d[\d.e+-]*", "#", message))  # counts and values differ from step to step
    with _lock:
        if kind in _warned:
            return
        _warned.add(kind)
    warnings.warn(f"{message} (nllx.set_debug)", stacklevel=level)


def _values_can_be_seen(*tensors: Tensor) -> bool:
    """Not while tracing, transforming or capturing, nor those of tensors without memory: there nothing is checked."""
    return (
        all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type != "meta" for t in tensors)
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())
    )


class _Rows(NamedTuple):
    """Of each row of a tensor (C), (N, C) or (N, C, d1, ..., dk), in the order of class indices."""

    smallest: Tensor
    largest: Tensor
    sums: Tensor
    sums_of_exponentials: Tensor
    classes: int
    half: bool

    @classmethod
    def of(cls, values: Tensor) -> _Rows:
        values = values.detach()
        values = values[None] if values.dim() == 1 else values
        classes, half = values.shape[1], values.dtype in (torch.bfloat16, torch.float16)
        if classes == 0 or values.numel() == 0:
            nothing = torch.zeros(0)
            return cls(nothing, nothing, nothing, nothing, classes, half)
        parts: list[tuple[Tensor, ...]] = []
        for part in values.split(max(1, _AT_ONCE // max(1, values[0].numel()))):
            part = part.float() if half else part
            parts.append((part.amin(1), part.amax(1), part.sum(1), part.logsumexp(1).exp()))
        smallest, largest, sums, exponentials = (
            torch.cat([v.flatten() for v in column]) for column in zip(*parts, strict=True)
        )
        return cls(smallest, largest, sums, exponentials, classes, half)

    def where(self, rows: Tensor) -> _Rows:
        if not self:
            return self
        columns = (self.smallest[rows], self.largest[rows], self.sums[rows], self.sums_of_exponentials[rows])
        return _Rows(*columns, self.classes, self.half)

    def __bool__(self) -> bool:
        return self.smallest.numel() > 0

    def have_nan(self) -> Tensor:
        return self.smallest.isnan()

    def lie_in_0_to_1(self) -> Tensor:
        return (self.smallest >= 0) & (self.largest <= 1)

    def slack(self) -> float:
        """What rounding of the dtype, or to half precision at some time before, does to sums that should be 1. Logits and
        counts, which are what is looked for, are further away."""
        return 0.3 if self.half else 0.01

    def rounding(self) -> float:
        """What the rounding of probabilities or log-probabilities of this dtype alone does."""
        return 4 * (2**-8 if self.half else 2**-20) * max(1.0, math.log(self.classes))


def _which(rows: Tensor) -> str:
    return f"{int(rows.sum())} of {rows.numel()} rows"


def _of_ignored(counted: Tensor, reduction: int, ignore_index: int) -> Iterator[str]:
    if reduction == 1 and counted.numel() and not counted.any():
        yield (
            f"all {counted.numel()} targets are ignore_index ({ignore_index}), and the mean over nothing is NaN: "
            "zero_division=0 makes it 0"
        )


def _of_probability_targets(rows: _Rows) -> Iterator[str]:
    off = ((rows.sums - 1).abs() > rows.slack()) & (rows.sums != 0)  # rows of zeros are rows to ignore
    if (negative := rows.smallest < 0).any():
        yield f"the probabilities of {_which(negative)} of the target are below 0"
    elif off.any():
        value = rows.sums[off][0].item()
        yield f"the probabilities of {_which(off)} of the target do not sum to 1; those of one sum to {value:.4g}"


def _are_probabilities(rows: _Rows) -> bool:
    return bool((rows.lie_in_0_to_1() & ((rows.sums - 1).abs() <= rows.rounding())).all())


def _of_logits(rows: _Rows) -> Iterator[str]:
    if not rows:
        return
    if (bad := rows.have_nan() | (rows.largest == torch.inf)).any():
        yield f"the logits of {_which(bad)} that count hold NaN or inf: the loss is NaN"
    elif rows.classes == 1:
        yield "there is one class, whose probability is 1 and whose loss is 0 whatever the logits are"
    elif _are_probabilities(rows):
        yield (
            "each row of the input sums to 1 and lies in [0, 1]: these are probabilities, and logits are expected. Remove the "
            "softmax in front of the loss, which takes it itself"
        )
    elif ((rows.largest <= 0) & ((rows.sums_of_exponentials - 1).abs() <= rows.rounding())).all():
        yield (
            "the input is log-probabilities already. The loss is right, and log_softmax is computed twice: remove the one in "
            "front, or take nll_loss"
        )


def _of_log_probabilities(rows: _Rows) -> Iterator[str]:
    if not rows:
        return
    sums = rows.sums_of_exponentials
    if (bad := rows.have_nan()).any():
        yield f"the log-probabilities of {_which(bad)} that count hold NaN"
    elif _are_probabilities(rows):
        yield (
            "each row of the input sums to 1 and lies in [0, 1]: these are probabilities, and log-probabilities are expected. "
            "Put log_softmax in the place of softmax"
        )
    elif (above := rows.largest > rows.slack()).any():
        yield (
            f"{_which(above)} of the input hold values above 0, which no log-probability is: the loss can be negative. For "
            "logits take cross_entropy, or log_softmax in front"
        )
    elif (off := (sums - 1).abs() > rows.slack()).any():
        yield (
            f"the exponentials of {_which(off)} of the input do not sum to 1 (those of one sum to {sums[off][0].item():.4g}), "
            "as those of log-probabilities do. For logits take cross_entropy, or log_softmax in front"
        )


def _of_the_loss(input: Tensor, loss: Tensor) -> Iterator[str]:
    """The last resort, where nothing in the input explains it."""
    if loss.isfinite().all():
        return
    if input.numel() == 0:
        yield f"the input is empty (shape {list(input.shape)}), and the mean over nothing is NaN: zero_division=0 makes it 0"
    else:
        yield (
            "the loss is not finite: a target whose class is at -inf, a row of -inf alone, weights of the targets that sum to "
            "0 or are not finite, or a loss beyond the range of the dtype"
        )


@torch.no_grad()
def _check(op: str, input: Tensor, target: Tensor, loss: Tensor, reduction: int, ignore_index: int) -> None:
    if not _values_can_be_seen(input, target):
        return
    rows = _Rows.of(input)
    messages: list[str] = []
    if target.is_floating_point():
        messages += _of_probability_targets(_Rows.of(target))
    else:
        counted = target.reshape(-1).long() != ignore_index  # long: it may lie outside of the target's dtype
        messages += _of_ignored(counted, reduction, ignore_index)
        rows = rows.where(counted)
    messages += (_of_logits if op == "cross_entropy" else _of_log_probabilities)(rows)
    for message in messages or _of_the_loss(input, loss):
        _warn(f"{op}: {message}")


class _Checked:
    """In the place of ``nllx._C`` in nllx.functional while debugging is on: so that it costs nothing while it is off."""

    @staticmethod
    def cross_entropy(input: Tensor, target: Tensor, *options: Any) -> Tensor:
        loss: Tensor = _C.cross_entropy(input, target, *options)
        reduction, ignore_index = options[5:7]
        # What is said of logits does not hold for those that options map, nor that of a mean for another divisor.
        if all(option is None for option in options[1:5]) and options[8:12] == (1.0, 1.0, 0.0, 0.0):
            _check("cross_entropy", input, target, loss, reduction, ignore_index)
        return loss

    @staticmethod
    def nll_loss(
        input: Tensor, target: Tensor, weight: Any, reduction: int, ignore_index: int, *options: Any
    ) -> Tensor:
        loss: Tensor = _C.nll_loss(input, target, weight, reduction, ignore_index, *options)
        _check("nll_loss", input, target, loss, reduction, ignore_index)
        return loss

    def __getattr__(self, name: str) -> Any:
        """What has nothing to warn about."""
        return getattr(_C, name)


_checked = _Checked()


class set_debug:
    """Warns about input that the losses take and that is probably not what was meant, for a model that learns nothing.

    With ``nllx.set_debug(True)`` each call of ``cross_entropy`` and ``nll_loss`` (and so of the modules, and of patched torch)
    looks at the values that it gets and issues a ``UserWarning``, at the line of the caller, about

    - probabilities given as logits (a softmax in front of the loss), and log-probabilities given as logits;
    - logits or probabilities given to ``nll_loss``: values above 0, rows whose exponentials do not sum to 1;
    - probability targets that are negative or do not sum to 1 (rows of zeros are taken for rows to ignore);
    - NaN or inf in rows that count; a mean over targets that are all ignored; a single class; a loss that is not finite.

    It holds for the whole process, from the call on, or for a ``with`` block; the last that began and has not ended decides.
    Each line of code is warned about once for each kind of trouble, until ``set_debug`` is called again. Reading the values
    costs several passes over the logits, and on a GPU waits for it. While off it costs nothing.

    What is compiled, traced, transformed by ``torch.func`` or captured in a CUDA graph is not looked at, nor are
    ``cross_entropy_value_and_grad`` and torch's own functions (call :func:`nllx.patch` for those). Not every mistake can be
    seen: a softmax over the wrong dimension, or a sigmoid, leaves numbers that logits could be; and logits that are
    probabilities by chance (one-hot rows) are warned about.

    Args:
        mode: Whether to warn.

    >>> import warnings
    >>> probabilities = torch.tensor([[0.25, 0.75]])
    >>> with warnings.catch_warnings(record=True) as caught, nllx.set_debug(True):
    ...     warnings.simplefilter("always")
    ...     loss = nllx.CrossEntropyLoss()(probabilities, torch.tensor([1]))
    >>> str(caught[0].message).partition(":")[2].partition(":")[0].strip()
    'each row of the input sums to 1 and lies in [0, 1]'
    """

    def __init__(self, mode: bool) -> None:
        self._mode = bool(mode)
        self._entered = False
        with _lock:
            # Of calls without a block the last one is enough.
            if len(_settings) > 1 and not (_settings[-1]._entered or _settings[-2]._entered):
                del _settings[-2]
            _settings.append(self)
            _warned.clear()
            _switch()

    def __enter__(self) -> None:
        with _lock:
            self._entered = True
            if self not in _settings:  # a call of another thread came between
                _settings.append(self)
                _switch()

    def __exit__(self, *exception: object) -> None:
        with _lock:
            _settings.remove(self)
            _switch()


def _switch() -> None:
    vars(functional)["_C"] = _checked if _settings and _settings[-1]._mode else _C

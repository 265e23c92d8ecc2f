"""Warnings about input that is allowed and probably not meant (:func:`set_debug`)."""

from __future__ import annotations

import math
import sys
import threading
import types
import warnings
from typing import Any

import torch
from torch import Tensor

from nllx import _C, functional

__all__ = ["set_debug"]

_lock = threading.Lock()
_on = False


def _warn(message: str) -> None:
    """At the line of the first caller outside of nllx and torch."""
    frame: types.FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("nllx", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{message} (nllx.set_debug)", stacklevel=level)


def _values_can_be_seen(input: Tensor) -> bool:
    """Not while tracing, transforming or capturing, nor for tensors without memory: there nothing is checked."""
    return (
        type(input) in (Tensor, torch.nn.Parameter)
        and input.device.type != "meta"
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and not (input.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _rows(input: Tensor) -> Tensor:
    """(rows, classes), in float32 or float64."""
    values = input.detach()
    rows = values[None] if values.dim() == 1 else values.movedim(1, -1).flatten(0, -2)
    return rows.double() if rows.dtype == torch.float64 else rows.float()


def _are_one(sums: Tensor, dtype: torch.dtype, classes: int) -> Tensor:
    """Which are 1 but for rounding: that of a log-probability is at most half an ulp of it, their mean at most log(classes)."""
    return (sums - 1).abs() <= 4 * torch.finfo(dtype).eps * max(1.0, math.log(classes)) + 1e-6


def _which(rows: Tensor) -> str:
    return f"{int(rows.sum())} of {rows.numel()} rows"


def _counting_rows(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """The rows of classes that count, and which they are among all (None with probabilities, where all do)."""
    rows = _rows(input)
    if target.is_floating_point():
        return rows, None
    counted = target.detach().reshape(-1) != ignore_index
    return rows[counted], counted


def _check_nothing_counts(op: str, counted: Tensor | None, reduction: int, ignore_index: int) -> None:
    if counted is not None and reduction == 1 and counted.numel() and not counted.any():
        _warn(
            f"{op}: all {counted.numel()} targets are ignore_index ({ignore_index}), and the mean over nothing is NaN: "
            "zero_division=0 makes it 0"
        )


def _check_cross_entropy(input: Tensor, target: Tensor, reduction: int, ignore_index: int) -> None:
    op = "cross_entropy"
    rows, counted = _counting_rows(input, target, ignore_index)
    _check_nothing_counts(op, counted, reduction, ignore_index)
    classes = rows.shape[1]
    if target.is_floating_point():
        probabilities = _rows(target)
        if (negative := (probabilities < 0).any(1)).any():
            _warn(f"{op}: the probabilities of {_which(negative)} of the target are below 0")
        elif classes and not (fine := _are_one(probabilities.sum(1), target.dtype, classes)).all():
            value = probabilities.sum(1)[~fine][0].item()
            _warn(
                f"{op}: the probabilities of {_which(~fine)} of the target do not sum to 1; those of one sum to {value:g}"
            )
    if rows.numel() == 0:
        return
    if (bad := (rows.isnan() | (rows == torch.inf)).any(1)).any():
        _warn(f"{op}: the logits of {_which(bad)} that count hold NaN or inf: the loss is NaN")
    elif classes == 1:
        _warn(f"{op}: there is one class, whose probability is 1 and whose loss is 0 whatever the logits are")
    elif ((rows >= 0) & (rows <= 1)).all() and _are_one(rows.sum(1), input.dtype, classes).all():
        _warn(
            f"{op}: each row of the input sums to 1 and lies in [0, 1]: these are probabilities, and logits are expected. "
            "Remove the softmax in front of the loss, which takes it itself"
        )
    elif (rows <= 0).all() and _are_one(rows.logsumexp(1).exp(), input.dtype, classes).all():
        _warn(
            f"{op}: the input is log-probabilities already. The loss is right, and log_softmax is computed twice: remove "
            "the one in front, or take nll_loss"
        )


def _check_nll_loss(input: Tensor, target: Tensor, reduction: int, ignore_index: int) -> None:
    op = "nll_loss"
    rows, counted = _counting_rows(input, target, ignore_index)
    _check_nothing_counts(op, counted, reduction, ignore_index)
    if rows.numel() == 0:
        return
    if (bad := rows.isnan().any(1)).any():
        _warn(f"{op}: the log-probabilities of {_which(bad)} that count hold NaN")
        return
    classes = rows.shape[1]
    if ((rows >= 0) & (rows <= 1)).all() and _are_one(rows.sum(1), input.dtype, classes).all():
        _warn(
            f"{op}: each row of the input sums to 1 and lies in [0, 1]: these are probabilities, and log-probabilities are "
            "expected. Put log_softmax in the place of softmax"
        )
    elif (above := (rows > 8 * torch.finfo(input.dtype).eps).any(1)).any():
        _warn(
            f"{op}: {_which(above)} of the input hold values above 0, which no log-probability is: the loss can be negative. "
            "For logits take cross_entropy, or log_softmax in front"
        )
    elif not (fine := _are_one(rows.logsumexp(1).exp(), input.dtype, classes)).all():
        value = rows.logsumexp(1).exp()[~fine][0].item()
        _warn(
            f"{op}: the exponentials of {_which(~fine)} of the input do not sum to 1 (those of one sum to {value:g}), as those "
            "of log-probabilities do. For logits take cross_entropy, or log_softmax in front"
        )


class _Checked:
    """In the place of ``nllx._C`` in nllx.functional while debugging is on: so that it costs nothing while it is off."""

    @staticmethod
    def cross_entropy(
        input: Tensor, target: Tensor, weight: Any, reduction: int, ignore_index: int, *options: Any
    ) -> Tensor:
        loss = _C.cross_entropy(input, target, weight, reduction, ignore_index, *options)
        if _values_can_be_seen(input):
            with torch.no_grad():
                _check_cross_entropy(input, target, reduction, ignore_index)
        return loss

    @staticmethod
    def nll_loss(input: Tensor, target: Tensor, weight: Any, reduction: int, ignore_index: int) -> Tensor:
        loss = _C.nll_loss(input, target, weight, reduction, ignore_index)
        if _values_can_be_seen(input):
            with torch.no_grad():
                _check_nll_loss(input, target, reduction, ignore_index)
        return loss

    log_softmax = staticmethod(_C.log_softmax)


class set_debug:
    """Warns about input that the losses take and that is probably not what was meant, for a model that learns nothing.

    With ``nllx.set_debug(True)`` each call of ``cross_entropy`` and ``nll_loss`` (and so of the modules, and of patched torch)
    looks at the values that it gets and issues a ``UserWarning``, at the line of the caller, about

    - probabilities given as logits (a softmax in front of the loss), and log-probabilities given as logits;
    - logits or probabilities given to ``nll_loss``: values above 0, rows whose exponentials do not sum to 1;
    - probability targets that are negative or do not sum to 1;
    - NaN or inf in rows that count; a mean over targets that are all ignored; a single class.

    It holds for the whole process, from the call on, or for a ``with`` block. Reading the values costs several passes over the
    logits, and on a GPU waits for it. While off it costs nothing. What is compiled, traced, transformed by ``torch.func`` or
    captured in a CUDA graph is not looked at, and ``cross_entropy_value_and_grad`` is not either.

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
        self._before = _on
        _switch(bool(mode))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        _switch(self._before)


def _switch(mode: bool) -> None:
    global _on
    with _lock:
        _on = mode
        vars(functional)["_C"] = _Checked if mode else _C

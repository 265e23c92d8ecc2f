"""Warnings about input that is allowed and probably not meant (:func:`set_debug`)."""

from __future__ import annotations

import math
import sys
import threading
import types
import warnings
from collections.abc import Iterator
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
    """Which are 1 but for rounding, to half precision at some time before too. A log-probability is off by half an ulp of it,
    and they are log(classes) in the mean at most."""
    return (sums - 1).abs() <= max(0.01, 4 * torch.finfo(dtype).eps * math.log(max(classes, 2)))


def _which(rows: Tensor) -> str:
    return f"{int(rows.sum())} of {rows.numel()} rows"


def _of_ignored(counted: Tensor, reduction: int, ignore_index: int) -> Iterator[str]:
    if reduction == 1 and counted.numel() and not counted.any():
        yield (
            f"all {counted.numel()} targets are ignore_index ({ignore_index}), and the mean over nothing is NaN: "
            "zero_division=0 makes it 0"
        )


def _of_probability_targets(target: Tensor) -> Iterator[str]:
    rows = _rows(target)
    sums = rows.sum(1)
    if (negative := (rows < 0).any(1)).any():
        yield f"the probabilities of {_which(negative)} of the target are below 0"
    elif rows.shape[1] and not (fine := _are_one(sums, target.dtype, rows.shape[1]) | (sums == 0)).all():
        value = sums[~fine][0].item()  # rows of zeros are rows to ignore
        yield f"the probabilities of {_which(~fine)} of the target do not sum to 1; those of one sum to {value:g}"


def _are_probabilities(rows: Tensor, dtype: torch.dtype) -> bool:
    return bool(((rows >= 0) & (rows <= 1)).all() and _are_one(rows.sum(1), dtype, rows.shape[1]).all())


def _of_logits(rows: Tensor, dtype: torch.dtype) -> Iterator[str]:
    if rows.numel() == 0:
        return
    if (bad := (rows.isnan() | (rows == torch.inf)).any(1)).any():
        yield f"the logits of {_which(bad)} that count hold NaN or inf: the loss is NaN"
    elif rows.shape[1] == 1:
        yield "there is one class, whose probability is 1 and whose loss is 0 whatever the logits are"
    elif _are_probabilities(rows, dtype):
        yield (
            "each row of the input sums to 1 and lies in [0, 1]: these are probabilities, and logits are expected. Remove the "
            "softmax in front of the loss, which takes it itself"
        )
    elif (rows <= 0).all() and _are_one(rows.logsumexp(1).exp(), dtype, rows.shape[1]).all():
        yield (
            "the input is log-probabilities already. The loss is right, and log_softmax is computed twice: remove the one in "
            "front, or take nll_loss"
        )


def _of_log_probabilities(rows: Tensor, dtype: torch.dtype) -> Iterator[str]:
    if rows.numel() == 0:
        return
    if (bad := rows.isnan().any(1)).any():
        yield f"the log-probabilities of {_which(bad)} that count hold NaN"
    elif _are_probabilities(rows, dtype):
        yield (
            "each row of the input sums to 1 and lies in [0, 1]: these are probabilities, and log-probabilities are expected. "
            "Put log_softmax in the place of softmax"
        )
    elif (above := (rows > 8 * torch.finfo(dtype).eps).any(1)).any():
        yield (
            f"{_which(above)} of the input hold values above 0, which no log-probability is: the loss can be negative. For "
            "logits take cross_entropy, or log_softmax in front"
        )
    elif not (fine := _are_one(sums := rows.logsumexp(1).exp(), dtype, rows.shape[1])).all():
        yield (
            f"the exponentials of {_which(~fine)} of the input do not sum to 1 (those of one sum to "
            f"{sums[~fine][0].item():g}), as those of log-probabilities do. For logits take cross_entropy, or log_softmax in "
            "front"
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
    if not _values_can_be_seen(input):
        return
    rows = _rows(input)
    messages: list[str] = []
    if target.is_floating_point():
        messages += _of_probability_targets(target)
    else:
        counted = target.reshape(-1) != ignore_index
        messages += _of_ignored(counted, reduction, ignore_index)
        rows = rows[counted]
    messages += (_of_logits if op == "cross_entropy" else _of_log_probabilities)(rows, input.dtype)
    for message in messages or _of_the_loss(input, loss):
        _warn(f"{op}: {message}")


class _Checked:
    """In the place of ``nllx._C`` in nllx.functional while debugging is on: so that it costs nothing while it is off."""

    @staticmethod
    def cross_entropy(
        input: Tensor, target: Tensor, weight: Any, reduction: int, ignore_index: int, *options: Any
    ) -> Tensor:
        loss: Tensor = _C.cross_entropy(input, target, weight, reduction, ignore_index, *options)
        _check("cross_entropy", input, target, loss, reduction, ignore_index)
        return loss

    @staticmethod
    def nll_loss(input: Tensor, target: Tensor, weight: Any, reduction: int, ignore_index: int) -> Tensor:
        loss: Tensor = _C.nll_loss(input, target, weight, reduction, ignore_index)
        _check("nll_loss", input, target, loss, reduction, ignore_index)
        return loss

    log_softmax = staticmethod(_C.log_softmax)


class set_debug:
    """Warns about input that the losses take and that is probably not what was meant, for a model that learns nothing.

    With ``nllx.set_debug(True)`` each call of ``cross_entropy`` and ``nll_loss`` (and so of the modules, and of patched torch)
    looks at the values that it gets and issues a ``UserWarning``, at the line of the caller, about

    - probabilities given as logits (a softmax in front of the loss), and log-probabilities given as logits;
    - logits or probabilities given to ``nll_loss``: values above 0, rows whose exponentials do not sum to 1;
    - probability targets that are negative or do not sum to 1 (rows of zeros are taken for rows to ignore);
    - NaN or inf in rows that count; a mean over targets that are all ignored; a single class; a loss that is not finite.

    It holds for the whole process, from the call on, or for a ``with`` block. Reading the values costs several passes over the
    logits, and on a GPU waits for it. While off it costs nothing. What is compiled, traced, transformed by ``torch.func`` or
    captured in a CUDA graph is not looked at, nor are ``cross_entropy_value_and_grad`` and torch's own functions (call
    :func:`nllx.patch` for those). Python shows each warning once per line of code, unless ``warnings`` are set otherwise. Not
    every mistake can be seen: a softmax over the wrong dimension, or a sigmoid, leaves numbers that logits could be; and logits
    that are probabilities by chance (one-hot rows) are warned about.

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

"""The losses as modules. Each is torch's own module with another ``forward``, so that arguments, buffers, ``repr``, pickling,
and ``isinstance`` checks in users' code stay what they are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nllx import functional as F
from nllx._arguments import ONE, ZERO, check_row_numbers, mean_or_zero, plain

__all__ = ["CrossEntropyLoss", "LogSoftmax", "MSELoss", "NLLLoss"]


# The options of nllx's CrossEntropyLoss that torch's has not, with their defaults.
_ROW_OPTIONS: dict[str, float | None] = {
    "logit_scale": ONE,
    "softcap": None,
    "temperature": ONE,
    "z_loss": ZERO,
    "divisor": None,
}


def row_options_in(module: torch.nn.Module) -> list[str]:
    """The names of the options that a module has a value of its own for."""
    places = (vars(module), module._parameters, module._buffers)
    return [name for name in _ROW_OPTIONS if any(name in place for place in places)]


def options_beyond_torch(module: torch.nn.Module) -> list[str]:
    """Those without which the values would be others."""
    zero = ["zero_division=0"] if getattr(module, "zero_division", math.nan) == 0 else []
    return zero + row_options_in(module)


def _options(module: torch.nn.Module) -> str:
    """What nllx's module has and torch's has not, for its ``repr``."""
    shown = [f"{name}={getattr(module, name)}" for name in row_options_in(module)]
    if getattr(module, "inplace_backward", False):
        shown.append("inplace_backward=True")
    if getattr(module, "zero_division", math.nan) == 0:
        shown.append("zero_division=0")
    return ", ".join(shown)


def _scriptable(module: torch.nn.Module, kind: type[torch.nn.Module]) -> torch.nn.Module:
    """torch's module in place of nllx's, with the same weights and options: ``torch.jit.script`` compiles no calls of nllx."""
    if own := options_beyond_torch(module):
        raise NotImplementedError(f"torch.jit.script of {module} takes no {own[0]}: use torch.compile or torch.export")
    plain: Any = kind.__new__(kind)
    plain.__dict__.update(module.__dict__)
    for name in ("inplace_backward", "zero_division", *_ROW_OPTIONS):
        plain.__dict__.pop(name, None)
    return plain


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Drop-in for :class:`torch.nn.CrossEntropyLoss`; see :func:`nllx.functional.cross_entropy` for shapes, dtypes and errors.

    Args:
        weight: One factor per class, shape :math:`(C)`; a buffer, moved with the module.
        size_average: Deprecated, see ``reduction``.
        ignore_index: Class index of rows that do not count.
        reduce: Deprecated, see ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: In [0, 1].
        inplace_backward: Write the gradient over the logits; see :func:`nllx.functional.cross_entropy` for when it is safe.
        zero_division: What the mean over nothing is, NaN or 0; see :func:`nllx.functional.cross_entropy`.
        logit_scale, softcap, temperature, z_loss, divisor: Numbers; see :func:`nllx.functional.cross_entropy`. Tensors (one per
            row, or learnable) are given in the call, ``criterion(logits, target, sample_weight=u, logit_scale=s)``, where they
            take the place of the module's numbers.
    """

    # Of modules pickled before there were these options, and of torch's own.
    inplace_backward: bool = False
    zero_division: float = math.nan
    logit_scale: float = ONE
    softcap: float | None = None
    temperature: float = ONE
    z_loss: float = ZERO
    divisor: float | None = None
    _has_row_options: bool = False  # to look up one attribute and not five, which takes as long as a small loss

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ROW_OPTIONS:
            self._has_row_options = True
        super().__setattr__(name, value)

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        inplace_backward: bool = False,
        zero_division: float = math.nan,
        logit_scale: float = ONE,
        softcap: float | None = None,
        temperature: float = ONE,
        z_loss: float = ZERO,
        divisor: float | None = None,
    ) -> None:
        super().__init__(weight, size_average, plain(ignore_index), reduce, reduction, plain(label_smoothing))
        mean_or_zero("CrossEntropyLoss", 1, zero_division)
        numbers = (logit_scale, softcap, temperature, z_loss, divisor)
        check_row_numbers("CrossEntropyLoss", self.reduction, **dict(zip(_ROW_OPTIONS, numbers, strict=True)))
        self.inplace_backward = inplace_backward
        self.zero_division = plain(zero_division)
        for name, value in zip(_ROW_OPTIONS, numbers, strict=True):
            if value is not None and value != _ROW_OPTIONS[name]:
                setattr(self, name, plain(value))

    def extra_repr(self) -> str:
        return _options(self)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return _scriptable(self, torch.nn.CrossEntropyLoss)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        divisor: float | Tensor | None = None,
        logit_scale: float | Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor:
        given = sample_weight is not None or divisor is not None or logit_scale is not None or temperature is not None
        # Twice the call, since one with a dict of options takes a tenth longer, of a tiny loss.
        if not given and not self._has_row_options:
            return F.cross_entropy(
                input,
                target,
                weight=self.weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                label_smoothing=self.label_smoothing,
                inplace_backward=self.inplace_backward,
                zero_division=self.zero_division,
            )
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            inplace_backward=self.inplace_backward,
            zero_division=self.zero_division,
            logit_scale=self.logit_scale if logit_scale is None else logit_scale,
            softcap=self.softcap,
            temperature=self.temperature if temperature is None else temperature,
            z_loss=self.z_loss,
            sample_weight=sample_weight,
            divisor=self.divisor if divisor is None else divisor,
        )


class NLLLoss(torch.nn.NLLLoss):
    """Drop-in for :class:`torch.nn.NLLLoss`; see :func:`nllx.functional.nll_loss` for shapes, dtypes and errors.

    Args:
        weight: One factor per class, shape :math:`(C)`; a buffer, moved with the module.
        size_average: Deprecated, see ``reduction``.
        ignore_index: Class index of rows that do not count.
        reduce: Deprecated, see ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        zero_division: What the mean over nothing is, NaN or 0; see :func:`nllx.functional.nll_loss`.
    """

    zero_division: float = math.nan

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        zero_division: float = math.nan,
    ) -> None:
        super().__init__(weight, size_average, plain(ignore_index), reduce, reduction)
        mean_or_zero("NLLLoss", 1, zero_division)
        self.zero_division = plain(zero_division)

    def extra_repr(self) -> str:
        return _options(self)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return _scriptable(self, torch.nn.NLLLoss)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            zero_division=self.zero_division,
        )


class MSELoss(torch.nn.MSELoss):
    """Drop-in for :class:`torch.nn.MSELoss`; see :func:`nllx.functional.mse_loss` for shapes, dtypes and errors.

    Args:
        size_average: Deprecated, see ``reduction``.
        reduce: Deprecated, see ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
    """

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return _scriptable(self, torch.nn.MSELoss)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)


class LogSoftmax(torch.nn.LogSoftmax):
    """Drop-in for :class:`torch.nn.LogSoftmax`; see :func:`nllx.functional.log_softmax` for shapes, dtypes and errors.

    Args:
        dim: The dimension of the classes.
    """

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return _scriptable(self, torch.nn.LogSoftmax)

    def forward(self, input: Tensor) -> Tensor:
        return F.log_softmax(input, self.dim, _stacklevel=5)

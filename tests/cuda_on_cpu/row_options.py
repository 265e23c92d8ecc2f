"""The options of rows of logits (``RowOptions`` of csrc/problem.h): tensors for the kernels, and formulas in float64."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from typing import Any

import torch
from emulator import RowOptions
from memory import Memory, address
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Options:
    """logit_scale, temperature: None, "one" for all rows, or "rows", one for each. positive: no logit_scale that is negative
    or zero, as masked logits need it."""

    logit_scale: str | None = None
    temperature: str | None = None
    scale: float = 1.0
    sharpness: float = 1.0
    softcap: float = 0.0
    z_loss: float = 0.0
    sample_weight: bool = False
    positive: bool = False


NO_OPTIONS = Options()


class OptionTensors:
    """Of the rows in their order; NaN in those that are ignored."""

    def __init__(self, options: Options, counted: Tensor, acc: torch.dtype) -> None:
        self.options, self.counted = options, counted

        def of_rows(low: float, high: float) -> Tensor:
            values = torch.linspace(low, high, counted.numel(), dtype=acc)
            values[1 % len(values)] = max(low, 0)
            return torch.where(counted, values, torch.nan)

        def of_kind(kind: str | None, low: float, high: float) -> Tensor | None:
            if kind is None:
                return None
            return torch.tensor(high - 0.3, dtype=acc) if kind == "one" else of_rows(low, high)

        self.logit_scale = of_kind(options.logit_scale, 0.4 if options.positive else -1.5, 1.9)
        self.temperature = of_kind(options.temperature, 0.6, 2.3)
        self.sample_weight = of_rows(0.0, 1.8) if options.sample_weight else None

    def struct(self, memory: Memory) -> RowOptions:
        """In memory that shows access out of bounds."""
        o = self.options
        fields: dict[str, Any] = {
            name: getattr(o, name) for name in ("scale", "sharpness", "softcap", "z_loss")
        }  # fmt: skip
        self.kept = []
        for name in ("logit_scale", "temperature", "sample_weight"):
            tensor = getattr(self, name)
            if tensor is not None:
                self.kept.append(memory.copy(tensor, 1))
                fields[name] = address(self.kept[-1])
                if name != "sample_weight":
                    fields[f"{name}_stride"] = tensor.dim()
        return RowOptions(**fields)

    def pointer(self, memory: Memory) -> Any:
        return ctypes.pointer(self.struct(memory)) if self.options != NO_OPTIONS else None

    def rows(self, tensor: Tensor | None) -> Tensor:
        """One number in float64 for each row that counts."""
        if tensor is None:
            return torch.ones(int(self.counted.sum()), dtype=torch.float64)
        return tensor.double().expand(self.counted.shape)[self.counted]


class Mapped:
    """z of the rows (R, C) that count, and its derivatives; x in float64.

    slope: dz / dx over the scale; per_scale: that scale, but for logit_scale. argument: of the tanh.
    """

    def __init__(self, x: Tensor, tensors: OptionTensors) -> None:
        o = tensors.options
        sharpness = o.sharpness / tensors.rows(tensors.temperature).unsqueeze(1)
        self.per_scale = torch.full_like(sharpness, o.scale / o.softcap) if o.softcap else o.scale * sharpness
        self.scale = self.per_scale * tensors.rows(tensors.logit_scale).unsqueeze(1)
        self.argument = y = x * self.scale
        if o.softcap:
            self.z = o.softcap * sharpness * torch.tanh(y)
            self.slope = o.softcap * sharpness / torch.cosh(y).square()
            self.argument = y.clamp(-400, 400)
        else:
            self.z, self.slope = y, torch.ones_like(y)
            self.argument = torch.zeros_like(y)

    def gradients(self, x: Tensor, of_z: Tensor) -> tuple[Tensor, Tensor]:
        """Of x, and of the logit_scale of each row; a masked class has no part in it."""
        slope = of_z * self.slope
        return slope * self.scale, (slope * self.per_scale * torch.where(x.isinf(), 0.0, x)).sum(1)


def within(actual: Tensor, expected: Tensor, size: Tensor, of: str) -> None:
    """Two roundings of the result, and some of terms of that size in the dtype that is computed in."""
    rounded, acc = (torch.finfo(dtype) for dtype in (actual.dtype, torch.promote_types(actual.dtype, torch.float32)))
    allowed = 2 * rounded.eps * expected.abs() + 32 * acc.eps * size + rounded.tiny * max(1, rounded.eps / acc.eps)
    error = (actual.double() - expected).abs()
    same = actual.double() == expected
    worst = torch.where(same, 0.0, error / allowed)
    assert bool((worst <= 1).all()), (
        f"{of}: {math.inf if worst.isnan().any() else float(worst.max()):.3g} of the tolerance"
    )

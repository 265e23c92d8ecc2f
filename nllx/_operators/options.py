"""The options of the losses of logits in plain torch operations: what the logits are before they are compared, and what their
losses are multiplied with and divided by (csrc/problem.h, RowOptions)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nllx._operators.shapes import MEAN, MEAN_OR_ZERO, check_devices, differ, dtype_name, holds


def check_options(
    op: str,
    logits: Tensor,
    rows: Sequence[int],
    sample_weight: Tensor | None,
    logit_scale: Tensor | None,
    temperature: Tensor | None,
    scale: float,
    sharpness: float,
    softcap: float,
    z_loss: float,
) -> None:
    """Raises what the kernels raise (csrc/checks.cpp)."""
    tensors = {"sample_weight": sample_weight, "logit_scale": logit_scale, "temperature": temperature}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.is_complex():
            raise TypeError(f"{op}(): argument '{name}' must be real, but has dtype {dtype_name(tensor.dtype)}")
        one_in_all = name != "sample_weight"
        if differ(tensor.shape, rows) and not (one_in_all and tensor.dim() == 0):
            kinds = "a number, a tensor of no dimension or one number per row" if one_in_all else "one number per row"
            raise ValueError(f"{op}: {name} must be {kinds}, of shape {list(rows)}, but got shape {list(tensor.shape)}")
    check_devices(op, logits, **tensors)
    # Numbers that change are symbols to a compiler, which traces comparisons.
    if not (-math.inf < scale < math.inf and 0 < sharpness < math.inf):
        raise ValueError(
            f"{op}: logit_scale must be a finite number and temperature a positive one; their numbers are {scale} and "
            f"{sharpness}"
        )
    if not 0 <= softcap < math.inf:
        raise ValueError(f"{op}: softcap must be a positive number, or None, but got {softcap}")
    if not -math.inf < z_loss < math.inf:
        raise ValueError(f"{op}: z_loss must be a finite number, but got {z_loss}")


def check_divisor(op: str, logits: Tensor, divisor: Tensor | None, reduction: int) -> None:
    if divisor is None:
        return
    if reduction not in (MEAN, MEAN_OR_ZERO):
        raise ValueError(f"{op}: divisor is what reduction 'mean' divides by; with another reduction divide the result")
    if divisor.is_complex():
        raise TypeError(f"{op}(): argument 'divisor' must be real, but has dtype {dtype_name(divisor.dtype)}")
    if divisor.dim() != 0:
        raise ValueError(
            f"{op}: divisor must be a number or a tensor of no dimension, but got shape {list(divisor.shape)}"
        )
    check_devices(op, logits, divisor=divisor)


def given_divisor(divisor: Tensor, reduction: int, acc: torch.dtype) -> Tensor:
    """The divisor as it divides: infinite where it is 0 and the mean over nothing is to be 0."""
    divisor = divisor.to(acc)
    return torch.where(divisor == 0, torch.inf, divisor) if reduction == MEAN_OR_ZERO else divisor


def of_rows(option: Tensor, dim: int, valid: Tensor | None, acc: torch.dtype, other: float) -> Tensor:
    """An option with a dimension for the classes; `other` in rows that do not count, where it may be anything."""
    option = option.to(acc)
    if option.dim() == 0 and (valid is None or valid.dim() > 1):
        return option
    option = option.unsqueeze(dim)
    return option if valid is None else torch.where(valid, option, torch.full_like(option, other))


class LogitMap:
    """z = sharpness / temperature softcap tanh(scale logit_scale x / softcap), or without a softcap (0)
    z = sharpness / temperature scale logit_scale x, and its derivatives."""

    def __init__(
        self,
        dim: int,
        valid: Tensor | None,
        acc: torch.dtype,
        logit_scale: Tensor | None,
        temperature: Tensor | None,
        scale: float,
        sharpness: float,
        softcap: float,
    ) -> None:
        self.is_identity = (
            logit_scale is None and temperature is None and scale == 1 and sharpness == 1 and softcap == 0
        )
        self.logit_scale = None if logit_scale is None else of_rows(logit_scale, dim, valid, acc, 1)
        self.per_scale: float | Tensor = scale
        self.outer: float | Tensor = (
            sharpness if temperature is None else sharpness / of_rows(temperature, dim, valid, acc, 1)
        )
        self.softcap = softcap
        if softcap == 0:
            self.per_scale = self.per_scale * self.outer
        else:
            self.per_scale = self.per_scale / softcap
            self.outer = self.outer * softcap

    def _inner(self, x: Tensor) -> Tensor:
        """What is capped, or z. A masked class has no part in the derivative of a factor, which would be 0 times infinity."""
        factor = self.per_scale if self.logit_scale is None else self.per_scale * self.logit_scale
        if not isinstance(factor, Tensor):
            return x * factor
        masked = x.isinf()
        return torch.where(masked, x * factor.detach(), torch.where(masked, torch.zeros_like(x), x) * factor)

    def __call__(self, x: Tensor) -> Tensor:
        if self.is_identity:
            return x
        if self.softcap == 0:
            return self._inner(x)
        # Where it is infinite, tanh is a constant, of whose derivatives torch makes NaN.
        masked, inner = x.isinf(), self._inner(x)
        finite = torch.where(masked, torch.zeros_like(inner), inner)
        return self.outer * torch.where(masked, torch.tanh(inner).detach(), torch.tanh(finite))

    def derivatives(self, gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradient of z those of x and of the logit_scale of each class."""
        if self.is_identity:
            return gradient, gradient
        masked = x.isinf()
        x = torch.where(masked, torch.zeros_like(x), x)
        if self.softcap != 0:  # not 1 - tanh², which has no digits left where tanh is nearly 1
            gradient = gradient * self.outer / torch.cosh(self._inner(x)).square()
            gradient = torch.where(masked, torch.zeros_like(gradient), gradient)
        gradient = gradient * self.per_scale
        return gradient if self.logit_scale is None else gradient * self.logit_scale, gradient * x


def to_shape_of_scale(by_scale: Tensor, logit_scale: Tensor, dim: int) -> Tensor:
    """The gradient of logit_scale, from what each class gives."""
    rows = by_scale.sum(dim)
    if logit_scale.dim() == 0 and rows.dim() > 0:
        rows = rows.sum()
    return rows.to(logit_scale.dtype)


def log_sum_exp(x: Tensor, dim: int) -> Tensor:
    if holds(x.shape[dim] == 0):
        return torch.logsumexp(x, dim)
    m = x.detach().amax(dim, keepdim=True)
    m = torch.where(m == -torch.inf, torch.zeros_like(m), m)
    return m.squeeze(dim) + (x - m).exp().sum(dim).log()


def empty_gradients(
    logits: Tensor, logit_scale: Tensor | None, output_mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    of_scale = None
    if output_mask[1] and logit_scale is not None:
        of_scale = torch.empty_like(logit_scale, memory_format=torch.contiguous_format)
    return torch.empty_like(logits) if output_mask[0] else None, of_scale

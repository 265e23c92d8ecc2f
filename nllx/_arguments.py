"""Python's arguments of the losses, as torch takes them: types, ranges, deprecated ones."""

from __future__ import annotations

import math
import numbers
import operator
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction

from nllx import _C
from nllx._operators.shapes import MEAN, MEAN_OR_ZERO

SMALLEST, LARGEST = -(2**63), 2**63 - 1


NAN = math.nan


def check_tensors(op: str, **tensors: Any) -> None:
    """Raises torch's TypeError for arguments that are no tensors; torch.ops would raise RuntimeError."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor) and (name != "weight" or value is not None):
            raise TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(value).__name__}")


def plain(value: Any) -> Any:
    """NumPy's numbers as Python's, which torch.jit.script takes; others as they are."""
    of_numpy: Any = value if type(value).__module__ == "numpy" and isinstance(value, numbers.Number) else None
    return value if of_numpy is None else of_numpy.item()


def is_traced_number(value: Any) -> bool:
    """Whether it is a number of NumPy as a compiler has it: an array of no dimension."""
    return torch.compiler.is_compiling() and type(value).__name__ == "ndarray" and value.ndim == 0


def integer(op: str, name: str, value: Any) -> int:
    """As torch takes an int: anything with ``__index__`` (NumPy's integers too) but a bool, in 64 bits."""
    if is_traced_number(value):
        traced = torch.as_tensor(value)
        if not traced.is_floating_point() and traced.dtype != torch.bool:
            return traced.item()  # type: ignore[return-value]
    try:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{op}(): argument '{name}' must be int, not {type(value).__name__}") from None
    # Of NumPy's and torch's numbers a compiler may know no value; they have no more bits.
    if (isinstance(value, int) or not torch.compiler.is_compiling()) and not SMALLEST <= number <= LARGEST:
        raise ValueError(f"{op}(): argument '{name}' is {number}. Overflow when unpacking long long")
    return number


def _is_constant(value: Tensor) -> bool:
    """Whether a tensor is a number that nothing is differentiated with respect to."""
    if value.dim() != 0 or value.is_complex() or value.requires_grad:
        return False
    if torch.compiler.is_compiling():
        return True
    return not _C.has_tangent(value) and not torch._C._functorch.is_gradtrackingtensor(value)


def real(op: str, name: str, value: Any) -> float:
    """As torch takes a float: a real number (NumPy's too), or a tensor of no dimension that needs no gradient."""
    if is_traced_number(value):
        value = value.item()
    if not isinstance(value, numbers.Real) and not (isinstance(value, Tensor) and _is_constant(value)):
        raise TypeError(f"{op}(): argument '{name}' must be float, not {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{op}(): argument '{name}' is larger than any float") from None


def is_nested(input: Any) -> bool:
    """Without asking classes of tensors and modes, which see attributes too and may refuse."""
    with torch._C.DisableTorchFunction():
        return isinstance(input, Tensor) and input.is_nested


def refuse_nested(op: str, input: Any) -> None:
    """torch's losses take no nested tensors either, with errors from deep inside."""
    if is_nested(input):
        raise NotImplementedError(
            f"{op}: nested tensors have no rows of classes; give those of their parts: {op}(input.values(), target.values())"
        )


def mean_or_zero(op: str, number: int, zero_division: Any) -> int:
    """The operators' number of a reduction, from ATen's and what the mean over nothing is to be."""
    if is_traced_number(zero_division):
        zero_division = zero_division.item()
    if zero_division != 0:
        if zero_division == zero_division or not isinstance(zero_division, numbers.Real):
            raise ValueError(f"{op}: zero_division must be nan or 0, but got {zero_division!r}")
        return number
    return MEAN_OR_ZERO if number == MEAN else number


# The types of Python that torch takes for a dtype.
_PYTHON_DTYPES = {float: torch.float64, int: torch.int64, bool: torch.bool, complex: torch.complex128}


def as_dtype(op: str, value: Any) -> torch.dtype:
    if isinstance(value, torch.dtype):
        return value
    if isinstance(value, type) and value in _PYTHON_DTYPES:
        return _PYTHON_DTYPES[value]
    raise TypeError(f"{op}(): argument 'dtype' must be torch.dtype, not {type(value).__name__}")


def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    if torch.compiler.is_compiling():  # torch.compile traces neither the warning nor torch's function
        return "none" if reduce is False else "sum" if size_average is False else "mean"
    return _Reduction.legacy_get_string(size_average, reduce)


def stacklevel_of_caller() -> int:
    """For a warning at the line that called nllx, by whatever way."""
    level = 2
    if not torch.compiler.is_compiling():
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_back.f_globals.get("__name__", "").startswith("nllx."):
            frame, level = frame.f_back, level + 1
    return level


class RowOptions(NamedTuple):
    """The options of a loss of logits as the operators take them (csrc/operators/cross_entropy.h)."""

    sample_weight: Tensor | None
    logit_scale: Tensor | None
    temperature: Tensor | None
    divisor: Tensor | None
    scale: float
    sharpness: float
    softcap: float
    z_loss: float

    def map(self) -> tuple[float, float, float]:
        return self.scale, self.sharpness, self.softcap


# The options' defaults, known by identity. Of other numbers than the integers 0 and 1 a compiler that traces for numbers that
# change would make variables.
ONE: float = 1
ZERO: float = 0


def _tensor(op: str, name: str, value: Any) -> Tensor:
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{op}(): argument '{name}' must be a real number or a tensor of them, not {value.dtype}")
    return value


def _positive(op: str, name: str, value: Any) -> float:
    number = real(op, name, value)
    if not 0.0 < number < math.inf:  # a comparison, which a compiler traces of a number that changes
        raise ValueError(f"{op}: {name} must be a positive number, but got {value!r}")
    return number


def _finite(op: str, name: str, value: Any) -> float:
    number = real(op, name, value)
    if not -math.inf < number < math.inf:
        raise ValueError(f"{op}: {name} must be a finite number, but got {value!r}")
    return number


def row_options(
    op: str,
    logits: Tensor,
    logit_scale: float | Tensor = ONE,
    softcap: float | None = None,
    temperature: float | Tensor = ONE,
    z_loss: float = ZERO,
    sample_weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    with_graph: bool = True,
) -> RowOptions:
    """with_graph: whether the tensors may get gradients."""
    if (
        softcap is None
        and sample_weight is None
        and divisor is None
        and logit_scale is ONE
        and temperature is ONE
        and z_loss is ZERO
    ):
        return RowOptions(None, None, None, None, 1.0, 1.0, 0.0, 0.0)
    scale = sharpness = 1.0
    of_scale = of_temperature = None
    if isinstance(logit_scale, Tensor):
        of_scale = _tensor(op, "logit_scale", logit_scale)
    elif logit_scale is not ONE:
        scale = _finite(op, "logit_scale", logit_scale)
    if isinstance(temperature, Tensor):
        of_temperature = _tensor(op, "temperature", temperature)
    elif temperature is not ONE:
        sharpness = 1.0 / _positive(op, "temperature", temperature)
    cap = 0.0 if softcap is None else _positive(op, "softcap", softcap)
    if sample_weight is not None and not isinstance(sample_weight, Tensor):
        raise TypeError(f"{op}(): argument 'sample_weight' must be Tensor, not {type(sample_weight).__name__}")
    if divisor is not None and not isinstance(divisor, Tensor):
        number = divisor if isinstance(divisor, torch.SymInt | torch.SymFloat) else real(op, "divisor", divisor)
        if not 0.0 <= number < math.inf:
            raise ValueError(f"{op}: divisor must be a number that is not negative, but got {divisor!r}")
        divisor = torch.full([], number, dtype=torch.float64, device=logits.device)
    # Without a softcap a learnable temperature is a scale, whose gradient the kernels have.
    if (
        with_graph
        and softcap is None
        and of_temperature is not None
        and of_temperature.requires_grad
        and of_temperature.dim() == 0
        and of_temperature.device == logits.device
    ):
        wide = of_temperature.to(
            torch.promote_types(torch.promote_types(of_temperature.dtype, logits.dtype), torch.float32)
        )
        of_scale, of_temperature = wide.reciprocal() if of_scale is None else of_scale / wide, None
    of_square = 0.0 if z_loss is ZERO else _finite(op, "z_loss", z_loss)
    return RowOptions(sample_weight, of_scale, of_temperature, divisor, scale, sharpness, cap, of_square)


def check_row_numbers(op: str, reduction: str, **numbers: Any) -> None:
    """The options of a module, which are numbers."""
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            in_call = (
                f"; give a tensor in the call, criterion(..., {name}=tensor)"
                if name not in ("softcap", "z_loss")
                else ""
            )
            raise TypeError(f"{op}(): '{name}' is a number here{in_call}")
    row_options(op, torch.empty(0), **numbers)
    if numbers["divisor"] is not None and reduction != "mean":
        raise ValueError(f"{op}: divisor is what reduction 'mean' divides by; with another reduction divide the result")

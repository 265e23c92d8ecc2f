"""Python's arguments of the losses, as torch takes them: types, ranges, deprecated ones."""

from __future__ import annotations

import math
import numbers
import operator
import sys
from typing import Any

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
    return float(value)


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

"""The launches of csrc/cuda on CPU tensors, through the emulator.

``run`` does with a problem of ``cases.py`` what the CUDA entries of nllx do with tensors: it finds arrays that the kernels
take, allocates, launches, and returns results. All memory that a kernel gets lies between guard zones.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_double, c_int, c_int64, c_longlong, c_uint8, c_void_p
from pathlib import Path

import torch
from cases import REDUCTIONS, Case, Problem, grad_output
from compilation import CSRC
from torch import Tensor

FLOAT_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
INDEX_TYPES = {torch.int64: 0, torch.int32: 1, torch.int16: 2, torch.int8: 3, torch.uint8: 4}
ROWS, PLANES = 0, 1  # nllx::Layout
FAMILIES = ("register rows", "block rows", "planes")  # nllx::CudaFamily
ASCENDING, DESCENDING, RANDOM = 0, 1, 2  # orders of the emulator: others are random too, by another seed


# The structs of csrc/problem.h, csrc/cuda/kernels.h and csrc/cuda/plan.h.


class Extent(ctypes.Structure):
    _fields_ = [("outer", c_int64), ("classes", c_int64), ("inner", c_int64)]

    @property
    def rows(self) -> int:
        return self.outer * self.inner


class Strides(ctypes.Structure):
    _fields_ = [("outer", c_int64), ("classes", c_int64), ("inner", c_int64)]


class Targets(ctypes.Structure):
    _fields_ = [
        ("index", c_void_p),
        ("index_type", c_uint8),
        ("probabilities", c_void_p),
        ("probabilities_are_acc", c_bool),
        ("probability_strides", Strides),
        ("weight", c_void_p),
        ("weight_sum", c_void_p),
        ("ignore_index", c_int64),
        ("label_smoothing", c_double),
    ]


class CrossEntropyForward(ctypes.Structure):
    _fields_ = [
        ("extent", Extent),
        ("layout", c_uint8),
        ("logits", c_void_p),
        ("logits_strides", Strides),
        ("targets", Targets),
        ("row_loss", c_void_p),
        ("row_loss_is_acc", c_bool),
        ("row_stats", c_void_p),
    ]


class CrossEntropyBackward(ctypes.Structure):
    _fields_ = [
        ("extent", Extent),
        ("layout", c_uint8),
        ("logits", c_void_p),
        ("logits_strides", Strides),
        ("targets", Targets),
        ("row_stats", c_void_p),
        ("grad_output", c_void_p),
        ("grad_output_stride", c_int64),
        ("total_weight", c_void_p),
        ("grad_logits", c_void_p),
        ("grad_strides", Strides),
    ]


class NllLossForward(ctypes.Structure):
    _fields_ = [
        ("extent", Extent),
        ("log_probs", c_void_p),
        ("strides", Strides),
        ("targets", Targets),
        ("row_loss", c_void_p),
        ("row_loss_is_acc", c_bool),
    ]


class NllLossBackward(ctypes.Structure):
    _fields_ = [
        ("extent", Extent),
        ("layout", c_uint8),
        ("targets", Targets),
        ("grad_output", c_void_p),
        ("grad_output_stride", c_int64),
        ("total_weight", c_void_p),
        ("grad_log_probs", c_void_p),
        ("grad_strides", Strides),
    ]


class LogSoftmaxForward(ctypes.Structure):
    _fields_ = [
        ("extent", Extent),
        ("layout", c_uint8),
        ("input", c_void_p),
        ("input_strides", Strides),
        ("output", c_void_p),
        ("output_strides", Strides),
    ]


class LogSoftmaxBackward(ctypes.Structure):
    _fields_ = [
        ("extent", Extent),
        ("layout", c_uint8),
        ("grad_output", c_void_p),
        ("grad_output_strides", Strides),
        ("output", c_void_p),
        ("output_strides", Strides),
        ("grad_input", c_void_p),
        ("grad_input_strides", Strides),
    ]


class LossReduction(ctypes.Structure):
    _fields_ = [
        ("reduction", c_uint8),
        ("loss_is_acc", c_bool),
        ("loss", c_void_p),
        ("total_weight", c_void_p),
        ("partials", c_void_p),
    ]


class BadTarget(ctypes.Structure):
    _fields_ = [
        ("claimed", c_int),
        ("ready", c_int),
        ("row", c_longlong),
        ("value", c_longlong),
        ("classes", c_longlong),
        ("ignore_index", c_longlong),
    ]


class CudaPlan(ctypes.Structure):
    _fields_ = [
        ("family", c_uint8),
        ("threads", c_int),
        ("threads_per_row", c_int),
        ("rows_per_block", c_int),
        ("values_per_thread", c_int),
        ("blocks", c_int64),
    ]


_STRUCTS = (
    CrossEntropyForward,
    CrossEntropyBackward,
    NllLossForward,
    NllLossBackward,
    LogSoftmaxForward,
    LogSoftmaxBackward,
    LossReduction,
    BadTarget,
    CudaPlan,
)


class KernelError(Exception):
    """A launch that ended early: a deadlock, a collective used against its rules, or undefined behaviour."""


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: str  # as the launch names it: "log_softmax_forward_rows_kernel<T>"
    blocks: int
    threads: int

    @property
    def name(self) -> str:
        return self.kernel.split("<")[0]


@functools.cache
def kernel_bounds() -> dict[str, int]:
    """The kernels of csrc/cuda and the threads of a block that each is compiled for."""
    sources = "\n".join(path.read_text() for path in sorted((CSRC / "cuda").glob("*.cu*")))
    found = re.findall(r"__global__\s+void\s+__launch_bounds__\((\d+), 1\)\s+(\w+)\(", sources)
    assert len(found) == len(re.findall(r"\b__global__\b", sources)), "a kernel without __launch_bounds__(threads, 1)"
    return {name: int(threads) for threads, name in found}


class Kernels:
    """A library made by ``compilation.kernels_library``."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.emulator_error.restype = c_char_p
        self._library.emulator_launches.restype = c_char_p
        self._library.emulator_configure.argtypes = [ctypes.c_uint64, ctypes.c_uint]
        for struct in _STRUCTS:
            size = c_int64.in_dll(self._library, f"sizeof_{struct.__name__}").value
            assert size == ctypes.sizeof(struct), f"{struct.__name__} here is not that of csrc"
        self.launched: list[Launch] = []  # since the list was last emptied

    def _function(self, name: str, restype: type, arguments: Sequence[object]):
        address = c_void_p.in_dll(self._library, name).value
        assert address is not None, f"the library is built without {name}"
        return CFUNCTYPE(restype, *map(type, arguments))(address)

    def launch(self, name: str, *arguments: object, order: int = ASCENDING, most_blocks: int = 0) -> None:
        """Calls ``nllx::launch_<name>`` on stream 0. Arguments are of ctypes; structs go by reference."""
        arguments = tuple(ctypes.pointer(a) if isinstance(a, ctypes.Structure) else a for a in arguments)
        arguments = (*arguments, c_void_p())
        self._library.emulator_configure(order, most_blocks)
        status = self._function(f"launch_{name}", c_int, arguments)(*arguments)
        launched = [line.split("\t") for line in self._library.emulator_launches().decode().splitlines()]
        error = self._library.emulator_error().decode()
        if status != 0 or error:
            raise KernelError(error)
        for kernel, blocks, threads in launched:
            launch = Launch(kernel.strip("()"), int(blocks), int(threads))
            bound = kernel_bounds()[launch.name]
            assert launch.threads <= bound, f"{launch}: launched with more threads than its bound, {bound}"
            self.launched.append(launch)

    def plan(self, name: str, extent: Extent, layout: int, element_bytes: int | None = None) -> CudaPlan:
        """``nllx::cuda_plan_<name>``."""
        arguments: list[object] = [ctypes.pointer(extent), c_uint8(layout)]
        if element_bytes is not None:
            arguments.append(c_int(element_bytes))
        return self._function(f"cuda_plan_{name}", CudaPlan, arguments)(*arguments)


class Memory:
    """Tensors between guard zones, in memory that is NaN, or -1, where nothing is written."""

    GUARD = 4096  # bytes on either side

    def __init__(self) -> None:
        self._tensors: list[tuple[Tensor, Tensor, Tensor | None]] = []  # buffer, tensor, values it has to keep

    def _place(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, shift: int) -> tuple[Tensor, Tensor]:
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        begin = self.GUARD + shift * dtype.itemsize
        buffer = torch.full([begin + extent * dtype.itemsize + self.GUARD], 0xFF, dtype=torch.uint8)
        assert buffer.data_ptr() % 16 == 0
        window = buffer[begin : begin + extent * dtype.itemsize].view(dtype)
        return buffer, window.as_strided(shape, stride)

    def copy(self, tensor: Tensor, shift: int | None = None) -> Tensor:
        """A copy with the tensor's strides, `shift` elements past a 16-byte boundary (by default as the tensor is), of
        which nothing may change."""
        tensor = tensor.resolve_neg()
        if shift is None:
            shift = tensor.data_ptr() % 16 // tensor.itemsize
        buffer, copy = self._place(tensor.shape, tensor.stride(), tensor.dtype, shift)
        everything = [1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))], [1]
        copy.as_strided(*everything).copy_(tensor.as_strided(*everything))
        self._tensors.append((buffer, copy, buffer.clone()))
        return copy

    def empty(self, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None, shift: int = 0) -> Tensor:
        """Memory to write: contiguous, or with stride."""
        if stride is None:
            stride = torch.empty(shape, device="meta").stride()
        buffer, tensor = self._place(shape, stride, dtype, shift)
        self._tensors.append((buffer, tensor, None))
        return tensor

    def check(self) -> None:
        """Nothing was written but what ``empty`` returned."""
        for buffer, tensor, kept in self._tensors:
            if kept is not None:
                assert torch.equal(buffer, kept), "an input has changed, or the memory around it"
                continue
            values = tensor.clone()
            tensor.view(torch.uint8).fill_(0xFF) if tensor.dim() == 0 else tensor.fill_(0)
            outside = buffer.clone()
            tensor.copy_(values)
            expected = torch.full_like(buffer, 0xFF)
            start = tensor.data_ptr() - buffer.data_ptr()
            expected[start : start + 0]
            del outside, expected


def address(tensor: Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())

"""The functions of csrc/cuda in ctypes: structs, and launches and plans of a library that ``compilation`` has made."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from ctypes import CFUNCTYPE, c_bool, c_char_p, c_double, c_float, c_int, c_int64, c_longlong, c_uint8, c_void_p
from pathlib import Path
from typing import Any

import torch
from compilation import CSRC
from gpus import GPUS

FLOAT_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_INDICES = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64")
INDEX_TYPES = {getattr(torch, name): number for number, name in enumerate(_INDICES)}
ROWS, PLANES = 0, 1  # nllx::Layout
FAMILIES = ("tile rows", "register rows", "block rows", "planes")  # nllx::CudaFamily
FORWARD, BACKWARD, VALUE_AND_GRAD, LOG_SOFTMAX = range(4)  # nllx::CudaOp
ASCENDING, DESCENDING, RANDOM = 0, 1, 2  # orders of the emulator: others are random too, by another seed


# The structs of csrc/problem.h, csrc/cuda/kernels/launches.h and csrc/cuda/kernels/plan.h.


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
        ("scale", c_float),
        ("uniform", c_float),
        ("zero_divisor", c_double),
    ]


class RowOptions(ctypes.Structure):
    _fields_ = [
        ("logit_scale", c_void_p),
        ("logit_scale_stride", c_int64),
        ("temperature", c_void_p),
        ("temperature_stride", c_int64),
        ("scale", c_double),
        ("sharpness", c_double),
        ("softcap", c_double),
        ("sample_weight", c_void_p),
        ("z_loss", c_double),
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
        ("options", ctypes.POINTER(RowOptions)),
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
        ("options", ctypes.POINTER(RowOptions)),
        ("grad_logit_scale", c_void_p),
        ("scale_gradient", c_bool),
    ]


class SoftmaxStatisticsForward(ctypes.Structure):
    _fields_ = [
        ("extent", Extent),
        ("layout", c_uint8),
        ("logits", c_void_p),
        ("logits_strides", Strides),
        ("targets", Targets),
        ("log_prob", c_void_p),
        ("logsumexp", c_void_p),
        ("entropy", c_void_p),
        ("prediction", c_void_p),
        ("row_stats", c_void_p),
        ("options", ctypes.POINTER(RowOptions)),
    ]


class SoftmaxStatisticsBackward(ctypes.Structure):
    _fields_ = [
        ("extent", Extent),
        ("layout", c_uint8),
        ("logits", c_void_p),
        ("logits_strides", Strides),
        ("targets", Targets),
        ("row_stats", c_void_p),
        ("grad_log_prob", c_void_p),
        ("grad_logsumexp", c_void_p),
        ("grad_entropy", c_void_p),
        ("grad_logits", c_void_p),
        ("grad_strides", Strides),
        ("options", ctypes.POINTER(RowOptions)),
        ("grad_logit_scale", c_void_p),
        ("scale_gradient", c_bool),
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


MOST_DIMS = 8


class Elements(ctypes.Structure):
    _fields_ = [("count", c_int64), ("dims", c_int), ("sizes", c_int64 * MOST_DIMS)]


class ElementStrides(ctypes.Structure):
    _fields_ = [("of", c_int64 * MOST_DIMS), ("adjacent", c_bool)]


class ElementwiseForward(ctypes.Structure):
    _fields_ = [
        ("elements", Elements),
        ("input", c_void_p),
        ("input_strides", ElementStrides),
        ("target", c_void_p),
        ("target_strides", ElementStrides),
        ("weight", c_void_p),
        ("weight_is_acc", c_bool),
        ("weight_strides", ElementStrides),
        ("loss", c_void_p),
        ("loss_is_acc", c_bool),
        ("loss_strides", ElementStrides),
    ]


class ElementwiseBackward(ctypes.Structure):
    _fields_ = [
        ("elements", Elements),
        ("input", c_void_p),
        ("input_strides", ElementStrides),
        ("target", c_void_p),
        ("target_strides", ElementStrides),
        ("weight", c_void_p),
        ("weight_is_acc", c_bool),
        ("weight_strides", ElementStrides),
        ("grad_output", c_void_p),
        ("grad_output_is_acc", c_bool),
        ("one_grad_output", c_bool),
        ("grad_output_strides", ElementStrides),
        ("total_weight", c_void_p),
        ("grad_input", c_void_p),
        ("grad_input_strides", ElementStrides),
        ("grad_target", c_void_p),
        ("grad_target_strides", ElementStrides),
    ]


class LossReduction(ctypes.Structure):
    _fields_ = [
        ("reduction", c_uint8),
        ("loss_is_acc", c_bool),
        ("loss", c_void_p),
        ("total_weight", c_void_p),
        ("partials", c_void_p),
        ("counters", c_void_p),
        ("row_parts", c_void_p),
        ("divisor", c_void_p),
    ]


class LossWorkspace(ctypes.Structure):
    _fields_ = [("partials", c_int64), ("row_part_bytes", c_int64), ("counters", c_bool)]


class BadTarget(ctypes.Structure):
    _fields_ = [
        ("claimed", c_int),
        ("ready", c_int),
        ("row", c_longlong),
        ("value", c_longlong),
        ("classes", c_longlong),
        ("ignore_index", c_longlong),
    ]


class CudaProblem(ctypes.Structure):
    _fields_ = [
        ("extent", Extent),
        ("layout", c_uint8),
        ("dense", c_bool),
        ("aligned", c_bool),
        ("has_terms", c_bool),
        ("element_bytes", c_int),
    ]


class CudaDevice(ctypes.Structure):
    _fields_ = [
        ("multiprocessors", c_int),
        ("shared_bytes", c_int),
        ("cluster_blocks", c_int),
        ("async_copies", c_bool),
        ("conservative", c_bool),
    ]

    def __init__(
        self,
        multiprocessors: int,
        shared_bytes: int,
        cluster_blocks: int = 1,
        async_copies: bool = True,
        conservative: bool = False,
    ) -> None:
        super().__init__(multiprocessors, shared_bytes, cluster_blocks, async_copies, conservative)


H100 = CudaDevice(*GPUS["sm_90"])
CONSERVATIVE = CudaDevice(H100.multiprocessors, H100.shared_bytes, 1, False, True)  # as nllx::conservative() leaves it


class CudaPlan(ctypes.Structure):
    _fields_ = [
        ("family", c_uint8),
        ("threads", c_int),
        ("threads_per_row", c_int),
        ("rows_at_once", c_int),
        ("vector_elements", c_int),
        ("splits", c_int),
        ("cluster", c_int),
        ("shared_bytes", c_int),
        ("ahead", c_int),
        ("rows_per_chunk", c_int64),
        ("chunks", c_int64),
        ("reason", c_char_p),
    ]


_STRUCTS = (
    RowOptions,
    CrossEntropyForward,
    CrossEntropyBackward,
    SoftmaxStatisticsForward,
    SoftmaxStatisticsBackward,
    NllLossForward,
    NllLossBackward,
    LogSoftmaxForward,
    LogSoftmaxBackward,
    Elements,
    ElementStrides,
    ElementwiseForward,
    ElementwiseBackward,
    LossReduction,
    BadTarget,
    LossWorkspace,
    CudaProblem,
    CudaDevice,
    CudaPlan,
)


class KernelError(Exception):
    """A launch that ended early: a deadlock, a collective used against its rules, or undefined behaviour."""


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: str  # as the launch names it: "log_softmax_forward_rows_kernel<T>"
    blocks: int
    threads: int
    cluster: int = 1  # blocks of one

    @property
    def name(self) -> str:
        return self.kernel.split("<")[0]


@functools.cache
def kernel_bounds() -> dict[str, int]:
    """The kernels of csrc/cuda/kernels and the threads of a block that each is compiled for."""
    sources = "\n".join(path.read_text() for path in sorted((CSRC / "cuda" / "kernels").glob("*.cu*")))
    constants = {
        name: int(value)
        for name, value in re.findall(r"(k\w+) = (\d+)[,;]", (CSRC / "cuda/kernels/plan.h").read_text())
    }
    found = re.findall(r"__global__\s+void\s+__launch_bounds__\((\w+).*\)\s+(\w+)\(", sources)
    assert len(found) == len(re.findall(r"\b__global__\b", sources)), "a kernel without __launch_bounds__"
    return {name: int(threads) if threads.isdecimal() else constants[threads] for threads, name in found}


class Emulator:
    """A library made by ``compilation.library``."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulator_error.restype = c_char_p
        self.library.emulator_launches.restype = c_char_p
        self.library.emulator_banks.restype = c_char_p
        self.library.emulator_banks.argtypes = [c_bool]
        self.library.emulator_configure.argtypes = [ctypes.c_uint64, ctypes.c_uint]
        self.library.emulator_host_memory.argtypes = [c_void_p, ctypes.c_size_t]
        self.launched: list[Launch] = []  # since the list was last emptied
        self.system_atomics = 0  # of the last launch that had a record of bad targets

    def run(self, launch: Callable[[], int], order: int = ASCENDING, most_blocks: int = 0) -> None:
        """Calls a function of the library that launches kernels and returns a cudaError_t.

        order: of the threads; most_blocks: what grids are cut to, unless 0. Raises KernelError.
        """
        self.library.emulator_configure(order, most_blocks)
        status = launch()
        error = self.library.emulator_error().decode()
        if status != 0 or error:
            raise KernelError(error)
        for line in self.library.emulator_launches().decode().splitlines():
            kernel, *numbers = line.split("\t")
            self.launched.append(Launch(kernel.strip("()"), *map(int, numbers)))

    def count_banks(self, count: bool) -> dict[str, int]:
        """Whether the launches that follow count their accesses of shared memory, and what those before have counted.

        The most cycles that the lanes of a warp took to access 128 bytes at once, which are one if no two of them meet
        in a bank: by the place in the source, "row_state.cuh:90".
        """
        lines = self.library.emulator_banks(count).decode().splitlines()
        places = (line.rpartition("/")[2].split("\t") for line in lines)
        return {place: int(cycles) for place, cycles in places}


class Kernels(Emulator):
    """A library made by ``compilation.kernels_library``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        for struct in _STRUCTS:
            size = c_int64.in_dll(self.library, f"sizeof_{struct.__name__}").value
            assert size == ctypes.sizeof(struct), f"{struct.__name__} here is not that of csrc"

    def _function(self, name: str, restype: type, arguments: Sequence[Any]) -> Callable[[], Any]:
        """nllx::name bound to arguments, which are of ctypes; structs go by reference."""
        arguments = [ctypes.pointer(a) if isinstance(a, ctypes.Structure) else a for a in arguments]
        function = CFUNCTYPE(restype, *map(type, arguments))(c_void_p.in_dll(self.library, name).value)
        return lambda: function(*arguments)

    def launch(self, name: str, *arguments: Any, order: int = ASCENDING, most_blocks: int = 0) -> None:
        """``nllx::launch_<name>`` on stream 0."""
        before = len(self.launched)
        launch = self._function(f"launch_{name}", c_int, [*arguments, c_void_p()])
        records = [argument for argument in arguments if isinstance(argument, BadTarget)]
        for record in records:
            self.library.emulator_host_memory(ctypes.addressof(record), ctypes.sizeof(record))
        self.run(launch, order, most_blocks)
        if records:
            self.system_atomics = self.library.emulator_host_memory(None, 0)
        for launch in self.launched[before:]:
            bound = kernel_bounds()[launch.name]
            assert launch.threads <= bound, f"{launch}: more threads than the {bound} that it is compiled for"

    def workspace(self, name: str, *arguments: Any) -> LossWorkspace:
        """``nllx::<name>_workspace``."""
        return self._function(f"{name}_workspace", LossWorkspace, arguments)()

    def plan(self, op: int, problem: CudaProblem, device: CudaDevice = H100) -> CudaPlan:
        """``nllx::cuda_plan``."""
        plan = self._function("cuda_plan", CudaPlan, [c_uint8(op), problem, device])()
        self.run(lambda: 0)  # raises if something in it was undefined
        return plan

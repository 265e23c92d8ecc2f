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
from collections.abc import Callable, Sequence
from ctypes import CFUNCTYPE, c_bool, c_char_p, c_double, c_int, c_int64, c_longlong, c_uint8, c_void_p
from pathlib import Path
from typing import Any

import torch
from cases import REDUCTIONS, Problem, grad_output
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


class Emulator:
    """A library made by ``compilation.library``."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulator_error.restype = c_char_p
        self.library.emulator_launches.restype = c_char_p
        self.library.emulator_configure.argtypes = [ctypes.c_uint64, ctypes.c_uint]
        self.launched: list[Launch] = []  # since the list was last emptied

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
            kernel, blocks, threads = line.split("\t")
            self.launched.append(Launch(kernel.strip("()"), int(blocks), int(threads)))


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
        self.run(self._function(f"launch_{name}", c_int, [*arguments, c_void_p()]), order, most_blocks)
        for launch in self.launched[before:]:
            bound = kernel_bounds()[launch.name]
            assert launch.threads <= bound, f"{launch}: more threads than the {bound} that it is compiled for"

    def plan(self, name: str, extent: Extent, layout: int, *element_bytes: int) -> CudaPlan:
        """``nllx::cuda_plan_<name>``."""
        plan = self._function(f"cuda_plan_{name}", CudaPlan, [extent, c_uint8(layout), *map(c_int, element_bytes)])()
        self.run(lambda: 0)  # raises if something in it was undefined
        return plan


class Memory:
    """Tensors between guard zones, in memory that is NaN, or -1, where nothing is written."""

    GUARD = 4096  # bytes on either side

    def __init__(self) -> None:
        self._tensors: list[tuple[Tensor, Tensor, Tensor | None]] = []  # buffer, tensor, values it has to keep

    def _place(
        self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, shift: int
    ) -> tuple[Tensor, Tensor]:
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

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None, shift: int = 0
    ) -> Tensor:
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
                assert torch.equal(buffer, kept), "an input was written, or memory beside it"
                continue
            values = tensor.clone()
            tensor.view(_INTEGERS[tensor.itemsize]).fill_(-1)
            assert (buffer == 0xFF).all(), "memory beside an output was written"
            tensor.copy_(values)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def address(tensor: Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())


# From tensors to arrays (outer, classes, inner), as csrc/layout.cpp has it.


@dataclasses.dataclass
class Arrays:
    extent: Extent
    layout: int
    strides: list[Strides]


def _collapse(tensor: Tensor, dims: range) -> tuple[int, int] | None:
    """Size and stride of dimensions as one, if their strides allow it."""
    size, stride = 1, 0
    for d in reversed(dims):
        if tensor.shape[d] == 1:
            continue
        if size == 1:
            size, stride = tensor.shape[d], tensor.stride(d)
        elif tensor.stride(d) == stride * size:
            size *= tensor.shape[d]
        else:
            return None
    return size, stride


def _view(tensor: Tensor, class_dim: int, form: str) -> tuple[Extent, Strides] | None:
    outer = _collapse(tensor, range(class_dim))
    inner = _collapse(tensor, range(class_dim + 1, tensor.dim()))
    if outer is None or inner is None:
        return None
    classes, class_stride = tensor.shape[class_dim], tensor.stride(class_dim)
    if form == "flipped planes":  # a transposed matrix is one plane
        fits = inner[0] == 1 and (outer[1] == 1 or outer[0] == 1)
        outer, inner = (1, 0), outer
    else:
        size, stride = (classes, class_stride) if form == "rows" else inner
        fits = stride == 1 or size == 1
    return (Extent(outer[0], classes, inner[0]), Strides(outer[1], class_stride, inner[1])) if fits else None


def view_as_arrays(tensors: Sequence[Tensor], class_dim: int) -> Arrays | None:
    """The tensors, of one shape, as rows or planes; None where they have no layout in common."""
    for form in ("rows", "flipped planes", "planes"):
        views = [_view(tensor, class_dim, form) for tensor in tensors]
        if all(view is not None for view in views):
            return Arrays(views[0][0], ROWS if form == "rows" else PLANES, [view[1] for view in views])
    return None


def share_layout(tensors: list[Tensor], class_dim: int) -> tuple[list[Tensor], Arrays]:
    """The tensors, contiguous where they have no layout in common, and their arrays."""
    arrays = view_as_arrays(tensors, class_dim)
    if arrays is None:
        tensors = [tensor.contiguous() for tensor in tensors]
        arrays = view_as_arrays(tensors, class_dim)
    assert arrays is not None
    return tensors, arrays


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a problem is run.

    order, most_blocks: of the emulator. shifts: elements that the input and its gradient (or log_softmax's output) begin
    past a 16-byte boundary; None: as the table has it. loss_dtype: None for torch's.
    """

    order: int = ASCENDING
    most_blocks: int = 0
    shifts: tuple[int | None, int] = (None, 0)
    loss_dtype: torch.dtype | None = None


@dataclasses.dataclass
class Result:
    """What the kernels made of a problem: bad is the record of class indices out of range after the forward and after the
    backward."""

    output: Tensor
    grad: Tensor
    row_stats: Tensor | None = None
    total_weight: Tensor | None = None
    bad: tuple[BadTarget, BadTarget] = dataclasses.field(default_factory=lambda: (BadTarget(), BadTarget()))

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.output, self.grad, self.row_stats, self.total_weight) if t is not None]


def loss_partials(rows: int) -> int:
    """Groups of rows that are added by a block each."""
    rows_per_partial = int(re.search(r"kRowsPerPartial = (\d+);", (CSRC / "cuda" / "kernels.h").read_text())[1])
    return math.ceil(rows / rows_per_partial)


class _Loss:
    """The tensors of a loss, in the dtypes and memory that the kernels take, and its launches."""

    def __init__(self, kernels: Kernels, problem: Problem, settings: Settings) -> None:
        self.kernels, self.case, self.settings = kernels, problem.case, settings
        self.memory = Memory()
        self.class_dim = 0 if problem.input.dim() == 1 else 1
        self.input, self.probabilities = problem.input, None
        self.torchs_loss_dtype = self.input.dtype
        if self.case.has_probabilities:
            self.probabilities = problem.target
            for tensor in (problem.target, problem.weight):
                if tensor is not None:
                    self.torchs_loss_dtype = torch.promote_types(self.torchs_loss_dtype, tensor.dtype)
            if self.torchs_loss_dtype == torch.float64:
                self.input = self.input.double()
        self.acc = torch.float64 if self.input.dtype == torch.float64 else torch.float32
        self.loss_dtype = settings.loss_dtype or self.torchs_loss_dtype
        self.float_type = c_uint8(FLOAT_TYPES[self.input.dtype])
        self.targets = Targets(ignore_index=self.case.ignore_index, label_smoothing=self.case.label_smoothing)
        if self.probabilities is not None:
            if self.probabilities.dtype != self.input.dtype:
                self.probabilities = self.probabilities.to(self.acc)
            self.targets.probabilities_are_acc = self.probabilities.dtype == self.acc
        else:
            self.index = self.memory.copy(problem.target.contiguous())
            self.targets.index = address(self.index)
            self.targets.index_type = INDEX_TYPES[self.index.dtype]
        if problem.weight is not None:
            self.weight = self.memory.copy(problem.weight.to(self.acc).contiguous())
            self.weight_sum = self.memory.copy(self.weight.sum())
            self.targets.weight = address(self.weight)
            self.targets.weight_sum = address(self.weight_sum)
        self.row_shape = self.input.select(self.class_dim, 0).shape
        self.reduction = REDUCTIONS.index(self.case.reduction)

    @property
    def rows(self) -> int:
        return math.prod(self.row_shape)

    def run(self) -> Result:
        forward, backward = (
            (self._cross_entropy_forward, self._cross_entropy_backward)
            if self.case.op == "cross_entropy"
            else (self._nll_loss_forward, self._nll_loss_backward)
        )
        bad = BadTarget(), BadTarget()
        output, total_weight, row_stats = self._forward(forward, bad[0])
        g = self.memory.copy(grad_output(self.case, output.to(self.torchs_loss_dtype)).to(self.acc).contiguous())
        divisor = total_weight if self.case.reduction == "mean" else None
        grad = backward(g, 1 if self.case.reduction == "none" else 0, divisor, row_stats, bad[1])
        self.memory.check()
        return Result(output, grad, row_stats, total_weight, bad)

    def _launch(self, name: str, *arguments: object) -> None:
        self.kernels.launch(name, *arguments, order=self.settings.order, most_blocks=self.settings.most_blocks)

    def _arrays(self, with_grad: bool) -> tuple[Tensor, Tensor | None, Arrays]:
        """Input and, if asked for, its gradient in memory, with the arrays of both."""
        tensors = [self.input, *([] if self.probabilities is None else [self.probabilities])]
        grad = torch.empty_like(self.input) if with_grad else None
        (input, *others), arrays = share_layout([*tensors, *([] if grad is None else [grad])], self.class_dim)
        input = self.memory.copy(input, self.settings.shifts[0])
        if grad is not None:
            grad = self.memory.empty(grad.shape, grad.dtype, others.pop().stride(), self.settings.shifts[1])
        if others:
            self.placed_probabilities = self.memory.copy(others[0])
            self.targets.probabilities = address(self.placed_probabilities)
            self.targets.probability_strides = arrays.strides[1]
        return input, grad, arrays

    def _forward(self, launch, bad: BadTarget) -> tuple[Tensor, Tensor, Tensor | None]:
        reduced = self.case.reduction != "none"
        result = self.memory.empty([] if reduced else self.row_shape, self.loss_dtype)
        row_loss = self.memory.empty([self.rows], self.acc) if reduced else result
        total_weight = self.memory.empty([], self.acc)
        input, _, arrays = self._arrays(with_grad=False)
        row_stats = launch(input, arrays, row_loss, bad)
        partials = self.memory.empty([2 * loss_partials(self.rows)], torch.float64)
        reduction = LossReduction(
            self.reduction, self.loss_dtype == self.acc, address(result), address(total_weight), address(partials)
        )
        self.kernels.launch(
            "loss_reduction",
            reduction,
            arrays.extent,
            self.targets,
            address(row_loss),
            c_bool(row_loss.dtype == self.acc),
            self.float_type,
            order=self.settings.order,  # its blocks do not walk on
        )
        return result, total_weight, row_stats

    def _cross_entropy_forward(self, input: Tensor, arrays: Arrays, row_loss: Tensor, bad: BadTarget) -> Tensor:
        row_stats = self.memory.empty([*self.row_shape, 2], self.acc)
        problem = CrossEntropyForward(
            arrays.extent,
            arrays.layout,
            address(input),
            arrays.strides[0],
            self.targets,
            address(row_loss),
            row_loss.dtype == self.acc,
            address(row_stats),
        )
        self._launch("cross_entropy_forward", problem, self.float_type, bad)
        return row_stats

    def _cross_entropy_backward(
        self, g: Tensor, g_stride: int, divisor: Tensor | None, row_stats: Tensor, bad: BadTarget
    ) -> Tensor:
        input, grad, arrays = self._arrays(with_grad=True)
        problem = CrossEntropyBackward(
            arrays.extent,
            arrays.layout,
            address(input),
            arrays.strides[0],
            self.targets,
            address(row_stats),
            address(g),
            g_stride,
            address(divisor),
            address(grad),
            arrays.strides[-1],
        )
        mass = self.memory.empty([self.rows], self.acc)
        self._launch("cross_entropy_backward", problem, self.float_type, address(mass), bad)
        return grad

    def _nll_loss_forward(self, input: Tensor, arrays: Arrays, row_loss: Tensor, bad: BadTarget) -> None:
        problem = NllLossForward(
            arrays.extent,
            address(input),
            arrays.strides[0],
            self.targets,
            address(row_loss),
            row_loss.dtype == self.acc,
        )
        self._launch("nll_loss_forward", problem, self.float_type, bad)

    def _nll_loss_backward(
        self, g: Tensor, g_stride: int, divisor: Tensor | None, row_stats: None, bad: BadTarget
    ) -> Tensor:
        (grad,), arrays = share_layout([torch.empty_like(self.input)], self.class_dim)
        grad = self.memory.empty(grad.shape, grad.dtype, grad.stride(), self.settings.shifts[1])
        problem = NllLossBackward(
            arrays.extent,
            arrays.layout,
            self.targets,
            address(g),
            g_stride,
            address(divisor),
            address(grad),
            arrays.strides[0],
        )
        self._launch("nll_loss_backward", problem, self.float_type, bad)
        return grad


def _run_log_softmax(kernels: Kernels, problem: Problem, settings: Settings) -> Result:
    case, memory = problem.case, Memory()
    input = problem.input if case.out_dtype is None else problem.input.to(case.out_dtype)
    float_type = c_uint8(FLOAT_TYPES[input.dtype])
    how = {"order": settings.order, "most_blocks": settings.most_blocks}

    (x, y), arrays = share_layout(
        [input, torch.empty_like(input, memory_format=torch.contiguous_format)], case.class_dim
    )
    x = memory.copy(x, settings.shifts[0])
    y = memory.empty(y.shape, y.dtype, y.stride(), settings.shifts[1])
    forward = LogSoftmaxForward(
        arrays.extent, arrays.layout, address(x), arrays.strides[0], address(y), arrays.strides[1]
    )
    kernels.launch("log_softmax_forward", forward, float_type, **how)

    (g, placed_y, grad), arrays = share_layout([grad_output(case, y), y, torch.empty_like(y)], case.class_dim)
    g = memory.copy(g, settings.shifts[0])
    placed_y = memory.copy(placed_y)
    grad = memory.empty(grad.shape, grad.dtype, grad.stride(), settings.shifts[1])
    backward = LogSoftmaxBackward(
        arrays.extent,
        arrays.layout,
        address(g),
        arrays.strides[0],
        address(placed_y),
        arrays.strides[1],
        address(grad),
        arrays.strides[2],
    )
    kernels.launch("log_softmax_backward", backward, float_type, **how)
    memory.check()
    return Result(y, grad)


def run(kernels: Kernels, problem: Problem, settings: Settings = Settings()) -> Result:  # noqa: B008
    """Output and gradient of a problem, for the gradient of the output that ``cases.grad_output`` gives."""
    result = (
        _run_log_softmax(kernels, problem, settings)
        if problem.case.op == "log_softmax"
        else _Loss(kernels, problem, settings).run()
    )
    result.grad = result.grad.to(problem.input.dtype)
    return result

"""The launches of csrc/cuda on CPU tensors, through the emulator.

``run`` does with a problem of ``cases.py`` what the CUDA entries of nllx do with tensors: it finds arrays that the
kernels take, allocates, launches, and returns results.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from ctypes import c_bool, c_uint8

import torch
from cases import REDUCTIONS, Problem, grad_output
from compilation import CSRC
from emulator import (
    ASCENDING,
    FLOAT_TYPES,
    INDEX_TYPES,
    PLANES,
    ROWS,
    BadTarget,
    CrossEntropyBackward,
    CrossEntropyForward,
    Extent,
    Kernels,
    LogSoftmaxBackward,
    LogSoftmaxForward,
    LossReduction,
    NllLossBackward,
    NllLossForward,
    Strides,
    Targets,
)
from memory import Memory, address
from torch import Tensor

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
    past a 16-byte boundary; None: as the table has it. loss_dtype: None for torch's. memory: where the tensors lie.
    """

    order: int = ASCENDING
    most_blocks: int = 0
    shifts: tuple[int | None, int] = (None, 0)
    loss_dtype: torch.dtype | None = None
    memory: type[Memory] = Memory


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
        self.memory = settings.memory()
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
        grad = self.memory.like(self.input) if with_grad else None
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
        (grad,), arrays = share_layout([self.memory.like(self.input)], self.class_dim)
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
    case, memory = problem.case, settings.memory()
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

    (g, placed_y, grad), arrays = share_layout([grad_output(case, y), y, memory.like(y)], case.class_dim)
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

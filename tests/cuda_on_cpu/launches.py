"""The launches of csrc/cuda on CPU tensors, through the emulator.

``run`` does with a problem of ``cases.py`` what the CUDA entries of nllx do with tensors: it finds arrays that the
kernels take, allocates, launches, and returns results.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from ctypes import c_bool, c_uint8
from typing import Any

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

    order, most_blocks: of the emulator. shifts: elements that the input and its gradient (or log_softmax's output)
    begin past a 16-byte boundary; None: as the table has it. loss_dtype: None for torch's. memory: where tensors lie.
    """

    order: int = ASCENDING
    most_blocks: int = 0
    shifts: tuple[int | None, int] = (None, 0)
    loss_dtype: torch.dtype | None = None
    memory: type[Memory] = Memory


@dataclasses.dataclass
class Result:
    """What the kernels made of a problem.

    row_stats, total_weight: of the losses that have them. bad: what the forward and the backward recorded of class
    indices out of range.
    """

    output: Tensor
    grad: Tensor
    row_stats: Tensor | None = None
    total_weight: Tensor | None = None
    bad: tuple[BadTarget, BadTarget] = dataclasses.field(default_factory=lambda: (BadTarget(), BadTarget()))


def _loss_partials(rows: int) -> int:
    """Groups of rows that are added by a block each."""
    found = re.search(r"kRowsPerPartial = (\d+);", (CSRC / "cuda" / "kernels.h").read_text())
    assert found is not None
    return math.ceil(rows / int(found[1]))


class _Loss:
    """The tensors of a loss, in the dtypes and memory that the kernels take, and its launches."""

    def __init__(self, kernels: Kernels, problem: Problem, settings: Settings) -> None:
        case = problem.case
        self.kernels, self.case, self.settings, self.memory = kernels, case, settings, settings.memory()
        self.class_dim = 0 if problem.input.dim() == 1 else 1
        self.input, self.probabilities = problem.input, None
        self.torchs_loss_dtype = self.input.dtype
        self.targets = Targets(ignore_index=case.ignore_index, label_smoothing=case.label_smoothing)
        if case.has_probabilities:
            for tensor in (problem.target, problem.weight):
                if tensor is not None:
                    self.torchs_loss_dtype = torch.promote_types(self.torchs_loss_dtype, tensor.dtype)
            if self.torchs_loss_dtype == torch.float64:
                self.input = self.input.double()
        self.acc = torch.float64 if self.input.dtype == torch.float64 else torch.float32
        self.loss_dtype = settings.loss_dtype or self.torchs_loss_dtype
        if case.has_probabilities:
            same = problem.target.dtype == self.input.dtype
            self.probabilities = problem.target if same else problem.target.to(self.acc)
            self.targets.probabilities_are_acc = self.probabilities.dtype == self.acc
        else:
            self.targets.index = address(self.memory.copy(problem.target.contiguous()))
            self.targets.index_type = INDEX_TYPES[problem.target.dtype]
        if problem.weight is not None:
            weight = self.memory.copy(problem.weight.to(self.acc).contiguous())
            self.targets.weight = address(weight)
            if case.label_smoothing > 0:
                self.targets.weight_sum = address(self.memory.copy(weight.sum()))
        self.float_type = c_uint8(FLOAT_TYPES[self.input.dtype])
        self.row_shape = self.input.select(self.class_dim, 0).shape
        self.rows = math.prod(self.row_shape)

    def run(self) -> Result:
        cross_entropy = self.case.op == "cross_entropy"
        bad = BadTarget(), BadTarget()
        reduced = self.case.reduction != "none"
        output = self.memory.empty([] if reduced else self.row_shape, self.loss_dtype)
        row_loss = self.memory.empty([self.rows], self.acc) if reduced else output
        row_stats = self.memory.empty([*self.row_shape, 2], self.acc) if cross_entropy else None
        if cross_entropy:
            self._cross_entropy_forward(row_loss, row_stats, bad[0])
        else:
            self._nll_loss_forward(row_loss, bad[0])
        total_weight = self._reduce(row_loss, output)
        # Rounded as torch's, so that the exact gradient is known.
        g = grad_output(self.case, output.to(self.torchs_loss_dtype)).to(self.acc).contiguous()
        incoming = {
            "grad_output": address(self.memory.copy(g)),
            "grad_output_stride": 0 if reduced else 1,
            "total_weight": address(total_weight if self.case.reduction == "mean" else None),
        }
        if cross_entropy:
            grad = self._cross_entropy_backward(incoming, row_stats, bad[1])
        else:
            grad = self._nll_loss_backward(incoming, bad[1])
        self.memory.check()
        return Result(output, grad, row_stats, total_weight, bad)

    def _launch(self, name: str, *arguments: Any) -> None:
        self.kernels.launch(name, *arguments, order=self.settings.order, most_blocks=self.settings.most_blocks)

    def _arrays(self, *others: Tensor) -> tuple[Tensor, list[Tensor], Arrays]:
        """Input and probabilities in memory; others, if need be contiguous; the arrays of input and others."""
        given = [self.input] if self.probabilities is None else [self.input, self.probabilities]
        tensors, arrays = share_layout([*given, *others], self.class_dim)
        input = self.memory.copy(tensors[0], self.settings.shifts[0])
        if self.probabilities is not None:
            self.targets.probabilities = address(self.memory.copy(tensors[1]))
            self.targets.probability_strides = arrays.strides.pop(1)
        return input, tensors[len(given) :], arrays

    def _cross_entropy_forward(self, row_loss: Tensor, row_stats: Tensor, bad: BadTarget) -> None:
        input, _, arrays = self._arrays()
        problem = CrossEntropyForward(
            extent=arrays.extent,
            layout=arrays.layout,
            logits=address(input),
            logits_strides=arrays.strides[0],
            targets=self.targets,
            row_loss=address(row_loss),
            row_loss_is_acc=row_loss.dtype == self.acc,
            row_stats=address(row_stats),
        )
        self._launch("cross_entropy_forward", problem, self.float_type, bad)

    def _cross_entropy_backward(self, incoming: dict[str, Any], row_stats: Tensor, bad: BadTarget) -> Tensor:
        input, (like,), arrays = self._arrays(self.memory.like(self.input))
        grad = self.memory.empty(like.shape, like.dtype, like.stride(), self.settings.shifts[1])
        problem = CrossEntropyBackward(
            extent=arrays.extent,
            layout=arrays.layout,
            logits=address(input),
            logits_strides=arrays.strides[0],
            targets=self.targets,
            row_stats=address(row_stats),
            grad_logits=address(grad),
            grad_strides=arrays.strides[1],
            **incoming,
        )
        mass = self.memory.empty([self.rows], self.acc)
        self._launch("cross_entropy_backward", problem, self.float_type, address(mass), bad)
        return grad

    def _nll_loss_forward(self, row_loss: Tensor, bad: BadTarget) -> None:
        input, _, arrays = self._arrays()
        problem = NllLossForward(
            extent=arrays.extent,
            log_probs=address(input),
            strides=arrays.strides[0],
            targets=self.targets,
            row_loss=address(row_loss),
            row_loss_is_acc=row_loss.dtype == self.acc,
        )
        self._launch("nll_loss_forward", problem, self.float_type, bad)

    def _nll_loss_backward(self, incoming: dict[str, Any], bad: BadTarget) -> Tensor:
        (like,), arrays = share_layout([self.memory.like(self.input)], self.class_dim)
        grad = self.memory.empty(like.shape, like.dtype, like.stride(), self.settings.shifts[1])
        problem = NllLossBackward(
            extent=arrays.extent,
            layout=arrays.layout,
            targets=self.targets,
            grad_log_probs=address(grad),
            grad_strides=arrays.strides[0],
            **incoming,
        )
        self._launch("nll_loss_backward", problem, self.float_type, bad)
        return grad

    def _reduce(self, row_loss: Tensor, output: Tensor) -> Tensor:
        """Returns the divisor of the mean."""
        total_weight = self.memory.empty([], self.acc)
        partials = self.memory.empty([2 * _loss_partials(self.rows)], torch.float64)
        reduction = LossReduction(
            reduction=REDUCTIONS.index(self.case.reduction),
            loss_is_acc=output.dtype == self.acc,
            loss=address(output),
            total_weight=address(total_weight),
            partials=address(partials),
        )
        extent = Extent(1, self.input.shape[self.class_dim], self.rows)
        is_acc = c_bool(row_loss.dtype == self.acc)
        arguments = (reduction, extent, self.targets, address(row_loss), is_acc, self.float_type)
        # On the whole grid: its blocks do not walk on.
        self.kernels.launch("loss_reduction", *arguments, order=self.settings.order)
        return total_weight


def _run_log_softmax(kernels: Kernels, problem: Problem, settings: Settings) -> Result:
    case, memory = problem.case, settings.memory()
    input = problem.input if case.out_dtype is None else problem.input.to(case.out_dtype)
    float_type = c_uint8(FLOAT_TYPES[input.dtype])
    how = {"order": settings.order, "most_blocks": settings.most_blocks}

    (x, y), arrays = share_layout([input, memory.like(input, torch.contiguous_format)], case.class_dim)
    x = memory.copy(x, settings.shifts[0])
    y = memory.empty(y.shape, y.dtype, y.stride(), settings.shifts[1])
    forward = LogSoftmaxForward(
        extent=arrays.extent,
        layout=arrays.layout,
        input=address(x),
        input_strides=arrays.strides[0],
        output=address(y),
        output_strides=arrays.strides[1],
    )
    kernels.launch("log_softmax_forward", forward, float_type, **how)

    (g, saved, grad), arrays = share_layout([grad_output(case, y), y, memory.like(y)], case.class_dim)
    g, saved = memory.copy(g, settings.shifts[0]), memory.copy(saved)
    grad = memory.empty(grad.shape, grad.dtype, grad.stride(), settings.shifts[1])
    backward = LogSoftmaxBackward(
        extent=arrays.extent,
        layout=arrays.layout,
        grad_output=address(g),
        grad_output_strides=arrays.strides[0],
        output=address(saved),
        output_strides=arrays.strides[1],
        grad_input=address(grad),
        grad_input_strides=arrays.strides[2],
    )
    kernels.launch("log_softmax_backward", backward, float_type, **how)
    memory.check()
    return Result(y, grad)


def run(kernels: Kernels, problem: Problem, settings: Settings = Settings()) -> Result:
    """Output and gradient of a problem, for the gradient of the output that ``cases.grad_output`` gives."""
    if problem.case.op == "log_softmax":
        result = _run_log_softmax(kernels, problem, settings)
    else:
        result = _Loss(kernels, problem, settings).run()
    result.grad = result.grad.to(problem.input.dtype)
    return result

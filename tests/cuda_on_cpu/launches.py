"""The launches of csrc/cuda on CPU tensors, through the emulator.

``run`` does with a problem of ``cases.py`` what the CUDA entries of nllx do with tensors: it finds arrays that the
kernels take, allocates, launches, and returns results.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from ctypes import c_uint8, c_void_p
from typing import Any

import torch
from cases import REDUCTIONS, Problem, grad_output
from emulator import (
    ASCENDING,
    FLOAT_TYPES,
    FORWARD,
    H100,
    INDEX_TYPES,
    PLANES,
    ROWS,
    VALUE_AND_GRAD,
    BadTarget,
    CrossEntropyBackward,
    CrossEntropyForward,
    CudaDevice,
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

    device: that the plans are made for. together: value and gradient in one launch, where the loss is reduced;
    in_place: there, the gradient over the logits.
    order, most_blocks: of the emulator. shifts: elements that the input and its gradient (or log_softmax's output)
    begin past a 16-byte boundary; None: as the table has it. loss_dtype: None for torch's. memory: where tensors lie.
    mean_or_zero: for a case whose reduction is the mean, the mean that is 0 over nothing.
    """

    order: int = ASCENDING
    most_blocks: int = 0
    shifts: tuple[int | None, int] = (None, 0)
    loss_dtype: torch.dtype | None = None
    memory: type[Memory] = Memory
    device: CudaDevice = H100
    together: bool = False
    in_place: bool = False
    mean_or_zero: bool = False


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


class _Loss:
    """The tensors of a loss, in the dtypes and memory that the kernels take, and its launches."""

    def __init__(self, kernels: Kernels, problem: Problem, settings: Settings) -> None:
        case = problem.case
        self.kernels, self.case, self.settings, self.memory = kernels, case, settings, settings.memory()
        self.class_dim = 0 if problem.input.dim() == 1 else 1
        self.counters: Tensor | None = None
        self.kept: list[Tensor | None] = []  # what the launches only have addresses of
        self.input, self.probabilities = problem.input, None
        self.torchs_loss_dtype = self.input.dtype
        self.targets = Targets(
            ignore_index=case.ignore_index,
            label_smoothing=case.label_smoothing,
        )
        if settings.mean_or_zero:
            self.targets.zero_divisor = math.inf
        elif case.label_smoothing > 0 and not case.has_probabilities:
            self.targets.zero_divisor = math.nan
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
            self.targets.index_type = INDEX_TYPES[
                torch.uint8 if problem.target.dtype == torch.bool else problem.target.dtype
            ]
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
        self.output = self.memory.empty([] if reduced else self.row_shape, self.loss_dtype)
        self.total_weight = self.memory.empty([], self.acc)
        row_stats = self.memory.empty([*self.row_shape, 2], self.acc) if cross_entropy else None
        together = self.settings.together and cross_entropy and reduced
        if together:
            grad = self._cross_entropy_value_and_grad(self._incoming(None), row_stats, bad[0])
        else:
            if cross_entropy:
                self._cross_entropy_forward(row_stats, bad[0])
            else:
                self._nll_loss_forward(bad[0])
            incoming = self._incoming(self.total_weight if self.case.reduction == "mean" else None)
            if cross_entropy:
                grad = self._cross_entropy_backward(incoming, row_stats, bad[1])
            else:
                grad = self._nll_loss_backward(incoming, bad[1])
        self.memory.check()
        if self.counters is not None:
            assert not self.counters.any(), "counters that are not zero after the launch"
        return Result(self.output, grad, row_stats, self.total_weight, bad)

    def _incoming(self, total_weight: Tensor | None) -> dict[str, Any]:
        # Rounded as torch's, so that the exact gradient is known.
        g = grad_output(self.case, self.output.to(self.torchs_loss_dtype)).to(self.acc).contiguous()
        incoming = self.memory.copy(g)
        self.kept.append(incoming)
        return {
            "grad_output": address(incoming),
            "grad_output_stride": 0 if self.case.reduction != "none" else 1,
            "total_weight": address(total_weight),
        }

    def _row_loss(self) -> dict[str, Any]:
        """Fields of a forward problem: only an unreduced loss is written row by row."""
        if self.case.reduction != "none":
            return {}
        return {"row_loss": address(self.output), "row_loss_is_acc": self.output.dtype == self.acc}

    def _reduction(self, name: str, *arguments: Any) -> LossReduction:
        workspace = self.kernels.workspace(name, *arguments)
        partials = self.memory.empty([workspace.partials], torch.float64) if workspace.partials else None
        row_parts = (
            self.memory.empty([workspace.row_part_bytes // 4], torch.float32) if workspace.row_part_bytes else None
        )
        counted = workspace.counters and not self.settings.device.conservative
        self.counters = torch.zeros(1 + 1024, dtype=torch.int32) if counted else None
        divisor = self.memory.empty([], self.acc)
        self.kept += [partials, row_parts, divisor]
        return LossReduction(
            reduction=3 if self.settings.mean_or_zero else REDUCTIONS.index(self.case.reduction),
            loss_is_acc=self.output.dtype == self.acc,
            loss=address(self.output),
            total_weight=address(self.total_weight),
            partials=address(partials),
            row_parts=address(row_parts),
            counters=address(self.counters),
            divisor=address(divisor),
        )

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

    def _forward_problem(self, input: Tensor, arrays: Arrays, row_stats: Tensor) -> CrossEntropyForward:
        return CrossEntropyForward(
            extent=arrays.extent,
            layout=arrays.layout,
            logits=address(input),
            logits_strides=arrays.strides[0],
            targets=self.targets,
            row_stats=address(row_stats),
            **self._row_loss(),
        )

    def _cross_entropy_forward(self, row_stats: Tensor, bad: BadTarget) -> None:
        input, _, arrays = self._arrays()
        problem, device = self._forward_problem(input, arrays, row_stats), self.settings.device
        reduction = self._reduction("cross_entropy", c_uint8(FORWARD), problem, c_void_p(), self.float_type, device)
        self._launch("cross_entropy_forward", problem, reduction, self.float_type, device, bad)

    def _backward_problem(
        self, incoming: dict[str, Any], row_stats: Tensor
    ) -> tuple[Tensor, Tensor, Arrays, CrossEntropyBackward]:
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
        return input, grad, arrays, problem

    def _cross_entropy_value_and_grad(self, incoming: dict[str, Any], row_stats: Tensor, bad: BadTarget) -> Tensor:
        input, grad, arrays, gradient = self._backward_problem(incoming, row_stats)
        if self.settings.in_place and grad.stride() == input.stride():
            input = grad.copy_(input)
            gradient.logits = address(input)
        problem, device = self._forward_problem(input, arrays, row_stats), self.settings.device
        reduction = self._reduction(
            "cross_entropy", c_uint8(VALUE_AND_GRAD), problem, gradient, self.float_type, device
        )
        mass = self.memory.empty([self.rows], self.acc)
        arguments = (problem, gradient, reduction, self.float_type, device, address(mass), bad)
        self._launch("cross_entropy_value_and_grad", *arguments)
        return grad

    def _cross_entropy_backward(self, incoming: dict[str, Any], row_stats: Tensor, bad: BadTarget) -> Tensor:
        _, grad, _, problem = self._backward_problem(incoming, row_stats)
        mass = self.memory.empty([self.rows], self.acc)
        self._launch("cross_entropy_backward", problem, self.float_type, self.settings.device, address(mass), bad)
        return grad

    def _nll_loss_forward(self, bad: BadTarget) -> None:
        input, _, arrays = self._arrays()
        problem = NllLossForward(
            extent=arrays.extent,
            log_probs=address(input),
            strides=arrays.strides[0],
            targets=self.targets,
            **self._row_loss(),
        )
        reduction = self._reduction("nll_loss", problem)
        self._launch("nll_loss_forward", problem, reduction, self.float_type, bad)

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
        self._launch("nll_loss_backward", problem, self.float_type, self.settings.device, bad)
        return grad


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
    kernels.launch("log_softmax_forward", forward, float_type, settings.device, **how)

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
    kernels.launch("log_softmax_backward", backward, float_type, settings.device, **how)
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

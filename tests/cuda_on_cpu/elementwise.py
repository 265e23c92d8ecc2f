"""Problems of losses that compare two tensors element by element, through the emulator."""

from __future__ import annotations

import dataclasses
from ctypes import c_uint8
from typing import Any

import torch
from cases import REDUCTIONS
from emulator import (
    FLOAT_TYPES,
    Elements,
    ElementStrides,
    ElementwiseBackward,
    ElementwiseForward,
    Kernels,
    LossReduction,
)
from launches import Settings
from memory import address
from oracle import epsilon
from torch import Tensor
from torch.testing import assert_close

LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")


@dataclasses.dataclass(frozen=True)
class ElementwiseCase:
    """layouts: of input, target and weight. weight: None, "input" (of the input's dtype) or "acc". loss_is_acc, and
    grad_output_is_acc: in the dtype that is computed in. shift: elements that the target begins past a 16-byte boundary."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    reduction: str = "mean"
    weight: str | None = None
    layouts: tuple[str, str, str] = ("contiguous",) * 3
    loss_is_acc: bool = False
    grad_output_is_acc: bool = True
    wanted: tuple[bool, bool] = (True, True)
    shift: int = 0

    @property
    def acc(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def _values(shape: tuple[int, ...], layout: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if layout == "transposed":
        return _values(shape[::-1], "contiguous", dtype, generator).permute(*reversed(range(len(shape))))
    if layout == "sliced":
        return _values(tuple(2 * n + 1 for n in shape), "contiguous", dtype, generator)[
            tuple(slice(1, None, 2) for _ in shape)
        ]
    if layout == "expanded":
        return _values((*shape[:-1], 1), "contiguous", dtype, generator).expand(shape)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _strides(tensor: Tensor) -> ElementStrides:
    strides = ElementStrides(adjacent=tensor.is_contiguous())
    for d, stride in enumerate(reversed(tensor.stride())):
        strides.of[d] = stride
    return strides


class Problem:
    """Tensors of a case, in memory that shows access out of bounds."""

    def __init__(self, kernels: Kernels, case: ElementwiseCase, settings: Settings) -> None:
        self.kernels, self.case, self.settings, self.memory = kernels, case, settings, settings.memory()
        generator = torch.Generator().manual_seed(0)
        dtypes = case.dtype, case.dtype, case.acc if case.weight == "acc" else case.dtype
        tensors = [_values(case.shape, *of, generator) for of in zip(case.layouts, dtypes, strict=True)]
        self.input, self.target = self.memory.copy(tensors[0], 0), self.memory.copy(tensors[1], case.shift)
        self.weight = self.memory.copy(tensors[2], 0) if case.weight else None
        self.type = c_uint8(FLOAT_TYPES[case.dtype])
        self.elements = Elements(count=self.input.numel(), dims=len(case.shape))
        for d, size in enumerate(reversed(case.shape)):
            self.elements.sizes[d] = size
        per_element = case.reduction == "none"
        self.grad_output = self.memory.copy(
            _values(
                case.shape if per_element else (),
                "contiguous",
                case.acc if case.grad_output_is_acc else case.dtype,
                generator,
            ),
            0,
        )

    def _operands(self) -> dict[str, Any]:
        operands: dict[str, Any] = {"elements": self.elements, "weight_is_acc": self.case.weight == "acc"}
        for name in ("input", "target", "weight"):
            tensor = getattr(self, name)
            if tensor is not None:
                operands |= {name: address(tensor), f"{name}_strides": _strides(tensor)}
        return operands

    def _launch(self, name: str, *arguments: Any) -> None:
        self.kernels.launch(name, *arguments, order=self.settings.order, most_blocks=self.settings.most_blocks)

    def forward(self, name: str) -> tuple[Tensor, Tensor]:
        """The loss and the divisor of its mean, by ``nllx::launch_<name>_forward``."""
        case, memory = self.case, self.memory
        per_element = case.reduction == "none"
        loss = memory.empty(case.shape if per_element else [], case.acc if case.loss_is_acc else case.dtype)
        total_weight = memory.empty([], case.acc)
        problem = ElementwiseForward(**self._operands(), loss_is_acc=case.loss_is_acc)
        if per_element:
            problem.loss, problem.loss_strides = address(loss), _strides(loss)
        workspace = self.kernels.workspace("elementwise", self.elements)
        partials = memory.empty([workspace.partials], torch.float64) if workspace.partials else None
        counted = workspace.counters and not self.settings.device.conservative
        counters = torch.zeros(1 + 1024, dtype=torch.int32) if counted else None
        reduction = LossReduction(
            reduction=REDUCTIONS.index(case.reduction),
            loss_is_acc=case.loss_is_acc or case.dtype == case.acc,
            loss=address(loss),
            total_weight=address(total_weight),
            partials=address(partials),
            counters=address(counters),
        )
        self._launch(f"{name}_forward", problem, reduction, self.type)
        memory.check()
        assert counters is None or not counters.any(), "counters that are not zero after the launch"
        return loss, total_weight

    def backward(self, name: str, total_weight: Tensor) -> list[Tensor | None]:
        """The gradients of input and target, by ``nllx::launch_<name>_backward``."""
        case, memory = self.case, self.memory
        divisor = memory.copy(total_weight)
        problem = ElementwiseBackward(
            **self._operands(),
            grad_output=address(self.grad_output),
            grad_output_is_acc=self.grad_output.dtype == case.acc,
            one_grad_output=case.reduction != "none",
            grad_output_strides=_strides(self.grad_output),
            total_weight=address(divisor if case.reduction == "mean" else None),
        )
        gradients: list[Tensor | None] = [None, None]
        for i, field in enumerate(("grad_input", "grad_target")):
            if case.wanted[i]:
                like = memory.like((self.input, self.target)[i])
                gradients[i] = gradient = memory.empty(like.shape, like.dtype, like.stride())
                setattr(problem, field, address(gradient))
                setattr(problem, f"{field}_strides", _strides(gradient))
        self._launch(f"{name}_backward", problem, self.type)
        memory.check()
        return gradients


def check_mse_loss(kernels: Kernels, case: ElementwiseCase, settings: Settings) -> list[Tensor | None]:
    """Compares loss, divisor and gradients with their definition in float64; returns them."""
    problem = Problem(kernels, case, settings)
    loss, total_weight = problem.forward("mse_loss")
    gradients = problem.backward("mse_loss", total_weight)

    x, t, g = (tensor.double() for tensor in (problem.input, problem.target, problem.grad_output))
    w = torch.ones(case.shape, dtype=torch.float64) if problem.weight is None else problem.weight.double()
    unit = 8 * epsilon(case.acc)  # of a term, and of sums of eight terms, which are added in double
    terms, size, divisor = w * (x - t) ** 2, w.abs() * (x - t) ** 2, w.sum()
    assert_close(total_weight.double(), divisor, rtol=0, atol=unit * w.abs().sum().item())
    expected, tolerance = terms, unit * size
    if case.reduction != "none":
        over = total_weight.double() if case.reduction == "mean" else 1
        expected, tolerance = terms.sum() / over, unit * (size.sum() / over).abs()
        g = g / over
    _check_near(loss, expected, tolerance, "loss")
    k = 2 * g * w * (x - t)
    for gradient, sign, wanted in zip(gradients, (1, -1), case.wanted, strict=True):
        assert (gradient is not None) == wanted
        if gradient is not None:
            _check_near(gradient, sign * k, unit * k.abs(), "gradient")
    return [loss, total_weight, *gradients]


def _check_near(actual: Tensor, expected: Tensor, tolerance: Tensor, what: str) -> None:
    """Within tolerance, and the rounding to the dtype of actual."""
    least = torch.finfo(actual.dtype).smallest_normal * epsilon(actual.dtype)
    allowed = tolerance + epsilon(actual.dtype) * expected.abs() + least
    assert ((actual.double() - expected).abs() <= allowed).all(), f"{what} is {actual}, expected {expected}"

"""Problems of the cross entropy with options through the emulator, against formulas in float64."""

from __future__ import annotations

import dataclasses
from ctypes import c_uint8

import torch
from emulator import (
    FLOAT_TYPES,
    INDEX_TYPES,
    BadTarget,
    CrossEntropyBackward,
    CrossEntropyForward,
    Kernels,
    Targets,
)
from launches import Settings, share_layout
from memory import address
from row_options import NO_OPTIONS, Mapped, Options, OptionTensors, within
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class OptionsCase:
    """shape: the classes are dimension 1, of rows (N, C) or planes (N, C, K). target: "index", "probabilities" in the dtype of
    the logits or "acc probabilities". shift: elements that logits and gradient begin past a 16-byte boundary. masked: every
    third logit. mean: one incoming gradient and a divisor for all rows. loss_is_acc: the losses' dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    options: Options = NO_OPTIONS
    target: str = "index"
    weight: bool = False
    label_smoothing: float = 0.0
    shift: tuple[int, int] = (0, 0)
    masked: bool = False
    mean: bool = False
    loss_is_acc: bool = True
    wants_scale: bool = True
    bad: bool = False  # the first row has a class index out of range

    @property
    def acc(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


@dataclasses.dataclass
class OptionsResult:
    loss: Tensor
    row_weight: Tensor
    row_stats: Tensor
    grad: Tensor
    grad_scale: Tensor
    bad: tuple[BadTarget, BadTarget]

    def tensors(self) -> list[Tensor]:
        return [self.loss, self.row_weight, self.row_stats, self.grad, self.grad_scale]


def _rows(tensor: Tensor) -> Tensor:
    """(rows, classes), in the order of the kernels."""
    return tensor.movedim(1, -1).reshape(-1, tensor.shape[1])


class OptionsProblem:
    def __init__(self, case: OptionsCase) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(0)
        rows, classes = (case.shape[0], *case.shape[2:]), case.shape[1]
        self.x = (2 * torch.randn(case.shape, generator=generator, dtype=torch.float64)).to(case.dtype)
        self.index = torch.randint(classes, rows, generator=generator)
        self.counted = torch.ones(rows, dtype=torch.bool)
        self.probabilities: Tensor | None = None
        if case.target == "index":
            if self.counted.numel() > 2:
                self.counted.view(-1)[2::5] = False
            self.index[~self.counted] = -100
        else:
            p = torch.rand(case.shape, generator=generator, dtype=torch.float64)
            p = p / p.sum(1, keepdim=True) * torch.linspace(0.5, 1.5, rows[0]).reshape(-1, *[1] * (len(case.shape) - 1))
            self.probabilities = p.to(case.acc if case.target.startswith("acc") else case.dtype)
        if case.masked:
            places = torch.arange(classes).reshape(-1, *[1] * (len(case.shape) - 2)).expand(case.shape) % 3 == 1
            if case.target == "index":
                places = places.scatter(1, self.index.clamp(min=0).unsqueeze(1), False)
            else:
                self.probabilities[places] = 0
            self.x[places] = -torch.inf
        self.x = torch.where(self.counted.unsqueeze(1), self.x, torch.nan)
        self.weight = None
        if case.weight:
            self.weight = torch.rand(classes, generator=generator, dtype=case.acc) + 0.1
        self.valid = self.counted.clone()
        if case.bad:
            self.index.view(-1)[0] = classes
            self.valid.view(-1)[0] = False
        self.tensors = OptionTensors(case.options, self.valid.view(-1), case.acc)
        self.incoming = (
            torch.tensor(1.3, dtype=case.acc) if case.mean else torch.linspace(-1, 2, len(self.flat), dtype=case.acc)
        )
        self.total_weight = torch.tensor(3.7, dtype=case.acc) if case.mean else None

    @property
    def flat(self) -> Tensor:
        return self.valid.view(-1)

    def run(self, kernels: Kernels, settings: Settings) -> OptionsResult:
        """in_place: the gradient over the logits."""
        case, memory = self.case, settings.memory()
        given = [self.x] if self.probabilities is None else [self.x, self.probabilities]
        (placed, *others), arrays = share_layout([*given, torch.empty_like(self.x)], 1)
        like = others[-1]
        targets = Targets(ignore_index=-100, index_type=INDEX_TYPES[torch.int64], label_smoothing=case.label_smoothing)
        kept: list[Tensor] = []

        def copy(tensor: Tensor, shift: int | None = None) -> Tensor:
            kept.append(memory.copy(tensor, shift))
            return kept[-1]

        if self.probabilities is None:
            targets.index = address(copy(self.index.contiguous()))
        else:
            targets.probabilities = address(copy(others[0]))
            targets.probabilities_are_acc = self.probabilities.dtype == case.acc
            targets.probability_strides = arrays.strides[1]
        if self.weight is not None:
            targets.weight = address(copy(self.weight))
            targets.weight_sum = address(copy(self.weight.sum()))
        grad = memory.empty(like.shape, like.dtype, like.stride(), case.shift[1])
        logits = grad.copy_(placed) if settings.in_place else copy(placed, case.shift[0])
        common = {
            "extent": arrays.extent,
            "layout": arrays.layout,
            "logits": address(logits),
            "logits_strides": arrays.strides[0],
            "targets": targets,
            "options": self.tensors.pointer(memory),
        }
        rows, float_type = self.index.shape, c_uint8(FLOAT_TYPES[case.dtype])
        result = OptionsResult(
            memory.empty(rows, case.acc if case.loss_is_acc else case.dtype),
            memory.empty(rows, case.acc),
            memory.empty([*rows, 2], case.acc),
            grad,
            memory.empty(rows, case.acc),
            (BadTarget(), BadTarget()),
        )
        how = {"order": settings.order, "most_blocks": settings.most_blocks}
        forward = CrossEntropyForward(
            **common,
            row_loss=address(result.loss),
            row_loss_is_acc=result.loss.dtype == case.acc,
            row_stats=address(result.row_stats),
        )
        kernels.launch(
            "cross_entropy_options_forward", forward, address(result.row_weight), float_type, result.bad[0], **how
        )
        backward = CrossEntropyBackward(
            **common,
            row_stats=address(result.row_stats),
            grad_output=address(copy(self.incoming)),
            grad_output_stride=self.incoming.dim(),
            total_weight=address(None if self.total_weight is None else copy(self.total_weight)),
            grad_logits=address(grad),
            grad_strides=arrays.strides[-1],
            grad_logit_scale=address(result.grad_scale if case.wants_scale else None),
        )
        kernels.launch("cross_entropy_options_backward", backward, float_type, result.bad[1], **how)
        if not case.wants_scale:
            assert result.grad_scale.isnan().all()
            result.grad_scale.fill_(0)
        memory.check()
        return result

    def check(self, result: OptionsResult) -> None:
        case, options, valid = self.case, self.case.options, self.flat
        x = _rows(self.x).double()[valid]
        mapped = Mapped(x, self.tensors)
        z, factor = mapped.z, self.tensors.rows(self.tensors.sample_weight)
        # The coefficients of the classes, and the weight of each row in the mean.
        w = torch.ones(case.shape[1], dtype=torch.float64) if self.weight is None else self.weight.double()
        uniform = case.label_smoothing / case.shape[1]
        if self.probabilities is None:
            hit = torch.zeros_like(x).scatter_(1, self.index.reshape(-1)[valid].unsqueeze(1), 1.0)
            row_weight = factor * (hit * w).sum(1)
        else:
            hit, row_weight = _rows(self.probabilities).double()[valid], factor
        a = w * ((1 - case.label_smoothing) * hit + uniform)
        mass = a.sum(1, keepdim=True)
        m = z.amax(1, keepdim=True)
        log_sum = (z - m).exp().sum(1, keepdim=True).log()
        lse = m + log_sum
        log_p = z - m - log_sum
        p = log_p.exp()
        loss = factor * (torch.where(a == 0, 0.0, -a * log_p).sum(1) + options.z_loss * lse.squeeze(1) ** 2)
        of_row = self.incoming.double().expand(valid.shape)[valid]
        k = (of_row * factor / (1 if self.total_weight is None else self.total_weight.double())).unsqueeze(1)
        of_lse = mass + 2 * options.z_loss * lse
        grad, grad_scale = mapped.gradients(x, k * (p * of_lse - a))

        # z is as wrong as it is large, and so is its logarithm's sum.
        large = 2 + torch.where(z.isinf(), 0.0, z).abs().amax(1, keepdim=True)
        within(
            result.loss.reshape(-1)[valid],
            loss,
            (factor.unsqueeze(1) * large * (mass + options.z_loss * lse.abs())).squeeze(1),
            "loss",
        )
        within(result.row_weight.reshape(-1)[valid], row_weight, 0 * row_weight, "row_weight")
        stats = result.row_stats.reshape(-1, 2)[valid]
        within(stats[:, 0], m.squeeze(1), large.squeeze(1), "maximum")
        within(stats[:, 1], log_sum.squeeze(1), large.squeeze(1), "log_sum")
        of_z = (
            k.abs()
            * (p * large * (mass + 2 * abs(options.z_loss) * (lse.abs() + large)) + a)
            * (1 + mapped.argument.abs())
        )
        size = of_z * mapped.slope.abs() * torch.where(x.isinf(), 0.0, x).abs()
        within(_rows(result.grad)[valid], grad, of_z * (mapped.slope * mapped.scale).abs(), "grad")
        if case.wants_scale:
            # Float32 sums of thousands of terms are as good as their parts.
            total = (size.sum(1, keepdim=True) * mapped.per_scale.abs()).squeeze(1)
            within(result.grad_scale.reshape(-1)[valid], grad_scale, total, "grad_logit_scale")

        of_bad = ~self.flat & self.counted.view(-1)
        assert result.loss.reshape(-1)[of_bad].isnan().all()
        assert (result.loss.reshape(-1)[~valid & ~of_bad] == 0).all()
        for name in ("row_weight", "grad_scale"):
            assert (getattr(result, name).reshape(-1)[~valid] == 0).all(), name
        assert (result.row_stats.reshape(-1, 2)[~valid] == 0).all()
        assert (_rows(result.grad)[~valid] == 0).all()
        for bad in result.bad:
            assert bad.claimed == bad.ready == case.bad
            if case.bad:
                assert (bad.row, bad.value, bad.classes) == (0, case.shape[1], case.shape[1])


def check_cross_entropy_options(kernels: Kernels, case: OptionsCase, settings: Settings) -> list[Tensor]:
    problem = OptionsProblem(case)
    result = problem.run(kernels, settings)
    problem.check(result)
    return result.tensors()

"""The one table of problems that the tests loop over, and the function that builds their tensors.

A row of ``CASES`` says what is computed (operator, shape, layout, dtypes, options, values) and why the row is there.
``build`` makes its tensors, the same on every run and device. Nothing here imports pytest or nllx, so the table also
serves tests that run a kernel by other means.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")  # their position is the operators' integer argument
OPERATORS = ("cross_entropy", "nll_loss", "log_softmax")  # those of rows of classes
ELEMENTWISE = ("mse_loss",)  # target (any_numbers) and weight have the input's shape

float16, bfloat16, float32, float64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
int8, int16, int32, int64, uint8 = torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem.

    name, why: unique identifier, and the reason for the row.
    op: one of ``OPERATORS`` or ``ELEMENTWISE``, or softmax_statistics, of which a loss is made.
    shape: ``(C)``, ``(N, C)`` or ``(N, C, d1, …, dk)``; any shape for log_softmax.
    layout, target_layout, weight_layout: a key of ``LAYOUTS``.
    target: "index" or a key of ``PROBABILITIES``.
    target_dtype: None means int64 for an index target and the input's dtype for probabilities.
    weight: "" for none, or a key of ``WEIGHTS``; weight_dtype None means the input's dtype.
    ignored: which rows hold ``ignore_index``: "", "some" or "all".
    row_options: cross_entropy with a scale, a softcap, a temperature, a z-loss and a weight for each row.
    scale, offset: the logits are ``offset + scale * normal``.
    special: "" or a key of ``SPECIALS``: values set by hand.
    dim, out_dtype: log_softmax's arguments.
    same_as_torch: whether nllx promises torch's values and gradients. False where nllx documents its own.
    """

    name: str
    why: str
    shape: tuple[int, ...]
    op: str = "cross_entropy"
    dtype: torch.dtype = float32
    layout: str = "contiguous"
    target: str = "index"
    target_dtype: torch.dtype | None = None
    target_layout: str = "contiguous"
    weight: str = ""
    weight_dtype: torch.dtype | None = None
    weight_layout: str = "contiguous"
    ignore_index: int = -100
    ignored: str = ""
    label_smoothing: float = 0.0
    reduction: str = "mean"
    row_options: bool = False
    scale: float = 2.0
    offset: float = 0.0
    special: str = ""
    dim: int = 1
    out_dtype: torch.dtype | None = None
    same_as_torch: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def has_probabilities(self) -> bool:
        return self.target != "index"

    @property
    def class_dim(self) -> int:
        """The dimension that is normalised over."""
        if self.op == "log_softmax":
            return self.dim % max(len(self.shape), 1)
        return 0 if len(self.shape) == 1 else 1

    @property
    def classes(self) -> int:
        return self.shape[self.class_dim] if self.shape else 1

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape without the class dimension: that of an index target."""
        return self.shape[: self.class_dim] + self.shape[self.class_dim + 1 :]

    @property
    def rows(self) -> int:
        return math.prod(self.row_shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass
class Problem:
    """The tensors of a case."""

    case: Case
    input: Tensor
    target: Tensor | None = None
    weight: Tensor | None = None

    @property
    def differentiable(self) -> list[Tensor]:
        """What a gradient is defined for: the input, and for probability targets target and weight as well."""
        tensors: list[Tensor | None] = [self.input]
        if self.case.has_probabilities:
            tensors += [self.target, self.weight]
        return [tensor for tensor in tensors if tensor is not None]

    def requires_grad(self, input_only: bool = False) -> Problem:
        """The same values in the same layouts, as leaves that require a gradient wherever one is defined, or the input
        alone."""
        differentiable = {id(tensor) for tensor in ([self.input] if input_only else self.differentiable)}

        def leaf(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or id(tensor) not in differentiable:
                return tensor
            return tensor.detach().requires_grad_()

        tensors = (leaf(self.input), leaf(self.target), leaf(self.weight))
        return Problem(self.case, *tensors)  # type: ignore[arg-type]

    def for_torch(self, dtype: torch.dtype | None = None) -> Problem:
        """Contiguous copies on the CPU that torch's losses take: class indices in int64, their weights in the input's
        dtype; with dtype, all floating tensors in it."""

        def convert(tensor: Tensor | None, to: torch.dtype | None) -> Tensor | None:
            return (
                None if tensor is None else torch.empty(tensor.shape, dtype=to or tensor.dtype).copy_(tensor.detach())
            )

        index = self.target is not None and not self.case.has_probabilities
        tensors = (
            convert(self.input, dtype),
            convert(self.target, int64 if index else dtype),
            convert(self.weight, dtype or (self.input.dtype if index else None)),
        )
        return Problem(self.case, *tensors)  # type: ignore[arg-type]

    def call(self, functional: Any) -> Tensor:
        """The case computed by ``torch.nn.functional``, ``nllx.functional`` or anything with their functions."""
        case = self.case
        function = getattr(functional, case.op, None)
        if case.op in ELEMENTWISE:
            return function(self.input, self.target, weight=self.weight, reduction=case.reduction)
        if case.op == "log_softmax":
            return function(self.input, case.dim, dtype=case.out_dtype)
        if case.op == "softmax_statistics":
            return _of_statistics(functional, self.input, self.target, case)
        options = {"ignore_index": case.ignore_index, "reduction": case.reduction}
        if case.op == "cross_entropy":
            options["label_smoothing"] = case.label_smoothing
        if case.row_options:
            return _with_row_options(functional, self, options)
        return function(self.input, self.target, self.weight, **options)

    def op_arguments(self) -> tuple[Any, ...]:
        """The arguments of ``torch.ops.nllx.<op>``, in the order of its schema."""
        case = self.case
        if case.op == "log_softmax":
            return self.input, case.dim, case.out_dtype
        arguments = (self.input, self.target, self.weight, REDUCTIONS.index(case.reduction))
        if case.op in ELEMENTWISE:
            return arguments
        if case.op == "nll_loss":
            return (*arguments, case.ignore_index)
        *tensors, reduction = arguments
        return (*tensors, *[None] * 4, reduction, case.ignore_index, case.label_smoothing)


def _with_row_options(functional: Any, problem: Problem, options: dict[str, Any]) -> Tensor:
    """The cross entropy with options: of nllx's, or of what stands for them in torch's functions."""
    x, target, weight = problem.input, problem.target, problem.weight
    assert target is not None
    shape = list(x.shape)
    dim = 0 if len(shape) == 1 else 1
    shape.pop(dim)
    each = torch.linspace(0.5, 1.5, math.prod(shape), dtype=torch.float64, device=x.device).reshape(shape)
    if hasattr(functional, "softmax_statistics") or hasattr(functional, "takes_row_options"):
        rows = {"sample_weight": each, "temperature": each.flip(0) if each.dim() else each}
        return functional.cross_entropy(x, target, weight, **options, **rows, logit_scale=1.5, softcap=3.0, z_loss=0.05)
    like = functional.cross_entropy(x.detach(), target.detach(), weight, **options)  # has the dtype of the loss
    temperature = (each.flip(0) if each.dim() else each).unsqueeze(dim)
    counts = torch.ones_like(each, dtype=torch.bool)
    if not problem.case.has_probabilities:
        counts = (target != options["ignore_index"]).reshape(shape)
        x = torch.where(counts.unsqueeze(dim), x, 0.0)
    x = x.to(torch.promote_types(x.dtype, float32))
    z = (3.0 * torch.tanh(1.5 * x / 3.0) / temperature).to(x.dtype)
    w = None if weight is None else weight.to(z.dtype)
    losses = functional.cross_entropy(z, target, w, **{**options, "reduction": "none"}).reshape(shape)
    losses = (each * torch.where(counts, losses + 0.05 * torch.logsumexp(z, dim).square(), 0.0)).to(z.dtype)
    if options["reduction"] != "mean":
        return (losses if options["reduction"] == "none" else losses.sum()).to(like.dtype)
    if weight is not None and not problem.case.has_probabilities:
        index = torch.where(counts, target.reshape(shape), 0).long()
        each = each * weight.double().gather(0, index.reshape(-1)).reshape(shape)
    divisor = torch.where(counts, each, 0.0).sum().to(z.dtype)
    if options["label_smoothing"] > 0 and not problem.case.has_probabilities:  # to which torch adds 0 / 0
        divisor = torch.where(divisor == 0, math.nan, divisor)
    return (losses.sum() / divisor).to(like.dtype)


def _of_statistics(functional: Any, x: Tensor, target: Tensor, case: Case) -> Tensor:
    """A loss of each row from its statistics, reduced: of nllx's, or of what stands for them in torch's functions."""
    dim = case.class_dim
    if hasattr(functional, "softmax_statistics"):
        log_prob, logsumexp, entropy, _ = functional.softmax_statistics(
            x, target, dim=dim, ignore_index=case.ignore_index
        )
    else:
        counts = target != case.ignore_index
        x = torch.where(counts.unsqueeze(dim), x.float() if x.dtype in (bfloat16, float16) else x, 0.0)
        log_p = functional.log_softmax(x, dim)
        index = torch.where(counts, target, 0).unsqueeze(dim)
        log_prob = torch.where(counts, log_p.gather(dim, index).squeeze(dim), 0.0)
        # Of torch's own the forward derivative cannot be differentiated.
        logsumexp = torch.where(counts, (x - log_p).select(dim, 0), 0.0)
        entropy = torch.where(counts, -(log_p.exp() * log_p).sum(dim), 0.0)
    losses = 0.1 * logsumexp.square() - log_prob - 0.3 * entropy
    return losses if case.reduction == "none" else getattr(losses, case.reduction)()


# Layouts: each takes a contiguous tensor and returns one of equal values (or, for the expanded ones, of equal first
# entry along the expanded dimension) with other strides.


def _unreadable(x: Tensor, *shape: int) -> Tensor:
    """A buffer like x whose every entry would spoil a result that read it: NaN, or a class out of range."""
    return x.new_full(shape, math.nan if x.is_floating_point() else 119)


def _stored_as(order: Callable[[int], Sequence[int]], pad: int = 0) -> Callable[[Tensor], Tensor]:
    """Dimensions stored in another order; the one stored last padded by ``pad`` elements."""

    def arrange(x: Tensor) -> Tensor:
        dims = list(order(x.dim()))
        stored = x.permute(dims)
        buffer = _unreadable(x, *stored.shape[:-1], stored.shape[-1] + pad)
        view = buffer[..., : stored.shape[-1]]
        view.copy_(stored)
        return view.permute([dims.index(i) for i in range(x.dim())])

    return arrange


def _expanded(dim: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.narrow(dim, 0, min(1, x.shape[dim])).expand(x.shape)


def _offset(x: Tensor) -> Tensor:
    buffer = _unreadable(x, x.numel() + 1)
    view = buffer[1:].view(x.shape)
    view.copy_(x)
    return view


def _stepped(x: Tensor) -> Tensor:
    buffer = _unreadable(x, *x.shape[:-1], 2 * x.shape[-1])
    view = buffer[..., ::2]
    view.copy_(x)
    return view


def _class_slice(x: Tensor) -> Tensor:
    buffer = _unreadable(x, x.shape[0], x.shape[1] + 3, *x.shape[2:])
    view = buffer[:, 2:-1]
    view.copy_(x)
    return view


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    # Rows of images: the classes of a pixel lie side by side.
    "channels_last": _stored_as(lambda rank: [0, *range(2, rank), 1]),
    # Rows with a gap between them, also between the pixels of an image.
    "padded": _stored_as(range, pad=3),
    "channels_last_padded": _stored_as(lambda rank: [0, *range(2, rank), 1], pad=3),
    # (N, C) with the rows side by side: the class stride is N.
    "transposed": _stored_as(lambda rank: range(rank - 1, -1, -1)),
    # The class dimension lies between two others, so that no two of the others can be walked as one.
    "neither": _stored_as(lambda rank: [0, 2, 1, *range(3, rank)]),
    "class_slice": _class_slice,
    "stepped": _stepped,
    # Starts one element into its storage, so no vector load is aligned.
    "offset": _offset,
    "expanded": _expanded(0),
    "expanded_classes": _expanded(1),
    "expanded_inner": _expanded(2),
    "negative_bit": lambda x: torch._neg_view(-x),  # type: ignore[attr-defined]
}


def _every(step: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        weight[::step] = value
        return weight

    return change


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "positive": lambda weight: weight,
    "some_zero": _every(3, 0.0),
    "some_negative": _every(4, -0.25),
    "all_zero": _every(1, 0.0),
    "nan_unused": _every(1 << 40, math.nan),  # class 0, which `build` then keeps out of the targets
}


Change = Callable[[Tensor, Tensor, "Tensor | None"], None]  # of logits, class indices and probabilities, by row


def _masked(keep: Callable[[int], Tensor]) -> Change:
    """Sets the classes not kept to -inf in every row and moves the targets to classes that are kept."""

    def change(logits: Tensor, index: Tensor, probabilities: Tensor | None) -> None:
        classes = logits.shape[1]
        kept = keep(classes)
        mask = torch.ones(classes, dtype=torch.bool)
        mask[kept] = False
        logits[:, mask] = -math.inf
        index.copy_(kept[index % len(kept)])
        if probabilities is not None:
            probabilities[:, mask] = 0

    return change


def _one_row(value: float, everywhere: bool, at_target: bool = False) -> Change:
    """Sets the second row, or in it the class of the target or another one, to value."""

    def change(logits: Tensor, index: Tensor, probabilities: Tensor | None) -> None:
        if everywhere:
            logits[1] = value
        else:
            logits[1, (int(index[1]) + (not at_target)) % logits.shape[1]] = value

    return change


def _zero_weight_target_masked(logits: Tensor, index: Tensor, probabilities: Tensor | None) -> None:
    index[1] = 0  # WEIGHTS["some_zero"] gives class 0 the weight 0
    logits[1, 0] = -math.inf


SPECIALS: dict[str, Change] = {
    "masked": _masked(lambda classes: torch.arange(0, classes, 3)),
    "masked_head": _masked(lambda classes: torch.arange(classes - 1, classes)),
    "masked_tail": _masked(lambda classes: torch.arange(0, 1)),
    "target_masked": _one_row(-math.inf, everywhere=False, at_target=True),
    "zero_weight_target_masked": _zero_weight_target_masked,
    "row_masked": _one_row(-math.inf, everywhere=True),
    "lowest_row": _one_row(torch.finfo(float32).min, everywhere=True),
    "plus_inf": _one_row(math.inf, everywhere=False),
    "nan_row": _one_row(math.nan, everywhere=True),
}

# Each makes (rows, classes) probabilities of standard normal numbers and class indices.
PROBABILITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "probabilities": lambda normal, index: normal.softmax(1),
    "one_hot": lambda normal, index: torch.nn.functional.one_hot(index, normal.shape[1]).to(normal.dtype),
    "any_numbers": lambda normal, index: normal * 2 + 1,
}


def build(case: Case, device: str | torch.device = "cpu") -> Problem:
    """The tensors of a case: a function of the case's name, and the same values on every device."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=float64)

    # Values are made as (rows, classes) in float64 and then moved to where the case has its class dimension.
    rows, classes = case.rows, case.classes
    logits = normal(rows, classes) * case.scale + case.offset
    if case.op == "nll_loss":
        logits = logits.log_softmax(1)
    index = torch.randint(max(classes, 1), (rows,), generator=generator)
    if case.weight == "nan_unused":
        index.clamp_(min=1)
    probabilities = PROBABILITIES[case.target](normal(rows, classes), index) if case.has_probabilities else None
    target_dtype = case.target_dtype or (case.dtype if case.has_probabilities else int64)
    if not case.has_probabilities:
        index.clamp_(
            max=1 if target_dtype == torch.bool else min(torch.iinfo(target_dtype).max, torch.iinfo(int64).max)
        )
    if case.special:
        SPECIALS[case.special](logits, index, probabilities)
    if case.ignored:
        chosen = torch.rand(rows, generator=generator, dtype=float64) < (0.3 if case.ignored == "some" else 1.0)
        chosen[1:2] = True  # the row that SPECIALS change
        chosen[:1] = case.ignored == "all"
        index[chosen] = case.ignore_index

    def arranged(values: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
        return LAYOUTS[layout](values.to(dtype).to(device).contiguous())

    def as_input(values: Tensor) -> Tensor:
        return values.view(*case.row_shape, classes).movedim(-1, case.class_dim) if case.shape else values.view(())

    problem = Problem(case, arranged(as_input(logits), case.layout, case.dtype))
    if case.op == "log_softmax":
        return problem
    if probabilities is not None:
        problem.target = arranged(as_input(probabilities), case.target_layout, target_dtype)
    else:
        problem.target = arranged(index.view(case.row_shape), case.target_layout, target_dtype)
    if case.weight and case.op in ELEMENTWISE:
        weights = torch.rand(rows, classes, generator=generator, dtype=float64) + 0.5
        problem.weight = arranged(as_input(weights), case.layout, case.weight_dtype or case.dtype)
    elif case.weight:
        weight = WEIGHTS[case.weight](torch.rand(classes, generator=generator, dtype=float64) + 0.5)
        problem.weight = arranged(weight, case.weight_layout, case.weight_dtype or case.dtype)
    return problem


def grad_output(case: Case, output: Tensor) -> Tensor:
    """A gradient of the output that is neither one nor constant, on the output's device."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) ^ 1)
    values = torch.randn(output.shape, generator=generator, dtype=float64) + 1.5
    return values.to(output.dtype).to(output.device)


# The table. A row is one line, or two; a formatter would make ten of it.
# fmt: off

_SIZES = {
    float32: (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 129, 1000, 1023, 1024, 1025, 4097, 50257),
    bfloat16: (1, 7, 8, 9, 31, 32, 33, 63, 65, 1000, 1023, 1025, 4097, 50257),
    float16: (1, 7, 8, 9, 31, 32, 33, 63, 65, 1000, 1023, 1025, 4097, 50257),
    float64: (1, 3, 4, 5, 7, 8, 9, 17, 1025, 50257),
}
_INNER = {
    float32: (1, 2, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 127, 1000),
    bfloat16: (2, 9, 33, 127),
    float16: (2, 17, 64),
    float64: (2, 5, 9, 33),
}


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _rows() -> list[Case]:
    why = "classes of one row around the widths of vectors, warps, blocks and of what fits in registers"
    cases = [
        Case(f"rows_{_short(dtype)}_{op}_{size}", why, (5, size), op=op, dtype=dtype, ignored="some")
        for dtype, sizes in _SIZES.items()
        for size in sizes
        for op in ("cross_entropy", "log_softmax")
    ]
    why = "one entry is read of each row, whatever its width"
    cases += [
        Case(f"rows_{_short(dtype)}_nll_loss_{size}", why, (5, size), op="nll_loss", dtype=dtype, ignored="some")
        for dtype in (float32, bfloat16, float16, float64)
        for size in (1, 3, 17, 1025)
    ]
    why = "rows that share no alignment: peeling before the first vector of each"
    cases += [
        Case(f"unaligned_{_short(dtype)}_{size}", why, (4, size), dtype=dtype, layout="offset", reduction="none")
        for dtype in (float32, bfloat16, float16, float64)
        for size in (3, 33, 257, 1031)
    ]
    why = "rows as threads, blocks and partitions divide them"
    cases += [
        Case(f"row_count_{count}", why, (count, 10), ignored="some", weight="positive")
        for count in (1, 2, 3, 31, 32, 33, 127, 128, 129, 1000, 4099)
    ]
    return cases


def _planes() -> list[Case]:
    why = "positions of a plane around vector and warp widths, classes strided by it"
    cases = [
        Case(f"planes_{_short(dtype)}_{op}_{inner}", why, (2, 19, inner), op=op, dtype=dtype, ignored="some")
        for dtype, sizes in _INNER.items()
        for inner in sizes
        for op in ("cross_entropy", "log_softmax")
    ]
    cases += [
        Case(f"planes_nll_loss_{inner}", why, (2, 19, inner), op="nll_loss", ignored="some", weight="positive")
        for inner in (1, 2, 9, 127)
    ]
    why = "few and many classes for each position of a plane"
    cases += [Case(f"planes_classes_{size}", why, (2, size, 6), ignored="some") for size in (1, 2, 3, 33, 1000, 4097)]
    cases += [
        Case("image", "(N, C, H, W) segmentation", (2, 21, 13, 11), ignored="some", ignore_index=255,
             weight="positive"),
        Case("image_none", "a loss per pixel", (2, 21, 13, 11), ignored="some", ignore_index=255, reduction="none"),
        Case("volume", "(N, C, D, H, W)", (2, 5, 3, 4, 5), ignored="some", reduction="sum"),
        Case("volume_probabilities", "(N, C, D, H, W)", (2, 5, 3, 4, 5), target="probabilities"),
        Case("plane_of_one", "(N, C, 1, 1): planes that are rows", (6, 10, 1, 1), reduction="none"),
        Case("tall_plane", "one plane larger than any partition of it", (1, 3, 9001), ignored="some"),
    ]
    return cases


def _blocks() -> list[Case]:
    """Problems larger than what a kernel takes at a time: 16 KiB of a row, 512 neighbouring rows, 128 KiB of a plane."""
    cases = []
    why = "parts of one row are merged: their maxima, sums and terms of smoothing and probabilities"
    for shape, dtype in (((3, 9001), float32), ((3, 17001), bfloat16), ((3, 4501), float64), ((2, 200, 7), float32),
                         ((2, 300, 7), float16), ((2, 100, 7), float64)):
        name, same = f"{_x(shape)}_{_short(dtype)}", {"why": why, "shape": shape, "dtype": dtype, "reduction": "none"}
        cases += [
            Case(f"blocks_{name}", **same),
            Case(f"blocks_smoothed_{name}", label_smoothing=0.1, weight="positive", **same),
            Case(f"blocks_probabilities_{name}", target="probabilities", weight="positive", **same),
            Case(f"blocks_log_softmax_{name}", op="log_softmax", **same),
            Case(f"blocks_growing_{name}", scale=40.0, label_smoothing=0.1, **same),
        ]
        for special in ("masked_head", "masked_tail"):
            cases += [
                Case(f"blocks_{special}_{name}", special=special, **same),
                Case(f"blocks_{special}_log_softmax_{name}", op="log_softmax", special=special, **same),
                Case(f"blocks_{special}_probabilities_{name}", target="probabilities", special=special,
                     same_as_torch=False, **same),
            ]
    why = "a part of a block of neighbouring rows"
    cases += [
        Case(f"tiles_{inner}_{op}", why, (2, 5, inner), op=op, ignored="some")
        for inner in (511, 512, 513, 1025, 1539)
        for op in OPERATORS
    ]
    why = "rows of few classes are taken many at a time"
    cases += [
        Case(f"few_classes_{rows}x{classes}_{_short(dtype)}", why, (rows, classes), dtype=dtype, ignored="some",
             label_smoothing=smoothing)
        for rows, classes in ((511, 2), (512, 15), (513, 16), (513, 17), (1025, 1), (1700, 10))
        for dtype, smoothing in ((float32, 0.0), (bfloat16, 0.1), (float64, 0.1))
    ]
    cases += [
        Case("few_classes_probabilities", why, (513, 10), target="probabilities", weight="positive"),
        Case("few_classes_padded", why, (513, 10), layout="padded", reduction="none"),
        Case("few_classes_log_softmax", why, (513, 10), op="log_softmax"),
        Case("wide_planes", "sums of many classes are exact also where each is a plane", (1, 50257, 3)),
        Case("wide_planes_log_softmax", "as above", (1, 50257, 3), op="log_softmax"),
        Case("wide_planes_smoothed", "equal addends round alike: their sum drifts", (1, 50257, 3), label_smoothing=0.1),
        Case("wide_planes_smoothed_weighted", "as above", (2, 4097, 3), label_smoothing=0.9, weight="positive"),
        Case("wide_planes_probabilities", "as above", (1, 50257, 3), target="probabilities", label_smoothing=0.9),
        Case("wide_rows_smoothed", "as above", (3, 50257), label_smoothing=0.9),
        Case("unbatched_stepped", "as above", (1031,), layout="stepped", label_smoothing=0.9),
    ]
    return cases


def _layouts() -> list[Case]:
    why = "every layout is read in place or copied right"
    rank_of = {"neither": (4,), "expanded_inner": (3, 4), "channels_last": (3, 4), "channels_last_padded": (3, 4)}
    shapes = {2: (6, 9), 3: (3, 9, 5), 4: (2, 9, 3, 4)}
    cases = []
    for layout in LAYOUTS:
        for rank in rank_of.get(layout, (2, 3, 4)):
            same = {"why": why, "shape": shapes[rank], "layout": layout}
            name = f"{layout}_{rank}d"
            cases += [
                Case(f"{name}_cross_entropy", weight="positive", ignored="some", label_smoothing=0.1, **same),
                Case(f"{name}_none", reduction="none", ignored="some", **same),
                Case(
                    f"{name}_probabilities", target="probabilities", target_layout=layout,
                    weight="positive", reduction="none", **same,
                ),
                Case(f"{name}_nll_loss", op="nll_loss", weight="positive", ignored="some", **same),
                Case(f"{name}_log_softmax", op="log_softmax", **same),
            ]
    why = "rows of bfloat16 images in channels-last, vectors across the classes of one pixel"
    cases.append(Case("channels_last_bfloat16", why, (2, 33, 5, 3), dtype=bfloat16, layout="channels_last"))
    why = "input and probability target of different layouts"
    cases += [
        Case(f"mixed_{layout}_{target_layout}", why, (2, 9, 3, 4), layout=layout, target_layout=target_layout,
             target="probabilities", label_smoothing=0.2, weight="positive")
        for layout, target_layout in (("channels_last", "contiguous"), ("contiguous", "channels_last"),
                                      ("neither", "transposed"), ("contiguous", "expanded"))
    ]
    why = "a target that is not contiguous"
    cases += [
        Case(f"target_{layout}", why, (4, 7, 6), target_layout=layout, ignored="some", reduction="none")
        for layout in ("transposed", "stepped", "padded", "expanded", "expanded_classes", "offset")
    ]
    why = "a weight that is not contiguous"
    cases += [
        Case(f"weight_{layout}", why, (5, 7), weight="positive", weight_layout=layout, label_smoothing=0.1)
        for layout in ("stepped", "expanded", "offset", "negative_bit")
    ]
    cases += [
        Case("padded_unaligned", "bfloat16 rows 1031 + 3 apart: another alignment in each", (5, 1031), dtype=bfloat16,
             layout="padded"),
        Case("transposed_wide", "class stride N in a wide row", (3, 1025), layout="transposed"),
        Case("sequence_transposed", "logits.transpose(1, 2) of a language model", (2, 130, 7), layout="channels_last",
             ignored="some"),
    ]
    return cases


def _dtypes() -> list[Case]:
    why = "each target dtype is read as what it is"
    cases = [
        Case(f"target_{_short(target_dtype)}_{op}_{_x(shape)}", why, shape, op=op,
             target_dtype=target_dtype, ignored="some" if target_dtype.is_signed else "", ignore_index=-2)
        for target_dtype in (int64, int32, int16, int8, uint8, torch.uint16, torch.uint32, torch.uint64)
        for op in ("cross_entropy", "nll_loss")
        for shape in ((5, 300), (2, 11, 7))
    ]
    cases += [
        Case("target_byte_255_ignored", "byte 255 is 255, not -1", (5, 300), target_dtype=uint8, ignored="some",
             ignore_index=255),
        Case("target_uint16_65535_ignored", "65535 is 65535, not -1", (5, 70_000), target_dtype=torch.uint16,
             ignored="some", ignore_index=65535),
        Case("target_bool", "two classes", (9, 2), target_dtype=torch.bool),
    ]
    why = "class weights keep their precision beside half logits"
    cases += [
        Case(f"weight_{_short(weight_dtype)}_beside_{_short(dtype)}_{op}", why, (7, 33), op=op, dtype=dtype,
             weight="positive", weight_dtype=weight_dtype)
        for dtype in (bfloat16, float16)
        for weight_dtype in (dtype, float32, float64)
        for op in ("cross_entropy", "nll_loss")
    ]
    why = "probabilities of another dtype promote the loss"
    cases += [
        Case(f"probabilities_{_short(target_dtype)}_beside_{_short(dtype)}", why, (4, 9), dtype=dtype,
             target="probabilities", target_dtype=target_dtype)
        for dtype, target_dtype in ((float32, float64), (float64, float32), (bfloat16, float32), (float16, float32),
                                    (float32, bfloat16))
    ]
    why = "log_softmax casts before it reduces"
    cases += [
        Case(f"log_softmax_{_short(dtype)}_to_{_short(out_dtype)}", why, (4, 100), op="log_softmax", dtype=dtype,
             out_dtype=out_dtype)
        for dtype, out_dtype in ((bfloat16, float32), (float16, float32), (float32, float64), (float32, bfloat16))
    ]
    cases += [
        Case("bfloat16_row_count", "3000 rows are not 3008", (3000, 4), dtype=bfloat16, ignored="some"),
        Case("bfloat16_row_count_1023", "1023 rows are not 1024", (1023, 4), dtype=bfloat16),
        Case("bfloat16_planes_count", "the same in planes", (2, 4, 1500), dtype=bfloat16, ignored="some"),
        Case("float16_sum_of_losses", "60,000 losses of 3 do not overflow on the way to the mean", (60000, 20),
             dtype=float16, scale=0.3),
        Case("float16_nll_sum_of_losses", "the same for nll_loss", (60000, 20), op="nll_loss", dtype=float16),
        Case("bfloat16_probabilities", "float32 accumulation", (6, 1000), dtype=bfloat16, target="probabilities",
             weight="positive", label_smoothing=0.1),
        Case("float16_smoothing", "float32 accumulation of the smoothing term", (6, 4097), dtype=float16,
             label_smoothing=0.1, weight="positive"),
    ]
    return cases


def _options() -> list[Case]:
    cases = []
    why = "every combination of the losses' options"
    for reduction in REDUCTIONS:
        for smoothing in (0.0, 0.1, 1.0):
            for weight in ("", "positive"):
                end = f"{reduction}_{smoothing}_{weight or 'unweighted'}"
                same = {"why": why, "reduction": reduction, "label_smoothing": smoothing, "weight": weight}
                cases += [
                    Case(f"options_index_{end}", shape=(6, 7), ignored="some", **same),
                    Case(f"options_index_planes_{end}", shape=(2, 7, 5), ignored="some", **same),
                    Case(f"options_probabilities_{end}", shape=(6, 7), target="probabilities", **same),
                ]
    why = "nll_loss's options"
    cases += [
        Case(f"options_nll_loss_{reduction}_{weight or 'unweighted'}_{_x(shape)}", why, shape,
             op="nll_loss", reduction=reduction, weight=weight, ignored="some")
        for reduction in REDUCTIONS
        for weight in ("", "positive")
        for shape in ((6, 7), (2, 7, 5), (2, 7, 3, 2))
    ]
    why = "ignore_index may be any integer, a class too"
    cases += [
        Case(f"ignore_{index}", why, (8, 5), ignore_index=index, ignored="some", weight="positive", label_smoothing=0.1)
        for index in (0, 2, 4, 5, -1, 255, 2**31, -(2**62))
    ]
    why = "signs and zeros of weights"
    cases += [
        Case(f"weight_{weight}_{reduction}_{op}", why, (9, 8), op=op, weight=weight, reduction=reduction,
             label_smoothing=0.0 if op == "nll_loss" else 0.1)
        for weight in ("some_zero", "some_negative")
        for reduction in REDUCTIONS
        for op in ("cross_entropy", "nll_loss")
    ]
    cases += [
        Case("weight_all_zero", "0 / 0: NaN loss and gradient", (4, 5), weight="all_zero"),
        Case("weight_all_zero_smoothed", "0 / 0 also where the smoothing term is 0", (4, 5), weight="all_zero",
             label_smoothing=0.1),
        Case("weight_all_zero_sum", "zero loss and gradient", (4, 5), weight="all_zero", reduction="sum"),
        Case("weight_nan_unused", "no product over classes that no target names", (6, 5), weight="nan_unused"),
        Case("probabilities_negative", "the formula holds for any number", (5, 6), target="any_numbers",
             weight="some_negative", label_smoothing=0.3),
        Case("probabilities_one_hot", "other divisor than index targets", (5, 6), target="one_hot", weight="positive"),
        Case("probabilities_wide", "a wide row", (3, 4097), target="probabilities", weight="positive"),
        Case("probabilities_planes", "planes of probabilities", (2, 19, 33), target="probabilities",
             weight="positive", label_smoothing=0.1),
    ]
    return cases


def _shapes() -> list[Case]:
    cases = []
    why = "an unbatched input"
    for reduction in REDUCTIONS:
        cases += [
            Case(f"unbatched_{reduction}", why, (7,), reduction=reduction, weight="positive", label_smoothing=0.1),
            Case(f"unbatched_nll_loss_{reduction}", why, (7,), op="nll_loss", reduction=reduction, weight="positive"),
            Case(f"unbatched_probabilities_{reduction}", why, (7,), reduction=reduction, target="probabilities"),
        ]
        for shape in ((0, 5), (3, 5, 0), (0, 5, 4), (2, 5, 0, 3)):
            name = f"{_x(shape)}_{reduction}"
            same = {"why": "nothing to reduce: mean NaN, sum 0, none empty", "shape": shape, "reduction": reduction}
            cases += [
                Case(f"empty_{name}", **same),
                Case(f"empty_nll_loss_{name}", op="nll_loss", **same),
                Case(f"empty_probabilities_{name}", target="probabilities", weight="positive", **same),
            ]
        for rows in (0, 3):
            cases.append(
                Case(f"no_classes_probabilities_{rows}_{reduction}", "a sum over no class", (rows, 0),
                     target="probabilities", reduction=reduction)
            )
    cases.append(Case("unbatched_ignored", "the only row is ignored: NaN", (7,), ignored="all"))
    why = "log_softmax over any dimension"
    cases += [
        Case(f"log_softmax_{_x(shape) or 'scalar'}_dim_{dim}", why, shape, op="log_softmax", dim=dim)
        for shape, dims in (
            ((), (0, -1)), ((1,), (0,)), ((7,), (0, -1)), ((5, 9), (0, 1, -1, -2)), ((3, 4, 5), (0, 1, 2, -3)),
            ((2, 3, 4, 5), (0, 1, 2, 3)), ((2, 3, 1, 2, 4), (2, 3)), ((0, 4), (0, 1)), ((4, 0), (0, 1)),
            ((2, 0, 3), (0, 1, 2)),
        )
        for dim in dims
    ]
    return cases


def _values() -> list[Case]:
    cases = []
    why = "differences of large logits: the maximum is subtracted first"
    offsets = {float32: (1e4, -1e6, 3e30), float64: (1e4, 1e150), bfloat16: (100.0, 1e6), float16: (1000.0,)}
    cases += [
        Case(f"offset_{_short(dtype)}_{offset:g}_{_x(shape)}", why, shape, dtype=dtype, offset=offset)
        for dtype in offsets
        for offset in offsets[dtype]
        for shape in ((5, 300), (2, 9, 17))
    ]
    why = "peaked rows: losses near 0 and far from it"
    cases += [
        Case(f"scale_{scale:g}_{op}", why, (9, 100), op=op, scale=scale, reduction="none")
        for scale in (1e-6, 30.0, 1e4, 1e30)
        for op in OPERATORS
    ]
    why = "-inf is a mask, also for whole vectors and tiles"
    for special in ("masked", "masked_head", "masked_tail"):
        cases += [
            Case(f"{special}_{_x(shape)}_{_short(dtype)}", why, shape, dtype=dtype, special=special,
                 reduction="none")
            for dtype in (float32, bfloat16, float64)
            for shape in ((4, 10), (3, 2050), (2, 40, 9))
        ]
        cases += [
            Case(f"{special}_log_softmax", why, (3, 2050), op="log_softmax", special=special),
            Case(f"{special}_log_softmax_planes", why, (2, 40, 9), op="log_softmax", special=special),
        ]
    why = "infinities and NaN end where torch has them"
    for special in ("target_masked", "row_masked", "plus_inf", "nan_row"):
        cases += [
            Case(f"{special}_{_x(shape)}_{op}", why, shape, op=op, special=special, reduction="none")
            for shape in ((4, 10), (3, 1030), (2, 9, 5))
            for op in ("cross_entropy", "log_softmax")
        ]
        cases.append(Case(f"{special}_ignored_loss", "…and nowhere else", (4, 10), special=special, ignored="all",
                          reduction="sum", same_as_torch=False))
    cases += [
        Case(f"lowest_row_{_x(shape)}_{_short(dtype)}", "a row masked with the lowest number is uniform", shape,
             dtype=dtype, special="lowest_row", reduction="none")
        for shape in ((4, 10), (3, 1030), (2, 9, 5))
        for dtype in (float32, bfloat16, float64)
    ]
    cases += [
        Case("masked_smoothing", "the smoothing term counts the masked class: inf", (4, 10), special="masked",
             label_smoothing=0.1),
        Case("all_ignored_mean", "0 / 0 with a zero gradient", (4, 10), ignored="all"),
        Case("all_ignored_sum", "zero", (4, 10), ignored="all", reduction="sum"),
        Case("all_ignored_none", "zeros", (4, 10), ignored="all", reduction="none"),
        Case("all_ignored_smoothing", "0 / 0", (4, 10), ignored="all", label_smoothing=0.1),
        Case("all_ignored_nll_loss", "0 / 0 with a zero gradient", (4, 10), op="nll_loss", ignored="all"),
        Case("all_ignored_planes", "0 / 0 with a zero gradient", (2, 10, 5), ignored="all"),
    ]
    why = "nllx: an ignored row may hold anything; its gradient is zero"
    cases += [
        Case(f"ignored_nan_{_x(shape)}_{_short(dtype)}_{reduction}", why, shape, dtype=dtype,
             special="nan_row", ignored="some", weight="positive", reduction=reduction, same_as_torch=False)
        for shape, dtype in (((6, 10), float32), ((5, 1030), bfloat16), ((2, 9, 5), float32), ((6, 10), float64))
        for reduction in REDUCTIONS
    ]
    cases += [
        Case("ignored_nan_smoothing", why, (6, 10), special="nan_row", ignored="some", label_smoothing=0.1,
             same_as_torch=False),
        Case("ignored_nan_nll_loss", why, (6, 10), op="nll_loss", special="nan_row", ignored="some",
             same_as_torch=False),
    ]
    why = "nllx: 0 · (-inf) = 0"
    cases += [
        Case(f"probability_zero_masked_{_x(shape)}_{_short(dtype)}", why, shape, dtype=dtype,
             special="masked", target="probabilities", weight="positive", same_as_torch=False)
        for shape in ((4, 10), (3, 1030), (2, 9, 5))
        for dtype in (float32, bfloat16, float64)
    ]
    cases += [
        Case(f"zero_weight_masked_{op}_{_x(shape)}", why, shape, op=op, weight="some_zero",
             special="zero_weight_target_masked", same_as_torch=False)
        for op in ("cross_entropy", "nll_loss")
        for shape in ((4, 10), (2, 9, 5))
    ]
    return cases


def _higher_order() -> list[Case]:
    """Small float64 problems: every op, layout, reduction and kind of target, for derivatives by finite differences."""
    why = "derivatives of first and second order"
    options: dict[str, dict[str, Any]] = {
        "index": {"ignored": "some"},
        "index_smoothed": {"ignored": "some", "weight": "positive", "label_smoothing": 0.2},
        "probabilities": {"target": "probabilities"},
        "probabilities_smoothed": {
            "target": "probabilities", "weight": "positive", "label_smoothing": 0.2,
        },
    }
    layouts = {
        "contiguous": (3, 4),
        "transposed": (3, 4),
        "expanded": (3, 4),
        "planes": (2, 3, 2),
        "channels_last": (2, 3, 2),
        "padded": (2, 3, 2),
        "neither": (2, 3, 2, 1),
        "unbatched": (4,),
    }
    cases = []
    for name, shape in layouts.items():
        layout = name if name in LAYOUTS else "contiguous"
        same: dict[str, Any] = {"why": why, "shape": shape, "layout": layout, "dtype": float64, "scale": 1.0}
        for reduction in REDUCTIONS:
            cases += [
                Case(f"second_order_{name}_{reduction}_{kind}", reduction=reduction, **same, **chosen)
                for kind, chosen in options.items()
                if not (name == "unbatched" and chosen.get("ignored"))
            ]
            if name != "unbatched":
                cases.append(Case(f"second_order_{name}_{reduction}_nll_loss", op="nll_loss", weight="positive",
                                  ignored="some", reduction=reduction, **same))
        for dim in range(len(shape)):
            cases.append(Case(f"second_order_{name}_log_softmax_{dim}", op="log_softmax", dim=dim, **same))
    return cases


# fmt: on

HIGHER_ORDER_CASES = _higher_order()
CASES = [
    *_rows(),
    *_planes(),
    *_blocks(),
    *_layouts(),
    *_dtypes(),
    *_options(),
    *_shapes(),
    *_values(),
    *HIGHER_ORDER_CASES,
]
assert len({case.name for case in CASES}) == len(CASES), "two rows of the table share a name"


def select(condition: Callable[[Case], bool]) -> list[Case]:
    """The rows for which condition holds, in order."""
    return [case for case in CASES if condition(case)]

"""Shapes that reach every family of CUDA kernels: what ``python -m nllx`` runs on a GPU and compares with float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nllx import _C, functional


class Row(NamedTuple):
    """`family` is the one that the shape is there for, on some GPU and in some dtype; which it reaches, the plan says."""

    family: str
    op: str
    shape: tuple[int, ...]


# 352 rows are more than twice the multiprocessors of any of these GPUs, and none is split; 40 and 8 are fewer. Planes are
# read in vectors from 512 vectors for each multiprocessor on.
OPTIONS = "cross_entropy with options"  # of rows, which have kernels of their own
ROWS = [
    Row("tile rows", "cross_entropy", (4096, 10)),
    Row("tile rows", "cross_entropy", (4096, 32)),
    Row("tile rows, loads ahead", "cross_entropy", (600_000, 3)),
    Row("tile rows, loads ahead", "cross_entropy", (700_000, 10)),
    Row("register rows", "cross_entropy", (500, 100)),
    Row("register rows", "cross_entropy", (500, 1000)),
    Row("block rows, kept", "cross_entropy", (352, 2050)),
    Row("block rows, kept, loads ahead", "cross_entropy", (352, 5003)),
    Row("block rows, kept in part", "cross_entropy", (352, 8192)),
    Row("block rows, kept in part, loads ahead", "cross_entropy", (352, 20_001)),
    Row("block rows, kept in part, loads ahead", "cross_entropy", (352, 32_000)),
    Row("block rows, cluster, kept, loads ahead", "cross_entropy", (352, 65_536)),
    Row("block rows, cluster, loads ahead", "cross_entropy", (40, 50_257)),
    Row("block rows, split", "cross_entropy", (8, 262_144)),
    Row("block rows, cluster, kept, loads ahead", "cross_entropy", (352, 130_000)),
    Row("block rows, cluster, kept in part, loads ahead", "cross_entropy", (40, 262_144)),
    Row("planes", "cross_entropy", (40, 21, 33, 35)),
    Row("planes, shared classes", "cross_entropy", (4, 300, 7, 7)),
    Row("planes, vectors, loads ahead", "cross_entropy", (1, 9, 592, 592)),
    Row("planes, vectors, loads ahead", "cross_entropy", (2, 21, 512, 512)),
    Row("register rows", "log_softmax", (500, 100)),
    Row("block rows, kept", "log_softmax", (352, 1030)),
    Row("block rows, kept, loads ahead", "log_softmax", (352, 5003)),
    Row("block rows, cluster, kept, loads ahead", "log_softmax", (16, 20_001)),
    Row("block rows, kept in part", "log_softmax", (16, 50_257)),
    Row("block rows, cluster, kept, loads ahead", "log_softmax", (16, 128_256)),
    Row("block rows, cluster, kept in part, loads ahead", "log_softmax", (16, 262_144)),
    Row("planes", "log_softmax", (40, 21, 33, 35)),
    Row("planes, shared classes", "log_softmax", (4, 300, 7, 7)),
    Row("options, rows by some of a warp", OPTIONS, (2048, 100)),
    Row("options, rows by a block", OPTIONS, (352, 5003)),
    Row("options, planes", OPTIONS, (40, 21, 33, 35)),
    Row("statistics, rows by some of a warp", "softmax_statistics", (2048, 100)),
    Row("statistics, rows by a block", "softmax_statistics", (352, 5003)),
    Row("statistics, planes", "softmax_statistics", (40, 21, 33, 35)),
    Row("rows of targets", "nll_loss", (2048, 1000)),
    Row("rows of targets", "nll_loss", (40, 21, 33, 35)),
    Row("elements, vectors", "mse_loss", (1000, 1003)),
    Row("elements", "mse_loss of a transposed target", (1000, 1003)),
]
DTYPES = (torch.bfloat16, torch.float32, torch.float64, torch.float16)
# For the sanitizers, which slow a kernel down a hundredfold: (dtypes, the most elements).
SMALL = (DTYPES[:2], 3_500_000)
NUMBERS = {"softcap": 15.0, "temperature": 1.3, "z_loss": 0.01}  # beside the options that are tensors
_PASSES = {"cross_entropy": ("forward", "backward", "value_and_grad"), "log_softmax": ("log_softmax", "log_softmax")}


class Problem(NamedTuple):
    """What is asked: `gradient` is that of the output. For mse_loss the target is of the input's dtype."""

    op: str
    input: Tensor
    target: Tensor
    gradient: Tensor
    label_smoothing: float
    of_rows: tuple[Tensor, Tensor] | None = None  # with options: logit_scale and sample_weight

    @property
    def reduction(self) -> str:
        """Of each a half: the gradient of a mean needs its divisor before the losses are known."""
        return "mean" if self.label_smoothing > 0 else "sum"


class Answer(NamedTuple):
    output: Tensor
    grad: Tensor
    together: tuple[Tensor, Tensor] | None = None  # of cross_entropy: the loss and its gradient in one launch, in place
    grad_scale: Tensor | None = None  # with options: the gradient of logit_scale


def plans(row: Row, dtype: torch.dtype, label_smoothing: float, gpu: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each pass of a row, and the family that the plan has for it on a GPU, with what of it is in kernels of its own."""
    for name in _PASSES.get(row.op, ("forward", "backward")):
        if row.op not in _PASSES:
            yield name, row.family
            continue
        outer, classes, *rest = row.shape
        inner = math.prod(rest)
        plan = _C.cuda_plan(
            name,
            outer=outer,
            classes=classes,
            inner=inner,
            element_bytes=dtype.itemsize,
            planes=inner > 1,
            dense=inner == 1,
            aligned=(inner if inner > 1 else classes) * dtype.itemsize % 16 == 0,
            has_terms=label_smoothing > 0,
            **gpu,
        )
        yield name, family(name, plan, classes * dtype.itemsize)


def family(op: str, plan: _C.CudaPlan, row_bytes: int) -> str:
    """A plan in words."""
    words = [plan["family"].replace("_", " ")]
    if plan["splits"] > 1:
        words.append("split")
    if plan["cluster"] > 1:
        words.append("cluster")
    if plan["family"] == "block_rows" and op in ("value_and_grad", "log_softmax"):
        if plan["shared_bytes"] == 0:
            return "forward, then backward"
        words.append("kept" if row_bytes <= plan["shared_bytes"] * plan["cluster"] else "kept in part")
    if plan["family"] == "block_rows" and plan["threads_per_row"] < plan["threads"]:
        words.append("several at once")
    if plan["family"] == "planes" and plan["vector_elements"] > 1:
        words.append("vectors")
    if plan["family"] == "planes" and plan["threads_per_row"] < plan["threads"]:
        words.append("shared classes")
    if plan["ahead"] > 0:
        words.append("loads ahead")
    return ", ".join(words)


def problem(row: Row, dtype: torch.dtype, label_smoothing: float, device: torch.device) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: tuple[int, ...], scale: float = 1) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator).mul_(scale)

    x = normal(row.shape, 3)
    if row.op.startswith("mse_loss"):
        transposed = row.op != "mse_loss"
        return Problem(row.op, x, normal(row.shape[::-1]).t() if transposed else normal(row.shape), normal(()), 0)
    rows = (row.shape[0], *row.shape[2:])
    target = torch.randint(row.shape[1], rows, device=device, generator=generator)
    target.view(-1)[1::7] = -100
    outputs = {"log_softmax": row.shape, "softmax_statistics": (3, *rows)}
    of_rows = None
    if row.op == OPTIONS:
        acc = torch.promote_types(dtype, torch.float32)
        scale, weight = torch.rand((2, *rows), dtype=acc, device=device, generator=generator)
        of_rows = scale + 0.5, weight
    return Problem(row.op, x, target, normal(outputs.get(row.op, ())), label_smoothing, of_rows)


def answer(problem: Problem) -> Answer:
    """By nllx. What the allocator gives out for results was NaN before."""
    x = problem.input.detach().requires_grad_()
    torch.full_like(x, math.nan)
    options: dict[str, Any] = {"reduction": problem.reduction, "label_smoothing": problem.label_smoothing}
    if problem.of_rows is not None:
        scale = problem.of_rows[0].detach().requires_grad_()
        options |= {"logit_scale": scale, "sample_weight": problem.of_rows[1], **NUMBERS}
        output = functional.cross_entropy(x, problem.target, **options)
        grads = torch.autograd.grad(output, (x, scale), problem.gradient.to(output.dtype))
        return Answer(output.detach(), grads[0], grad_scale=grads[1])
    if problem.op == "cross_entropy":
        output = functional.cross_entropy(x, problem.target, **options)
    elif problem.op == "log_softmax":
        output = functional.log_softmax(x, 1)
    elif problem.op == "nll_loss":
        output = functional.nll_loss(x, problem.target, reduction="sum")
    elif problem.op == "softmax_statistics":
        output = torch.stack(torch.ops.nllx.softmax_statistics(x, problem.target, 1)[:3])
    else:
        output = functional.mse_loss(x, problem.target, reduction="sum")
    torch.full_like(x, math.nan)
    (grad,) = torch.autograd.grad(output, x, problem.gradient.to(output.dtype))
    if problem.op != "cross_entropy":
        return Answer(output.detach(), grad)
    in_place = problem.input.clone()
    loss, _ = functional.cross_entropy_value_and_grad(in_place, problem.target, out=in_place, **options)
    return Answer(output.detach(), grad, (loss, in_place))


def _error(actual: Tensor, expected: Tensor, size: Tensor | float) -> float:
    """The largest error as a share of what is allowed: roundings of terms of that `size`, and of the result."""
    rounded, acc = (torch.finfo(dtype) for dtype in (actual.dtype, torch.promote_types(actual.dtype, torch.float32)))
    wide = actual.detach().double()
    if actual.dim() == 0 and abs(float(expected)) > rounded.max:  # a sum that float16 cannot hold
        return 0.0 if float(wide) == math.copysign(math.inf, float(expected)) else math.inf
    if not bool(wide.isfinite().all()):
        return math.inf
    # Of the smallest probabilities here the exponential errs by some twenty units: by 2^-24 log2 e |x|.
    allowed = (expected.abs() + size).mul_(32 * acc.eps).add_(expected.abs(), alpha=2 * rounded.eps)
    allowed += max(acc.tiny, rounded.tiny * rounded.eps)
    return float(((wide - expected).abs_() / allowed).max())


def _errors_with_options(problem: Problem, answer: Answer, of_rows: tuple[Tensor, Tensor]) -> list[float]:
    x, g, counts = problem.input.detach().double(), problem.gradient.double(), problem.target != -100
    softcap, temperature, z_loss = NUMBERS.values()
    # With a dimension for the classes, as the sums over them.
    scale, u = (t.double().unsqueeze(1) for t in of_rows)
    u = u * counts.unsqueeze(1)
    capped = torch.tanh(x * scale / softcap)
    z, slope = capped * (softcap / temperature), (1 - capped**2) / temperature
    lse, log_p = torch.logsumexp(z, 1, keepdim=True), torch.log_softmax(z, 1)
    a = torch.full_like(x, problem.label_smoothing / x.shape[1])
    hit = 1 - problem.label_smoothing + problem.label_smoothing / x.shape[1]
    a.scatter_(1, problem.target.clamp(min=0).unsqueeze(1), hit)
    k = u / u.sum() if problem.reduction == "mean" else u
    # z is as wrong as it is large, and the gradient as its exponential.
    large = z.abs().amax(1, keepdim=True) + 2
    loss = (k * ((-a * log_p).sum(1, keepdim=True) + z_loss * lse**2)).sum()
    of_loss = float((k * large * (1 + z_loss * lse.abs())).sum())
    of_z = g * k * (log_p.exp() * (1 + 2 * z_loss * lse) - a) * slope
    size = g.abs() * k * (log_p.exp() * large * (1 + 2 * z_loss * (lse.abs() + large)) + a) * slope * 2
    of_grad = _error(answer.grad, of_z * scale, size * scale)
    assert answer.grad_scale is not None
    of_scale = _error(answer.grad_scale, (of_z * x).sum(1), (size * x.abs()).sum(1))
    return [_error(answer.output, loss, of_loss), max(of_grad, of_scale)]


def errors(problem: Problem, answer: Answer) -> list[float]:
    """Of each pass, against float64."""
    if problem.of_rows is not None:
        return _errors_with_options(problem, answer, problem.of_rows)
    x, g = problem.input.detach().double(), problem.gradient.double()
    if problem.op == "log_softmax":
        expected = torch.log_softmax(x, 1)
        # The backward is given the rounded output, as torch's is.
        p, total = answer.output.double().exp(), g.sum(1, keepdim=True)
        size = p * g.abs().sum(1, keepdim=True)
        return [_error(answer.output, expected, 1.0), _error(answer.grad, g - p * total, size)]
    if problem.op.startswith("mse_loss"):
        difference = x - problem.target.double()
        return [_error(answer.output, (difference**2).sum(), 0.0), _error(answer.grad, 2 * g * difference, 0.0)]
    counts = problem.target != -100
    if problem.op == "softmax_statistics":
        log_p = torch.log_softmax(x, 1)
        p, of_class = log_p.exp(), [t.unsqueeze(1) for t in g]
        hit = torch.zeros_like(p).scatter_(1, problem.target.clamp(min=0).unsqueeze(1), 1)
        entropy = -(p * log_p).sum(1)
        expected = torch.stack([(log_p * hit).sum(1), torch.logsumexp(x, 1), entropy]) * counts
        logs = log_p + entropy.unsqueeze(1)
        grad = hit * of_class[0] + p * (of_class[1] - of_class[0] - of_class[2] * logs)
        size = hit * of_class[0].abs() + p * (
            of_class[0].abs() + of_class[1].abs() + of_class[2].abs() * (logs.abs() + 16)
        )
        rows = counts.unsqueeze(1)
        return [_error(answer.output, expected, 16.0), _error(answer.grad, grad * rows, size * rows)]
    smoothing = problem.label_smoothing
    # By the definition: in torch's gradient of a smoothed loss the coefficients are added up, as many as there are classes.
    target = torch.full_like(x, smoothing / x.shape[1])
    target.scatter_(1, problem.target.clamp(min=0).unsqueeze(1), 1 - smoothing + smoothing / x.shape[1])
    target.mul_(counts.unsqueeze(1))
    if problem.op == "nll_loss":
        loss, grad = torch.nn.functional.nll_loss(x, problem.target, reduction="sum"), -target
    else:
        options: dict[str, Any] = {"reduction": problem.reduction, "label_smoothing": smoothing}
        loss = torch.nn.functional.cross_entropy(x, problem.target, **options)
        grad = torch.softmax(x, 1).mul_(counts.unsqueeze(1)).sub_(target)
    if problem.reduction == "mean":
        grad /= counts.sum()
        target /= counts.sum()
    losses = float(counts.numel()) if problem.op == "nll_loss" else 0.0  # of both signs: their sum may be near zero
    found = [_error(answer.output, loss, losses), _error(answer.grad, g * grad, g.abs() * target)]
    if answer.together is not None:
        value, gradient = answer.together
        found.append(max(_error(value, loss, losses), _error(gradient, grad, target)))
    return found


def check(device: torch.device, gpu: dict[str, Any], small: bool = False) -> int:
    """Prints a line for each row and dtype, of every pass its family and its error as a share of the tolerance; returns how
    many differ. `gpu`: as cuda_plan takes it."""
    dtypes, most = SMALL if small else (DTYPES, math.inf)
    wrong = 0
    for row in ROWS:
        for dtype in dtypes if math.prod(row.shape) <= most else ():
            for label_smoothing in (0.0, 0.1) if row.op.startswith("cross_entropy") else (0.0,):
                shape = " x ".join(map(str, row.shape))
                smoothed = ", label smoothing" if label_smoothing else ""
                # Before it runs: what hangs is then the last that is printed.
                print(f"  {row.op} {shape} {str(dtype)[6:]}{smoothed}:", end="", flush=True)
                try:
                    asked = problem(row, dtype, label_smoothing, device)
                    found = errors(asked, answer(asked))
                except torch.OutOfMemoryError:
                    print(" left out, not enough memory")
                    continue
                for (name, family), value in zip(plans(row, dtype, label_smoothing, gpu), found, strict=True):
                    differs = not value <= 1
                    wrong += differs
                    print(f" {name} ({family}) {value:.0%}{' DIFFERS' if differs else ''}", end="")
                print(flush=True)
    return wrong

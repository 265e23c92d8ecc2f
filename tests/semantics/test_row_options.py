"""Options of rows (scale, softcap, temperature, z-loss, weights of rows, divisor) against their definition in float64."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import nllx
from nllx.functional import cross_entropy, cross_entropy_value_and_grad, softmax_statistics

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROW_OPTIONS = ("logit_scale", "temperature", "sample_weight")
NEUTRAL: dict[str, Any] = {
    "logit_scale": 1.0,
    "softcap": None,
    "temperature": 1.0,
    "z_loss": 0.0,
    "sample_weight": None,
    "divisor": None,
}

# Shape (the classes lie in dimension 1, of a vector in 0): few classes, middle, long rows in segments, planes; more rows
# than a word of 64 has bits, and fewer than a vector has lanes.
SHAPES: dict[str, tuple[int, ...]] = {
    "vector": (10,),
    "three classes": (131, 3),
    "ten classes": (67, 10),
    "rows": (5, 100),
    "many rows": (70, 300),
    "segments": (3, 40_000),
    "sequences": (2, 10, 9),
    "images": (2, 21, 7, 9),
    "planes": (2, 70, 50),
}


def _class_dim(x: Tensor) -> int:
    return 0 if x.dim() == 1 else 1


# How the same logits lie in memory: planes, rows (channels-last images), neither.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "classes last": lambda x: x.movedim(_class_dim(x), -1).contiguous().movedim(-1, _class_dim(x)),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}


# ---- the definition ----


def _transformed(x: Tensor, scale: Any, softcap: float | None, temperature: Any, counted: Tensor | None) -> Tensor:
    """z in float64, classes last. What the rows that do not count hold is replaced, so that no NaN of theirs gets out."""

    def column(option: Any, neutral: float) -> Any:
        if not isinstance(option, Tensor):
            return option
        option = option.double()
        if option.dim() and counted is not None:
            option = torch.where(counted, option, neutral)
        return option.unsqueeze(-1) if option.dim() else option

    x = x.double()
    if counted is not None:
        x = torch.where(counted.unsqueeze(-1), x, 0.0)
    # A factor times a mask would be NaN in the gradient of the factor: masks are put in afterwards.
    mask = x == -torch.inf
    z = torch.where(mask, 0.0, x) * column(scale, 1.0)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
        # No mask is left.
        return torch.where(mask, -softcap, z) / column(temperature, 1.0)
    return torch.where(mask, -torch.inf, z / column(temperature, 1.0))


def _reference(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    zero_division: float = torch.nan,
    logit_scale: Any = 1.0,
    softcap: float | None = None,
    temperature: Any = 1.0,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
    divisor: Any = None,
) -> Tensor:
    """The loss, in float64 and torch's operations, which differentiate it as often as wanted."""
    dim = _class_dim(x)
    x = x.movedim(dim, -1)
    classes = x.shape[-1]
    w = torch.ones(classes, dtype=torch.float64) if weight is None else weight.double()
    indices = not target.is_floating_point()
    counted = target.long() != ignore_index if indices else torch.ones(x.shape[:-1], dtype=torch.bool)
    z = _transformed(x, logit_scale, softcap, temperature, counted)
    lse = torch.logsumexp(z, -1)
    log_p = torch.where(z == -torch.inf, -torch.inf, z - lse.unsqueeze(-1))
    if indices:
        y = torch.where(counted, target.long(), 0)
        p = torch.nn.functional.one_hot(y, classes).double()
        w_row = w[y]
    else:
        p = target.double().movedim(dim, -1)
        w_row = torch.ones(x.shape[:-1], dtype=torch.float64)
    coefficient = w * ((1 - label_smoothing) * p + label_smoothing / classes)
    # A masked class that no one asks for adds nothing; the inner where keeps the infinity out of the gradient.
    unasked = (coefficient == 0) & (log_p == -torch.inf)
    loss = -(coefficient * torch.where(unasked, 0.0, log_p)).sum(-1) + z_loss * lse**2
    u = torch.ones_like(loss) if sample_weight is None else sample_weight.double()
    u = torch.where(counted, u, 0.0)
    loss = torch.where(counted, u * loss, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if divisor is not None:
        return loss.sum() / divisor
    total = torch.where(counted, u * w_row, 0.0).sum()
    if total == 0:
        return loss.sum() * 0 if zero_division == 0 else loss.sum() * torch.nan
    return loss.sum() / total


def _reference_statistics(
    x: Tensor,
    target: Tensor | None = None,
    dim: int = -1,
    ignore_index: int = -100,
    *,
    logit_scale: Any = 1.0,
    softcap: float | None = None,
    temperature: Any = 1.0,
) -> list[Tensor | None]:
    """log_prob, logsumexp, entropy, prediction."""
    counted = None if target is None else target != ignore_index
    z = _transformed(x.movedim(dim, -1), logit_scale, softcap, temperature, counted)
    lse = torch.logsumexp(z, -1)
    mask = z == -torch.inf
    log_p = torch.where(mask, 0.0, torch.where(mask, 0.0, z) - lse.unsqueeze(-1))
    entropy = -torch.where(mask, 0.0, log_p.exp() * log_p).sum(-1)
    prediction = z.argmax(-1)
    if target is None or counted is None:
        return [None, lse, entropy, prediction]
    log_prob = log_p.gather(-1, torch.where(counted, target, 0).unsqueeze(-1)).squeeze(-1)
    numbers = [torch.where(counted, t, 0.0) for t in (log_prob, lse, entropy)]
    return [*numbers, torch.where(counted, prediction, -1)]


# ---- problems ----


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _problem(
    shape: str, dtype: torch.dtype, layout: str, target_kind: str, weighted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    size = SHAPES[shape]
    generator = _generator(sum(size))
    dim = 0 if len(size) == 1 else 1
    classes = size[dim]
    rows = [n for i, n in enumerate(size) if i != dim]
    x = LAYOUTS[layout]((2.5 * torch.randn(size, generator=generator, dtype=torch.float64)).to(dtype))
    weight = (torch.rand(classes, generator=generator) + 0.5).to(dtype) if weighted else None
    if target_kind == "indices":
        target = torch.randint(classes, rows, generator=generator)
        if target.numel() > 2:
            target.view(-1)[::5] = -100
    else:
        target = LAYOUTS[layout](torch.randn(size, generator=generator).softmax(dim).to(dtype))
    return x, target, weight


def _rows(x: Tensor) -> list[int]:
    dim = _class_dim(x)
    return [n for i, n in enumerate(x.shape) if i != dim]


def _factors(x: Tensor, seed: int, low: float = 0.5, dtype: torch.dtype | None = None) -> Tensor:
    """One number per row in [low, low + 1), transposed in memory where there is more than one dimension."""
    rows = _rows(x)
    t = torch.rand(rows, generator=_generator(seed)) + low
    t = t.to(dtype or (torch.float64 if x.dtype == torch.float64 else torch.float32))
    return t.t().contiguous().t() if t.dim() == 2 else t


def _scalar(value: float, x: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


OPTIONS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "scale": lambda x: {"logit_scale": 1.75},
    "negative scale": lambda x: {"logit_scale": -0.5},
    "whole scale": lambda x: {"logit_scale": 2},
    "scale 0-d": lambda x: {"logit_scale": _scalar(1.25, x)},
    "scale per row": lambda x: {"logit_scale": _factors(x, 1)},
    # Signs and a zero: nothing may be found by dividing by the scale.
    "scale per row, any sign": lambda x: {"logit_scale": (_factors(x, 1, -0.5) * 4).round() / 2},
    "softcap": lambda x: {"softcap": 4.0},
    "temperature": lambda x: {"temperature": 0.75},
    "temperature 0-d": lambda x: {"temperature": _scalar(1.5, x)},
    "temperature per row": lambda x: {"temperature": _factors(x, 2)},
    "z-loss": lambda x: {"z_loss": 0.0625},
    "sample weight": lambda x: {"sample_weight": _factors(x, 3)},
    "divisor": lambda x: {"divisor": 12.5},
    "divisor 0-d": lambda x: {"divisor": _scalar(12.5, x)},
    "numbers": lambda x: {"logit_scale": 1.25, "softcap": 5.0, "temperature": 0.75, "z_loss": 0.0625, "divisor": 7},
    "tensors 0-d": lambda x: {
        "logit_scale": _scalar(1.25, x),
        "softcap": 5.0,
        "temperature": _scalar(0.75, x),
        "z_loss": 0.0625,
        "sample_weight": _factors(x, 3),
        "divisor": _scalar(7, x),
    },
    "tensors per row": lambda x: {
        "logit_scale": _factors(x, 1),
        "softcap": 5.0,
        "temperature": _factors(x, 2),
        "z_loss": 0.0625,
        "sample_weight": _factors(x, 3),
    },
    "scale and temperature per row": lambda x: {"logit_scale": _factors(x, 1), "temperature": _factors(x, 2)},
    "scale 0-d, softcap": lambda x: {"logit_scale": _scalar(1.25, x), "softcap": 4.0},
    "z-loss, weights": lambda x: {"z_loss": 0.25, "sample_weight": _factors(x, 3, -0.25)},
    "divided weights": lambda x: {"sample_weight": _factors(x, 3), "divisor": 9.0, "logit_scale": _scalar(0.75, x)},
}


def _for(reduction: str, options: dict[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in options.items() if name != "divisor" or reduction == "mean"}


def _leaves(x: Tensor, options: dict[str, Any], names: tuple[str, ...]) -> tuple[Tensor, dict[str, Any], list[Tensor]]:
    """Copies of the logits and options, in the layouts they have, those of the names with a gradient."""
    x = x.detach().clone().requires_grad_()
    options = {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in options.items()}
    tensors = [options[n].requires_grad_() for n in names if isinstance(options.get(n), Tensor)]
    return x, options, [x, *tensors]


def _upstream(loss: Tensor) -> Tensor:
    """An incoming gradient that every dtype holds exactly."""
    return (torch.arange(loss.numel(), dtype=torch.float64) % 7 / 4 - 0.75).reshape(loss.shape)


def _arithmetic(dtype: torch.dtype) -> float:
    """The epsilon of the type that sums are made in."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _check_loss(found: Tensor, want: Tensor, dtype: torch.dtype, classes: int, where: str) -> None:
    assert found.dtype == dtype, where
    assert found.shape == want.shape, where
    # A few roundings of z (up to 30 here) and of the logarithm of the sum, then the result is rounded once.
    eps = _arithmetic(dtype)
    largest = max(1.0, want.detach().abs().max().item() if want.numel() else 1.0)
    assert_close(
        found.detach().double(),
        want.detach(),
        rtol=torch.finfo(dtype).eps + 32 * eps,
        atol=32 * eps * largest,
        msg=lambda m: f"loss, {where}: {m}",
    )


def _check_gradients(
    found: list[Tensor] | tuple[Tensor, ...],
    want: list[Tensor] | tuple[Tensor, ...],
    leaves: list[Tensor],
    where: str,
    noise: Tensor | None = None,
) -> None:
    """The first of the logits, the others of options."""
    x = leaves[0]
    assert found[0].dtype == x.dtype, where
    eps = _arithmetic(x.dtype)
    assert_close(
        found[0].double(),
        want[0].double(),
        # The result is rounded once; float16 also has numbers below its normal ones.
        rtol=torch.finfo(x.dtype).eps + 64 * eps,
        atol=64 * eps * max(want[0].abs().max().item(), 1e-30) + (2.0**-24 if x.dtype == torch.float16 else 0.0),
        msg=lambda m: f"gradient of the logits, {where}: {m}",
    )
    for a, b, leaf in zip(found[1:], want[1:], leaves[1:], strict=True):
        assert a.dtype == leaf.dtype, where
        assert a.shape == leaf.shape, where
        # Sums of many terms that cancel: relative to the largest of them.
        bound = 1.0 if noise is None else noise.abs().max().item()
        assert_close(
            a.double(),
            b.double(),
            rtol=torch.finfo(leaf.dtype).eps + 128 * eps,
            atol=256 * eps * max(bound, b.abs().max().item() if b.numel() else 0.0),
            msg=lambda m: f"gradient of an option, {where}: {m}",
        )


def _noise(x: Tensor, grad: Tensor) -> Tensor:
    """Per row, the size of the terms that the gradient of a factor is the sum of."""
    return (x.detach().double() * grad.double()).abs().sum(_class_dim(x)).sum()


def _compare(
    x: Tensor,
    target: Tensor,
    options: dict[str, Any],
    where: str,
    names: tuple[str, ...] = ("logit_scale",),
    **arguments: Any,
) -> None:
    ours, our_options, our_leaves = _leaves(x, options, names)
    theirs, their_options, their_leaves = _leaves(x, options, names)
    found = cross_entropy(ours, target, **arguments, **our_options)
    want = _reference(theirs, target, **arguments, **their_options)
    dtype = x.dtype
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        if arguments.get("weight") is not None:
            dtype = torch.promote_types(dtype, arguments["weight"].dtype)
    _check_loss(found, want, dtype, x.shape[_class_dim(x)], where)
    grads = torch.autograd.grad(found, our_leaves, _upstream(want).to(found.dtype))
    wants = torch.autograd.grad(want, their_leaves, _upstream(want))
    _check_gradients(grads, wants, our_leaves, where, _noise(x, wants[0]))


# ---- values and first gradients ----


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: str, options: str) -> None:
    """Of the logits and the scale, for targets × weights × smoothing × reductions; dtypes and layouts take turns."""
    combinations = list(
        itertools.product(("indices", "probabilities"), (False, True), (0.0, 0.1), ("mean", "sum", "none"))
    )
    # Each option and shape starts elsewhere, so that every pair of a dtype and anything else is met.
    start = 5 * list(OPTIONS).index(options) + 7 * list(SHAPES).index(shape)
    step = {"segments": 6, "many rows": 4, "planes": 2, "rows": 2, "images": 2, "sequences": 2, "vector": 2}.get(
        shape, 1
    )
    for i, (target_kind, weighted, smoothing, reduction) in enumerate(combinations):
        if (i + i // 6 + start) % step:
            continue
        dtype = DTYPES[(i + i // 4 + start) % 4]
        layout = list(LAYOUTS)[(i // 2 + start) % 3]
        x, target, weight = _problem(shape, dtype, layout, target_kind, weighted)
        where = f"{target_kind} weighted={weighted} smoothing={smoothing} {reduction} {dtype} {layout}"
        _compare(
            x,
            target,
            _for(reduction, OPTIONS[options](x)),
            where,
            weight=weight,
            reduction=reduction,
            label_smoothing=smoothing,
        )


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("target_kind", ["indices", "probabilities"])
@pytest.mark.parametrize("shape", ["vector", "three classes", "rows", "segments", "images"])
def test_gradients_of_all_tensors(shape: str, target_kind: str, softcap: float | None) -> None:
    """Each alone, and all together."""
    x, target, weight = _problem(shape, torch.float64, "contiguous", target_kind, True)
    per_row = {name: _factors(x, i) for i, name in enumerate(ROW_OPTIONS)}
    scalars = {"logit_scale": _scalar(1.5, x), "temperature": _scalar(0.75, x), "divisor": _scalar(9.0, x)}
    for given in (per_row, {**per_row, **scalars}):
        options = {**given, "softcap": softcap, "z_loss": 0.125}
        names = [(name,) for name in given] if shape != "segments" else []
        for wanted in [*names, tuple(given)]:
            for smoothing, reduction in ((0.1, "mean"), (0.0, "none"), (0.0, "sum")):
                chosen = _for(reduction, options)
                wanted_here = tuple(name for name in wanted if name in chosen)
                where = f"{wanted_here} {reduction}"
                _compare(
                    x, target, chosen, where, wanted_here, weight=weight, reduction=reduction, label_smoothing=smoothing
                )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_options_of_other_dtypes(dtype: torch.dtype) -> None:
    """Each option in each float dtype beside the logits: a gradient in its own, to its own precision."""
    x, target, _ = _problem("images", dtype, "contiguous", "indices", False)
    for other in DTYPES:
        options: dict[str, Any] = {name: _factors(x, i, dtype=other) for i, name in enumerate(ROW_OPTIONS)}
        options |= {"divisor": torch.tensor(9.0, dtype=other), "softcap": 4.0, "z_loss": 0.125}
        for names in (("logit_scale",), (*ROW_OPTIONS, "divisor")):
            _compare(x, target, options, f"{other} {names}", names)
        options["logit_scale"] = torch.tensor(1.5, dtype=other)
        _compare(x, target, options, f"{other}, 0-d")


@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes_of_probabilities(dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    x, target, _ = _problem("rows", dtype, "contiguous", "probabilities", False)
    _compare(x, target.to(target_dtype), OPTIONS["tensors per row"](x), f"{target_dtype}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_wider_than_the_logits(dtype: torch.dtype) -> None:
    x, target, weight = _problem("rows", dtype, "contiguous", "indices", True)
    assert weight is not None
    for wider in (torch.float32, torch.float64):
        _compare(x, target, OPTIONS["tensors per row"](x), f"{wider}", weight=weight.to(wider))


def test_only_the_scale_wants_a_gradient() -> None:
    """Logits that want none: frozen features under a learnable scale."""
    for shape in ("three classes", "rows", "segments", "images"):
        x, target, _ = _problem(shape, torch.float64, "contiguous", "indices", False)
        for scale in (_scalar(1.5, x), _factors(x, 1)):
            ours, theirs = scale.clone().requires_grad_(), scale.clone().requires_grad_()
            (grad,) = torch.autograd.grad(cross_entropy(x, target, logit_scale=ours, softcap=6.0), ours)
            (want,) = torch.autograd.grad(_reference(x, target, logit_scale=theirs, softcap=6.0), theirs)
            assert_close(grad, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("target_kind", ["indices", "probabilities"])
def test_class_weights_targets_and_a_softcap_that_want_gradients(target_kind: str) -> None:
    """The right gradient or an error; never nothing."""
    x, target, weight = _problem("rows", torch.float64, "contiguous", target_kind, True)
    assert weight is not None
    tensors = {"weight": weight, "softcap": torch.tensor(4.0, dtype=torch.float64)}
    if target_kind == "probabilities":
        tensors["target"] = target
    for options in OPTIONS["tensors per row"](x), OPTIONS["tensors 0-d"](x), {}:
        for name, tensor in tensors.items():
            results = []
            for function in (cross_entropy, _reference):
                leaf = tensor.clone().requires_grad_()
                arguments: dict[str, Any] = {"target": target, "weight": weight, **options, name: leaf}
                try:
                    loss = function(x.clone().requires_grad_(), **arguments)
                except (RuntimeError, TypeError, ValueError):
                    if function is _reference:
                        raise
                    break
                try:
                    results += torch.autograd.grad(loss, leaf, allow_unused=True)
                except (RuntimeError, NotImplementedError):
                    break
                assert results[-1] is not None, name
            else:
                assert_close(*results, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_options_that_lie_anywhere() -> None:
    """Expanded, strided and offset tensors of one number per row."""
    x, target, _ = _problem("images", torch.float64, "classes last", "indices", False)
    rows = _rows(x)
    kinds = {
        "expanded": torch.tensor(1.5, dtype=torch.float64).expand(rows),
        "expanded in part": (torch.rand(rows[-1], generator=_generator(), dtype=torch.float64) + 0.5).expand(rows),
        "strided": (torch.rand([*rows, 3], generator=_generator(), dtype=torch.float64) + 0.5)[..., 1],
        "reversed": (torch.rand(rows[::-1], generator=_generator(), dtype=torch.float64) + 0.5).permute(2, 1, 0),
    }
    for where, factors in kinds.items():
        for name in ROW_OPTIONS:
            results = []
            for function in (cross_entropy, _reference):
                leaf, option = x.clone().requires_grad_(), factors.detach().requires_grad_()
                loss = function(leaf, target, softcap=6.0, **{name: option})
                results.append((loss, *torch.autograd.grad(loss, (leaf, option))))
            for a, b in zip(*results, strict=True):
                assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, where=where, name=name: f"{where} {name}: {m}")


def test_dtypes_of_indices_and_of_divisors() -> None:
    """Divisors are counts more often than not."""
    x = torch.randn(6, 10, generator=_generator(), dtype=torch.float64)
    target = torch.tensor([0, 3, 9, 9, 2, 1])
    options = OPTIONS["tensors per row"](x)
    want = _reference(x, target, ignore_index=2, **options)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.uint16):
        assert_close(cross_entropy(x, target.to(dtype), ignore_index=2, **options), want)
    want = _reference(x, target, divisor=11, **options)
    for divisor in (11, 11.0, *(torch.tensor(11, dtype=d) for d in (torch.int64, torch.int32, torch.float32))):
        assert_close(cross_entropy(x, target, divisor=divisor, **options), want)


@pytest.mark.parametrize("wanted", [False, True], ids=["constant", "learnable"])
@pytest.mark.parametrize("name", [*ROW_OPTIONS, "divisor"])
def test_options_that_change_before_the_backward(name: str, wanted: bool) -> None:
    """The gradient of the loss that was, or an error."""
    x, target, _ = _problem("rows", torch.float64, "contiguous", "indices", False)
    for option in (torch.tensor(1.5).double(), _factors(x, 1)):
        if option.dim() == {"divisor": 1, "sample_weight": 0}.get(name):
            continue
        for softcap in (None, 4.0):
            ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            want = torch.autograd.grad(_reference(theirs, target, softcap=softcap, **{name: option}), theirs)
            changed = option.clone().requires_grad_(wanted)
            loss = cross_entropy(ours, target, softcap=softcap, **{name: changed})
            with torch.no_grad():
                changed.mul_(3)
            try:
                found = torch.autograd.grad(loss, ours)
            except RuntimeError as e:
                if "modified by an inplace operation" not in str(e):
                    raise
            else:
                assert_close(found, want)


# ---- special values ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("shape", ["three classes", "ten classes", "many rows", "segments", "images"])
def test_masked_classes(shape: str, softcap: float | None, dtype: torch.dtype) -> None:
    """p = 0, and a gradient of the scale that does not see them."""
    x, target, weight = _problem(shape, dtype, "contiguous", "indices", True)
    mask = torch.rand(x.shape, generator=_generator(5)) < 0.3
    mask.scatter_(1, torch.where(target == -100, 0, target).unsqueeze(1), False)
    x[mask] = -torch.inf
    probabilities = torch.where(mask, 0.0, torch.rand(x.shape, generator=_generator(6)) + 0.1)
    probabilities = (probabilities / probabilities.sum(1, keepdim=True)).to(dtype)
    for scale in (_scalar(1.25, x), _factors(x, 1)):
        for temperature in (1.0, _factors(x, 2)):
            options = {"logit_scale": scale, "softcap": softcap, "temperature": temperature, "z_loss": 0.125}
            for given in (target, probabilities):
                ours, our_options, our_leaves = _leaves(x, options, ("logit_scale",))
                theirs, their_options, their_leaves = _leaves(x, options, ("logit_scale",))
                loss = cross_entropy(ours, given, weight, **our_options)
                want = _reference(theirs, given, weight, **their_options)
                _check_loss(loss, want, dtype, x.shape[1], "masked")
                grads = torch.autograd.grad(loss, our_leaves)
                wants = torch.autograd.grad(want, their_leaves)
                assert (grads[0][mask] == 0).all()
                finite = torch.where(mask, 0.0, x.double())
                _check_gradients(grads, wants, our_leaves, "masked", _noise(finite, wants[0]))


def test_a_masked_class_that_is_asked_for() -> None:
    """An infinite loss in its row, which is as it is without options."""
    x = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, 1.0, 2.0]])
    losses = cross_entropy(x, torch.tensor([1, 1]), logit_scale=torch.tensor(1.5), temperature=0.5, reduction="none")
    assert losses[0] == torch.inf
    assert losses[1].isfinite()
    capped = cross_entropy(x, torch.tensor([1, 1]), logit_scale=torch.tensor(1.5), softcap=3.0, reduction="none")
    assert_close(
        capped.double(),
        _reference(x, torch.tensor([1, 1]), logit_scale=1.5, softcap=3.0, reduction="none"),
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_softcap_holds_what_is_large(dtype: torch.dtype) -> None:
    """Also where the scaled logit overflows: tanh is 1 there, and its derivative 0."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([[largest, -largest, 0.5], [-largest, largest / 2, 1.0], [300.0, 200.0, -1.0]], dtype=dtype)
    target = torch.tensor([1, 2, 2])
    scale = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float32)
    for given in (4.0, scale):
        # In float64 a double would overflow too: from the limits.
        limits = x.double().clamp(-1e5, 1e5)
        ours, theirs = x.clone().requires_grad_(), limits.requires_grad_()
        loss = cross_entropy(ours, target, logit_scale=given, softcap=5.0, reduction="none")
        want = _reference(theirs, target, logit_scale=given, softcap=5.0, reduction="none")
        eps = torch.finfo(dtype).eps
        assert_close(loss.double(), want, rtol=max(eps, 1e-6), atol=0)
        (grad,), (wanted,) = torch.autograd.grad(loss.sum(), ours), torch.autograd.grad(want.sum(), theirs)
        assert_close(grad.double(), wanted, rtol=max(2 * eps, 1e-5), atol=1e-12)


def test_a_softcap_keeps_small_logits() -> None:
    """Far below the softcap nothing changes; a tanh from a difference of exponentials would lose digits."""
    x = 1e-3 * torch.randn(50, 10, generator=_generator())
    target = torch.randint(10, (50,), generator=_generator())
    leaves = [x.clone().requires_grad_(), x.double().requires_grad_()]
    (grad,) = torch.autograd.grad(
        cross_entropy(leaves[0], target, logit_scale=1e-2, softcap=50.0, z_loss=1.0), leaves[0]
    )
    (want,) = torch.autograd.grad(_reference(leaves[1], target, logit_scale=1e-2, softcap=50.0, z_loss=1.0), leaves[1])
    assert_close(grad.double(), want, rtol=1e-5, atol=0)
    statistics = softmax_statistics(x, target, softcap=50.0)
    assert_close(statistics.log_prob.double(), _reference_statistics(x, target, softcap=50.0)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", ["three classes", "ten classes", "many rows", "segments", "images"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ignored_rows_hold_anything(dtype: torch.dtype, shape: str, bad: float) -> None:
    """They give nothing to the loss, the divisor and the gradients, and get nothing."""
    x, target, weight = _problem(shape, dtype, "contiguous", "indices", True)
    ignored = target == -100
    assert ignored.any()
    x.movedim(1, -1)[ignored] = bad
    rows = {name: torch.where(ignored, bad, _factors(x, i)) for i, name in enumerate(ROW_OPTIONS)}
    scalars = {"logit_scale": _scalar(1.5, x), "temperature": _scalar(0.75, x)}
    for softcap in (None, 4.0):
        for given in (rows, {**rows, **scalars}):
            for reduction in ("mean", "none"):
                options = {**given, "softcap": softcap, "z_loss": 0.125}
                for names in (("logit_scale",), ROW_OPTIONS):
                    ours, our_options, our_leaves = _leaves(x, options, names)
                    theirs, their_options, their_leaves = _leaves(x, options, names)
                    arguments = {"weight": weight, "label_smoothing": 0.1, "reduction": reduction}
                    loss = cross_entropy(ours, target, **arguments, **our_options)
                    want = _reference(theirs, target, **arguments, **their_options)
                    where = f"{softcap} {reduction} {names}"
                    _check_loss(loss, want, dtype, x.shape[1], where)
                    if reduction == "none":
                        assert (loss[ignored] == 0).all()
                    # An incoming gradient of NaN reaches no ignored row either.
                    upstream = _upstream(want)
                    wants = torch.autograd.grad(want, their_leaves, upstream)
                    if reduction == "none":
                        upstream = torch.where(ignored, torch.nan, upstream)
                    grads = torch.autograd.grad(loss, our_leaves, upstream.to(dtype))
                    assert (grads[0].movedim(1, -1)[ignored] == 0).all()
                    for grad in grads[1:]:
                        if grad.dim():
                            assert (grad[ignored] == 0).all(), where
                    finite = torch.where(ignored.unsqueeze(1), 0.0, x.double())
                    _check_gradients(grads, wants, our_leaves, where, _noise(finite, wants[0]))


@pytest.mark.parametrize("kind", ["empty", "all ignored", "weights of zero"])
@pytest.mark.parametrize("options", ["tensors per row", "z-loss, weights", "scale 0-d, softcap", "temperature"])
def test_the_mean_over_nothing(options: str, kind: str) -> None:
    x = torch.randn(0 if kind == "empty" else 4, 10, generator=_generator())
    target = torch.randint(10, (len(x),), generator=_generator())
    given = OPTIONS[options](x)
    if kind == "all ignored":
        target[:] = -100
        x[:] = torch.nan
    elif kind == "weights of zero":
        given["sample_weight"] = torch.zeros(len(x))
    for extra, want in (
        ({}, torch.nan),
        ({"zero_division": 0.0}, 0.0),
        ({"divisor": 8.0}, 0.0),
        ({"divisor": torch.tensor(8.0)}, 0.0),
    ):
        leaf, chosen, leaves = _leaves(x, {**given, **extra}, ("logit_scale",))
        loss = cross_entropy(leaf, target, **chosen)
        assert_close(loss, torch.tensor(want), equal_nan=True, rtol=0, atol=0, msg=lambda m, e=extra: f"{e}: {m}")
        if want == 0:
            for grad, tensor in zip(torch.autograd.grad(loss, leaves), leaves, strict=True):
                assert grad.shape == tensor.shape
                assert (grad == 0).all()
    for reduction in ("sum", "none"):
        leaf, chosen, leaves = _leaves(x, given, ("logit_scale",))
        loss = cross_entropy(leaf, target, reduction=reduction, **chosen)
        assert (loss == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(loss.sum(), leaves))


@pytest.mark.parametrize("target_kind", ["indices", "probabilities"])
@pytest.mark.parametrize("scale", [0, 0.0, torch.tensor(0.0, dtype=torch.float64)], ids=["0", "0.0", "0-d"])
def test_a_scale_of_zero(scale: Any, target_kind: str) -> None:
    """The classes are the same then, but not to the gradient of the scale."""
    for shape in ("ten classes", "segments", "images"):
        x, target, _ = _problem(shape, torch.float64, "contiguous", target_kind, False)
        for softcap in (None, 4.0):
            _compare(x, target, {"logit_scale": scale, "softcap": softcap, "z_loss": 0.125}, f"{shape} {softcap}")


# ---- options that change nothing ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_neutral_options_are_none(shape: str, dtype: torch.dtype) -> None:
    """Numbers bit for bit; tensors, which take other ways, to the rounding."""
    ways: list[dict[str, Any]] = [
        NEUTRAL,
        {"logit_scale": float("1.0")},
        {"logit_scale": 1, "temperature": 1, "z_loss": 0},
        {"softcap": None, "z_loss": 0.0},
    ]
    for target_kind, layout in (("indices", "classes last"), ("probabilities", "contiguous")):
        x, target, weight = _problem(shape, dtype, layout, target_kind, True)
        number = dtype if dtype == torch.float64 else torch.float32
        ones = torch.ones(_rows(x), dtype=number)
        one = torch.tensor(1.0, dtype=number)
        near = [{"logit_scale": one}, {"logit_scale": ones, "sample_weight": ones}, {"temperature": ones}]
        for reduction in ("mean", "none"):
            leaf = x.clone().requires_grad_()
            plain = cross_entropy(leaf, target, weight, reduction=reduction, label_smoothing=0.1)
            (grad,) = torch.autograd.grad(plain.sum(), leaf)
            for i, options in enumerate(ways + near):
                other = x.clone().requires_grad_()
                loss = cross_entropy(other, target, weight, reduction=reduction, label_smoothing=0.1, **options)
                (second,) = torch.autograd.grad(loss.sum(), other)
                if i < len(ways):
                    assert torch.equal(loss, plain)
                    assert torch.equal(second, grad)
                else:
                    eps = torch.finfo(dtype).eps
                    assert_close(loss, plain, rtol=8 * eps, atol=8 * eps)
                    assert_close(second, grad, rtol=8 * eps, atol=8 * eps * grad.abs().max().item())


def test_neutral_options_of_the_others_are_none() -> None:
    x, target, weight = _problem("images", torch.float32, "contiguous", "indices", True)
    plain = cross_entropy_value_and_grad(x, target, weight)
    neutral = cross_entropy_value_and_grad(x, target, weight, **NEUTRAL)
    assert all(torch.equal(a, b) for a, b in zip(plain, neutral, strict=True))
    numbers = {name: NEUTRAL[name] for name in ("logit_scale", "softcap", "temperature")}
    plain, neutral = (softmax_statistics(x, target, dim=1, **o) for o in ({}, numbers))
    assert all(torch.equal(a, b) for a, b in zip(plain, neutral, strict=True))
    criteria = (
        nllx.CrossEntropyLoss(weight),
        nllx.CrossEntropyLoss(weight, **{n: v for n, v in NEUTRAL.items() if n != "sample_weight"}),
    )
    assert torch.equal(*(c(x, target) for c in criteria))
    assert repr(criteria[0]) == repr(criteria[1]) == "CrossEntropyLoss()"


def test_the_divisor_takes_the_place_of_the_sum_of_weights() -> None:
    """Micro-batches of one step, each divided by the weights of all, add up to the loss of the whole."""
    x, target, weight = _problem("three classes", torch.float64, "contiguous", "indices", True)
    u = _factors(x, 3)
    assert weight is not None
    counted = target != -100
    total = (u * weight[target.clamp(min=0)])[counted].sum()
    whole, *parts = x.clone().requires_grad_(), *(p.clone().requires_grad_() for p in x.split(50))
    loss = cross_entropy(whole, target, weight, sample_weight=u)
    losses = [
        cross_entropy(p, y, weight, sample_weight=v, divisor=total)
        for p, y, v in zip(parts, target.split(50), u.split(50), strict=True)
    ]
    assert_close(sum(losses), loss)
    grads = torch.autograd.grad(sum(losses), parts)
    assert_close(torch.cat(grads), *torch.autograd.grad(loss, whole))


# ---- the other entrances ----


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", ["vector", "ten classes", "many rows", "segments", "images"])
def test_value_and_grad(shape: str, options: str) -> None:
    start = list(OPTIONS).index(options) + 3 * list(SHAPES).index(shape)
    cases = itertools.product(("indices", "probabilities"), (False, True), ("mean", "sum"), (None, "fresh", "over"))
    for i, (target_kind, weighted, reduction, out) in enumerate(cases):
        if (i + start) % (12 if shape == "segments" else 3):
            continue
        dtype, layout = DTYPES[(i // 2 + start) % 4], list(LAYOUTS)[(i // 3 + start) % 3]
        x, target, weight = _problem(shape, dtype, layout, target_kind, weighted)
        given = _for(reduction, OPTIONS[options](x))
        theirs = x.clone().requires_grad_()
        arguments = {"weight": weight, "reduction": reduction, "label_smoothing": 0.1 * (i // 2 % 2)}
        want = _reference(theirs, target, **arguments, **given)
        (wanted,) = torch.autograd.grad(want, theirs)
        ours = x.clone()
        where = f"{target_kind} {arguments} {dtype} {layout} {out}"
        destination = {None: None, "fresh": torch.full_like(x, torch.nan), "over": ours}[out]
        loss, grad = cross_entropy_value_and_grad(ours, target, out=destination, **arguments, **given)
        if destination is not None:
            assert grad is destination
        assert not loss.requires_grad
        _check_loss(loss, want, dtype, x.shape[_class_dim(x)], where)
        _check_gradients([grad], [wanted], [x], where)


@pytest.mark.parametrize("name", [*ROW_OPTIONS, "divisor"])
def test_value_and_grad_has_no_graph_for_options(name: str) -> None:
    """A gradient that would be left out is an error."""
    x, target = torch.randn(4, 10), torch.tensor([0, 1, 2, 3])
    option = torch.tensor(1.5) if name == "divisor" else torch.ones(4)
    cross_entropy_value_and_grad(x, target, **{name: option})
    with pytest.raises(RuntimeError, match=name):
        cross_entropy_value_and_grad(x, target, **{name: option.requires_grad_()})
    if name in ("logit_scale", "temperature"):
        with pytest.raises(RuntimeError, match=name):
            cross_entropy_value_and_grad(x, target, **{name: torch.tensor(1.5, requires_grad=True)})


@pytest.mark.parametrize(
    "options", ["numbers", "tensors 0-d", "tensors per row", "scale 0-d, softcap", "sample weight"]
)
@pytest.mark.parametrize("shape", ["three classes", "many rows", "segments", "images"])
def test_gradient_over_the_logits(shape: str, options: str) -> None:
    """A scale's gradient is of logits that are gone then: theirs may go elsewhere, but both are right."""
    cases = ((torch.float64, "indices"), (torch.bfloat16, "probabilities"), (torch.float32, "indices"))
    for (dtype, target_kind), names in itertools.product(cases, ((), ("logit_scale",))):
        x, target, weight = _problem(shape, dtype, "contiguous", target_kind, True)
        given = OPTIONS[options](x)
        ours, our_options, our_leaves = _leaves(x, given, names)
        theirs, their_options, their_leaves = _leaves(x, given, names)
        logits = ours * 1
        loss = cross_entropy(logits, target, weight, inplace_backward=True, **our_options)
        want = _reference(theirs, target, weight, **their_options)
        wants = torch.autograd.grad(want, their_leaves)
        loss.backward()
        assert ours.grad is not None
        written = torch.equal(logits.detach(), ours.grad)
        assert written or (len(our_leaves) > 1 and torch.equal(logits, ours))
        grads = [leaf.grad for leaf in our_leaves if leaf.grad is not None]
        assert len(grads) == len(our_leaves)
        _check_gradients(grads, wants, our_leaves, f"{dtype} {target_kind}", _noise(x, wants[0]))


@pytest.mark.parametrize("options", ["numbers", "tensors 0-d", "tensors per row"])
def test_autocast(options: str) -> None:
    """The loss is float32, the gradients are of the dtypes of the leaves."""
    for dtype in (torch.bfloat16, torch.float32):
        x, target, _ = _problem("rows", dtype, "contiguous", "indices", False)
        given = OPTIONS[options](x)
        ours, our_options, our_leaves = _leaves(x, given, ("logit_scale",))
        theirs, their_options, their_leaves = _leaves(x, given, ("logit_scale",))
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(ours, target, **our_options)
        want = _reference(theirs, target, **their_options)
        assert loss.dtype == torch.float32
        assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
        wants = torch.autograd.grad(want, their_leaves)
        _check_gradients(torch.autograd.grad(loss, our_leaves), wants, our_leaves, f"{dtype}", _noise(x, wants[0]))


NUMBERS = {"logit_scale": 1.25, "softcap": 5.0, "temperature": 0.75, "z_loss": 0.0625, "divisor": 7.0}


def test_module() -> None:
    x, target, weight = _problem("images", torch.float64, "contiguous", "indices", True)
    criterion = nllx.CrossEntropyLoss(weight, **NUMBERS)
    want = _reference(x, target, weight, **NUMBERS)
    for module in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert_close(module(x, target), want)
        for name, value in NUMBERS.items():
            assert f"{name}={value}" in repr(module)
    # What the call gives takes the place of the module's number.
    calls: list[dict[str, Any]] = [
        {"logit_scale": _factors(x, 1)},
        {"temperature": _factors(x, 2), "logit_scale": 2.0},
        {"sample_weight": _factors(x, 3), "divisor": torch.tensor(3.0)},
        {"divisor": 5},
        {"logit_scale": 1.0, "temperature": 1.0},
    ]
    for options in calls:
        assert_close(criterion(x, target, **options), _reference(x, target, weight, **{**NUMBERS, **options}))
    for name in NUMBERS:
        single = nllx.CrossEntropyLoss(**{name: NUMBERS[name]})
        assert repr(single) == f"CrossEntropyLoss({name}={NUMBERS[name]})"
        assert_close(single(x, target), _reference(x, target, **{name: NUMBERS[name]}))


def test_module_of_learnable_scale() -> None:
    x, target, _ = _problem("rows", torch.float64, "contiguous", "indices", False)
    scales = [torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64)) for _ in range(2)]
    nllx.CrossEntropyLoss(softcap=5.0)(x, target, logit_scale=scales[0].exp()).backward()
    _reference(x, target, softcap=5.0, logit_scale=scales[1].exp()).backward()
    assert scales[0].grad is not None
    assert_close(scales[0].grad, scales[1].grad)


def test_module_of_before_the_options() -> None:
    """Pickled by a version that did not have them; so are those of today that have none of their own."""
    x, target = torch.randn(4, 10), torch.tensor([0, 1, 2, 3])
    module = nllx.CrossEntropyLoss(label_smoothing=0.1)
    old = nllx.CrossEntropyLoss(label_smoothing=0.1)
    assert not set(NUMBERS) & set(vars(old))
    for restored in (old, copy.deepcopy(old), pickle.loads(pickle.dumps(old))):
        assert torch.equal(restored(x, target), module(x, target))
        assert repr(restored) == repr(module)
        u = torch.rand(4)
        assert torch.equal(restored(x, target, sample_weight=u), module(x, target, sample_weight=u))


@pytest.mark.parametrize("name", NUMBERS)
def test_module_takes_numbers(name: str) -> None:
    for tensor in (torch.tensor(2.0), torch.nn.Parameter(torch.tensor(2.0)), torch.ones(3)):
        with pytest.raises(TypeError, match=name):
            nllx.CrossEntropyLoss(**{name: tensor})


# ---- derivatives of higher order, torch.func, compilers ----


def _small(
    target_kind: str, rows: tuple[int, ...] = (4,), classes: int = 5
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = _generator(11)
    x = torch.randn(rows[0], classes, *rows[1:], generator=generator, dtype=torch.float64)
    if target_kind == "indices":
        target = torch.randint(classes, rows, generator=generator)
        target.view(-1)[1] = -100
    else:
        target = torch.randn(x.shape, generator=generator, dtype=torch.float64).softmax(1)
    options = {n: torch.rand(rows, generator=generator, dtype=torch.float64) + 0.5 for n in ROW_OPTIONS}
    return x, target, options


@pytest.mark.parametrize(("reduction", "scalar"), [("none", False), ("mean", True)], ids=["per row", "0-d"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("target_kind", ["indices", "probabilities"])
def test_gradcheck(target_kind: str, reduction: str, softcap: float | None, scalar: bool) -> None:
    x, target, options = _small(target_kind, (3,), 3)
    if scalar:
        options |= {"logit_scale": torch.tensor(1.5).double(), "temperature": torch.tensor(0.75).double()}
        options["divisor"] = torch.tensor(2.5).double()
    names = list(options)
    weight = torch.tensor([0.5, 1.5, 1.0], dtype=torch.float64)

    def f(x: Tensor, *factors: Tensor) -> Tensor:
        given = dict(zip(names, factors, strict=True))
        return cross_entropy(
            x, target, weight, reduction=reduction, label_smoothing=0.1, z_loss=0.25, softcap=softcap, **given
        )

    inputs = [t.requires_grad_() for t in (x, *options.values())]
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True, check_batched_grad=True)
    # Logits and scale alone, which may be differentiated on another way than with other options.
    inputs = [t.detach().requires_grad_(i < 2) for i, t in enumerate(inputs)]
    assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True)


Loss = Callable[..., Tensor]


def _both(f: Callable[[Loss], Any], rtol: float = 1e-9, atol: float = 1e-11) -> None:
    """What is done with a loss, done with nllx's and with the definition."""
    found, want = f(cross_entropy), f(_reference)
    assert_close(found, want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("target_kind", ["indices", "probabilities"])
@pytest.mark.parametrize("scalar", [False, True], ids=["per row", "0-d"])
@pytest.mark.parametrize("size", [((4,), 5), ((70,), 3), ((2, 3), 21)], ids=str)
def test_second_order(size: tuple[tuple[int, ...], int], scalar: bool, target_kind: str, softcap: float | None) -> None:
    """Of the norm of the gradient of the logits, in every option: what learns to weight rows does."""
    x, target, options = _small(target_kind, *size)
    options["divisor"] = torch.tensor(3.5).double()
    if scalar:
        options |= {"logit_scale": torch.tensor(1.5).double(), "temperature": torch.tensor(0.75).double()}
    direction = torch.randn(x.shape, generator=_generator(3), dtype=torch.float64)

    def second(loss: Loss, wanted: tuple[str, ...], of_options: bool) -> tuple[Tensor, ...]:
        leaf, given, leaves = _leaves(x, options, wanted)
        value = loss(leaf, target, softcap=softcap, z_loss=0.125, label_smoothing=0.1, **given)
        first = torch.autograd.grad(value, leaves if of_options else leaf, create_graph=True)
        total = (first[0] * direction).sum() + sum(g.square().sum() for g in first)
        return torch.autograd.grad(total, leaves)

    for wanted, of_options in itertools.product((*((name,) for name in options), tuple(options)), (False, True)):
        _both(functools.partial(second, wanted=wanted, of_options=of_options))


TRANSFORMED = ("logit_scale", "temperature", "sample_weight", "divisor")


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("target_kind", ["indices", "probabilities"])
def test_forward_mode(target_kind: str, softcap: float | None) -> None:
    x, target, options = _small(target_kind)
    options["divisor"] = torch.tensor(3.5).double()
    scalars = {**options, "logit_scale": torch.tensor(1.5).double(), "temperature": torch.tensor(0.75).double()}
    for given in (options, scalars):
        for names in (("logit_scale",), ("temperature",), ("sample_weight",), ("divisor",), (), TRANSFORMED):

            def tangent(loss: Loss, given: dict[str, Tensor] = given, names: tuple[str, ...] = names) -> Any:
                def f(x: Tensor, *factors: Tensor) -> Tensor:
                    chosen = {**given, **dict(zip(names, factors, strict=True))}
                    return loss(x, target, softcap=softcap, z_loss=0.125, **chosen)

                inputs = (x, *(given[name] for name in names))
                tangents = tuple(torch.linspace(-1, 2, t.numel()).double().reshape(t.shape) for t in inputs)
                forward_over_reverse = torch.func.jvp(torch.func.grad(f), inputs, tangents)
                return torch.func.jvp(f, inputs, tangents), forward_over_reverse

            _both(tangent)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("target_kind", ["indices", "probabilities"])
def test_func_transforms_of_logits_and_scale(target_kind: str, softcap: float | None) -> None:
    x, target, options = _small(target_kind)
    per_row = options["logit_scale"]
    batch = torch.stack([x, 2 * x, x.flip(0)])
    rest = {"temperature": options["temperature"], "sample_weight": options["sample_weight"], "softcap": softcap}
    scalar = torch.tensor(1.5).double()

    for scale in (scalar, per_row):
        scales = torch.stack([scale, scale * 2, scale / 3])

        def transformed(loss: Loss, scale: Tensor = scale, scales: Tensor = scales) -> Any:
            def f(x: Tensor, s: Tensor) -> Tensor:
                return loss(x, target, z_loss=0.125, logit_scale=s, **rest)

            def rows(x: Tensor, s: Tensor) -> Tensor:
                return loss(x, target, z_loss=0.125, logit_scale=s, reduction="none", **rest)

            def mapped(f: Callable[..., Any], in_dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
                if loss is cross_entropy:
                    return torch.vmap(f, in_dims)(*inputs)
                return _stacked(f, *([t] * 3 if dim is None else t for t, dim in zip(inputs, in_dims, strict=True)))

            grad = torch.func.grad(f, (0, 1))
            return (
                grad(x, scale),
                *(mapped(g, (0, 0), batch, scales) for g in (f, rows, grad)),
                *(mapped(g, (None, 0), x, scales) for g in (f, rows, grad)),
                *(mapped(g, (0, None), batch, scale) for g in (f, rows, grad)),
                torch.func.jacrev(rows, (0, 1))(x, scale),
                torch.func.jacfwd(rows, (0, 1))(x, scale),
                torch.func.jacrev(torch.func.grad(f, (0, 1)), (0, 1))(x, scale),
                torch.func.hessian(f, (0, 1))(x, scale),
            )

        _both(transformed)


def _stacked(f: Callable[..., Any], *batches: Any) -> Any:
    """What vmap is to give: sample by sample."""
    results = [f(*sample) for sample in zip(*batches, strict=True)]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return torch.stack(results)


@pytest.mark.parametrize("target_kind", ["indices", "probabilities"])
def test_vmap_over_options(target_kind: str) -> None:
    """Alone, together, and of gradients; also beside logits that are the same for all."""
    x, target, options = _small(target_kind)
    options["divisor"] = torch.tensor(3.5).double()
    scale = {"logit_scale": torch.tensor(1.5).double(), "temperature": torch.tensor(0.75).double()}
    for given in (options, {**options, **scale}):
        batches = {name: torch.stack([t, t * 2, t / 3]) for name, t in given.items()}
        for names in (*((name,) for name in given), tuple(given)):
            stacks = [batches[name] for name in names]

            def f(x: Tensor, *factors: Tensor, names: tuple[str, ...] = names) -> Tensor:
                return cross_entropy(x, target, softcap=2.0, z_loss=0.125, **dict(zip(names, factors, strict=True)))

            def reference(x: Tensor, *factors: Tensor, names: tuple[str, ...] = names) -> Tensor:
                return _reference(x, target, softcap=2.0, z_loss=0.125, **dict(zip(names, factors, strict=True)))

            in_dims = (None, *(0 for _ in names))
            found, want = torch.vmap(f, in_dims)(x, *stacks), _stacked(reference, [x] * 3, *stacks)
            assert_close(found, want, msg=lambda m, names=names: f"{names}: {m}")
            wanted = tuple(range(1 + len(names)))
            found = torch.vmap(torch.func.grad(f, wanted), in_dims)(x, *stacks)
            want = _stacked(torch.func.grad(reference, wanted), [x] * 3, *stacks)
            assert_close(found, want, msg=lambda m, names=names: f"gradients, {names}: {m}")


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scalar", [False, True], ids=["per row", "0-d"])
@pytest.mark.parametrize("kind", ["masks", "ignored rows"])
@pytest.mark.parametrize("derivative", ["first", "second", "tangent", "tangent of the first"])
def test_derivatives_of_special_values(derivative: str, kind: str, scalar: bool, softcap: float | None) -> None:
    """What must not become NaN in a first gradient must not in a second one, nor in a tangent."""
    x, target, options = _small("indices")
    if kind == "masks":
        mask = torch.rand(x.shape, generator=_generator(5)) < 0.4
        x[mask.scatter(1, target.clamp(min=0).unsqueeze(1), False)] = -torch.inf
    else:
        ignored = target == -100
        x[ignored] = torch.nan
        options = {name: torch.where(ignored, torch.nan, t) for name, t in options.items()}
    if scalar:
        options |= {"logit_scale": torch.tensor(1.5).double(), "temperature": torch.tensor(0.75).double()}

    def derivatives(loss: Loss, wanted: tuple[str, ...]) -> Any:
        def f(x: Tensor, *factors: Tensor) -> Tensor:
            chosen = {**options, **dict(zip(wanted, factors, strict=True))}
            return loss(x, target, softcap=softcap, z_loss=0.125, **chosen)

        inputs = (x, *(options[name] for name in wanted))
        tangents = tuple(torch.linspace(-1, 2, t.numel()).double().reshape(t.shape) for t in inputs)
        if derivative == "tangent":
            return torch.func.jvp(f, inputs, tangents)
        if derivative == "tangent of the first":
            return torch.func.jvp(torch.func.grad(f), inputs, tangents)
        leaves = [t.clone().requires_grad_() for t in inputs]
        first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
        return first if derivative == "first" else torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    wrong = []
    for wanted in ((), *((name,) for name in options), ("logit_scale", "temperature"), ROW_OPTIONS):
        found, want = derivatives(cross_entropy, wanted), derivatives(_reference, wanted)
        if not all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(found, want, strict=True)):
            wrong.append(wanted)
    assert not wrong


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_nested_gradients(name: str, softcap: float | None) -> None:
    """The gradient, in an option, of the gradient of the logits: a step of training, differentiated."""
    x, target, options = _small("indices")
    options["divisor"] = torch.tensor(3.5).double()
    direction = torch.randn(x.shape, generator=_generator(3), dtype=torch.float64)
    shapes = [options[name]]
    if name in ("logit_scale", "temperature"):
        shapes.append(torch.tensor(1.5).double())
    for option in shapes:

        def nested(loss: Loss, option: Tensor = option) -> Any:
            def f(x: Tensor, o: Tensor) -> Tensor:
                return loss(x, target, softcap=softcap, z_loss=0.125, **{**options, name: o})

            def step(o: Tensor) -> Tensor:
                return f(x - 0.5 * torch.func.grad(f)(x, o), options[name] if o.dim() else o.detach())

            def product(o: Tensor) -> Tensor:
                return (torch.func.grad(f)(x, o) * direction).sum()

            return (
                torch.func.grad(step)(option),
                torch.func.grad(product)(option),
                torch.func.jacrev(lambda o: torch.func.grad(f)(x, o))(option),
                torch.func.grad(lambda o: torch.func.grad(product)(o).square().sum())(option),
            )

        _both(nested)


@pytest.mark.parametrize(("kind", "module"), [("numbers", False), ("tensors per row", False), ("tensors 0-d", True)])
def test_compiled(kind: str, module: bool) -> None:
    x, target, weight = _problem("rows", torch.float64, "contiguous", "indices", True)
    options = OPTIONS[kind](x)
    results = []
    in_constructor = {n: v for n, v in options.items() if not isinstance(v, Tensor)}
    criterion = nllx.CrossEntropyLoss(weight, **in_constructor)

    def ours(x: Tensor, **tensors: Tensor) -> Tensor:
        if module:
            return criterion(x * 2, target, **tensors)
        return cross_entropy(x * 2, target, weight, **in_constructor, **tensors)

    def theirs(x: Tensor, **tensors: Tensor) -> Tensor:
        return _reference(x * 2, target, weight, **in_constructor, **tensors)

    torch._dynamo.reset()
    for f in (torch.compile(ours, backend="aot_eager", fullgraph=True), theirs):
        leaf, given, leaves = _leaves(x, options, TRANSFORMED)
        loss = f(leaf, **{n: v for n, v in given.items() if isinstance(v, Tensor)})
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert_close(*results, rtol=1e-10, atol=1e-12)


def test_compiled_with_numbers_that_change() -> None:
    """A schedule of temperatures and scales, and a divisor counted in each step."""
    x, target, _ = _problem("rows", torch.float64, "contiguous", "indices", False)
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def f(x: Tensor, **numbers: float) -> Tensor:
        return cross_entropy(x, target, **numbers)

    for i in range(3):
        numbers = {
            "logit_scale": 1.5 + i,
            "temperature": 0.5 + i,
            "softcap": 4.0 + i,
            "z_loss": 0.1 * i,
            "divisor": 7 + i,
        }
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        found, want = f(leaves[0], **numbers), _reference(leaves[1], target, **numbers)
        assert_close(found, want)
        assert_close(torch.autograd.grad(found, leaves[0]), torch.autograd.grad(want, leaves[1]))


@pytest.mark.parametrize("kind", ["numbers", "scalars", "rows"])
@pytest.mark.parametrize("target_kind", ["indices", "probabilities"])
def test_opcheck(target_kind: str, kind: str) -> None:
    """Arguments by the names that the schema has."""
    x, target, rows = _small(target_kind)
    scalars = {"logit_scale": torch.tensor(1.5).double(), "temperature": torch.tensor(0.75).double()}
    options: dict[str, Any] = {"numbers": {}, "scalars": scalars, "rows": rows}[kind]
    options = {**options, "weight": torch.ones(5, dtype=torch.float64), "softcap": 4.0, "z_loss": 0.125, "scale": 1.5}
    if kind == "rows":
        options["divisor"] = torch.tensor(3.5).double()
    options["label_smoothing"] = 0.1
    operator = torch.ops.nllx.cross_entropy_forward.default
    names = [argument.name for argument in operator._schema.arguments]
    assert names[:2] == ["logits", "target"]
    assert {*options} <= {*names}
    if "logit_scale" in options:
        options["logit_scale"].requires_grad_()
    results = torch.library.opcheck(operator, (x.requires_grad_(), target), options)
    assert {*results.values()} == {"SUCCESS"}
    assert len(results) >= 4


# ---- threads ----


@pytest.mark.parametrize("size", [(70_003, 3), (300, 2000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype, size: tuple[int, int]) -> None:
    generator = _generator(1)
    x = torch.randn(size, generator=generator).to(dtype)
    target = torch.randint(size[1], (size[0],), generator=generator)
    target[::7] = -100
    u = torch.rand(size[0], generator=generator) + 0.5
    scales = torch.tensor(1.5), torch.rand(size[0], generator=generator) + 0.5
    before = torch.get_num_threads()
    results: list[list[Tensor]] = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            tensors: list[Tensor] = []
            for scale in scales:
                for softcap in (None, 5.0):
                    leaves = x.clone().requires_grad_(), scale.clone().requires_grad_()
                    options = {"logit_scale": leaves[1], "softcap": softcap, "z_loss": 0.125, "sample_weight": u}
                    loss = cross_entropy(leaves[0], target, **options)
                    tensors += [loss, *torch.autograd.grad(loss, leaves)]
                    # The scale alone, whose gradient may come from other loops.
                    loss = cross_entropy(x, target, **options)
                    tensors += torch.autograd.grad(loss, leaves[1])
            results.append(tensors)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(t.isfinite().all() for t in results[0])


# ---- softmax_statistics ----


@pytest.mark.parametrize("kind", [k for k in OPTIONS if k.startswith(("scale", "softcap", "temperature", "negative"))])
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics(shape: str, kind: str) -> None:
    """Values, and gradients of the logits, the scale and the temperature, with and without a target."""
    start = list(OPTIONS).index(kind) + list(SHAPES).index(shape)
    for i, softcap in enumerate((None, 6.0)):
        dtype, layout = DTYPES[(start + i) % 4], list(LAYOUTS)[(start + i) % 3]
        x, target, _ = _problem(shape, dtype, layout, "indices", False)
        options = {"softcap": softcap, **OPTIONS[kind](x)}
        dim = _class_dim(x)
        for given, names in ((target, ("logit_scale",)), (None, ("logit_scale", "temperature"))):
            where = f"{dtype} {layout} {softcap} {names}"
            ours, our_options, our_leaves = _leaves(x, options, names)
            theirs, their_options, their_leaves = _leaves(x, options, names)
            found = softmax_statistics(ours, given, dim=dim, **our_options)
            want = _reference_statistics(theirs, given, dim, **their_options)
            totals = []
            eps = _arithmetic(dtype)
            for name, a, b in zip(found._fields, found, want, strict=True):
                if b is None:
                    assert a is None
                elif name == "prediction":
                    assert a.dtype == torch.int64
                    # Half-precision logits tie, and float32 rounds more of them together: the z of both is the largest.
                    z = _transformed(
                        x.movedim(dim, -1),
                        options.get("logit_scale", 1.0),
                        options["softcap"],
                        options.get("temperature", 1.0),
                        None,
                    )
                    kept = b >= 0
                    assert torch.equal(a >= 0, kept), where
                    chosen = z.gather(-1, a.clamp(min=0).unsqueeze(-1)).squeeze(-1)
                    assert_close(chosen[kept], z.amax(-1)[kept], rtol=4 * eps, atol=4 * eps)
                else:
                    assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                    assert_close(
                        a.detach().double(),
                        b.detach(),
                        rtol=32 * eps,
                        atol=64 * eps,
                        msg=lambda m, w=where, n=name: f"{n} {w}: {m}",
                    )
                    upstream = _upstream(b) + 0.25 * len(totals)
                    totals.append(((a.double() * upstream).sum(), (b * upstream).sum()))
            grads = torch.autograd.grad(sum(a for a, _ in totals), our_leaves)
            wants = torch.autograd.grad(sum(b for _, b in totals), their_leaves)
            _check_gradients(grads, wants, our_leaves, where, _noise(x, wants[0]))


def test_prediction_is_of_z() -> None:
    """The first class of the largest z, which is not the largest logit where z has another order or ties."""
    x = torch.tensor([[1.0, 3.0, -2.0, 3.0, -2.0], [0.0, 5e3, 2e4, 1e4, 2e4]])
    expected = {
        "plain": ({}, [1, 2]),
        "negative": ({"logit_scale": -1.0}, [2, 0]),
        "per row": ({"logit_scale": torch.tensor([-1.0, 1.0])}, [2, 2]),
        "zero": ({"logit_scale": torch.tensor(0.0)}, [0, 0]),
        "temperature": ({"temperature": torch.tensor([0.5, 2.0])}, [1, 2]),
        # tanh is 1 from class 1 on.
        "softcap": ({"softcap": 1e-2}, [0, 1]),
    }
    for planes in (False, True):
        for name, (options, want) in expected.items():
            logits = x.t().contiguous() if planes else x
            found = softmax_statistics(logits, dim=0 if planes else 1, **options).prediction
            assert found.tolist() == want, (name, planes)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scalar", [False, True], ids=["per row", "0-d"])
def test_statistics_of_higher_order(scalar: bool, softcap: float | None) -> None:
    x, target, options = _small("indices", (3,), 3)
    del options["sample_weight"]
    if scalar:
        options |= {"logit_scale": torch.tensor(1.5).double(), "temperature": torch.tensor(0.75).double()}

    def f(x: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return tuple(softmax_statistics(x, target, dim=1, logit_scale=s, softcap=softcap, temperature=t)[:3])

    for count in (2, 3):
        inputs = [t.detach().clone().requires_grad_(i < count) for i, t in enumerate((x, *options.values()))]
        assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_statistics_of_masks_and_ignored_rows(bad: float, softcap: float | None) -> None:
    for shape in ("three classes", "many rows", "segments", "images"):
        x, target, _ = _problem(shape, torch.float64, "contiguous", "indices", False)
        ignored = target == -100
        mask = torch.rand(x.shape, generator=_generator(5)) < 0.3
        mask.scatter_(1, torch.where(ignored, 0, target).unsqueeze(1), False)
        x[mask] = -torch.inf
        x.movedim(1, -1)[ignored] = bad
        rows = torch.where(ignored, bad, _factors(x, 1))
        for scale in (rows, _scalar(1.25, x)):
            options = {"logit_scale": scale, "softcap": softcap, "temperature": rows}
            results = []
            for function in (softmax_statistics, _reference_statistics):
                leaf, given, leaves = _leaves(x, options, ("logit_scale",))
                found = function(leaf, target, dim=1, **given)
                grads = torch.autograd.grad(sum(t.sum() for t in found[:3]), leaves, create_graph=True)
                # Second derivatives, of which the forward mode of the backward is made too.
                seconds = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
                results.append([*found, *grads, *seconds])
            for a, b in zip(*results, strict=True):
                assert_close(a, b, rtol=1e-10, atol=1e-10)
            assert (results[0][4].movedim(1, -1)[ignored] == 0).all()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scalar", [False, True], ids=["per row", "0-d"])
def test_vmap_of_statistics(scalar: bool, softcap: float | None) -> None:
    x, target, options = _small("indices")
    scale = torch.tensor(1.5).double() if scalar else options["logit_scale"]
    scales, temperatures = torch.stack([scale, scale * 2]), torch.tensor([0.75, 1.5]).double()
    batch = torch.stack([x, x.flip(1)])

    def f(function: Any) -> Callable[..., Any]:
        return lambda x, s, t: tuple(function(x, target, dim=1, logit_scale=s, softcap=softcap, temperature=t)[:3])

    def g(function: Any) -> Callable[..., Any]:
        return torch.func.grad(lambda *inputs: sum(t.square().sum() for t in f(function)(*inputs)), (0, 1, 2))

    for h in (f, g):
        want = _stacked(h(_reference_statistics), batch, scales, temperatures)
        assert_close(torch.vmap(h(softmax_statistics))(batch, scales, temperatures), want)
        want = _stacked(h(_reference_statistics), [x, x], scales, temperatures)
        assert_close(torch.vmap(h(softmax_statistics), (None, 0, 0))(x, scales, temperatures), want)


# ---- errors ----

_ERRORS = (ValueError, RuntimeError, TypeError)
# Options, the exception (any of those where the documentation leaves it open) and the name that the sentence has.
_BAD: dict[str, tuple[dict[str, Any], Any, str]] = {
    **{f"softcap {v}": ({"softcap": v}, ValueError, "softcap") for v in (-1.0, 0.0, 0, torch.nan, -torch.inf)},
    **{f"temperature {v}": ({"temperature": v}, ValueError, "temperature") for v in (-1.0, 0.0, 0, torch.nan)},
    **{f"logit_scale {v}": ({"logit_scale": v}, ValueError, "logit_scale") for v in (torch.nan, torch.inf, -torch.inf)},
    **{f"divisor {v}": ({"divisor": v}, ValueError, "divisor") for v in (-1.0, -3, torch.nan)},
    **{
        f"{name} of shape {tuple(size)}": ({name: torch.ones(size)}, ValueError, name)
        for name in ROW_OPTIONS
        for size in ((3,), (1,), (4, 1), (1, 4), (4, 10), (10,), (0,))
    },
    "sample_weight of no dimension": ({"sample_weight": torch.tensor(2.0)}, ValueError, "sample_weight"),
    "divisor of one element": ({"divisor": torch.ones(1)}, ValueError, "divisor"),
    "divisor per row": ({"divisor": torch.ones(4)}, ValueError, "divisor"),
    "divisor of a sum": ({"divisor": 2.0, "reduction": "sum"}, ValueError, "divisor"),
    "divisor of rows": ({"divisor": torch.tensor(2.0), "reduction": "none"}, ValueError, "divisor"),
    "bool scale": ({"logit_scale": torch.tensor(True)}, _ERRORS, "logit_scale"),
    "bool scales": ({"logit_scale": torch.ones(4, dtype=torch.bool)}, _ERRORS, "logit_scale"),
    "complex scale": ({"logit_scale": torch.tensor(1j)}, _ERRORS, "logit_scale"),
    "complex number": ({"logit_scale": 1j}, _ERRORS, "logit_scale"),
    "text": ({"logit_scale": "2"}, TypeError, "logit_scale"),
    "no scale": ({"logit_scale": None}, TypeError, "logit_scale"),
    "weights in a list": ({"sample_weight": [1.0, 1.0, 1.0, 1.0]}, TypeError, "sample_weight"),
    "a weight": ({"sample_weight": 2.0}, TypeError, "sample_weight"),
    "text as z_loss": ({"z_loss": "1"}, TypeError, "z_loss"),
    "text as divisor": ({"divisor": "1"}, TypeError, "divisor"),
    "text as softcap": ({"softcap": "1"}, TypeError, "softcap"),
    "text as temperature": ({"temperature": "1"}, TypeError, "temperature"),
}


@pytest.mark.parametrize("bad", _BAD)
def test_errors(bad: str) -> None:
    """From each entrance, also without data; one sentence, which names the option."""
    options, kind, name = _BAD[bad]
    x, target = torch.randn(4, 10), torch.tensor([0, 1, 2, 3])
    calls: list[Callable[[], Any]] = [
        lambda: cross_entropy(x, target, **options),
        lambda: cross_entropy(x, torch.rand(4, 10), **options),
        lambda: cross_entropy(x.clone().requires_grad_(), target, **options),
        lambda: cross_entropy(
            x.to("meta"),
            target.to("meta"),
            **{n: v.to("meta") if isinstance(v, Tensor) else v for n, v in options.items()},
        ),
    ]
    if options.get("reduction") != "none":
        calls.append(lambda: cross_entropy_value_and_grad(x, target, **options))
    if name in ("logit_scale", "softcap", "temperature"):
        calls.append(lambda: softmax_statistics(x, target, **options))
        calls.append(lambda: softmax_statistics(x, **options))
    for call in calls:
        with pytest.raises(kind, match=name) as raised:
            call()
        assert " " in str(raised.value)
    if name != "sample_weight" and "reduction" not in options and options[name] is not None:
        with pytest.raises(_ERRORS, match=name):
            nllx.CrossEntropyLoss(**options)(x, target)


def test_shapes_of_rows_in_images() -> None:
    """One number per pixel; not per image, nor in another order, which would broadcast."""
    x, target, _ = _problem("images", torch.float32, "contiguous", "indices", False)
    rows = _rows(x)
    for name in ROW_OPTIONS:
        for size in (rows[:1], [rows[0], 1, 1], rows[::-1], [1, *rows[1:]], rows[1:], [int(torch.tensor(rows).prod())]):
            with pytest.raises(ValueError, match=name):
                cross_entropy(x, target, **{name: torch.ones(size)})


def test_the_options_are_keywords() -> None:
    x, target = torch.randn(4, 10), torch.tensor([0, 1, 2, 3])
    with pytest.raises(TypeError):
        cross_entropy(x, target, None, None, -100, None, "mean", 0.0, 2.0)
    with pytest.raises(TypeError):
        nllx.CrossEntropyLoss(None, None, -100, None, "mean", 0.0, 2.0)
    with pytest.raises(TypeError):
        nllx.CrossEntropyLoss()(x, target, torch.ones(4))


# ---- ends of the range, bits, and the rest of nllx beside the options ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 40, 3000, 17000])
def test_masks_of_finite_numbers(classes: int, dtype: torch.dtype) -> None:
    """A row of the lowest number has the softmax 1 / C, and one of such masks and other logits that of the others, whatever the
    factors round to."""
    for options in ({"temperature": 1.5}, {"logit_scale": 0.7}, {"logit_scale": torch.tensor(0.7), "z_loss": 0.0}):
        low = torch.full((2, classes), torch.finfo(dtype).min, dtype=dtype)
        low[1, 1:4] = 0
        target = torch.tensor([classes - 1, 2])
        x = low.requires_grad_()
        losses = cross_entropy(x, target, reduction="none", **options)
        assert_close(losses.double(), torch.tensor([classes, 3.0]).double().log(), rtol=torch.finfo(dtype).eps, atol=0)
        (grad,) = torch.autograd.grad(losses.sum(), x)
        assert grad.isfinite().all()


@pytest.mark.parametrize("size", [31, 257, 1003, 17001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_a_rows_scale_is_that_of_the_row_alone(size: int, dtype: torch.dtype) -> None:
    """Bit for bit: where the gradient lies, and whether it goes past the caches, does not matter."""
    rows = 2 + (32 << 20) // (size * dtype.itemsize)
    x, y = torch.randn(rows, size).to(dtype), torch.arange(rows) % size
    for function in (
        lambda n, s: cross_entropy(x[:n], y[:n], logit_scale=s, reduction="sum"),
        lambda n, s: softmax_statistics(x[:n], y[:n], logit_scale=s, outputs=["log_prob"]).log_prob.sum(),
    ):
        found = []
        for n in (rows, 65):
            scale = torch.full((n,), 1.25, requires_grad=True)
            found.append(torch.autograd.grad(function(n, scale), scale)[0][:65])
        assert torch.equal(*found)


@pytest.mark.parametrize("shape", [(64, 10), (64, 50), (64, 2000), (2, 5, 40)])
def test_a_row_that_one_class_dominates(shape: tuple[int, ...]) -> None:
    """Its loss is 0 then, and no less, as that of logits that are scaled before."""
    x = torch.randn(shape) * 2
    target = torch.zeros([shape[0], *shape[2:]], dtype=torch.int64)
    x[:, 0] += 60
    for options in ({"temperature": 0.7}, {"logit_scale": 20.3}):
        leaf = x.clone().requires_grad_()
        losses = cross_entropy(leaf, target, reduction="none", **options)
        assert (losses >= 0).all()
        factor = options.get("logit_scale", 1.0) / options.get("temperature", 1.0)
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
        exact = (x.double() * factor).softmax(1)[:, 1:].sum(1)
        assert_close(losses.double(), exact, rtol=1e-4, atol=1e-12)
        assert (grad.double()[:, 0].abs() <= 1e-9).all()


def test_gradients_of_what_a_softcap_holds() -> None:
    """1 - tanh² has no digits left there."""
    x = torch.tensor([[0.0, 3.0, 4.0, 6.0, 8.0, -6.0, 0.4, 0.6, 12.0]]).repeat(1, 8)
    for layout in (x, x.T.contiguous().T, x.unsqueeze(2)):
        leaf = layout.clone().requires_grad_()
        target = torch.zeros([1, *layout.shape[2:]], dtype=torch.int64)
        cross_entropy(leaf, target, softcap=1.0).backward()
        wide = layout.double().requires_grad_()
        torch.nn.functional.cross_entropy(torch.tanh(wide), target).backward()
        assert_close(leaf.grad.double(), wide.grad, rtol=2e-5, atol=1e-30)


def test_one_divisor_of_both_ways() -> None:
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        x, weight, u = (torch.rand(size, generator=generator) for size in ((200, 8), (8,), (200,)))
        y = torch.randint(8, (200,), generator=generator)
        leaf = x.requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(leaf, y, weight, sample_weight=u), leaf)
        assert torch.equal(grad, cross_entropy_value_and_grad(x, y, weight, sample_weight=u)[1])


def test_modules_that_own_the_name_of_an_option_are_not_converted() -> None:
    """torch's forward does not look at it, and nllx's would."""
    x, y = torch.randn(6, 5), torch.arange(6) % 5
    for value in (2.0, torch.nn.Parameter(torch.tensor(3.0))):
        module = torch.nn.CrossEntropyLoss()
        module.temperature = value
        before = module(x, y)
        nllx.convert(module, verbose=False)
        assert type(module) is torch.nn.CrossEntropyLoss
        assert_close(module(x, y), before)
    plain = nllx.revert(nllx.CrossEntropyLoss(), verbose=False)
    assert type(plain) is torch.nn.CrossEntropyLoss
    with pytest.raises(ValueError, match="softcap"):
        nllx.revert(nllx.CrossEntropyLoss(softcap=30.0))


def test_a_divisor_of_a_size_that_changes() -> None:
    class Loss(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(x, y, divisor=2 * x.shape[0])

    n = torch.export.Dim("n")
    exported = torch.export.export(
        Loss(), (torch.randn(6, 5), torch.arange(6) % 5), dynamic_shapes=({0: n}, {0: n})
    ).module()
    x, y = torch.randn(9, 5), torch.arange(9) % 5
    assert_close(exported(x, y), torch.nn.functional.cross_entropy(x, y) / 2)


def test_half_sample_weights_of_one_row() -> None:
    """Two large gradients of it cancel, before they are rounded to its dtype."""
    u = torch.tensor([2e-7], dtype=torch.float16, requires_grad=True)
    x = torch.tensor([[4.0, 0.0, -3.0]], dtype=torch.float16)
    (grad,) = torch.autograd.grad(cross_entropy(x, x.softmax(1).flip(1), sample_weight=u), u)
    assert grad.abs() < 1


def test_set_debug_says_nothing_of_mapped_logits() -> None:
    with warnings.catch_warnings(), nllx.set_debug(True):
        warnings.simplefilter("error")
        cross_entropy(torch.tensor([[torch.inf, 0.0]]), torch.tensor([1]), softcap=30.0)
        cross_entropy(torch.randn(2, 3).log_softmax(1), torch.tensor([1, 2]), temperature=2.0)
        assert cross_entropy(torch.randn(2, 3), torch.tensor([-100, -100]), divisor=5) == 0


def test_numbers_beyond_the_type_of_the_arithmetic() -> None:
    x, y = torch.randn(2, 3), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="float32"):
        cross_entropy(x, y, softcap=1e39)
    wide = cross_entropy(x.double(), y, softcap=1e39)
    assert_close(wide, torch.nn.functional.cross_entropy(x.double(), y))


@pytest.mark.parametrize("threads", [1, 2])
def test_scale_and_temperature_that_both_learn(threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(3000, 70, generator=generator), torch.randint(70, (3000,), generator=generator)
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, threads):
            torch.set_num_threads(count)
            s, t = torch.tensor(1.7, requires_grad=True), torch.tensor(0.7, requires_grad=True)
            found.append(torch.autograd.grad(cross_entropy(x, y, logit_scale=s, temperature=t), (s, t)))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    finally:
        torch.set_num_threads(before)
    wide = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.7, 0.7)]
    exact = torch.nn.functional.cross_entropy(x.double() * wide[0] / wide[1], y)
    assert_close([g.double() for g in found[1]], list(torch.autograd.grad(exact, wide)), rtol=1e-5, atol=1e-7)

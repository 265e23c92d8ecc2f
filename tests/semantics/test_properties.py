"""Generated problems against torch: values, gradients and errors.

``HYPOTHESIS_PROFILE=search`` looks for new counterexamples for as long as it takes; without it the same few are run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from cases import LAYOUTS, REDUCTIONS, Case, Problem, build
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import answer, check_gradients, check_output
from torch import Tensor
from torch.testing import assert_close
from transforms import numbers

import nllx

F = torch.nn.functional


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any row that the table could have, small."""
    op = draw(st.sampled_from(["cross_entropy", "cross_entropy", "nll_loss", "log_softmax"]))
    batched = draw(st.booleans()) or op == "log_softmax"
    classes = draw(st.one_of(st.integers(1, 40), st.integers(1, 700)))
    inner = draw(st.lists(st.integers(0, 6), max_size=3)) if batched else []
    shape = (draw(st.integers(0, 9)), classes, *inner) if batched else (classes,)
    layouts = [name for name in LAYOUTS if _allowed(name, shape)]
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    # Not beside a divisor of zero, over which what is not NaN is infinite, term by term.
    row_options = op == "cross_entropy" and draw(st.integers(0, 2)) == 0
    probabilities = op == "cross_entropy" and draw(st.booleans())
    integers = [torch.int64, torch.int32, torch.int16, torch.uint8]
    target_dtype = None if probabilities else draw(st.sampled_from(integers))
    ignorable = [0, 1, 255] if target_dtype == torch.uint8 else [-100, -1, 0, 1, 255]
    return Case(
        name=f"generated_{draw(st.integers(0, 2**30))}",
        why="generated",
        shape=shape,
        op=op,
        dtype=dtype,
        layout=draw(st.sampled_from(layouts)),
        target=draw(st.sampled_from(["probabilities", "one_hot"])) if probabilities else "index",
        target_dtype=target_dtype,
        target_layout=draw(st.sampled_from(layouts)) if probabilities else "contiguous",
        weight=draw(st.sampled_from(["", "positive", *([] if row_options else ["some_zero"])])),
        ignore_index=-1 if probabilities else draw(st.sampled_from(ignorable)),
        ignored="" if probabilities else draw(st.sampled_from(["", "some", "all"])),
        label_smoothing=draw(st.sampled_from([0.0, 0.0, 0.1, 0.9, 1.0])) if op == "cross_entropy" else 0.0,
        reduction=draw(st.sampled_from(REDUCTIONS)),
        row_options=row_options,
        scale=draw(st.sampled_from([0.01, 1.0, 5.0, 50.0])),
        offset=draw(st.sampled_from([0.0, 0.0, -20.0, 300.0])),
        dim=draw(st.integers(-len(shape), len(shape) - 1)) if op == "log_softmax" else 1,
    )


def _allowed(layout: str, shape: tuple[int, ...]) -> bool:
    ranks = {"class_slice": 2, "expanded_classes": 2, "neither": 3, "expanded_inner": 3}
    ranks |= {"channels_last": 2, "channels_last_padded": 2}
    return len(shape) >= ranks.get(layout, 1)


@given(cases())
def test_generated_problem(case: Case) -> None:
    for input_only in (True, False):
        result = answer(build(case), nllx.functional, input_only=input_only)
        check_output(case, result.output)
        check_gradients(case, result.grads)


def _second_order(problem: Problem, functional: Any, plain: bool) -> list[Tensor]:
    """Derivatives of a function of output and gradients that is linear in neither. `plain`: of contiguous tensors."""
    case = problem.case
    leaves = [leaf.contiguous() if plain else leaf for leaf in problem.differentiable]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    target = problem.target
    if plain and target is not None and not target.is_floating_point():
        target = target.long()
    rest = (target, problem.weight)[len(leaves) - 1 :]
    output = Problem(case, *leaves, *rest).call(functional)
    if not output.numel():
        return []
    first = torch.autograd.grad(output.square().sum() + output.sum(), leaves, create_graph=True)
    total = sum((g.square().sum() + (g * numbers(g)).sum() for g in first), output.new_zeros([]))
    return list(torch.autograd.grad(total, leaves))


@given(cases())
def test_generated_second_order(case: Case) -> None:
    """In float64, against torch's loss of contiguous tensors: of others its nll_loss has no gradient."""
    problem = build(dataclasses.replace(case, dtype=torch.float64, scale=min(case.scale, 5.0), offset=0.0))
    expected = _second_order(problem, F, plain=True)
    for got, want in zip(_second_order(problem, nllx.functional, plain=False), expected, strict=True):
        largest = want.nan_to_num().abs().max().item() if want.numel() else 0.0
        assert_close(got, want, rtol=1e-8, atol=1e-10 * (1 + largest), equal_nan=True)


@given(cases(), st.integers(1, 4), st.integers(-3, 2), st.booleans(), st.booleans())
def test_generated_samples(case: Case, size: int, dim: int, mapped_target: bool, mapped_weight: bool) -> None:
    """``vmap`` and per-sample gradients against torch's loss of each sample."""
    case = dataclasses.replace(case, dtype=torch.float64, scale=min(case.scale, 5.0), offset=0.0)
    if not case.has_probabilities:
        case = dataclasses.replace(case, target_dtype=torch.int64)
    problems = [build(dataclasses.replace(case, name=f"{case.name} {i}")) for i in range(size)]
    columns = [[getattr(p, name) for p in problems] for name in ("input", "target", "weight")]
    batched: list[Any] = []
    in_dims: list[int | None] = []
    for column, mapped in zip(columns, (True, mapped_target, mapped_weight), strict=True):
        if column[0] is None or not mapped:
            column[:] = [column[0]] * size
            batched.append(column[0])
            in_dims.append(None)
        else:
            in_dims.append(max(-column[0].dim() - 1, min(dim, column[0].dim())))
            batched.append(torch.stack(column, in_dims[-1]))

    def value(x: Tensor, target: Tensor, weight: Tensor, functional: Any) -> tuple[Tensor, Tensor]:
        output = Problem(case, x, target, weight).call(functional)
        return (output * numbers(output)).sum() + output.square().sum(), output

    def gradient(*tensors: Any) -> Any:
        return torch.func.grad(functools.partial(value, functional=nllx.functional), has_aux=True)(*tensors)

    grads, outputs = torch.vmap(gradient, tuple(in_dims))(*batched)
    for i in range(size):
        x = columns[0][i].detach().contiguous().requires_grad_()
        total, output = value(x, columns[1][i], columns[2][i], F)
        assert_close(outputs[i], output, rtol=1e-9, atol=1e-11, equal_nan=True)
        assert_close(grads[i], torch.autograd.grad(total, x)[0], rtol=1e-8, atol=1e-10, equal_nan=True)


_logits = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**99), max_value=2.0**99)
_special = st.one_of(_logits, st.sampled_from([0.0, -math.inf, math.inf, math.nan, -3.4e38, 3.4e38, 1e-40]))


@st.composite
def rows(draw: st.DrawFn, element: st.SearchStrategy[float]) -> tuple[Tensor, Tensor]:
    count, classes = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    values = draw(st.lists(element, min_size=count * classes, max_size=count * classes))
    target = draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float32).view(count, classes), torch.tensor(target)


@given(rows(_logits))
def test_any_finite_logits(problem: tuple[Tensor, Tensor]) -> None:
    """Whatever their size, the loss is finite or as torch's, and the gradient of a row sums to zero."""
    x, target = problem
    x.requires_grad_()
    loss = nllx.functional.cross_entropy(x, target, reduction="none")
    expected = F.cross_entropy(x.double(), target, reduction="none")
    assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert_close(gradient.sum(1), torch.zeros(len(x)), rtol=0, atol=1e-6)
    assert_close(gradient.double(), torch.autograd.grad(expected.sum(), x)[0].double(), rtol=1e-5, atol=1e-6)


@given(rows(_special))
def test_infinities_and_nan_are_where_torch_has_them(problem: tuple[Tensor, Tensor]) -> None:
    x, target = problem
    for package in (nllx.functional, F):
        losses = package.cross_entropy(x, target, reduction="none")
        if package is nllx.functional:
            ours = losses
    assert torch.equal(ours.isnan(), losses.isnan())
    assert_close(ours, losses, equal_nan=True)
    assert_close(nllx.functional.log_softmax(x, 1), F.log_softmax(x, 1), equal_nan=True)


@given(rows(_logits), st.integers(-(2**63), 2**63 - 1), st.integers(0, 3), st.integers(-200, 200))
def test_any_target(problem: tuple[Tensor, Tensor], value: int, place: int, ignore_index: int) -> None:
    """A class, ignored, or an IndexError that names it: as torch decides."""
    x, target = problem
    place %= len(target)
    target[place] = value
    try:
        expected = F.cross_entropy(x, target, ignore_index=ignore_index, reduction="none")
    except IndexError:
        with pytest.raises(IndexError, match=rf"Target {value} is out of bounds\..*target\[{place}\]"):
            nllx.functional.cross_entropy(x, target, ignore_index=ignore_index, reduction="none")
    else:
        result = nllx.functional.cross_entropy(x, target, ignore_index=ignore_index, reduction="none")
        assert_close(result, expected, equal_nan=True)


_sizes = st.lists(st.integers(0, 3), max_size=4).map(tuple)


@settings(max_examples=max(300, settings.default.max_examples))
@given(_sizes, _sizes, st.sampled_from([torch.int64, torch.float32]), st.sampled_from(["cross_entropy", "nll_loss"]))
def test_any_shapes(input_shape: tuple[int, ...], target_shape: tuple[int, ...], dtype: torch.dtype, op: str) -> None:
    """The shape that torch returns, or the exception that torch raises."""
    x, target = torch.zeros(input_shape), torch.zeros(target_shape, dtype=dtype)
    try:
        expected = getattr(F, op)(x, target, reduction="none")
    except Exception as error:
        # Where a size is 0, torch's exception comes from its own slicing; where the dtype is wrong too, either will do.
        several = 0 in input_shape or dtype == torch.float32
        kinds = (IndexError, RuntimeError, ValueError) if several else type(error)
        with pytest.raises(kinds):
            getattr(nllx.functional, op)(x, target, reduction="none")
    else:
        assert_close(getattr(nllx.functional, op)(x, target, reduction="none"), expected)


_floating = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
_any_dtype = st.sampled_from(
    [torch.float32, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64]
)
_ARGUMENTS = (
    "input",
    "target",
    "dtype of target",
    "weight",
    "dtype of weight",
    "reduction",
    "ignore_index",
    "smoothing",
)
_CLASSES = 4


@dataclasses.dataclass(frozen=True)
class Call:
    op: str
    tensors: tuple[Tensor, Tensor, Tensor | None]
    options: dict[str, Any]
    mistaken: frozenset[str]

    def __call__(self, functional: Any) -> Tensor:
        return getattr(functional, self.op)(*self.tensors, **self.options)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """A loss with arguments of which up to two may be wrong."""
    op = draw(st.sampled_from(["cross_entropy", "nll_loss"]))
    mistaken = draw(st.frozensets(st.sampled_from(_ARGUMENTS), max_size=2))

    def choose(name: str, right: st.SearchStrategy[Any], wrong: st.SearchStrategy[Any]) -> Any:
        return draw(wrong if name in mistaken else right)

    shape = draw(st.sampled_from([(_CLASSES,), (3, _CLASSES), (3, _CLASSES, 2), (2, _CLASSES, 2, 3)]))
    rows = shape[:-1] if len(shape) == 1 else (shape[0], *shape[2:])
    x = (3 * numbers(torch.zeros(shape))).to(choose("input", _floating, _any_dtype))
    if op == "nll_loss" or draw(st.integers(0, 2)):
        size = choose(
            "target", st.just(rows), st.sampled_from([rows[1:], (*rows, 1), (*rows[:-1], 5), (1, *rows), shape])
        )
        values = draw(st.lists(st.integers(0, _CLASSES - 1), min_size=math.prod(size), max_size=math.prod(size)))
        target = torch.tensor(values, dtype=torch.int64).view(size)
        target = target.to(choose("dtype of target", st.just(torch.int64), _any_dtype))
    else:
        size = choose(
            "target", st.just(shape), st.sampled_from([shape[1:], (*shape, 1), (5, *shape[1:]), (*shape[:-1], 7)])
        )
        target = numbers(torch.zeros(size)).to(choose("dtype of target", st.just(x.dtype), _any_dtype))
    size = choose(
        "weight", st.sampled_from([None, (_CLASSES,)]), st.sampled_from([(3,), (1,), (), (_CLASSES, 1), (0,)])
    )
    weight = None
    if size is not None:
        weight = numbers(torch.zeros(size)).to(choose("dtype of weight", st.just(x.dtype), _any_dtype))
    options = {
        "reduction": choose("reduction", st.sampled_from(REDUCTIONS), st.sampled_from(["MEAN", "", None, 1])),
        "ignore_index": choose("ignore_index", st.just(-100), st.sampled_from([0, -1, 1.0, True, "1", None, 2**63])),
    }
    if op == "cross_entropy":
        bad = st.sampled_from([1.5, -0.5, math.nan, "0.1", None])
        options["label_smoothing"] = choose("smoothing", st.sampled_from([0.0, 0.1, 1]), bad)
    return Call(op, (x, target, weight), options, mistaken)


def _refused(call: Call) -> bool:
    """Whether it is one of the calls of docs/differences.md that torch takes and nllx does not."""
    smoothing = call.options.get("label_smoothing")
    negative = isinstance(smoothing, float) and not smoothing >= 0
    return negative or any(t is not None and t.is_complex() for t in call.tensors)


def _taken(call: Call) -> bool:
    """Whether it is one of those that nllx takes and torch does not."""
    x, target, weight = call.tensors
    smoothed = bool(call.options.get("label_smoothing"))
    small = target.dtype in (torch.int32, torch.int16, torch.int8)
    small |= target.dtype == torch.uint8 and (x.dim() > 2 or smoothed)
    precise = weight is not None and weight.dtype in (torch.float32, torch.float64) and x.dtype.itemsize == 2
    # torch's own sums of a smoothed loss do not broadcast where its loss without smoothing takes such shapes.
    shapes = (x.dim() == 1 and target.shape == (1,)) or (x.dim() > 2 and weight is not None and weight.dim() != 1)
    return small or precise or (smoothed and shapes)


@settings(max_examples=max(500, settings.default.max_examples))
@given(calls())
def test_any_mistake(call: Call) -> None:
    """The value that torch returns, or an exception where torch raises one: of its type, if there is one mistake.

    Probabilities of another shape than the logits are two: they may be meant as class indices.
    """
    results: list[Any] = []
    for functional in (nllx.functional, F):
        try:
            results.append(call(functional))
        except Exception as error:
            results.append(error)
    ours, theirs = results
    if isinstance(theirs, Exception):
        if not (_taken(call) and isinstance(ours, Tensor)):
            one = len(call.mistaken) == 1 and not (call.mistaken == {"target"} and call.tensors[1].is_floating_point())
            assert isinstance(ours, type(theirs) if one else Exception), (theirs, ours)
    elif not (_refused(call) and isinstance(ours, (RuntimeError, NotImplementedError))):
        assert_close(ours, theirs, rtol=3e-2, atol=3e-2, equal_nan=True)

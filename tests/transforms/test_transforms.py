"""Every transform of every loss in every layout gives what torch's loss gives: the table of transforms.py, by value."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
from cases import Case
from oracle import Reference
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten
from transforms import TRANSFORMS, Subject, Transform

import nllx

_WHY = "a loss under a transform"
_INDEX: dict[str, Any] = {"ignored": "some", "weight": "positive", "label_smoothing": 0.2}
_PROBABILITIES: dict[str, Any] = {"target": "probabilities", "weight": "positive", "label_smoothing": 0.2}
# Name in docs/transforms.md, options, and whether it is differentiated with respect to the logits alone.
OPS: dict[str, tuple[dict[str, Any], bool]] = {
    "cross_entropy": ({**_INDEX}, True),
    "cross_entropy, probabilities": ({**_PROBABILITIES}, True),
    "cross_entropy, probabilities and weights": ({**_PROBABILITIES}, False),
    "cross_entropy, options": (
        {"row_options": True, "ignored": "some", "weight": "positive", "label_smoothing": 0.2},
        True,
    ),
    "nll_loss": ({"op": "nll_loss", "weight": "positive", "ignored": "some"}, True),
    "log_softmax": ({"op": "log_softmax"}, True),
    "mse_loss": ({"op": "mse_loss", "target": "any_numbers", "weight": "positive"}, False),
    "softmax_statistics": ({"op": "softmax_statistics", "ignored": "some"}, True),
}
_SHAPES: dict[str, dict[str, Any]] = {
    "rows_mean": {"shape": (3, 4)},
    "rows_none": {"shape": (3, 4), "reduction": "none"},
    "transposed_sum": {"shape": (3, 4), "layout": "transposed", "reduction": "sum"},
    "planes_mean": {"shape": (2, 3, 2)},
    "channels_last_none": {"shape": (2, 3, 2, 1), "layout": "channels_last", "reduction": "none"},
    "unbatched_mean": {"shape": (4,)},
}


def _case(op: str, shape: str) -> Case:
    fields = {**OPS[op][0], **_SHAPES[shape]}
    if len(fields["shape"]) == 1:
        fields.pop("ignored", None)
    if fields.get("op") == "log_softmax":
        fields.pop("reduction", None)
        fields["dim"] = len(fields["shape"]) - 1 if shape == "planes_mean" else min(1, len(fields["shape"]) - 1)
    return Case(f"{op} {shape}", _WHY, dtype=torch.float64, scale=1.0, **fields)


# Layouts and reductions change nothing of how options are transformed.
_PAIRS = [
    pytest.param(op, shape, id=f"{op.replace(', ', '_').replace(' ', '_')}-{shape}")
    for op in OPS
    for shape in _SHAPES
    if not OPS[op][0].get("row_options") or shape in ("rows_mean", "planes_mean")
]


@pytest.mark.parametrize(("op", "shape"), _PAIRS)
@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if not t.compiles], ids=str)
def test_transform(transform: Transform, op: str, shape: str, device: str, record_property: Any) -> None:
    _check(transform, op, shape, device, record_property)


@pytest.mark.parametrize("shape", ["rows_mean", pytest.param("planes_mean", marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.replace(", ", "_").replace(" ", "_"))
@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if t.compiles and not t.builds], ids=str)
def test_compiled_transform(transform: Transform, op: str, shape: str, device: str, record_property: Any) -> None:
    with torch._inductor.config.patch(force_disable_caches=True):
        _check(transform, op, shape, device, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.replace(", ", "_").replace(" ", "_"))
@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if t.builds], ids=str)
def test_built_transform(transform: Transform, op: str, device: str, record_property: Any) -> None:
    with torch._inductor.config.patch(force_disable_caches=True):
        _check(transform, op, "rows_mean", device, record_property)


def _check(transform: Transform, op: str, shape: str, device: str, record_property: Any) -> None:
    case, input_only = _case(op, shape), OPS[op][1]

    def run(functional: Any, **fields: Any) -> Any:
        torch.manual_seed(0)
        make = transform.run if functional is nllx.functional else transform.eager or transform.run
        return make(Subject(dataclasses.replace(case, **fields), functional, device, input_only))

    record_property("transform", transform.name)
    record_property("op", op)
    record_property("torch", str(torch.__version__))  # a subclass of str does not pass between processes
    record_property("place", (TRANSFORMS.index(transform), list(OPS).index(op), list(_SHAPES).index(shape)))
    expected, torch_raises = _attempt(lambda: run(torch.nn.functional))
    if torch_raises:  # at the layout, or the operation: held against the same numbers, or the definition
        expected, raises = _attempt(lambda: run(torch.nn.functional, layout="contiguous"))
        if raises:
            expected, raises = _attempt(lambda: run(Reference))
        if raises and transform.compiles:
            with torch.compiler.set_stance("force_eager"):
                expected, raises = _attempt(lambda: run(torch.nn.functional))
        if raises:  # torch's operations cannot do it either
            with pytest.raises(type(torch_raises)):
                run(nllx.functional)
            record_property("outcome", f"torch and nllx raise {_sentence(torch_raises)}")
            return
    _assert_close(run(nllx.functional), expected)
    record_property("outcome", f"ok; torch raises {_sentence(torch_raises)}" if torch_raises else "ok")


def _assert_close(actual: Any, expected: Any) -> None:
    """Equal trees of tensors, up to roundings."""
    (got, got_tree), (want, want_tree) = tree_flatten(actual), tree_flatten(expected)
    assert got_tree == want_tree
    for a, b in zip(got, want, strict=True):
        if not isinstance(b, Tensor):
            assert a == b
        elif b.dtype == torch.float64:
            assert_close(a, b, rtol=1e-9, atol=1e-11)
        elif b.dtype in (torch.bfloat16, torch.float16):  # torch rounds between its steps
            assert_close(a, b, rtol=2e-2, atol=2e-2)
        else:
            assert_close(a, b)


def _attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The result, or the exception."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def _sentence(error: Exception) -> str:
    """Type and message, without what the shape or the build decides."""
    message = str(error).splitlines()[0].split(". ")[0].split("; ")[0]
    message = re.sub(r"\[torch\.\w+ \[[\d, ]*\]\]", "a tensor", message)
    message = re.sub(r'"[^"]*/([^"/]+)":\d+', r"\1", message)
    return f"{type(error).__name__}: {message}"

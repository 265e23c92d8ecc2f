"""The mean over nothing: NaN as torch has it, 0 with a gradient of 0 where that is asked for, and else no difference."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from oracle import Reference
from torch import Tensor
from torch.testing import assert_close

import nllx

F = nllx.functional

# Rows that are all ignored, targets that weigh nothing, and empty inputs.
_IGNORED = torch.full((4,), -100)
NOTHING: dict[str, tuple[tuple[int, ...], Tensor, dict[str, Any]]] = {
    "rows": ((4, 5), _IGNORED, {}),
    "rows_smoothed": ((4, 5), _IGNORED, {"label_smoothing": 0.1, "weight": torch.rand(5)}),
    "many_rows": ((3000, 5), torch.full((3000,), 2), {"ignore_index": 2}),
    "long_rows": ((4, 70_000), _IGNORED, {}),
    "planes": ((4, 5, 3, 7), torch.full((4, 3, 7), -100), {}),
    "unbatched": ((5,), torch.tensor(3), {"ignore_index": 3}),
    "zero_weights": ((4, 5), torch.tensor([0, 1, 1, 0]), {"weight": torch.tensor([0.0, 0, 1, 2, 3])}),
    "zero_weights_smoothed": (
        (4, 5),
        torch.tensor([0, 1, 1, 0]),
        {"weight": torch.tensor([0.0, 0, 1, 2, 3]), "label_smoothing": 0.1},
    ),
    "no_rows": ((0, 5), torch.zeros(0, dtype=torch.int64), {}),
    "no_pixels": ((2, 5, 0), torch.zeros(2, 0, dtype=torch.int64), {}),
    "no_probabilities": ((0, 5), torch.zeros(0, 5), {}),
    "no_classes": ((3, 0), torch.zeros(3, 0), {}),
}


def _losses(options: dict[str, Any], target: Tensor) -> list[Any]:
    """The operators that take the options."""
    nll = not target.is_floating_point() and "label_smoothing" not in options
    return [F.cross_entropy, F.nll_loss] if nll else [F.cross_entropy]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NOTHING)
def test_mean_over_nothing(name: str, dtype: torch.dtype, device: str) -> None:
    shape, target, options = NOTHING[name]
    options = {k: v.to(device, dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    target = target.to(device, dtype if target.is_floating_point() else None)
    for loss in _losses(options, target):
        assert loss(x, target, **options).isnan()
        assert loss(x, target, **options, zero_division=math.nan).isnan()
        assert loss(x, target, **options, zero_division=float("nan")).isnan()
        value = loss(x, target, **options, zero_division=0)
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        assert (value == 0).all()
        assert value.dtype == dtype
        assert (grad == 0).all()
        assert (torch.autograd.grad(grad.square().sum(), x)[0] == 0).all()


@pytest.mark.parametrize("name", NOTHING)
def test_value_and_grad(name: str, device: str) -> None:
    shape, target, options = NOTHING[name]
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    x, target = torch.randn(shape, device=device), target.to(device)
    assert F.cross_entropy_value_and_grad(x, target, **options)[0].isnan()
    value, grad = F.cross_entropy_value_and_grad(x, target, **options, zero_division=0.0)
    assert (value == 0).all()
    assert (grad == 0).all()
    out = torch.full_like(x, 7)
    value, grad = F.cross_entropy_value_and_grad(x, target, **options, out=out, zero_division=0.0)
    assert (value == 0).all()
    assert (out == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_over_something_it_changes_nothing(reduction: str, smoothing: float, device: str) -> None:
    x = torch.randn(6, 5, device=device, requires_grad=True)
    target = torch.tensor([1, -100, 3, 0, -100, 4], device=device)
    weight = torch.rand(5, device=device)

    def both(**options: Any) -> list[Tensor]:
        value = F.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=smoothing, **options)
        likelihood = F.nll_loss(x, target, weight, reduction=reduction, **options)
        return [value, likelihood, *torch.autograd.grad((value + likelihood).sum(), x)]

    for got, expected in zip(both(zero_division=0), both(), strict=True):
        assert torch.equal(got, expected)


def test_a_row_that_holds_nan_is_still_ignored(device: str) -> None:
    x = torch.full((3, 4), math.nan, device=device, requires_grad=True)
    value = F.cross_entropy(x, torch.full((3,), -100, device=device), zero_division=0)
    value.backward()
    assert value == 0
    assert (x.grad == 0).all()


def test_under_transforms(device: str) -> None:
    """Some samples are nothing, others are not."""
    x = torch.randn(3, 2, 4, dtype=torch.float64, device=device)
    target = torch.tensor([[1, -100], [-100, -100], [0, 3]], device=device)

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(x, target, zero_division=0)

    each = [torch.func.grad_and_value(loss)(x[i], target[i]) for i in range(3)]
    grads, values = torch.vmap(torch.func.grad_and_value(loss))(x, target)
    assert values[1] == 0
    assert (grads[1] == 0).all()
    assert_close(values, torch.stack([value for _, value in each]))
    assert_close(grads, torch.stack([grad for grad, _ in each]))
    tangent = torch.func.jvp(lambda x: torch.vmap(loss)(x, target), (x,), (torch.ones_like(x),))[1]
    assert_close(tangent, torch.zeros_like(values), atol=1e-12, rtol=0)
    assert (torch.func.hessian(loss)(x[1], target[1]) == 0).all()


def test_compiled(device: str) -> None:
    target = torch.full((3,), -100, device=device)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(x, target, zero_division=0) + F.nll_loss(x, target, zero_division=0.0)

    x = torch.randn(3, 4, device=device, requires_grad=True)
    loss(x).backward()
    assert loss(x) == 0
    assert (x.grad == 0).all()


@pytest.mark.parametrize("module", [nllx.CrossEntropyLoss, nllx.NLLLoss])
def test_modules(module: Any) -> None:
    x = torch.randn(4, 5)
    assert module()(x, _IGNORED).isnan()
    zero = module(zero_division=0)
    for copied in (zero, copy.deepcopy(zero), pickle.loads(pickle.dumps(zero))):
        assert copied(x, _IGNORED) == 0
    old = module()
    del old.__dict__["zero_division"]  # pickled before there was the option
    assert old(x, _IGNORED).isnan()


@pytest.mark.parametrize("value", [1, -1.0, math.inf, "nan", None, torch.ones(2)])
def test_only_nan_or_zero(value: Any) -> None:
    for loss in (F.cross_entropy, F.nll_loss):
        with pytest.raises((ValueError, RuntimeError), match=r"zero_division|ambiguous"):
            loss(torch.randn(4, 5), _IGNORED, zero_division=value)
    with pytest.raises((ValueError, RuntimeError), match=r"zero_division|ambiguous"):
        F.cross_entropy_value_and_grad(torch.randn(4, 5), _IGNORED, zero_division=value)


def test_definition() -> None:
    """That of the derivatives of higher order."""
    from nllx import _operators

    x = torch.randn(4, 5)
    assert Reference.cross_entropy(x, _IGNORED).isnan()
    assert _operators.cross_entropy.forward(x, _IGNORED, reduction=3)[0] == 0
    assert _operators.nll_loss.forward(x, _IGNORED, reduction=3)[0] == 0

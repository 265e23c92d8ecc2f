"""What levels of torch.func meet that is no transform of its own: modes and mutation inside of them, duals, empty samples."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad
from torch.testing import assert_close

import nllx

F, N = torch.nn.functional, nllx.functional
_x = torch.arange(6.0, dtype=torch.float64).view(2, 3) / 3
_t = torch.tensor([0, 2])
_w = torch.tensor([[0.5, 1.0, 2.0], [3.0, 0.25, 1.5]], dtype=torch.float64)
_samples = torch.stack([_x, _x.flip(1) + 1])
_LOSSES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "cross_entropy": lambda functional, x: functional.cross_entropy(x, _t, label_smoothing=0.1),
    "probabilities": lambda functional, x: functional.cross_entropy(x, _x),
    "nll_loss": lambda functional, x: functional.nll_loss(x, _t),
    "log_softmax": lambda functional, x: functional.log_softmax(x, 1).square().sum(),
}
_losses = pytest.mark.parametrize("loss", _LOSSES.values(), ids=_LOSSES.keys())


def _same(make: Callable[[Any], Any]) -> None:
    assert_close(make(N), make(F), equal_nan=True)


@_losses
def test_no_grad_inside_of_grad(loss: Callable[[Any, Tensor], Tensor]) -> None:
    """It holds for the levels outside of its own too."""

    def make(functional: Any) -> Any:
        def inner(x: Tensor) -> Tensor:
            with torch.no_grad():
                scale = loss(functional, x)
            return scale * x.pow(2).sum()

        outer = func.grad(lambda x: func.grad(inner)(x).sum())
        x = _x.clone().requires_grad_()
        through = func.grad(inner)(x)
        plain = torch.autograd.grad(through.sum(), x)[0]
        return outer(_x), through.detach(), plain, torch.vmap(outer)(_samples)

    _same(make)


@_losses
def test_grad_inside_of_no_grad(loss: Callable[[Any, Tensor], Tensor]) -> None:
    def make(functional: Any) -> Any:
        with torch.no_grad():
            first = func.grad(lambda x: loss(functional, x))(_x)

            def inner(x: Tensor) -> Tensor:
                with torch.enable_grad():
                    return loss(functional, x) * x.sum()

            return first, func.grad(inner)(_x), func.grad(lambda x: func.grad(inner)(x).square().sum())(_x)

    _same(make)


@pytest.mark.parametrize("op", ["cross_entropy", "nll_loss"])
def test_forward_derivatives_of_samples_with_weights_of_their_own(op: str) -> None:
    def make(functional: Any) -> Any:
        def losses(x: Tensor) -> Tensor:
            return torch.vmap(lambda x, w: getattr(functional, op)(x, _t, w))(x, _w)

        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(losses(forward_ad.make_dual(_samples, _samples)))
        shared = func.jvp(lambda x: torch.vmap(lambda w: getattr(functional, op)(x, _t, w))(_w), (_x,), (_x,))
        return (
            func.jvp(losses, (_samples,), (_samples,)),
            func.jacfwd(losses)(_samples),
            func.hessian(lambda x: losses(x).square().sum())(_samples),
            (dual.primal, dual.tangent),
            shared,
        )

    _same(make)


@_losses
def test_duals_inside_of_grad(loss: Callable[[Any, Tensor], Tensor]) -> None:
    def make(functional: Any) -> Any:
        def tangent(x: Tensor) -> Tensor:
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(loss(functional, forward_ad.make_dual(x, _x))).tangent

        return func.grad(tangent)(_x), func.grad(lambda x: func.grad(tangent)(x).square().sum())(_x)

    _same(make)


def test_log_softmax_needs_its_output_alone() -> None:
    """Not the input, which may change and need not live: in levels of grad as in plain autograd."""

    def make(functional: Any) -> Any:
        def value(x: Tensor) -> Tensor:
            y = x * 1
            output = functional.log_softmax(y, 1)
            y.mul_(2)
            return output[0, 0] + y.sum()

        return func.grad(value)(_x), torch.vmap(func.grad(value))(_samples), func.hessian(value)(_x)

    _same(make)
    alive = []

    def output(x: Tensor) -> Tensor:
        y = x * 1
        alive.append(weakref.ref(y))
        return N.log_softmax(y, 1)

    _, pullback = func.vjp(output, _x)
    gc.collect()
    assert alive[0]() is None
    assert_close(pullback(_x), func.vjp(lambda x: F.log_softmax(x, 1), _x)[1](_x))


@pytest.mark.parametrize("op", ["cross_entropy", "nll_loss"])
def test_logits_that_change_before_the_pullback(op: str) -> None:
    """An error, as in plain autograd. torch's cross_entropy has saved its log-probabilities."""
    x = _x.clone()
    _, pullback = func.vjp(lambda x: getattr(N, op)(x, _t), x)
    assert_close(
        pullback(torch.ones((), dtype=x.dtype)), func.vjp(lambda x: getattr(F, op)(x, _t), _x)[1](x.new_ones([]))
    )
    _, pullback = func.vjp(lambda x: getattr(N, op)(x, _t), x)
    x.mul_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pullback(torch.ones((), dtype=x.dtype))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("op", ["cross_entropy", "probabilities", "nll_loss", "log_softmax"])
@pytest.mark.parametrize("shape", [(2, 0, 2, 1), (0, 3, 2, 1), (2, 0, 1, 2), (2, 3, 0, 1)])
def test_empty_problems_with_strides_of_any_kind(op: str, shape: tuple[int, ...], reduction: str) -> None:
    def make(functional: Any) -> Any:
        x = torch.rand(shape).expand(-1, -1, shape[2] if shape[2] != 1 else 3, shape[3] if shape[3] != 1 else 4)
        x = x.requires_grad_()
        if op == "log_softmax":
            output = functional.log_softmax(x, 1)
        else:
            target = torch.full((x.shape[0], *x.shape[2:]), -100) if op != "probabilities" else x.detach()
            name = "cross_entropy" if op == "probabilities" else op
            output = getattr(functional, name)(x, target, reduction=reduction)
        return output.detach(), torch.autograd.grad(output.sum(), x)

    _same(make)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 2)])
def test_forward_derivatives_of_empty_probabilities(shape: tuple[int, ...]) -> None:
    p = torch.rand(shape)
    for reduction in ("none", "sum", "mean"):

        def make(functional: Any, reduction: str = reduction) -> Any:
            def loss(x: Tensor) -> Tensor:
                return functional.cross_entropy(x, p, reduction=reduction)

            return func.jacfwd(loss)(p).shape, func.jacrev(loss)(p)

        _same(make)

"""Gradients of every order, against torch's and against finite differences."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, HIGHER_ORDER_CASES, REDUCTIONS, Case, Problem, build, grad_output, select
from oracle import answer, check_gradients
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.testing import assert_close

import nllx


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient(case: Case, device: str) -> None:
    problem = build(case, device)
    (gradient,) = answer(problem, nllx.functional, input_only=True).grads
    assert (gradient.dtype, gradient.device) == (problem.input.dtype, problem.input.device)
    check_gradients(case, [gradient])


@pytest.mark.parametrize("case", select(lambda case: case.has_probabilities), ids=str)
def test_gradients_of_probabilities_and_weights(case: Case, device: str) -> None:
    problem = build(case, device)
    grads = answer(problem, nllx.functional).grads
    for tensor, got in zip(problem.differentiable, grads, strict=True):
        assert (got.dtype, got.device) == (tensor.dtype, tensor.device)
    check_gradients(case, grads)


def _function(problem: Problem):
    """The loss as a function of the tensors that it is differentiable in, and those tensors."""
    leaves = problem.requires_grad()

    def loss(*tensors: Tensor) -> Tensor:
        rest = (leaves.target, leaves.weight)[len(tensors) - 1 :]
        return Problem(problem.case, *tensors, *rest).call(nllx.functional)

    return loss, tuple(leaves.differentiable)


@pytest.mark.parametrize("case", HIGHER_ORDER_CASES, ids=str)
def test_finite_differences(case: Case, device: str) -> None:
    loss, tensors = _function(build(case, device))
    # An expanded tensor cannot be perturbed in one place.
    tensors = tuple(t.detach().contiguous().requires_grad_() if 0 in t.stride() else t for t in tensors)
    gradcheck(loss, tensors)
    gradgradcheck(loss, tensors)


def _second_order(problem: Problem, functional: object) -> list[Tensor]:
    """Gradients of a function of the gradients, also in the direction of the incoming gradient."""
    leaves = problem.requires_grad()
    output = leaves.call(functional)
    incoming = grad_output(problem.case, output).requires_grad_()
    first = grad(output, leaves.differentiable, incoming, create_graph=True)
    penalty = sum((g * g).sum() + grad_output(problem.case, g).mul(g).sum() for g in first)
    return list(grad(penalty, [*leaves.differentiable, incoming], allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("case", HIGHER_ORDER_CASES, ids=str)
def test_second_order_is_torchs(case: Case, device: str) -> None:
    expected = _second_order(build(case).for_torch(), torch.nn.functional)
    for got, want in zip(_second_order(build(case, device), nllx.functional), expected, strict=True):
        # Sums and products of a few dozen numbers of size one.
        assert_close(got.cpu(), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("target", ["index", "probabilities"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_third_order_is_torchs(target: str, reduction: str, device: str) -> None:
    case = Case(f"third_{target}_{reduction}", "", (3, 4), dtype=torch.float64, target=target, weight="positive",
                label_smoothing=0.2, reduction=reduction)  # fmt: skip

    def third_order(problem: Problem, functional: object) -> Tensor:
        leaves = problem.requires_grad()
        value = leaves.call(functional).sum()
        for power in (2, 3):
            value = grad(value, leaves.input, create_graph=True)[0].pow(power).sum()
        return grad(value, leaves.input)[0]

    got = third_order(build(case, device), nllx.functional)
    assert_close(got.cpu(), third_order(build(case).for_torch(), torch.nn.functional), rtol=1e-12, atol=1e-13)


# One problem per operator and kind of target, for what does not depend on the case.
KINDS = [
    Case("cross_entropy", "index targets", (4, 6), ignored="some", weight="positive", label_smoothing=0.1),
    Case("cross_entropy_planes", "index targets", (2, 6, 5), ignored="some", reduction="none"),
    Case("probabilities", "probability targets", (4, 6), target="probabilities", weight="positive"),
    Case("nll_loss", "log-probabilities", (4, 6), op="nll_loss", ignored="some", weight="positive"),
    Case("log_softmax", "rows", (4, 6), op="log_softmax"),
]


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_backward_twice(case: Case, device: str) -> None:
    """retain_graph keeps what backward needs, and no buffer is handed out twice."""
    leaves = build(case, device).requires_grad()
    output = leaves.call(nllx.functional)
    once = grad(output, leaves.differentiable, grad_output(case, output), retain_graph=True)
    kept = [g.clone() for g in once]
    twice = grad(output, leaves.differentiable, grad_output(case, output))
    for first, copy, second in zip(once, kept, twice, strict=True):
        assert torch.equal(first, copy)
        assert torch.equal(first, second)
        assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_backward_without_its_graph_raises(case: Case, device: str) -> None:
    leaves = build(case, device).requires_grad()
    loss = leaves.call(nllx.functional).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_gradients_accumulate(case: Case, device: str) -> None:
    leaves = build(case, device).requires_grad()
    for _ in range(3):
        leaves.call(nllx.functional).sum().backward()
    once_each = answer(build(case, device), nllx.functional, torch.ones_like(leaves.call(nllx.functional))).grads
    for tensor, once in zip(leaves.differentiable, once_each, strict=True):
        assert_close(tensor.grad, 3 * once)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_only_the_gradients_asked_for(case: Case, device: str) -> None:
    """Each differentiable tensor alone has the gradient that it has among all."""
    together = answer(build(case, device), nllx.functional).grads
    for i, expected in enumerate(together):
        loss, tensors = _function(build(case, device))
        tensors = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
        output = loss(*tensors)
        # The logits alone have a kernel, with others they go through the definition: a few roundings apart.
        assert_close(grad(output, tensors[i], grad_output(case, output))[0], expected, rtol=1e-6, atol=1e-7)


def test_no_gradient_no_graph(device: str) -> None:
    for case in KINDS:
        problem = build(case, device)
        assert not problem.call(nllx.functional).requires_grad
        with torch.no_grad():
            assert not problem.requires_grad().call(nllx.functional).requires_grad
        with torch.inference_mode():
            output = build(case, device).call(nllx.functional)
        assert_close(output, problem.call(nllx.functional), rtol=0, atol=0)


_NONE = {"why": "a gradient for each row", "reduction": "none"}
_INCOMING = {
    "zero_dimensional": (Case("mean", "one gradient", (4, 6)), lambda d: torch.tensor(-2.5, device=d)),
    "unbatched": (Case("unbatched", shape=(6,), **_NONE), lambda d: torch.tensor(1.5, device=d)),
    "zero": (Case("rows", shape=(4, 6), **_NONE), lambda d: torch.zeros(4, device=d)),
    "expanded": (Case("rows", shape=(4, 6), **_NONE), lambda d: torch.tensor(0.3, device=d).expand(4)),
    "stepped": (Case("rows", shape=(4, 6), **_NONE), lambda d: torch.randn(8, device=d)[::2]),
    "negative_bit": (Case("rows", shape=(4, 6), **_NONE), lambda d: torch._neg_view(torch.randn(4, device=d))),
    "transposed": (Case("planes", shape=(2, 6, 3), **_NONE), lambda d: torch.randn(3, 2, device=d).t()),
    "expanded_planes": (
        Case("image", shape=(2, 6, 3, 4), **_NONE),
        lambda d: torch.randn(3, 1, device=d).expand(2, 3, 4),
    ),
    "nll_loss": (Case("nll", shape=(2, 6, 3), op="nll_loss", **_NONE), lambda d: torch.randn(3, 2, device=d).t()),
    "probabilities": (
        Case("probabilities", shape=(2, 6, 3), target="probabilities", weight="positive", **_NONE),
        lambda d: torch.randn(3, 2, device=d).t(),
    ),
    "log_softmax": (
        Case("log_softmax", "expanded and transposed", (4, 6), op="log_softmax"),
        lambda d: torch.randn(6, 1, device=d).expand(6, 4).t(),
    ),
    "log_softmax_planes": (
        Case("log_softmax_planes", "one number", (2, 6, 3), op="log_softmax"),
        lambda d: torch.tensor(2.0, device=d).expand(2, 6, 3),
    ),
}


@pytest.mark.parametrize("name", _INCOMING)
def test_any_incoming_gradient(name: str, device: str) -> None:
    """The incoming gradient may be any value in any layout; it is not written to."""
    case, make = _INCOMING[name]
    torch.manual_seed(0)
    incoming = make(device)
    version, before = incoming._version, incoming.clone()
    got = answer(build(case, device), nllx.functional, incoming).grads
    assert incoming._version == version
    assert torch.equal(incoming, before)
    expected = answer(build(case).for_torch(torch.float64), torch.nn.functional, incoming.cpu()).grads
    for g, want in zip(got, expected, strict=True):
        assert_close(g.cpu().double(), want, rtol=1e-5, atol=1e-6)  # a few units of float32 in numbers of size one


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_second_order_of_nll_loss_alone_is_zero(reduction: str, device: str) -> None:
    """Linear in the log-probabilities: the second derivative is zero, not missing."""
    for functional in (torch.nn.functional, nllx.functional):
        log_probs = torch.randn(3, 5, device=device, requires_grad=True)
        loss = functional.nll_loss(log_probs, torch.tensor([1, 4, -100], device=device), reduction=reduction).sum()
        (grad,) = torch.autograd.grad(loss, log_probs, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), log_probs)
        assert torch.equal(second, torch.zeros_like(log_probs))

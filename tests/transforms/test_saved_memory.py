"""What a call keeps: the inputs and a few numbers per row, as long as the graph lives, and nothing else changes."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from cases import CASES, Case, Problem, build
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import nllx


def _saved(problem: Problem) -> tuple[Tensor, list[Tensor]]:
    """The loss of a problem whose input alone requires a gradient, and what autograd saved for it."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return problem.call(nllx.functional), saved


def _input_leaf(case: Case, device: str) -> Problem:
    problem = build(case, device)
    problem.input.requires_grad_()
    return problem


_LOSSES = [
    Case("rows", "", (64, 100), ignored="some", weight="positive", label_smoothing=0.1),
    Case("rows_none", "", (64, 100), reduction="none"),
    Case("planes", "", (4, 100, 16), ignored="some", weight="positive"),
    Case("channels_last", "", (4, 100, 4, 4), layout="channels_last"),
    Case("bfloat16", "", (64, 100), dtype=torch.bfloat16, weight="positive", weight_dtype=torch.float32),
    Case("float64", "", (64, 100), dtype=torch.float64),
    Case("probabilities", "", (64, 100), target="probabilities", weight="positive", label_smoothing=0.1),
    Case("nll_loss", "", (64, 100), op="nll_loss", ignored="some", weight="positive"),
    Case("nll_loss_planes", "", (4, 100, 16), op="nll_loss", ignored="some"),
]


@pytest.mark.parametrize("case", _LOSSES, ids=str)
def test_losses_save_two_numbers_of_a_row(case: Case, device: str) -> None:
    """Besides the inputs themselves: never the log-probabilities. Two, since the maximum and the logarithm of the sum
    in one number would lose the latter where the former is large."""
    problem = _input_leaf(case, device)
    _, saved = _saved(problem)
    inputs = {t.data_ptr() for t in (problem.input, problem.target, problem.weight) if t is not None}
    own = [tensor for tensor in saved if tensor.data_ptr() not in inputs]
    numbers = sum(tensor.numel() for tensor in own)
    assert numbers <= (1 if case.op == "nll_loss" else 2 * case.rows + 1)
    assert all(tensor.element_size() <= max(4, case.dtype.itemsize) for tensor in own)
    assert any(tensor.data_ptr() == problem.input.data_ptr() for tensor in saved)


def test_log_softmax_saves_its_output_alone(device: str) -> None:
    problem = _input_leaf(Case("log_softmax", "", (64, 100), op="log_softmax"), device)
    output, saved = _saved(problem)
    assert [tensor.data_ptr() for tensor in saved] == [output.data_ptr()]


def test_nothing_is_saved_without_a_gradient(device: str) -> None:
    for case in _LOSSES:
        assert _saved(build(case, device))[1] == []


def _storages(problem: Problem) -> Iterator[StorageWeakRef]:
    for tensor in (problem.input, problem.target, problem.weight):
        if tensor is not None:
            yield StorageWeakRef(tensor.untyped_storage())


@pytest.mark.parametrize("case", [*_LOSSES, Case("log_softmax", "", (64, 100), op="log_softmax")], ids=str)
@pytest.mark.parametrize("use", ["forward", "backward", "double backward", "error"])
def test_no_reference_outlives_the_graph(case: Case, use: str, device: str) -> None:
    gc.disable()  # freed by reference counts, not only when a collection comes
    try:
        problem = _input_leaf(case, device)
        references = [*_storages(problem)]
        loss = problem.call(nllx.functional).sum()
        if use == "backward":
            loss.backward()
        if use == "double backward":
            (gradient,) = torch.autograd.grad(loss, problem.input, create_graph=True)
            if gradient.requires_grad:  # nll_loss is linear
                gradient.sum().backward()
            del gradient
            problem.input.grad = None  # it holds the graph, as torch documents
        if use == "error" and problem.target is not None and not case.has_probabilities and device == "cpu":
            with pytest.raises(IndexError):
                Problem(case, problem.input, problem.target.fill_(1000)).call(nllx.functional)
        del loss, problem
        assert all(reference.expired() for reference in references)
    finally:
        gc.enable()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs_are_not_written_to(case: Case, device: str) -> None:
    problem = _input_leaf(case, device)
    tensors = [t for t in (problem.input, problem.target, problem.weight) if t is not None]
    # The whole storage, gaps between rows included; bytes, since NaN is not equal to itself.
    before = [(t._version, _bytes(t).clone()) for t in tensors]
    output = problem.call(nllx.functional)
    torch.autograd.grad(output, problem.input, torch.ones_like(output))
    for tensor, (version, content) in zip(tensors, before, strict=True):
        assert tensor._version == version
        assert torch.equal(_bytes(tensor), content)


def _bytes(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))


def test_changing_the_logits_before_backward() -> None:
    """An error or the gradient of what they were; never a silent mixture."""
    logits = torch.randn(4, 5, requires_grad=True) * 1
    loss = nllx.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3]))
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_changing_target_or_weight_before_backward() -> None:
    target, weight = torch.tensor([0, 1, 2, 3]), torch.ones(5)
    for changed in (target, weight):
        logits = torch.randn(4, 5, requires_grad=True)
        loss = nllx.functional.cross_entropy(logits, target, weight)
        changed.mul_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_the_world_stays_as_it_was() -> None:
    """Threads, random numbers, default dtype, gradient mode, environment of floating point."""
    torch.manual_seed(0)
    state = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    denormal = torch.tensor(1e-40) * 1
    for case in _LOSSES:
        problem = _input_leaf(case, "cpu")
        problem.call(nllx.functional).sum().backward()
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()) == state[1:]
    assert torch.equal(torch.tensor(1e-40) * 1, denormal)


def test_default_dtype_has_no_influence() -> None:
    case = _LOSSES[0]
    expected = build(case).call(nllx.functional)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(build(case).call(nllx.functional), expected)
    finally:
        torch.set_default_dtype(default)

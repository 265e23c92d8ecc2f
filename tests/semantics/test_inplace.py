"""Gradients written over the logits, and loss and gradient at once."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from cases import Case, Problem, build, select
from oracle import answer
from torch import Tensor
from torch.testing import assert_close

import nllx
from nllx.functional import cross_entropy, cross_entropy_value_and_grad

x = torch.linspace(-2, 2, 24).reshape(4, 6)
t = torch.tensor([0, 5, -100, 3])
_losses = [case for case in select(lambda case: case.op == "cross_entropy") if case.numel]
_scalar = [case for case in _losses if case.reduction != "none"]


def _options(problem: Problem) -> dict[str, Any]:
    case = problem.case
    return {
        "weight": problem.weight,
        "reduction": case.reduction,
        "ignore_index": case.ignore_index,
        "label_smoothing": case.label_smoothing,
    }


def _equal(a: Tensor, b: Tensor) -> None:
    assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def _is_dense(tensor: Tensor) -> bool:
    return bool(torch._C._has_storage(tensor)) and not any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


# inplace_backward


@pytest.mark.parametrize("case", _losses, ids=str)
def test_inplace_is_the_same_gradient(case: Case, device: str) -> None:
    problem = build(case, device)
    if not _is_dense(problem.input):
        pytest.skip("expanded logits have no place for a gradient")
    results = []
    for inplace in (False, True):
        leaf = problem.input.detach().requires_grad_()
        logits = leaf.clone(memory_format=torch.preserve_format)
        loss = cross_entropy(logits, problem.target, **_options(problem), inplace_backward=inplace)
        loss.backward(torch.full_like(loss, 0.7))
        assert leaf.grad is not None
        results.append((loss.detach(), leaf.grad))
        if inplace:
            _equal(logits.detach(), leaf.grad)  # it lies where the logits were
    for ours, expected in zip(results[1], results[0], strict=True):
        _equal(ours, expected)


def test_inplace_allocates_no_gradient() -> None:
    logits = torch.randn(64, 40_000, requires_grad=True).clone()
    loss = cross_entropy(logits, torch.randint(40_000, (64,)), inplace_backward=True)
    grads: list[Tensor] = []
    logits.register_hook(grads.append)
    loss.backward()
    assert grads[0].data_ptr() == logits.data_ptr()


def _changed() -> Any:
    return pytest.raises(RuntimeError, match="modified by an inplace operation")


def test_inplace_misuse_raises(device: str) -> None:
    target = t.to(device)
    leaf = x.to(device).clone().requires_grad_()

    logits = leaf * 2
    loss = cross_entropy(logits, target, inplace_backward=True)
    loss.backward(retain_graph=True)
    with _changed():
        loss.backward()

    logits = leaf * 2
    other = cross_entropy(logits, target)
    cross_entropy(logits, target, inplace_backward=True).backward()
    with _changed():
        other.backward()

    with pytest.raises(RuntimeError, match=r"leaf Variable that requires grad"):
        cross_entropy(leaf, target, inplace_backward=True)
    before = leaf.detach().clone()
    for view in (leaf[:], leaf.view(4, 6), leaf[:, ::2].t()[:, :3]):
        with pytest.raises(RuntimeError, match=r"view of a leaf Variable that requires grad"):
            cross_entropy(view, torch.zeros(view.shape[0], dtype=torch.long, device=device), inplace_backward=True)
    _equal(leaf, before)
    flat = leaf.flatten() * 2
    for overlapping in ((leaf[:1] * 2).expand(4, 6), flat.unfold(0, 6, 3)[:4], flat.as_strided((4, 6), (1, 1))):
        with pytest.raises(RuntimeError, match=r"elements of logits share memory with each other"):
            cross_entropy(overlapping, target, inplace_backward=True)


def test_inplace_through_views(device: str) -> None:
    """Language models reshape: the logits are a view of the layer's output."""
    weight = torch.randn(6, 3, device=device, requires_grad=True)
    hidden = torch.randn(2, 2, 3, device=device)
    gradients = []
    for inplace in (False, True):
        logits = torch.nn.functional.linear(hidden, weight)
        loss = cross_entropy(logits.view(-1, 6), t.to(device), inplace_backward=inplace)
        gradients.append(torch.autograd.grad(loss, weight)[0])
    _equal(gradients[0], gradients[1])


def test_inplace_keeps_the_logits_where_derivatives_need_them(device: str) -> None:
    leaf, target = x.to(device).double().clone().requires_grad_(), t.to(device)
    logits = leaf * 2
    loss = cross_entropy(logits, target, inplace_backward=True)
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    _equal(logits.detach(), leaf.detach() * 2)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    expected = cross_entropy(leaf * 2, target)
    (first,) = torch.autograd.grad(expected, leaf, create_graph=True)
    assert_close(second, torch.autograd.grad(first.square().sum(), leaf)[0])

    def under_func(a: Tensor) -> Tensor:
        return cross_entropy(a * 2, target, inplace_backward=True)

    assert_close(torch.func.grad(under_func)(leaf.detach()), first.detach())
    assert_close(torch.func.jvp(under_func, (leaf.detach(),), (leaf.detach(),))[0], loss.detach())


def test_inplace_without_gradient(device: str) -> None:
    logits = x.to(device)
    _equal(cross_entropy(logits, t.to(device), inplace_backward=True), cross_entropy(logits, t.to(device)))
    _equal(logits.cpu(), x)


def test_inplace_module_and_compile(device: str) -> None:
    criterion = nllx.CrossEntropyLoss(label_smoothing=0.1, inplace_backward=True)
    assert pickle.loads(pickle.dumps(criterion)).inplace_backward
    assert not pickle.loads(pickle.dumps(nllx.CrossEntropyLoss())).inplace_backward
    leaf, target = x.to(device).clone().requires_grad_(), t.to(device)
    (expected,) = torch.autograd.grad(torch.nn.CrossEntropyLoss(label_smoothing=0.1)(leaf * 2, target), leaf)
    (eager,) = torch.autograd.grad(criterion(leaf * 2, target), leaf)
    compiled = torch.compile(lambda a: criterion(a * 2, target), backend="aot_eager", fullgraph=True)
    (traced,) = torch.autograd.grad(compiled(leaf), leaf)
    assert_close(eager, expected)
    assert_close(traced, expected)


def test_inplace_training(device: str) -> None:
    """The same parameters, bit for bit, after some steps."""

    def train(inplace: bool) -> Tensor:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5)).to(device)
        criterion = nllx.CrossEntropyLoss(inplace_backward=inplace)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for _ in range(3):
            loss = criterion(net(torch.randn(32, 8).to(device)), torch.randint(5, (32,)).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return torch.nn.utils.parameters_to_vector(net.parameters()).detach()

    assert torch.equal(train(False), train(True))


# cross_entropy_value_and_grad


@pytest.mark.parametrize("case", _scalar, ids=str)
@pytest.mark.parametrize("out", ["fresh", "given", "logits"])
def test_value_and_grad(case: Case, out: str, device: str) -> None:
    problem = build(case, device)
    expected = answer(problem, nllx.functional, torch.tensor(1.0).to(device))
    logits = problem.input.detach()
    if out == "logits" and not _is_dense(logits):
        pytest.skip("expanded logits have no place for a gradient")
    given = {"fresh": None, "given": torch.full_like(logits, 3.0), "logits": logits.clone()}[out]
    source = given if out == "logits" and given is not None else logits
    loss, grad = cross_entropy_value_and_grad(source, problem.target, **_options(problem), out=given)
    if given is not None:
        assert grad is given
    assert loss.dtype == expected.output.dtype
    assert grad.dtype == logits.dtype
    assert_close(loss, expected.output.detach(), equal_nan=True)
    assert_close(grad, expected.grads[0], equal_nan=True)


@pytest.mark.parametrize("shape", [(3000, 21), (70, 5000), (5, 40_000), (2, 19, 70, 70), (4096, 2), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_grad_is_that_of_two_calls(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """More than one part for the threads, so that both kernels take turns."""
    logits = torch.randn(shape, device=device).to(dtype).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    target.flatten()[::7] = -100
    expected = cross_entropy(logits, target, label_smoothing=0.1)
    loss, grad = cross_entropy_value_and_grad(logits, target, label_smoothing=0.1)
    assert not loss.requires_grad
    assert not grad.requires_grad
    _equal(loss, expected.detach())
    _equal(grad, torch.autograd.grad(expected, logits)[0])


def test_value_and_grad_goes_on_backward(device: str) -> None:
    weight = torch.randn(6, 3, device=device, requires_grad=True)
    hidden = torch.randn(4, 3, device=device)
    (expected,) = torch.autograd.grad(cross_entropy(hidden @ weight.T, t.to(device)), weight)
    logits = hidden @ weight.T
    version = logits._version
    _, grad = cross_entropy_value_and_grad(logits, t.to(device), out=logits)
    assert logits._version > version
    logits.backward(grad.detach().clone())
    assert weight.grad is not None
    assert_close(weight.grad, expected)


def test_value_and_grad_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, grad = cross_entropy_value_and_grad(x.bfloat16(), t)
        assert loss.dtype == torch.float32
        assert grad.dtype == torch.bfloat16
        _equal(loss, cross_entropy(x.bfloat16(), t))


def test_value_and_grad_compiles(device: str) -> None:
    def both(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty_like(logits)
        return (*cross_entropy_value_and_grad(logits, target), *cross_entropy_value_and_grad(logits, target, out=out))

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)(x.to(device), t.to(device))
    for got, expected in zip(compiled, both(x.to(device), t.to(device)), strict=True):
        assert_close(got, expected)


def test_value_and_grad_opcheck(device: str) -> None:
    logits, target = x.to(device), t.to(device)
    ops = torch.ops.nllx
    torch.library.opcheck(ops.cross_entropy_value_and_grad.default, (logits, target))
    arguments = (logits, target, *[None] * 5, 1, -100, 0.1, 1.0, 1.0, 0.0, 0.0, None, torch.empty_like(logits))
    torch.library.opcheck(ops.cross_entropy_value_and_grad_out.default, arguments)


def test_value_and_grad_mistakes() -> None:
    with pytest.raises(ValueError, match="reduction 'none' gives one loss per row"):
        cross_entropy_value_and_grad(x, t, reduction="none")
    for out in (torch.empty(4, 5), torch.empty(4, 6).double(), torch.empty(4, 6, device="meta")):
        with pytest.raises(RuntimeError, match=r"out must have shape \[4, 6\] and dtype"):
            cross_entropy_value_and_grad(x, t, out=out)
    for out in (torch.empty(1, 6).expand(4, 6), torch.empty(15).as_strided((4, 6), (3, 1))):
        with pytest.raises(RuntimeError, match=r"elements of out share memory with each other"):
            cross_entropy_value_and_grad(x, t, out=out)
    buffer = torch.zeros(30)
    with pytest.raises(RuntimeError, match=r"out shares memory with logits"):
        cross_entropy_value_and_grad(buffer[:24].view(4, 6), t, out=buffer[6:].view(4, 6))
    probabilities = x.softmax(1)
    with pytest.raises(RuntimeError, match=r"out shares memory with target"):
        cross_entropy_value_and_grad(x, probabilities, out=probabilities)
    with pytest.raises(RuntimeError, match=r"leaf Variable that requires grad"):
        cross_entropy_value_and_grad(x, t, out=torch.empty(4, 6, requires_grad=True))
    leaf = torch.nn.Parameter(x.clone())
    view = leaf[:]
    with pytest.raises(RuntimeError, match=r"view of a leaf Variable that requires grad"):
        cross_entropy_value_and_grad(view, t, out=view)
    _equal(leaf.detach(), x)
    _equal(cross_entropy_value_and_grad(view, t, out=leaf.detach()[:])[1], leaf.detach())
    with pytest.raises(TypeError, match="'out' must be Tensor"):
        cross_entropy_value_and_grad(x, t, out=[1.0])  # type: ignore[arg-type]


def test_value_and_grad_into_parts_of_a_buffer() -> None:
    """Logits and ``out`` may lie in one buffer with gaps between their rows, as long as they share no element."""
    buffer = torch.randn(4, 13)
    logits = buffer[:, :6]
    _, expected = cross_entropy_value_and_grad(logits.clone(), t)
    before = logits.clone()
    for first in (1, 3, 5):
        with pytest.raises(RuntimeError, match=r"out shares memory with logits.*logits\.clone"):
            cross_entropy_value_and_grad(logits, t, out=buffer[:, first : first + 6])
    with pytest.raises(RuntimeError, match=r"out shares memory with logits"):
        cross_entropy_value_and_grad(buffer[:3, :6], t[:3], out=buffer[1:, :6])
    with pytest.raises(RuntimeError, match=r"out shares memory with target"):
        cross_entropy_value_and_grad(x, buffer[:, :6], out=buffer[:, 2:8])
    with pytest.raises(RuntimeError, match=r"out shares memory with weight"):
        cross_entropy_value_and_grad(x, t, buffer[2, :6], out=buffer[:, 2:8])
    _equal(logits, before)
    for first in (6, 7):
        out = buffer[:, first : first + 6]
        _equal(cross_entropy_value_and_grad(logits, t, out=out)[1], expected)
        _equal(logits, before)
    columns = torch.randn(6, 8)  # every second one
    _, expected = cross_entropy_value_and_grad(columns.clone()[:, ::2], torch.arange(6) % 4)
    _equal(cross_entropy_value_and_grad(columns[:, ::2], torch.arange(6) % 4, out=columns[:, 1::2])[1], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, 64, 77])
def test_short_rows_with_gaps(rows: int, dtype: torch.dtype, device: str) -> None:
    """Every number of classes up to more than a kernel takes as columns; what lies between the rows stays."""
    for classes in range(1, 40):
        logits = torch.randn(rows, classes + 3, device=device).to(dtype)[:, :classes]
        target = torch.arange(rows, device=device) % classes
        buffer = torch.full((rows, classes + 3), 7.0, device=device, dtype=dtype)
        leaf = logits.detach().double().requires_grad_()
        expected = torch.nn.functional.cross_entropy(leaf, target)
        (gradient,) = torch.autograd.grad(expected, leaf)
        tolerance = {"rtol": 1e-2, "atol": 1e-3} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-7}
        for out in (None, buffer[:, :classes]):
            loss, grad = cross_entropy_value_and_grad(logits, target, out=out)
            assert_close(loss.double(), expected.detach(), **tolerance)
            assert_close(grad.double(), gradient, **tolerance)
        assert (buffer[:, classes:] == 7).all()


def test_nothing_is_written_before_an_error() -> None:
    out = x.clone()
    with pytest.raises(IndexError, match=r"Target 6 is out of bounds\..*target\[3\]"):
        cross_entropy_value_and_grad(out, torch.tensor([0, 1, 2, 6]), out=out)
    assert torch.equal(out, x)


def test_value_and_grad_with_threads() -> None:
    logits, target, weight = torch.randn(4099, 33), torch.randint(33, (4099,)), torch.rand(33)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(cross_entropy_value_and_grad(logits, target, weight))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        _equal(loss, results[0][0])
        _equal(grad, results[0][1])

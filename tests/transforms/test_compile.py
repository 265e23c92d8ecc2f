"""Operators under torch.library.opcheck, torch.compile, torch.export and without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
import torch._inductor.config
from cases import Case, Problem, build, grad_output, select
from oracle import answer
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import nllx

ops = torch.ops.nllx


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Every test compiles its own functions, within the compiler's limit of recompilations. No graph comes from a cache
    on disk, whose keys do not see a change of nllx."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


def _row(why: str, shape: tuple[int, ...], **fields: Any) -> Case:
    return Case(why.replace(" ", "_"), why, shape, **fields)


# Every kind of target, layout, reduction and dtype that can change what is traced, as small as it can be.
_TRACED = [
    _row("index mean", (3, 5), ignored="some"),
    _row("index sum smoothed", (3, 5), ignored="some", weight="positive", label_smoothing=0.1, reduction="sum"),
    _row("index none planes", (2, 5, 3), ignored="some", reduction="none", target_dtype=torch.int32),
    _row("index channels last", (2, 5, 3, 2), layout="channels_last", ignored="some"),
    _row("index neither", (2, 5, 3, 2), layout="neither", weight="positive"),
    _row("index transposed", (3, 5), layout="transposed"),
    _row("index expanded", (3, 5), layout="expanded"),
    _row("index unbatched", (5,), reduction="none"),
    _row("index bfloat16", (3, 5), dtype=torch.bfloat16, weight="positive", weight_dtype=torch.float32),
    _row("index ignored nan", (4, 5), special="nan_row", ignored="some", same_as_torch=False),
    _row("probabilities mean", (3, 5), target="probabilities"),
    _row("probabilities none", (2, 5, 3), target="probabilities", weight="positive", reduction="none"),
    _row("probabilities float64", (3, 5), target="probabilities", target_dtype=torch.float64),
    _row("nll mean", (3, 5), op="nll_loss", ignored="some", weight="positive"),
    _row("nll none image", (2, 5, 3, 2), op="nll_loss", ignored="some", reduction="none"),
    _row("nll float16", (3, 5), op="nll_loss", dtype=torch.float16),
    _row("log_softmax", (3, 5), op="log_softmax"),
    _row("log_softmax planes", (2, 5, 3), op="log_softmax", dim=-2),
    _row("log_softmax transposed", (2, 5, 3), op="log_softmax", layout="transposed"),
    _row("log_softmax cast", (3, 5), op="log_softmax", dtype=torch.bfloat16, out_dtype=torch.float32),
]
_traced = pytest.mark.parametrize("case", _TRACED, ids=str)


def _operator_calls(problem: Problem) -> dict[Any, tuple[Any, ...]]:
    """The operators that a problem runs through, with their arguments: the whole, the forward and the backward."""
    case, arguments = problem.case, problem.op_arguments()
    if case.op == "log_softmax":
        x = problem.input.detach() if case.out_dtype is None else problem.input.detach().to(case.out_dtype)
        output = ops.log_softmax_forward(x, case.dim)
        backward = (grad_output(case, output), output, case.dim)
        return {ops.log_softmax: arguments, ops.log_softmax_forward: (x, case.dim), ops.log_softmax_backward: backward}
    forward = getattr(ops, f"{case.op}_forward")
    with torch.no_grad():
        loss, *saved = forward(*arguments)
    tensors = 7 if case.op == "cross_entropy" else 3
    backward = (grad_output(case, loss), *arguments[:tensors], *saved, *arguments[tensors:])
    if case.op == "cross_entropy":
        backward = (*backward, 1.0, 1.0, 0.0, 0.0, [True, False])  # no options
    return {getattr(ops, case.op): arguments, forward: arguments, getattr(ops, f"{case.op}_backward"): backward}


@_traced
def test_opcheck(case: Case, device: str) -> None:
    for operator, arguments in _operator_calls(build(case, device).requires_grad()).items():
        # The total weight and the log-sum-exp have no derivative: the forward operators are checked without a gradient.
        if operator in (ops.cross_entropy_forward, ops.nll_loss_forward):
            arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
        torch.library.opcheck(operator.default, arguments)


def _metadata(tensor: Tensor) -> tuple[Any, ...]:
    """Dtype, shape, and the strides that are ever used."""
    strides = [
        stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and tensor.numel()
    ]
    return tensor.dtype, tensor.shape, strides


@pytest.mark.parametrize("case", select(lambda case: case.layout != "negative_bit"), ids=str)
def test_without_data(case: Case) -> None:
    """Meta tensors give dtype, shape and strides of the output and of the input's gradient."""

    def describe(problem: Problem) -> list[Any]:
        x = problem.input.detach().requires_grad_()
        output = Problem(case, x, problem.target, problem.weight).call(nllx.functional)
        (grad,) = torch.autograd.grad(output, x, torch.ones_like(output))
        return [*map(_metadata, (output, grad))]

    assert describe(build(case, "meta")) == describe(build(case))


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch without CUDA has no fake CUDA tensors")
def test_fake_tensors_of_another_device() -> None:
    with FakeTensorMode():
        for case in _TRACED:
            assert build(case, "cuda").call(nllx.functional).device.type == "cuda"


def _compile(function: Callable[..., Any], backend: str = "inductor", **options: Any) -> Callable[..., Any]:
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def _check_against_eager(problems: list[Problem], backend: str, dynamic: bool | None) -> None:
    """Compiles all problems as one function; outputs and gradients equal those of eager."""

    def losses(tensors: list[tuple[Tensor | None, ...]]) -> list[Tensor]:
        return [Problem(p.case, *t).call(nllx.functional) for p, t in zip(problems, tensors, strict=True)]

    leaves = [problem.requires_grad() for problem in problems]
    outputs = _compile(losses, backend, dynamic=dynamic)([(p.input, p.target, p.weight) for p in leaves])
    incoming = [grad_output(p.case, output) for p, output in zip(problems, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, [tensor for p in leaves for tensor in p.differentiable], incoming)
    expected = [answer(problem, nllx.functional) for problem in problems]
    results = [*outputs, *grads]
    eager = [e.output for e in expected] + [g for e in expected for g in e.grads]
    # The compiler may fuse what is not a kernel of nllx: equal to a few roundings.
    assert_close(results, eager, equal_nan=True)
    assert [*map(_metadata, results)] == [*map(_metadata, eager)]


@_traced
@pytest.mark.parametrize("dynamic", [False, True])
def test_traced_is_eager(case: Case, dynamic: bool, device: str) -> None:
    _check_against_eager([build(case, device)], "aot_eager", dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_is_eager(dynamic: bool, device: str) -> None:
    """One graph of all kernels, since compiling costs seconds, and the definition with its derivatives once."""
    kernels = [case for case in _TRACED if not case.has_probabilities]
    definition = next(case for case in _TRACED if case.has_probabilities and case.weight)
    _check_against_eager([build(case, device) for case in (*kernels, definition)], "inductor", dynamic)


@pytest.mark.parametrize("op", ["cross_entropy", "probabilities", "nll_loss", "log_softmax"])
def test_one_graph_for_all_sizes(op: str, device: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x: Tensor, target: Tensor) -> Tensor:
        if op == "log_softmax":
            return nllx.functional.log_softmax(x, 1)
        return (nllx.functional.nll_loss if op == "nll_loss" else nllx.functional.cross_entropy)(x, target)

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for rows, classes, inner in ((4, 5, 3), (7, 12, 2), (33, 101, 6), (2, 3, 9)):
        x = torch.randn(rows, classes, inner, device=device, requires_grad=True)
        target = torch.randint(classes, (rows, inner), device=device)
        target[0, 0] = -100
        if op == "probabilities":
            target = torch.rand(rows, classes, inner, device=device)
        output, expected = compiled(x, target), loss(x, target)
        assert_close(output, expected)
        grad = torch.randn_like(output)
        assert_close(torch.autograd.grad(output, x, grad), torch.autograd.grad(expected, x, grad))
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0]


@pytest.mark.parametrize("op", ["cross_entropy", "probabilities", "nll_loss", "log_softmax"])
def test_one_graph_of_samples_for_all_sizes(op: str, device: str) -> None:
    """Per-sample gradients, for any number of samples and classes."""
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x: Tensor, target: Tensor) -> Tensor:
        if op == "log_softmax":
            return (nllx.functional.log_softmax(x, 1) * target).sum()
        return (nllx.functional.nll_loss if op == "nll_loss" else nllx.functional.cross_entropy)(x, target)

    gradients = torch.vmap(torch.func.grad_and_value(loss))
    compiled = torch.compile(gradients, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for samples, rows, classes in ((4, 5, 3), (7, 12, 2), (33, 3, 101), (2, 3, 9)):
        x = torch.randn(samples, rows, classes, device=device)
        target = torch.randint(classes, (samples, rows), device=device)
        if op in ("probabilities", "log_softmax"):
            target = torch.rand(samples, rows, classes, device=device)
        assert_close(compiled(x, target), gradients(x, target))
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0]


@pytest.mark.parametrize("op", ["cross_entropy", "nll_loss"])
def test_one_graph_for_all_values_of_ignore_index(op: str, device: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        return getattr(nllx.functional, op)(x, target, ignore_index=ignore_index)

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    x = torch.randn(4, 9, device=device, requires_grad=True)
    target = torch.tensor([2, 3, 6, 8], device=device)
    compilations = []
    for ignore_index in (2, 3, 6):
        output, expected = compiled(x, target, ignore_index), loss(x, target, ignore_index)
        assert_close(output, expected)
        assert_close(torch.autograd.grad(output, x), torch.autograd.grad(expected, x))
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0]


def test_deprecated_arguments_compile(device: str) -> None:
    """They warn in eager mode, which would break the graph."""
    x, target = torch.randn(3, 5, device=device), torch.tensor([1, 4, -100], device=device)

    def losses(functional: Any) -> list[Tensor]:
        return [
            functional.cross_entropy(x, target, size_average=False),
            functional.nll_loss(x, target, reduce=False),
            functional.log_softmax(x),
            functional.log_softmax(x[None]),
        ]

    with pytest.warns(UserWarning, match="size_average and reduce|Implicit dimension"):
        expected = losses(torch.nn.functional)
    assert_close(_compile(lambda: losses(nllx.functional), "aot_eager")(), expected)


def test_range_is_checked_in_compiled_code(device: str) -> None:
    """A check that the compiler could see would be removed with its unused result."""
    if device == "cuda":
        pytest.skip("an out-of-range target is reported later on CUDA")
    compiled = _compile(nllx.functional.cross_entropy, "aot_eager")
    x, good = torch.randn(3, 5, requires_grad=True), torch.tensor([0, -100, 4])
    compiled(x, good)
    with pytest.raises(IndexError, match=r"Target 5 is out of bounds"):
        compiled(x, torch.tensor([0, 5, 4]))


def test_compiled_training(device: str) -> None:
    """A compiled step with modules, weights and padding trains like an eager one."""

    def train(step: Callable[[Callable], Callable]) -> list[float]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20)).to(device)
        criterion = nllx.CrossEntropyLoss(torch.linspace(0.5, 2, 20), ignore_index=0, label_smoothing=0.1).to(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        forward = step(lambda tokens: criterion(net(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:]))
        losses = []
        for i in range(4):
            tokens = torch.randint(20, (4, 6 + i), device=device)
            loss = forward(tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert_close(train(_compile), train(lambda function: function))


def test_compiled_autograd(device: str) -> None:
    """The backward pass itself can be compiled."""
    leaves = build(_TRACED[1], device).requires_grad()
    expected = answer(build(leaves.case, device), nllx.functional, torch.tensor(1.0)).grads[0]

    def step(x: Tensor) -> None:
        Problem(leaves.case, x, leaves.target, leaves.weight).call(nllx.functional).backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(step, backend="aot_eager")(leaves.input)
    assert_close(leaves.input.grad, expected)


@pytest.mark.parametrize(
    "loss", [nllx.CrossEntropyLoss(torch.ones(5), label_smoothing=0.1), nllx.NLLLoss(reduction="none")], ids=str
)
def test_export(loss: torch.nn.Module) -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    x, target = torch.randn(3, 5), torch.tensor([1, 4, -100])
    program = torch.export.export(loss, (x, target), dynamic_shapes=({0: batch}, {0: batch}))
    x, target = torch.randn(7, 5), torch.tensor([1, 4, -100, 0, 0, 2, 3])
    assert_close(program.module()(x, target), loss(x, target), rtol=0, atol=0)


# Sizes that depend on data: what a mask leaves. Two masks leave as many rows, which the compiler cannot know.
_MASK = torch.tensor([True, True, False, True, True, False])
_MASKED = (
    torch.arange(30.0).view(6, 5).cos(),
    torch.tensor([0, 2, -100, 3, 4, 1]),
    torch.arange(30.0).view(6, 5).softmax(1),
)
_w = torch.linspace(0.5, 2, 5)
_DEPEND_ON_DATA: dict[str, Callable[..., Tensor]] = {
    "mean": lambda x, y, p, m, n: nllx.functional.cross_entropy(x[m], y[n]),
    "none": lambda x, y, p, m, n: nllx.functional.cross_entropy(x[m], y[n], _w, reduction="none", label_smoothing=0.1),
    "planes": lambda x, y, p, m, n: nllx.functional.cross_entropy(
        x[m][:, :, None].expand(-1, -1, 3), y[n][:, None].expand(-1, 3)
    ),
    "probabilities": lambda x, y, p, m, n: nllx.functional.cross_entropy(x[m], p[n], _w),
    "nll_loss": lambda x, y, p, m, n: nllx.functional.nll_loss(nllx.functional.log_softmax(x[m], 1), y[n], _w),
    "value_and_grad": lambda x, y, p, m, n: nllx.functional.cross_entropy_value_and_grad(x[m], y[n])[1],
    "out": lambda x, y, p, m, n: nllx.functional.cross_entropy_value_and_grad(x[m], y[n], out=torch.empty_like(x[m]))[
        1
    ],
    "module": lambda x, y, p, m, n: nllx.CrossEntropyLoss()(x[m], y[n]),
    "gradient of the gradient": lambda x, y, p, m, n: torch.func.grad(
        lambda h: torch.func.grad(lambda g: nllx.functional.cross_entropy(g, y[m]))(h).square().sum()
    )(x[m]),
    "samples": lambda x, y, p, m, n: torch.func.vmap(nllx.functional.cross_entropy)(
        x[m][:, None].expand(-1, 2, -1), y[m][:, None].expand(-1, 2)
    ),
    "packed": lambda x, y, p, m, n: nllx.functional.cross_entropy(x[: m.sum().item()], y[: n.sum().item()]),
}


@pytest.mark.parametrize("call", _DEPEND_ON_DATA.values(), ids=_DEPEND_ON_DATA.keys())
def test_sizes_that_depend_on_data(call: Callable[..., Tensor]) -> None:
    x, y, p = _MASKED
    leaf, eager = (x.clone().requires_grad_() for _ in range(2))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        compiled = _compile(call, "aot_eager")
        got, expected = compiled(leaf, y, p, _MASK, _MASK.clone()), call(eager, y, p, _MASK, _MASK)
        assert_close(got, expected)
        if got.requires_grad:
            for loss in (got, expected):
                loss.sum().backward()
            assert_close(leaf.grad, eager.grad)
        if call not in (_DEPEND_ON_DATA["gradient of the gradient"], _DEPEND_ON_DATA["samples"]):
            with pytest.raises(ValueError, match=r"Expected input batch_size \(4\) to match target batch_size \(5\)"):
                compiled(leaf, y, p, _MASK, _MASK | (y < 0))

        class Model(torch.nn.Module):
            def forward(self, *arguments: Tensor) -> Tensor:
                return call(*arguments)

        if call is not _DEPEND_ON_DATA["gradient of the gradient"]:
            arguments = (x, y, p, _MASK, _MASK.clone())
            assert_close(torch.export.export(Model(), arguments).module()(*arguments), expected)


def test_dimensions_marked_as_unbacked() -> None:
    x, y, _ = (tensor.clone() for tensor in _MASKED)
    for tensor in (x, y):
        torch._dynamo.decorators.mark_unbacked(tensor, 0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(nllx.functional.cross_entropy, backend=counter, fullgraph=True)
    for rows in (6, 5, 1):
        assert_close(compiled(x[:rows], y[:rows]), nllx.functional.cross_entropy(x[:rows], y[:rows]))


_NUMPY: dict[str, dict[str, Any]] = {
    "float64": {"label_smoothing": np.float64(0.1)},
    "float32": {"label_smoothing": np.float32(0.25)},
    "int64": {"ignore_index": np.int64(2)},
    "int8": {"ignore_index": np.int8(-100)},
    "both": {"ignore_index": np.int32(-100), "label_smoothing": np.float64(0.1)},
}


@pytest.mark.parametrize("options", _NUMPY.values(), ids=_NUMPY.keys())
def test_numbers_of_numpy(options: dict[str, Any]) -> None:
    """In functions, modules and patched torch, compiled and not."""
    x = _MASKED[0].clone().requires_grad_()
    y = torch.where(_MASKED[1] < 0, int(options.get("ignore_index", -100)), _MASKED[1])
    expected = torch.nn.functional.cross_entropy(x, y, **{name: value.item() for name, value in options.items()})
    module = nllx.CrossEntropyLoss(**options)
    torchs = torch.nn.CrossEntropyLoss(**options)
    calls: list[Callable[[], Tensor]] = [
        lambda: nllx.functional.cross_entropy(x, y, **options),
        lambda: module(x, y),
        lambda: nllx.functional.cross_entropy_value_and_grad(x.detach(), y, **options)[0],
        lambda: torch.nn.functional.cross_entropy(x, y, **options),
        lambda: torchs(x, y),
    ]
    with nllx.patched():
        for call in calls:
            assert_close(call().detach(), expected.detach())
            # Of a float32 the compiler knows no value where torch's or nllx's function gets it; nllx's module keeps Python's.
            if "float32" not in str([value.dtype for value in options.values()]) or call is calls[1]:
                assert_close(_compile(call, "aot_eager")().detach(), expected.detach())
    assert_close(torch.jit.script(module)(x, y).detach(), expected.detach())


def test_numbers_of_numpy_made_in_compiled_code() -> None:
    x, y = _MASKED[0], torch.where(_MASKED[1] < 0, 2, _MASKED[1])
    calls: list[Callable[[], Tensor]] = [
        lambda: nllx.functional.cross_entropy(x, y, ignore_index=np.int64(2)),
        lambda: nllx.functional.nll_loss(x, y, ignore_index=np.int64(2)),
        lambda: nllx.CrossEntropyLoss(ignore_index=np.int64(2), zero_division=np.float64(0))(x, y),
    ]
    for call in calls:
        assert_close(_compile(call, "aot_eager")(), call())
    over_nothing = nllx.CrossEntropyLoss(zero_division=np.float64(0))
    assert_close(_compile(lambda: over_nothing(x, y * 0 - 100), "aot_eager")(), torch.tensor(0.0))
    with pytest.raises(ValueError, match="Overflow"):
        nllx.functional.cross_entropy(x, y, ignore_index=np.uint64(2**63))

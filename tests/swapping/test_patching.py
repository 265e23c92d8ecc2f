"""torch's losses routed to nllx and back, and the losses of a model converted."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import functools
import importlib
import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed.tensor
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import nllx

F = torch.nn.functional
_TORCH = {name: getattr(F, name) for name in nllx.functional.__all__ if hasattr(F, name)}
_x = torch.arange(12.0).view(3, 4).sin()
_t = torch.tensor([0, 3, 1])
_w = torch.tensor([0.5, 1.0, 2.0, 4.0])


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    nllx.patch_report(reset=True)
    yield
    nllx.unpatch()
    assert _is_torchs()


def _is_torchs() -> bool:
    return all(getattr(F, name) is function for name, function in _TORCH.items())


def _gradient(loss: Callable[[Tensor], Tensor], x: Tensor = _x) -> tuple[Tensor, Tensor, str]:
    leaf = x.detach().requires_grad_()
    value = loss(leaf)
    assert value.grad_fn is not None
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0], value.grad_fn.name()


_ENTROPY, _LIKELIHOOD = torch.nn.CrossEntropyLoss(_w, ignore_index=1), torch.nn.NLLLoss(_w)
_LOG_SOFTMAX = torch.nn.LogSoftmax(dim=0)
_CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda x: F.cross_entropy(x, _t, _w, label_smoothing=0.1, reduction="sum"),
    "cross_entropy by position": lambda x: F.cross_entropy(x, _t, _w, None, 3, None, "mean", 0.2),
    "probabilities": lambda x: F.cross_entropy(x, _x.softmax(1)),
    "CrossEntropyLoss": lambda x: _ENTROPY(x, _t),
    "nll_loss": lambda x: F.nll_loss(x, _t, _w, ignore_index=0, reduction="none"),
    "NLLLoss": lambda x: _LIKELIHOOD(x, _t),
    "log_softmax": lambda x: F.log_softmax(x, dim=1, dtype=torch.float64),
    "LogSoftmax": lambda x: _LOG_SOFTMAX(x),
    "mse_loss": lambda x: F.mse_loss(x, _x.flip(0), reduction="sum", weight=_x.exp()),
    "MSELoss": lambda x: torch.nn.MSELoss()(x, _x.flip(0)),
}


@pytest.mark.parametrize("call", _CALLS.values(), ids=_CALLS.keys())
def test_losses_run_on_nllx_and_back(call: Callable[[Tensor], Tensor]) -> None:
    *expected, torchs = _gradient(call)
    nllx.patch()
    *got, ours = _gradient(call)
    assert_close(got, expected)
    assert "nllx" in ours.lower()
    assert sum(counts.get("nllx", 0) for counts in nllx.patch_report().values()) == 1
    nllx.unpatch()
    assert _gradient(call)[2] == torchs
    assert sum(sum(counts.values()) for counts in nllx.patch_report().values()) == 1


class _Handles(Tensor):
    """A library's own tensor, which knows torch's functions by identity."""

    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


_FALL_THROUGH: dict[str, tuple[str, Callable[[], Any]]] = {
    "complex": ("dtype torch.complex64", lambda: F.log_softmax(_x + 0j, 1)),
    "nested": (
        "nested",
        lambda: F.log_softmax(torch.nested.nested_tensor([_x, _x[:2]], layout=torch.jagged), 2).values(),
    ),
    "sparse": ("layout torch.sparse_coo", lambda: F.log_softmax(_x.to_sparse(), 1)),
    "negative smoothing": ("label_smoothing below 0", lambda: F.cross_entropy(_x, _t, label_smoothing=-0.5)),
    "complex weight": ("complex target or weight", lambda: F.cross_entropy(_x, _x.softmax(1), _w + 0j)),
    "subclass": (
        "a subclass of Tensor with a __torch_function__ of its own",
        lambda: F.cross_entropy(_x.as_subclass(_Handles), _t).as_subclass(Tensor),
    ),
}


def _attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize(("reason", "call"), _FALL_THROUGH.values(), ids=_FALL_THROUGH.keys())
def test_what_nllx_does_not_take_goes_to_torch(reason: str, call: Callable[[], Any]) -> None:
    expected = _attempt(call)
    _Handles.seen.clear()
    with nllx.patched():
        got = _attempt(call)
    if isinstance(expected, Tensor):
        assert_close(got, expected)
    else:
        assert got == expected
    (counts,) = (counts for counts in nllx.patch_report().values() if counts)
    assert counts == {reason: 1}
    if "subclass" in reason:
        assert _Handles.seen[0] is _TORCH["cross_entropy"]


def test_sharded_tensors_go_to_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        x = torch.distributed.tensor.distribute_tensor(_x, mesh, [torch.distributed.tensor.Shard(0)])
        expected = F.log_softmax(x, -1).full_tensor()
        with nllx.patched():
            assert_close(F.log_softmax(x, -1).full_tensor(), expected)
    finally:
        torch.distributed.destroy_process_group()
    assert nllx.patch_report()["log_softmax"] == {"DTensor": 1}


def test_plain_subclasses_and_modes_run_on_nllx() -> None:
    class Plain(Tensor):
        pass

    expected = F.cross_entropy(_x, _t)
    with nllx.patched():
        assert_close(F.cross_entropy(_x.as_subclass(Plain), _t).as_subclass(Tensor), expected)
        with torch.device("cpu"):
            assert_close(F.cross_entropy(torch.nn.Parameter(_x), _t), expected)
    assert nllx.patch_report()["cross_entropy"] == {"nllx": 2}


def test_blocks_inside_of_blocks_and_exceptions() -> None:
    with nllx.patched():
        with nllx.patched():
            pass
        assert not _is_torchs()
    assert _is_torchs()
    nllx.patch()
    nllx.patch()
    with nllx.patched():
        nllx.unpatch()
        assert not _is_torchs()
    assert _is_torchs()
    with pytest.raises(IndexError), nllx.patched():
        F.cross_entropy(_x, _t + 4)
    assert _is_torchs()

    @nllx.patched()
    def decorated() -> bool:
        return _is_torchs()

    assert not decorated()
    assert not decorated()
    assert _is_torchs()


def test_many_threads() -> None:
    """Each in its own block; the functions are torch's again after the last one, and every call is counted."""
    start = threading.Barrier(8)
    expected = [*_gradient(_CALLS["cross_entropy"])[:2]]

    def work(_: int) -> None:
        start.wait()
        for _ in range(50):
            with nllx.patched():
                assert_close([*_gradient(_CALLS["cross_entropy"])[:2]], expected)

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert _is_torchs()
    assert nllx.patch_report()["cross_entropy"] == {"nllx": 400}


def test_somebody_elses_patch_survives() -> None:
    original, calls = F.cross_entropy, []
    try:
        nllx.patch()
        ours = F.cross_entropy

        @functools.wraps(ours)
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            calls.append("wrapped")
            return ours(*args, **kwargs)

        F.cross_entropy = wrapped
        nllx.unpatch()
        assert F.cross_entropy is wrapped
        assert "nllx" not in _gradient(lambda x: F.cross_entropy(x, _t))[2].lower()
        assert calls == ["wrapped"]
        with nllx.patched():  # on again, underneath the wrapper
            with pytest.warns(UserWarning, match="cross_entropy is .*which took the place of nllx's"):
                nllx.patch()
            assert F.cross_entropy is wrapped
            assert "nllx" in _gradient(lambda x: F.cross_entropy(x, _t))[2].lower()
            F.cross_entropy(_x, _t, label_smoothing=-0.5)  # torch's, not in a circle
        nllx.unpatch()
        F.cross_entropy = original  # the owner takes it away
        with nllx.patched():
            assert F.cross_entropy is ours
        assert F.cross_entropy is original
    finally:
        F.cross_entropy = original


def test_somebody_puts_torchs_function_back() -> None:
    nllx.patch()
    F.cross_entropy = _TORCH["cross_entropy"]
    nllx.patch()
    assert F.cross_entropy is not _TORCH["cross_entropy"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    torch._dynamo.reset()
    criterion = torch.nn.CrossEntropyLoss(_w)

    def loss(x: Tensor) -> Tensor:
        return criterion(x, _t) + F.nll_loss(F.log_softmax(x, 1), _t)

    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=dynamic)
    expected = _gradient(loss)[:2]
    with nllx.patched():
        assert_close(_gradient(compiled)[:2], expected)
        assert sum("nllx" in name for name in names) == 3
        names.clear()
    assert_close(_gradient(compiled)[:2], expected)  # torch's again: another graph
    assert names
    assert not any("nllx" in name for name in names)


def test_checkpoint_recomputes_with_the_same_loss() -> None:
    criterion = torch.nn.CrossEntropyLoss()
    expected = _gradient(lambda x: criterion(x * 2, _t))[1]
    with nllx.patched():
        for reentrant in (False, True):
            leaf = _x.clone().requires_grad_()
            value = torch.utils.checkpoint.checkpoint(lambda x: criterion(x * 2, _t), leaf, use_reentrant=reentrant)
            value.backward()
            assert_close(leaf.grad, expected)
    assert nllx.patch_report()["cross_entropy"] == {"nllx": 4}


def test_implicit_dimension_warns_where_it_is_called() -> None:
    with nllx.patched(), pytest.warns(UserWarning, match="Implicit dimension") as seen:
        F.log_softmax(_x)
    assert seen[0].filename == __file__


class _Own(torch.nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


def test_convert(capsys: pytest.CaptureFixture[str]) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LogSoftmax(1))
            self.likelihood = torch.nn.NLLLoss(_w.clone(), ignore_index=3)
            self.entropy = torch.nn.CrossEntropyLoss(_w.clone(), label_smoothing=0.1, reduction="sum")
            self.own = _Own()

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            x = self.body(x)
            return self.likelihood(x, target) + self.entropy(x, target) + self.own(x, target)

    torch.manual_seed(0)
    net = Net().eval()
    plain = copy.deepcopy(net)
    calls: list[Any] = []
    net.entropy.register_forward_hook(lambda module, args, output: calls.append(module))
    entropy, state = net.entropy, {name: value.clone() for name, value in net.state_dict().items()}
    assert nllx.convert(net) is net
    assert net.entropy is entropy
    assert [type(m) for m in (net.body[1], net.likelihood, net.entropy, net.own)] == [
        nllx.LogSoftmax,
        nllx.NLLLoss,
        nllx.CrossEntropyLoss,
        _Own,
    ]
    assert (net.entropy.label_smoothing, net.entropy.reduction, net.likelihood.ignore_index) == (0.1, "sum", 3)
    assert not net.entropy.training
    assert_close(dict(net.state_dict()), state)
    assert_close(_gradient(lambda x: net(x, _t))[:2], _gradient(lambda x: plain(x, _t))[:2])
    assert calls == [entropy]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["body.1", "likelihood", "entropy"]
    assert nllx.convert(net, verbose=False) is net
    assert type(nllx.convert(torch.nn.NLLLoss())) is nllx.NLLLoss
    assert "the module itself" in capsys.readouterr().out
    assert_close(copy.deepcopy(net)(_x, _t), plain(_x, _t))


def test_a_replacement_from_before_is_taken_away() -> None:
    """unittest.mock puts back what it found, which is torch's function and no wrapper of nllx's."""
    before = mock.patch.object(F, "cross_entropy", side_effect=F.cross_entropy)
    before.start()
    nllx.patch()
    before.stop()
    for _ in range(2):
        nllx.patch_report(reset=True)
        nllx.patch()
        F.cross_entropy(_x, _t)
        assert nllx.patch_report()["cross_entropy"] == {"nllx": 1}
        nllx.unpatch()
        assert _is_torchs()


def test_graphs_do_not_depend_on_the_depth_of_blocks() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: F.cross_entropy(x, _t), backend=backend, fullgraph=True)

    def run(depth: int) -> None:
        if depth:
            with nllx.patched():
                assert_close(compiled(_x), F.cross_entropy(_x, _t))
                run(depth - 1)

    run(12)
    compiled(_x)
    assert len(graphs) == 2  # patched and not
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "module", [torch.nn.CrossEntropyLoss(), torch.nn.NLLLoss(), torch.nn.LogSoftmax(1)], ids=lambda m: type(m).__name__
)
def test_script_compiles_torchs_function(module: torch.nn.Module) -> None:
    arguments = (_x,) if isinstance(module, torch.nn.LogSoftmax) else (_x, _t)
    with nllx.patched():
        assert_close(torch.jit.script(module)(*arguments), module(*arguments))
    assert_close(torch.jit.script(module)(*arguments), module(*arguments))


def test_functions_are_pickled_as_torchs() -> None:
    with nllx.patched():
        loaded = pickle.loads(pickle.dumps(F.cross_entropy))
        assert loaded is F.cross_entropy
        file = io.BytesIO()
        torch.save({"loss": F.cross_entropy}, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)["loss"] is _TORCH["cross_entropy"]


class _Doubled(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function)
        result = function(*args, **(kwargs or {}))
        return 2 * result if function is _TORCH["cross_entropy"] else result


def test_modes_see_torchs_function_alone() -> None:
    expected = F.cross_entropy(_x, _t)
    with nllx.patched(), _Doubled() as mode:
        actual = F.cross_entropy(_x, _t)
    assert_close(actual, 2 * expected)
    assert mode.seen[0] is _TORCH["cross_entropy"]
    assert nllx.patch_report()["cross_entropy"] == {"a TorchFunctionMode": 1}


def test_default_devices_stay_on_nllx() -> None:
    with nllx.patched(), torch.device("cpu"):
        F.cross_entropy(_x, _t)
    assert nllx.patch_report()["cross_entropy"] == {"nllx": 1}


class _Handled(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (
            "handled"
            if function in _TORCH.values()
            else super().__torch_function__(function, types, args, kwargs or {})
        )


@pytest.mark.parametrize("place", ["input", "target", "weight"])
def test_subclasses_anywhere_handle_torchs_function(place: str) -> None:
    arguments = {"input": _x, "target": _t, "weight": _w}
    arguments[place] = arguments[place].as_subclass(_Handled)
    with nllx.patched():
        assert F.cross_entropy(**arguments) == "handled"
        assert F.nll_loss(**arguments) == "handled"


@pytest.mark.parametrize("smoothing", [-1, np.float32(-0.1), torch.tensor(-0.1), -0.5, float("nan")])
def test_smoothing_below_zero_is_torchs(smoothing: Any) -> None:
    expected = F.cross_entropy(_x, _t, label_smoothing=smoothing)
    with nllx.patched():
        assert_close(F.cross_entropy(_x, _t, label_smoothing=smoothing), expected)
    assert nllx.patch_report()["cross_entropy"] == {"label_smoothing below 0": 1}


def test_sparse_probabilities_are_torchs() -> None:
    sparse = _x.softmax(1).to_sparse()
    expected = F.cross_entropy(_x, sparse)
    with nllx.patched():
        assert_close(F.cross_entropy(_x, sparse), expected)
    assert nllx.patch_report()["cross_entropy"] == {"layout torch.sparse_coo": 1}


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize(
    "options", [{"size_average": False}, {"reduce": False}, {"size_average": True, "reduce": True}]
)
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_deprecated_reductions(name: str, options: dict[str, bool]) -> None:
    expected = getattr(F, name)(_x, _t, _w, **options)
    with nllx.patched():
        assert_close(getattr(F, name)(_x, _t, _w, **options), expected)
    assert nllx.patch_report()[name] == {"nllx": 1}


def test_bodies_that_run_later_are_not_decorated() -> None:
    def generator() -> Iterator[int]:
        yield 1

    async def coroutine() -> None: ...

    for function in (generator, coroutine):
        with pytest.raises(TypeError, match=r"runs after the call; write `with nllx.patched\(\):` inside"):
            nllx.patched()(function)

    @nllx.patched()
    def plain() -> bool:
        return _is_torchs()

    assert not plain()
    assert _is_torchs()


def test_convert_leaves_replaced_forwards(capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.ModuleDict({"hooked": torch.nn.CrossEntropyLoss(), "plain": torch.nn.CrossEntropyLoss()})
    model["hooked"].forward = functools.partial(model["hooked"].forward)
    model["old"] = torch.nn.NLLLoss2d()
    nllx.convert(model)
    assert [type(model[name]) for name in model] == [
        torch.nn.CrossEntropyLoss,
        nllx.CrossEntropyLoss,
        torch.nn.NLLLoss2d,
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "nllx.convert: hooked: CrossEntropyLoss() is left as it is, since its forward has been replaced",
        "nllx.convert: plain: CrossEntropyLoss()",
    ]


def test_counts_of_many_threads_add_up() -> None:
    with nllx.patched(), concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: [F.cross_entropy(_x, _t) for _ in range(200)], range(16)))
    assert nllx.patch_report()["cross_entropy"] == {"nllx": 3200}


class _Labelled(torch.nn.Module):
    def __init__(self, loss: torch.nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(x, y)


_EXPORTED: dict[str, Callable[[], tuple[torch.nn.Module, tuple[Tensor, ...]]]] = {
    "LogSoftmax": lambda: (torch.nn.Sequential(torch.nn.LogSoftmax(1)), (_x,)),
    "nllx.LogSoftmax": lambda: (torch.nn.Sequential(nllx.LogSoftmax(1)), (_x,)),
    "CrossEntropyLoss": lambda: (_Labelled(torch.nn.CrossEntropyLoss(_w)), (_x, _t)),
    "nllx.CrossEntropyLoss": lambda: (_Labelled(nllx.CrossEntropyLoss(_w, ignore_index=3)), (_x, _t.int())),
    "smoothed": lambda: (_Labelled(nllx.CrossEntropyLoss(_w, label_smoothing=0.1, ignore_index=3)), (_x, _t)),
    "probabilities": lambda: (_Labelled(nllx.CrossEntropyLoss(_w)), (_x, _x.softmax(1))),
    "nllx.NLLLoss": lambda: (_Labelled(nllx.NLLLoss(_w, reduction="none")), (_x, _t)),
    "over nothing": lambda: (_Labelled(nllx.NLLLoss(zero_division=0, ignore_index=3)), (_x, _t * 0 + 3)),
}


@pytest.mark.parametrize("model", _EXPORTED.values(), ids=_EXPORTED.keys())
@pytest.mark.parametrize("patched", [False, True])
def test_onnx_gets_torchs_operators(model: Callable[[], Any], patched: bool) -> None:
    """As both exporters trace it: torch.export, and torch.jit.trace. What they make of it is in tests/integrations."""
    module, arguments = model()
    expected = module(*arguments)
    with (
        mock.patch("torch.onnx.is_in_onnx_export", return_value=True),
        nllx.patched() if patched else contextlib.nullcontext(),
    ):
        program = torch.export.export(module, arguments)
        traced = torch.jit.trace(module, arguments, check_trace=False)
    operators = [
        *(str(node.target) for node in program.graph.nodes),
        *(node.kind() for node in traced.inlined_graph.nodes()),
    ]
    assert not [operator for operator in operators if "nllx" in operator]
    for run in (program.module(), traced):
        assert_close(run(*arguments), expected)


class _Registered(Tensor):
    """As fastai's tensors: a function that is not registered refuses them."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in _TORCH.values() and str(function).startswith("<function"):
            return NotImplemented
        return super().__torch_function__(function, (Tensor,), args, kwargs or {})


def test_classes_that_know_torchs_functions_alone() -> None:
    x, target = _x.as_subclass(_Registered), _t.as_subclass(_Registered)
    modules = nllx.convert(torch.nn.ModuleList([torch.nn.CrossEntropyLoss(_w), torch.nn.NLLLoss()]), verbose=False)
    calls: list[Callable[[Any, Any], Tensor]] = [
        lambda x, y: nllx.functional.cross_entropy(x, y, _w, label_smoothing=0.1, inplace_backward=True),
        lambda x, y: nllx.functional.nll_loss(x, y, reduction="none"),
        lambda x, y: nllx.functional.log_softmax(x, 1),
        *modules,
    ]
    for call in calls:
        for mixed in (call(x, target), call(x, _t), call(_x, target) if call is not calls[2] else call(x, _t)):
            assert_close(mixed.as_subclass(Tensor), call(_x, _t))
    for refused in (
        lambda: nllx.functional.cross_entropy_value_and_grad(x, target),
        lambda: nllx.functional.cross_entropy(x, target, zero_division=0),
    ):
        with pytest.raises(TypeError, match=r"no implementation found for 'nllx\.functional\.cross_entropy"):
            refused()

    class Nothing(Tensor):
        @classmethod
        def __torch_function__(cls, *arguments: Any) -> Any:
            return NotImplemented

    with pytest.raises(TypeError, match=r"no implementation found for 'nllx\.functional\.log_softmax"):
        nllx.functional.log_softmax(_x.as_subclass(Nothing), 1)

    class Refuses(TorchFunctionMode):
        def __torch_function__(self, *arguments: Any) -> Any:
            return NotImplemented

    with Refuses(), pytest.raises(TypeError, match=r"no implementation found for 'nllx\.functional\.cross_entropy"):
        nllx.functional.cross_entropy(_x, _t)


def _scripted(x: Tensor, y: Tensor) -> Tensor:
    scores = nllx.functional.log_softmax(x, 1)
    return nllx.functional.nll_loss(scores, y) + nllx.functional.cross_entropy(x, y, label_smoothing=0.1)


def test_script_of_functions_that_call_nllx() -> None:
    assert_close(torch.jit.script(_scripted)(_x, _t), _scripted(_x, _t))


# Checkpoints whose forward and recomputation are not patched alike. Each ends with the backward.


def _head(a: Tensor) -> Tensor:
    return F.cross_entropy(a * 2, _t)


def _checkpointed(head: Callable[[Tensor], Tensor], a: Tensor, **options: Any) -> Tensor:
    return checkpoint(head, a, **{"use_reentrant": False, **options})


def _forward_alone(a: Tensor, **options: Any) -> None:
    with nllx.patched():
        loss = _checkpointed(_head, a, **options)
    loss.backward()


def _patch_and_back(a: Tensor) -> None:
    nllx.patch()
    loss = _checkpointed(_head, a)
    nllx.unpatch()
    loss.backward()


def _nested(a: Tensor) -> None:
    with nllx.patched():
        loss = _checkpointed(lambda b: _checkpointed(_head, b), a)
    loss.backward()


def _more_is_saved(a: Tensor) -> None:
    """The recomputation begins with another operation than the loss."""
    with nllx.patched():
        loss = _checkpointed(lambda b: _head(b) * torch.ones([], requires_grad=True), a)
    loss.backward()


def _second_backward(a: Tensor) -> None:
    with nllx.patched():
        loss = _checkpointed(_head, a)
        loss.backward(retain_graph=True)
    a.grad = None
    loss.backward()


def _in_a_wrapper(a: Tensor) -> None:
    module = checkpoint_wrapper(_Labelled(torch.nn.CrossEntropyLoss()))
    with nllx.patched():
        loss = module(a * 2, _t)
    loss.backward()


def _one_of_two(a: Tensor) -> None:
    def head(b: Tensor) -> Tensor:
        first = F.cross_entropy(b * 2, _t)
        with nllx.patched():
            second = F.cross_entropy(b * 2, _t)
        return 0.25 * first + 0.5 * second + 0.25 * F.cross_entropy(b * 2, _t)

    _checkpointed(head, a).backward()


def _inside_of_another(a: Tensor) -> None:
    def head(b: Tensor) -> Tensor:
        with nllx.patched():
            inner = _checkpointed(_head, b)
        return 0.5 * inner + 0.5 * _head(b)

    _checkpointed(head, a).backward()


def _backward_alone(a: Tensor) -> None:
    loss = _checkpointed(_head, a)
    with nllx.patched():
        loss.backward()


def _nested_backward_alone(a: Tensor) -> None:
    loss = _checkpointed(lambda b: _checkpointed(_head, b), a)
    with nllx.patched():
        loss.backward()


_STEPS: dict[str, tuple[Callable[[Tensor], None], dict[str, int]]] = {
    "forward alone": (_forward_alone, {"nllx": 2}),
    "to its end": (functools.partial(_forward_alone, early_stop=False), {"nllx": 2}),
    "reentrant": (functools.partial(_forward_alone, use_reentrant=True), {"nllx": 1}),
    "patch and unpatch": (_patch_and_back, {"nllx": 2}),
    "nested": (_nested, {"nllx": 2}),
    "more is saved": (_more_is_saved, {"nllx": 2}),
    "second backward": (_second_backward, {"nllx": 3}),
    "wrapper": (_in_a_wrapper, {"nllx": 2}),
    "one of two": (_one_of_two, {"nllx": 2, "a checkpoint whose forward ran on torch": 2}),
    "inside of another": (_inside_of_another, {"nllx": 3}),
    "backward alone": (_backward_alone, {"a checkpoint whose forward ran on torch": 1}),
    "nested, backward alone": (_nested_backward_alone, {"a checkpoint whose forward ran on torch": 1}),
}


@pytest.mark.parametrize(("step", "counts"), _STEPS.values(), ids=_STEPS.keys())
def test_checkpoints_are_computed_again_as_they_were(step: Callable[[Tensor], None], counts: dict[str, int]) -> None:
    leaf = _x.clone().requires_grad_()
    step(leaf)
    assert_close(leaf.grad, _gradient(_head)[1])
    assert nllx.patch_report()["cross_entropy"] == counts
    assert _is_torchs()


def test_reload() -> None:
    patching = sys.modules["nllx.patching"]
    for module in (patching, nllx.functional):
        nllx.patch()
        importlib.reload(module)
        assert "nllx" in _gradient(lambda x: F.cross_entropy(x, _t))[2].lower()
        patching.patch()
        nllx.unpatch()
        assert _is_torchs()
    with nllx.patched():
        importlib.reload(patching)
        with patching.patched():
            F.cross_entropy(_x, _t)
        assert not _is_torchs()
    assert _is_torchs()
    assert nllx.patch_report()["cross_entropy"] == {"nllx": 3}


def test_revert(capsys: pytest.CaptureFixture[str]) -> None:
    net = torch.nn.ModuleDict(
        {
            "entropy": torch.nn.CrossEntropyLoss(_w, label_smoothing=0.1),
            "scores": torch.nn.Sequential(torch.nn.LogSoftmax(1)),
        }
    )
    before = {name: (child, type(child), dict(vars(child))) for name, child in net.named_modules()}
    nllx.convert(net, verbose=False)
    assert type(net["entropy"]) is nllx.CrossEntropyLoss
    assert nllx.revert(net) is net
    for name, child in net.named_modules():
        same, kind, state = before[name]
        assert child is same
        assert type(child) is kind
        assert vars(child) == state
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == ["entropy", "scores.0"]
    assert "nllx" not in _gradient(lambda x: net["entropy"](x, _t))[2].lower()

    built = torch.nn.ModuleList([nllx.NLLLoss(reduction="sum"), nllx.CrossEntropyLoss(inplace_backward=True)])
    nllx.revert(built, verbose=False)
    assert [type(child) for child in built] == [torch.nn.NLLLoss, torch.nn.CrossEntropyLoss]
    assert repr(built[1]) == "CrossEntropyLoss()"
    wrapped = nllx.NLLLoss()
    wrapped.forward = functools.partial(wrapped.forward)
    assert type(nllx.revert(wrapped)) is nllx.NLLLoss
    assert "is left as it is, since its forward has been replaced" in capsys.readouterr().out
    wrapped(_x, _t)
    kept = torch.nn.ModuleList([nllx.NLLLoss(), nllx.NLLLoss(zero_division=0)])
    with pytest.raises(ValueError, match=r"nllx.revert: 1: NLLLoss\(zero_division=0\)"):
        nllx.revert(kept)
    assert type(kept[0]) is nllx.NLLLoss
    assert type(nllx.revert(nllx.LogSoftmax(1))) is torch.nn.LogSoftmax
    assert "the module itself" in capsys.readouterr().out


def test_nothing_to_convert(capsys: pytest.CaptureFixture[str]) -> None:
    nllx.convert(torch.nn.Linear(2, 2))
    assert "Linear holds no CrossEntropyLoss, NLLLoss, LogSoftmax or MSELoss of torch" in capsys.readouterr().out
    nllx.revert(torch.nn.Linear(2, 2))
    assert capsys.readouterr().out == "nllx.revert: Linear holds no loss of nllx\n"
    nllx.convert(torch.nn.Linear(2, 2), verbose=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "log_softmax", "mse_loss"])
def test_compiled_after_something_else_was(name: str) -> None:
    """Dynamo then traces into the replacements, where a patched process that compiles for the first time takes them whole."""
    torch.compiler.reset()
    torch.compile(lambda x: x + 1, backend="eager")(_x)
    target = {"cross_entropy": (_t,), "nll_loss": (_t,), "log_softmax": (1,), "mse_loss": (_x.flip(0),)}[name]
    expected = getattr(F, name)(_x, *target)
    with nllx.patched():
        compiled = torch.compile(lambda x: getattr(F, name)(x, *target), backend="eager", fullgraph=True)
        assert_close(compiled(_x), expected)
        promoted = torch.compile(lambda x, y: F.mse_loss(x, y), backend="eager", fullgraph=True)
        assert_close(promoted(_x, _x.flip(0).double()), _TORCH["mse_loss"](_x, _x.flip(0).double()))

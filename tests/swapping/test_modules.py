"""The modules: as torch's in everything that user code can see of them."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import nllx

_MODULES = ("CrossEntropyLoss", "NLLLoss", "LogSoftmax", "MSELoss")
_LOSSES = _MODULES[:2]
_FUNCTIONS = ("cross_entropy", "nll_loss", "log_softmax", "mse_loss")

x = torch.linspace(-2, 2, 24).reshape(4, 6)
t = torch.tensor([0, 5, -100, 3])


_OPTIONS = ("logit_scale", "softcap", "temperature", "z_loss", "sample_weight", "divisor")
_ADDED = [(name, inspect.Parameter.KEYWORD_ONLY) for name in ("inplace_backward", "zero_division", *_OPTIONS)]


def _parameters(function: Any) -> list[tuple[str, Any, Any]]:
    """Without what nllx adds to torch's: keyword-only, and without effect unless given."""
    parameters = [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
    return [p for p in parameters if p[:2] not in _ADDED]


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_signature_of_function(name: str) -> None:
    assert _parameters(getattr(nllx.functional, name)) == _parameters(getattr(torch.nn.functional, name))


@pytest.mark.parametrize("name", _MODULES)
def test_signature_of_module(name: str) -> None:
    ours, theirs = getattr(nllx, name), getattr(torch.nn, name)
    assert _parameters(ours.__init__) == _parameters(theirs.__init__)
    assert _parameters(ours.forward) == _parameters(theirs.forward)


def test_public_names() -> None:
    assert set(_MODULES) == set(nllx.modules.__all__) <= set(nllx.__all__)
    own = {"cross_entropy_value_and_grad", "softmax_statistics", "SoftmaxStatistics"}
    assert set(nllx.functional.__all__) == {*_FUNCTIONS, *own}
    for name in (*_MODULES, "functional"):
        assert getattr(nllx, name).__doc__


_ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("CrossEntropyLoss", {}),
    ("CrossEntropyLoss", {"weight": torch.arange(1.0, 7.0), "ignore_index": 5, "label_smoothing": 0.2}),
    ("CrossEntropyLoss", {"reduction": "none"}),
    ("CrossEntropyLoss", {"reduction": "sum", "ignore_index": -1}),
    ("NLLLoss", {}),
    ("NLLLoss", {"weight": torch.arange(1.0, 7.0), "ignore_index": 3}),
    ("NLLLoss", {"reduction": "sum"}),
    ("LogSoftmax", {"dim": 1}),
    ("LogSoftmax", {"dim": -2}),
    ("MSELoss", {}),
    ("MSELoss", {"reduction": "none"}),
]


def _call(module: torch.nn.Module) -> torch.Tensor:
    target = torch.where(t == -100, 1, t) if getattr(module, "ignore_index", -100) != -100 else t
    if isinstance(module, torch.nn.MSELoss):
        return module(x, x.flip(0))
    return module(x) if isinstance(module, torch.nn.LogSoftmax) else module(x, target)


@pytest.mark.parametrize(("name", "arguments"), _ARGUMENTS)
def test_like_torchs(name: str, arguments: dict[str, Any]) -> None:
    ours, theirs = getattr(nllx, name)(**arguments), getattr(torch.nn, name)(**arguments)
    assert repr(ours) == repr(theirs)
    assert ours.extra_repr() == theirs.extra_repr()
    assert_close(_call(ours), _call(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in theirs.named_buffers()]
    assert list(ours.named_parameters()) == []
    for attribute in ("weight", "ignore_index", "label_smoothing", "reduction", "dim"):
        assert hasattr(ours, attribute) == hasattr(theirs, attribute)
        assert str(getattr(ours, attribute, None)) == str(getattr(theirs, attribute, None))
    assert ours.__constants__ == theirs.__constants__


@pytest.mark.parametrize("name", _LOSSES)
def test_isinstance(name: str) -> None:
    loss = getattr(nllx, name)()
    assert isinstance(loss, torch.nn.modules.loss._Loss)
    assert isinstance(loss, torch.nn.modules.loss._WeightedLoss)
    assert isinstance(loss, torch.nn.Module)


@pytest.mark.parametrize("name", _MODULES)
def test_positional_arguments(name: str) -> None:
    given = {
        "CrossEntropyLoss": (torch.ones(6), None, 5, None, "sum", 0.1),
        "NLLLoss": (torch.ones(6), None, 5, None, "sum"),
        "LogSoftmax": (0,),
        "MSELoss": (None, None, "sum"),
    }[name]
    assert_close(_call(getattr(nllx, name)(*given)), _call(getattr(torch.nn, name)(*given)))


def _pickled(module: torch.nn.Module) -> torch.nn.Module:
    return pickle.loads(pickle.dumps(module))


def _saved(module: torch.nn.Module) -> torch.nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy, _pickled, _saved])
@pytest.mark.parametrize(("name", "arguments"), _ARGUMENTS)
def test_copies(name: str, arguments: dict[str, Any], copy_of: Any) -> None:
    module = getattr(nllx, name)(**arguments)
    copied = copy_of(module)
    assert type(copied) is type(module)
    assert repr(copied) == repr(module)
    assert_close(_call(copied), _call(module), rtol=0, atol=0)
    if arguments.get("weight") is not None and copy_of is not copy.copy:
        assert copied.weight.data_ptr() != module.weight.data_ptr()


def test_log_softmax_from_an_old_pickle() -> None:
    """Modules pickled without a dim get one, as torch's."""
    module = nllx.LogSoftmax(1)
    state = {key: value for key, value in module.__dict__.items() if key != "dim"}
    old = nllx.LogSoftmax.__new__(nllx.LogSoftmax)
    old.__setstate__(state)
    assert old.dim is None


@pytest.mark.parametrize("name", _LOSSES)
def test_weight_is_a_buffer(name: str) -> None:
    weight = torch.arange(1.0, 7.0)
    loss = getattr(nllx, name)(weight)
    assert_close(loss.state_dict()["weight"], weight)
    assert loss.double().weight.dtype == torch.float64
    assert loss.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert loss.to("meta").weight.device.type == "meta"
    theirs = getattr(torch.nn, name)(torch.zeros(6))
    theirs.load_state_dict(getattr(nllx, name)(weight).state_dict())
    assert_close(theirs.weight, weight)
    ours = getattr(nllx, name)(torch.zeros(6))
    ours.load_state_dict(theirs.state_dict())
    assert_close(_call(ours), _call(theirs))
    shared = getattr(nllx, name)(weight.clone()).share_memory()
    assert shared.weight.is_shared()


@pytest.mark.parametrize("name", _LOSSES)
def test_functional_call(name: str) -> None:
    loss, other = getattr(nllx, name)(torch.ones(6)), torch.arange(1.0, 7.0)
    expected = getattr(torch.nn, name)(other)(x, t)
    assert_close(torch.func.functional_call(loss, {"weight": other}, (x, t)), expected)
    assert_close(loss.weight, torch.ones(6))


def test_attributes_may_be_changed() -> None:
    ours, theirs = nllx.CrossEntropyLoss(), torch.nn.CrossEntropyLoss()
    for module in (ours, theirs):
        module.reduction, module.label_smoothing, module.ignore_index, module.weight = "sum", 0.3, 5, torch.ones(6) * 2
    assert_close(ours(x, t.clamp(min=0)), theirs(x, t.clamp(min=0)))


def test_hooks_and_train_mode() -> None:
    loss, seen = nllx.CrossEntropyLoss(), []
    loss.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert_close(loss.eval()(x, t), loss.train()(x, t))
    assert len(seen) == 2


_LEGACY = [
    {"size_average": True},
    {"size_average": False},
    {"reduce": True},
    {"reduce": False},
    {"size_average": False, "reduce": True},
    {"size_average": True, "reduce": False},
    {"size_average": False, "reduction": "none"},  # they win over reduction
]


def _warnings_of(function: Any) -> tuple[Any, list[tuple[type, str, str]]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, [(w.category, str(w.message), w.filename) for w in caught]


@pytest.mark.parametrize("legacy", _LEGACY, ids=str)
@pytest.mark.parametrize("op", _FUNCTIONS[:2])
def test_legacy_arguments_of_functions(op: str, legacy: dict[str, Any]) -> None:
    results = []
    for functional in (nllx.functional, torch.nn.functional):
        result, caught = _warnings_of(lambda f=functional: getattr(f, op)(x, t, **legacy))
        results.append((result, [(category, message) for category, message, _ in caught]))
    (ours, our_warnings), (theirs, their_warnings) = results
    assert_close(ours, theirs)
    assert our_warnings == their_warnings
    assert "size_average and reduce args will be deprecated" in our_warnings[0][1]


@pytest.mark.parametrize("legacy", _LEGACY, ids=str)
@pytest.mark.parametrize("name", _LOSSES)
def test_legacy_arguments_of_modules(name: str, legacy: dict[str, Any]) -> None:
    """Resolved, with the warning, where the module is made."""
    ours, our_warnings = _warnings_of(lambda: getattr(nllx, name)(**legacy))
    theirs, their_warnings = _warnings_of(lambda: getattr(torch.nn, name)(**legacy))
    assert [w[:2] for w in our_warnings] == [w[:2] for w in their_warnings]
    assert ours.reduction == theirs.reduction
    result, caught = _warnings_of(lambda: ours(x, t))
    assert not caught
    assert_close(result, theirs(x, t))


@pytest.mark.parametrize("name", _LOSSES)
def test_deprecated_name_of_the_mean(name: str) -> None:
    ours, our_warnings = _warnings_of(lambda: getattr(nllx, name)(reduction="elementwise_mean")(x, t))
    theirs, their_warnings = _warnings_of(lambda: getattr(torch.nn, name)(reduction="elementwise_mean")(x, t))
    assert_close(ours, theirs)
    assert [w[:2] for w in our_warnings] == [w[:2] for w in their_warnings]


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 3, 4), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize(
    "call", [lambda package, v: package.functional.log_softmax(v), lambda package, v: package.LogSoftmax()(v)]
)
def test_log_softmax_without_dim_warns_where_it_is_called(shape: tuple[int, ...], call: Any) -> None:
    value = torch.randn(shape)
    result, caught = _warnings_of(lambda: call(nllx, value))
    expected, torchs = _warnings_of(lambda: call(torch.nn, value))
    assert_close(result, expected)
    assert caught == torchs
    assert "Implicit dimension choice for log_softmax" in caught[0][1]


def test_no_warnings_without_cause() -> None:
    for name, arguments in _ARGUMENTS:
        _, caught = _warnings_of(lambda n=name, a=arguments: _call(getattr(nllx, n)(**a)))
        assert not caught


def test_a_patched_torch_is_not_called_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacing torch's functions by nllx's does not recurse."""
    for name in _FUNCTIONS:
        monkeypatch.setattr(torch.nn.functional, name, getattr(nllx.functional, name))
    leaf = x.clone().requires_grad_()
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(leaf, t)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    gradient.square().sum().backward()
    p = x.softmax(1).requires_grad_()
    nllx.functional.cross_entropy(leaf, p).backward()
    assert leaf.grad is not None
    assert p.grad is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_script() -> None:
    """Scripted models have torch's losses, with the same weights and options."""
    x, target, weight = torch.randn(3, 4), torch.tensor([0, 3, -1]), torch.rand(4)
    losses = [
        nllx.CrossEntropyLoss(weight, ignore_index=-1, label_smoothing=0.1, reduction="sum"),
        nllx.NLLLoss(weight, ignore_index=-1),
    ]
    for loss in losses:
        assert_close(torch.jit.script(loss)(x, target), loss(x, target))
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), nllx.LogSoftmax(1))
    assert_close(torch.jit.script(net)(x), net(x))
    with pytest.raises(NotImplementedError, match="zero_division"):
        torch.jit.script(nllx.NLLLoss(zero_division=0))


def test_repr_shows_what_torch_has_not() -> None:
    assert repr(nllx.CrossEntropyLoss()) == "CrossEntropyLoss()"
    loss = nllx.CrossEntropyLoss(inplace_backward=True, zero_division=0)
    assert repr(loss) == "CrossEntropyLoss(inplace_backward=True, zero_division=0)"
    assert repr(nllx.NLLLoss(zero_division=0)) == "NLLLoss(zero_division=0)"


def test_numbers_of_numpy_compile() -> None:
    x, target = torch.randn(3, 4), torch.tensor([0, 3, 1])
    loss = nllx.CrossEntropyLoss(label_smoothing=np.float64(0.1), ignore_index=np.int64(3))
    expected = torch.nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=3)(x, target)
    assert_close(torch.compile(loss, backend="eager", fullgraph=True)(x, target), expected)
    assert_close(loss(x, target), expected)
    likelihood = nllx.NLLLoss(ignore_index=np.int64(3))
    expected = torch.nn.NLLLoss(ignore_index=3)(x, target)
    assert_close(torch.compile(likelihood, backend="eager", fullgraph=True)(x, target), expected)


def test_dtypes_of_python() -> None:
    x = torch.randn(3, 4)
    assert nllx.functional.log_softmax(x, 1, dtype=float).dtype == torch.float64
    for dtype in ("float64", 1.0):
        with pytest.raises(TypeError, match=r"'dtype' must be torch\.dtype, not"):
            nllx.functional.log_softmax(x, 1, dtype=dtype)
    with pytest.raises(NotImplementedError):
        nllx.functional.log_softmax(x, 1, dtype=int)


def test_nodes_of_the_graph() -> None:
    """As those of torch's functions: classes of their own, which tools that draw or walk graphs show by name."""
    x, target = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 4, 2])
    calls = {
        "NllxCrossEntropyBackward": nllx.CrossEntropyLoss()(x, target),
        "NllxNllLossBackward": nllx.NLLLoss()(x, target),
        "NllxLogSoftmaxBackward": nllx.LogSoftmax(1)(x).sum().grad_fn.next_functions[0][0],
    }
    for name, found in calls.items():
        node = found.grad_fn if isinstance(found, torch.Tensor) else found
        assert type(node).__name__ == node.name() == name
        assert isinstance(node, torch.autograd.graph.Node)
        assert not issubclass(torch.Tensor, torch.autograd.graph.Node)
        assert type(node.next_functions[0][0]).__name__ == "AccumulateGrad"
    seen: list[str] = []
    loss = calls["NllxCrossEntropyBackward"]
    loss.grad_fn.register_prehook(lambda grads: seen.append("before"))
    loss.grad_fn.register_hook(lambda inputs, grads: seen.append("after"))
    loss.backward()
    assert seen == ["before", "after"]

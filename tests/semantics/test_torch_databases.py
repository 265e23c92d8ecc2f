"""PyTorch's own databases of sample inputs, OpInfo and ModuleInfo, through nllx."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.utils._pytree import tree_map

import nllx

_LOSSES = {name for name in nllx.functional.__all__ if hasattr(torch.nn.functional, name)} - {"log_softmax"}
_NAMES = {f"nn.functional.{name}" for name in _LOSSES} | {"log_softmax"}
_OPS = [op for op in op_db if op.name in _NAMES]
_MODULES = [info for info in module_db if info.module_cls.__name__ in nllx.modules.__all__]
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _same_samples_in_any_order() -> None:
    """The databases draw from torch's own generator, and some draws lie at the edge of torch's own rounding."""
    torch.manual_seed(0)


def test_databases_have_what_is_tested() -> None:
    assert {(op.name, op.variant_test_name) for op in _OPS} == {
        *((name, "") for name in _NAMES),
        ("log_softmax", "with_dtype"),
    }
    assert {info.module_cls.__name__ for info in _MODULES} == {*nllx.modules.__all__}


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.requires_grad]


def _run(function: Callable[..., Tensor], *arguments: Any, **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output, and gradients of what requires one."""
    output = function(*arguments, **options)
    leaves = _tensors([*arguments, *options.values()])
    if not leaves or not output.requires_grad:
        return output, ()
    torch.manual_seed(1)
    return output.detach(), torch.autograd.grad(output, leaves, torch.rand_like(output))


def _close(ours: tuple[Tensor, tuple[Tensor, ...]], theirs: tuple[Tensor, tuple[Tensor, ...]]) -> None:
    """Within the default tolerances of dtype. Torch's half results carry the rounding of every step of theirs."""
    loose = {"rtol": 2e-2, "atol": 2e-2} if theirs[0].dtype in (torch.bfloat16, torch.float16) else {}
    assert_close(ours[0], theirs[0], equal_nan=True, **loose)
    assert_close(ours[1], theirs[1], equal_nan=True, **loose)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("op", _OPS, ids=lambda op: op.full_name)
def test_op_info(op: Any, dtype: torch.dtype, device: str) -> None:
    function = getattr(nllx.functional, op.name.rsplit(".", 1)[-1])
    count = 0
    for sample in op.sample_inputs(device, dtype, requires_grad=True):
        arguments = (sample.input, *sample.args)
        _close(_run(function, *arguments, **sample.kwargs), _run(op.op, *arguments, **sample.kwargs))
        count += 1
    assert count > 5


@pytest.mark.parametrize("op", _OPS, ids=lambda op: op.full_name)
def test_op_info_without_gradient(op: Any, device: str) -> None:
    """Also of the integer dtypes that log_softmax casts."""
    function = getattr(nllx.functional, op.name.rsplit(".", 1)[-1])
    for dtype in op.dtypes:
        if dtype.is_complex:  # cast to real with a warning
            continue
        for sample in op.sample_inputs(device, dtype, requires_grad=False):
            expected = op.op(sample.input, *sample.args, **sample.kwargs)
            if expected.is_complex():
                continue
            _close((function(sample.input, *sample.args, **sample.kwargs), ()), (expected, ()))


def _function(op: Any) -> Callable[..., Tensor]:
    return getattr(nllx.functional, op.name.rsplit(".", 1)[-1])


_each_op = pytest.mark.parametrize("op", _OPS, ids=lambda op: op.full_name)


@pytest.mark.parametrize("dtype", _DTYPES[:2], ids=str)
@_each_op
def test_op_info_reference_inputs(op: Any, dtype: torch.dtype, device: str) -> None:
    for sample in op.reference_inputs(device, dtype, requires_grad=True):
        arguments = (sample.input, *sample.args)
        _close(_run(_function(op), *arguments, **sample.kwargs), _run(op.op, *arguments, **sample.kwargs))


@pytest.mark.parametrize("op", [op for op in _OPS if op.error_inputs_func], ids=lambda op: op.full_name)
def test_op_info_error_inputs(op: Any, device: str) -> None:
    for error in op.error_inputs(device):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            _function(op)(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("order", [1, 2])
@_each_op
def test_op_info_derivatives(op: Any, order: int, device: str) -> None:
    """gradcheck or gradgradcheck in all of the ways that the database says torch's own operation passes."""
    forward = op.supports_forward_ad if order == 1 else op.supports_fwgrad_bwgrad
    count = 0
    for sample in op.sample_inputs(device, torch.float64, requires_grad=True):
        leaves = tuple(t for t in (sample.input, *sample.args) if isinstance(t, Tensor))

        def call(*tensors: Tensor, sample: Any = sample) -> Tensor:
            rest = iter(tensors[1:])
            args = [next(rest) if isinstance(arg, Tensor) else arg for arg in sample.args]
            output = _function(op)(tensors[0], *args, **sample.kwargs)
            return sample.output_process_fn_grad(output)

        ways = {"nondet_tol": op.gradcheck_nondet_tol, "fast_mode": True, "check_batched_grad": op.check_batched_grad}
        if order == 1:
            batched = op.check_batched_forward_grad and forward
            assert gradcheck(call, leaves, check_forward_ad=forward, check_batched_forward_grad=batched, **ways)
        else:
            ways["check_batched_grad"] = op.check_batched_gradgrad
            # Forward over reverse and reverse over forward.
            assert gradgradcheck(
                call,
                leaves,
                gen_non_contig_grad_outputs=True,
                check_fwd_over_rev=forward,
                check_rev_over_rev=True,
                **ways,
            )
        count += 1
    assert count > 5


def _all_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, value)


@pytest.mark.parametrize("in_dim", [0, -1])
@_each_op
def test_op_info_vmap(op: Any, in_dim: int, device: str) -> None:
    """Over all tensors, and over the input alone: each sample as torch's operation has it."""
    for sample in op.sample_inputs(device, torch.float64, requires_grad=False):
        args = (sample.input, *sample.args)
        other = (sample.input.flip(0) * 1.5, *sample.args)
        tensors = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]

        for which in (tensors, tensors[:1]):

            def call(*mapped: Tensor, run: Any, which: Any = which, sample: Any = sample, args: Any = args) -> Tensor:
                full = list(args)
                for i, tensor in zip(which, mapped, strict=True):
                    full[i] = tensor
                return run(*full, **sample.kwargs)

            pairs = [torch.stack([args[i], other[i]], in_dim % (args[i].dim() + 1)) for i in which]
            mapped = torch.vmap(functools.partial(call, run=_function(op)), in_dims=in_dim)(*pairs)
            each = [call(*(one[i] for i in which), run=op.op) for one in (args, other)]
            assert_close(mapped, torch.stack(each), equal_nan=True)


@_each_op
def test_op_info_views(op: Any, device: str) -> None:
    """Tensors that are not contiguous, and views whose numbers are the negative of what lies in memory."""
    for sample in op.sample_inputs(device, torch.float64, requires_grad=True):
        expected = _run(op.op, sample.input, *sample.args, **sample.kwargs)
        apart = sample.noncontiguous()
        _close(_run(_function(op), apart.input, *apart.args, **apart.kwargs), expected)

        def negative(t: Tensor) -> Tensor:
            return torch._neg_view(-t.detach()).requires_grad_(t.requires_grad) if t.is_floating_point() else t

        args, kwargs = _all_tensors(negative, (sample.input, *sample.args)), _all_tensors(negative, sample.kwargs)
        _close(_run(_function(op), *args, **kwargs), expected)


@_each_op
def test_op_info_compiled(op: Any, device: str) -> None:
    torch.compiler.reset()
    samples = list(op.sample_inputs(device, torch.float32, requires_grad=True))
    for sample in samples[:: max(1, len(samples) // 6)]:
        arguments = (sample.input, *sample.args)
        compiled = torch.compile(_function(op), fullgraph=True, backend="aot_eager")
        _close(_run(compiled, *arguments, **sample.kwargs), _run(op.op, *arguments, **sample.kwargs))
        torch.compiler.reset()


@pytest.mark.parametrize("info", _MODULES, ids=lambda info: info.name)
def test_module_info_derivatives(info: Any, device: str) -> None:
    name = info.module_cls.__name__
    for sample in info.module_inputs_func(info, device=device, dtype=torch.float64, requires_grad=True, training=True):
        made, called = sample.constructor_input, sample.forward_input
        module = getattr(nllx, name)(*made.args, **made.kwargs).to(device)
        leaves = tuple(called.args)
        if module(*leaves, **called.kwargs).isnan().any():  # the mean over nothing, if all of so few are ignored
            continue
        assert gradcheck(module, leaves, fast_mode=True, check_forward_ad=True, **called.kwargs)
        assert gradgradcheck(module, leaves, fast_mode=True, **called.kwargs)


@pytest.mark.parametrize("info", _MODULES, ids=lambda info: info.name)
def test_module_info_copies(info: Any, device: str) -> None:
    """Pickled, copied, and loaded from the state of torch's module; in training and in evaluation."""
    name = info.module_cls.__name__
    for training in (True, False):
        for sample in info.module_inputs_func(
            info, device=device, dtype=torch.float32, requires_grad=False, training=training
        ):
            made, called = sample.constructor_input, sample.forward_input
            theirs = info.module_cls(*made.args, **made.kwargs).to(device).train(training)
            ours = getattr(nllx, name)(*made.args, **made.kwargs).to(device).train(training)
            expected = theirs(*called.args, **called.kwargs)
            assert repr(ours) == repr(theirs)
            for copied in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
                assert copied.training is training
                assert_close(copied(*called.args, **called.kwargs), expected, equal_nan=True)
            ours.load_state_dict(theirs.state_dict())
            assert_close(ours(*called.args, **called.kwargs), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", _DTYPES[:2], ids=str)
@pytest.mark.parametrize("info", _MODULES, ids=lambda info: info.name)
def test_module_info(info: Any, dtype: torch.dtype, device: str) -> None:
    name, count = info.module_cls.__name__, 0
    for sample in info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=True):
        made, called = sample.constructor_input, sample.forward_input
        ours = getattr(nllx, name)(*made.args, **made.kwargs).to(device)
        theirs = info.module_cls(*made.args, **made.kwargs).to(device)
        _close(_run(ours, *called.args, **called.kwargs), _run(theirs, *called.args, **called.kwargs))
        count += 1
    assert count > 0


# Which modules have error inputs depends on torch's version; NLLLoss always has.
_WITH_ERRORS = [info for info in _MODULES if info.module_error_inputs_func]


@pytest.mark.parametrize("info", _WITH_ERRORS, ids=lambda info: info.name)
def test_module_error_inputs(info: Any, device: str) -> None:
    count = 0
    for error in info.module_error_inputs_func(
        info, device=device, dtype=torch.float32, requires_grad=False, training=True
    ):
        made, called = error.module_error_input.constructor_input, error.module_error_input.forward_input
        make = functools.partial(getattr(nllx, info.module_cls.__name__), *made.args, **made.kwargs)
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                make()
        else:
            module = make()
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*called.args, **called.kwargs)
        count += 1
    assert count > 0

"""PyTorch's own databases of sample inputs, OpInfo and ModuleInfo, through nllx."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import nllx

_OPS = [op for op in op_db if op.name in ("nn.functional.cross_entropy", "nn.functional.nll_loss", "log_softmax")]
_MODULES = [info for info in module_db if info.module_cls.__name__ in ("CrossEntropyLoss", "NLLLoss", "LogSoftmax")]
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def test_databases_have_what_is_tested() -> None:
    assert {(op.name, op.variant_test_name) for op in _OPS} == {
        ("nn.functional.cross_entropy", ""),
        ("nn.functional.nll_loss", ""),
        ("log_softmax", ""),
        ("log_softmax", "with_dtype"),
    }
    assert {info.module_cls.__name__ for info in _MODULES} == {"CrossEntropyLoss", "NLLLoss", "LogSoftmax"}


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
        module = getattr(nllx, info.module_cls.__name__)(*made.args, **made.kwargs)
        with pytest.raises(error.error_type, match=error.error_regex):
            module(*called.args, **called.kwargs)
        count += 1
    assert count > 0

"""Bad input: torch's exception types, messages that name the argument and the fix, and never a crash."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import nllx

ops = torch.ops.nllx
F = torch.nn.functional

x = torch.linspace(-1, 1, 15).reshape(3, 5)
t = torch.tensor([0, 4, 2])
image, labels = x[:, :, None, None].expand(3, 5, 2, 4), t[:, None, None].expand(3, 2, 4)
p = x.softmax(1)


@dataclasses.dataclass
class Mistake:
    """A call that raises.

    message: expressions that the message of nllx matches, each.
    torch_type: the exception, where it is not that of torch for the same call; torch may have none there.
    """

    name: str
    call: Callable[[Any], Tensor]
    message: list[str]
    torch_type: type[Exception] | None = None


def _weight(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.ones(shape or (5,), dtype=dtype)


_BATCH = r"Expected input batch_size \(3\) to match target batch_size \(2\)\."
_MISTAKES = [
    # Shapes
    *(
        mistake
        for op in ("cross_entropy", "nll_loss")
        for mistake in (
            Mistake(f"{op}: batch", lambda f, op=op: getattr(f, op)(x, t[:2]), [op, _BATCH]),
            Mistake(f"{op}: batch of images", lambda f, op=op: getattr(f, op)(image, labels[:2]), [op, _BATCH]),
            Mistake(f"{op}: scalar target of a batch", lambda f, op=op: getattr(f, op)(x, t[0]), [op, r"batch_size \(0\)"]),
            Mistake(f"{op}: (N, 1) target", lambda f, op=op: getattr(f, op)(x, t[:, None]), [op, "target", r"\[3, 1\]"]),
            Mistake(f"{op}: (1, N) target", lambda f, op=op: getattr(f, op)(x, t[None]), [op, r"batch_size \(1\)"]),
            Mistake(f"{op}: sequence", lambda f, op=op: getattr(f, op)(image[..., 0], t), [op, r"target size \[3, 2\], got \[3\]"]),
            Mistake(f"{op}: spatial size", lambda f, op=op: getattr(f, op)(image, labels[..., :3]), [op, r"\[3, 5, 2, 4\].*\[3, 2, 3\]"]),
            Mistake(f"{op}: flattened target", lambda f, op=op: getattr(f, op)(image, labels.flatten(1)), [op, r"\[3, 2, 4\]"]),
            Mistake(f"{op}: classes kept in the target", lambda f, op=op: getattr(f, op)(image, labels[:, None]), [op, r"dimension: 4"]),
            Mistake(f"{op}: unbatched with two targets", lambda f, op=op: getattr(f, op)(x[0], t[:2]), [op, "1D target must have size 1"]),
            Mistake(f"{op}: unbatched with a matrix", lambda f, op=op: getattr(f, op)(x[0], t[:1, None]), [op, "0D or 1D target"]),
            # Dtypes
            Mistake(f"{op}: integer input", lambda f, op=op: getattr(f, op)(x.long(), t), [op, "not implemented", "Long"]),
            Mistake(f"{op}: boolean input", lambda f, op=op: getattr(f, op)(x > 0, t), [op, "not implemented", "Bool"]),
            Mistake(f"{op}: complex input", lambda f, op=op: getattr(f, op)(x + 0j, t), [op, "not implemented", "Complex"]),
            Mistake(f"{op}: float target", lambda f, op=op: getattr(f, op)(x, t.float()), [op, "target has dtype Float", r"call target\.long\(\)"]),
            Mistake(f"{op}: half target", lambda f, op=op: getattr(f, op)(x, t.half()), [op, "target has dtype Half", r"call target\.long\(\)"]),
            Mistake(f"{op}: boolean target", lambda f, op=op: getattr(f, op)(x, t > 0), [op, "target has dtype Bool", r"call target\.long\(\)"]),
            Mistake(f"{op}: complex target", lambda f, op=op: getattr(f, op)(x, t + 0j), [op, "target has dtype ComplexFloat"]),
            Mistake(f"{op}: float64 weight", lambda f, op=op: getattr(f, op)(x, t, _weight(torch.float64)), [op, "weight", "Float but found Double"]),
            Mistake(f"{op}: half weight", lambda f, op=op: getattr(f, op)(x, t, _weight(torch.float16)), [op, "weight", "Float but found Half"]),
            Mistake(f"{op}: integer weight", lambda f, op=op: getattr(f, op)(x, t, _weight(torch.int64)), [op, "weight", "Float but found Long"]),
            Mistake(f"{op}: weight of another half", lambda f, op=op: getattr(f, op)(x.half(), t, _weight(torch.bfloat16)), [op, "weight", "Half but found BFloat16"]),
            # Weights
            Mistake(f"{op}: short weight", lambda f, op=op: getattr(f, op)(x, t, _weight(torch.float32, 4)), [op, "all 5 classes", r"\[4\]"]),
            Mistake(f"{op}: long weight", lambda f, op=op: getattr(f, op)(image, labels, _weight(torch.float32, 6)), [op, "all 5 classes", r"\[6\]"]),
            Mistake(f"{op}: weight of one", lambda f, op=op: getattr(f, op)(x, t, _weight(torch.float32, 1)), [op, "all 5 classes", r"\[1\]"]),
            Mistake(f"{op}: weight matrix", lambda f, op=op: getattr(f, op)(x, t, _weight(torch.float32, 5, 1)), [op, "all 5 classes", r"\[5, 1\]"]),
            Mistake(f"{op}: weight with a gradient", lambda f, op=op: getattr(f, op)(x, t, _weight(torch.float32).requires_grad_()), [op, "not differentiable", "weight", r"weight\.detach\(\)"]),
            # Options
            Mistake(f"{op}: reduction", lambda f, op=op: getattr(f, op)(x, t, reduction="avg"), ["avg is not a valid value for reduction"]),
            Mistake(f"{op}: no reduction", lambda f, op=op: getattr(f, op)(x, t, reduction=None), ["None is not a valid value for reduction"]),
            Mistake(f"{op}: fractional ignore_index", lambda f, op=op: getattr(f, op)(x, t, ignore_index=1.5), ["ignore_index", "int"], TypeError),
            # Types
            Mistake(f"{op}: no input", lambda f, op=op: getattr(f, op)(None, t), ["Tensor"]),
            Mistake(f"{op}: list target", lambda f, op=op: getattr(f, op)(x, [0, 4, 2]), ["target", "Tensor"]),
            # Devices
            Mistake(f"{op}: target elsewhere", lambda f, op=op: getattr(f, op)(x, t.to("meta")), ["target", "device"]),
            Mistake(f"{op}: weight elsewhere", lambda f, op=op: getattr(f, op)(x, t, _weight(torch.float32).to("meta")), ["weight", "device"]),
            Mistake(f"{op}: input elsewhere", lambda f, op=op: getattr(f, op)(x.to("meta"), t), ["device"]),
            # Two at once: the batch comes first, then dtype, weight, range
            Mistake(f"{op}: batch and dtype", lambda f, op=op: getattr(f, op)(x, t[:2].float()), [_BATCH]),
            Mistake(f"{op}: dtype and weight", lambda f, op=op: getattr(f, op)(x, t.float(), _weight(torch.float32, 4)), ["target has dtype"]),
            Mistake(f"{op}: weight and range", lambda f, op=op: getattr(f, op)(x, t + 9, _weight(torch.float32, 4)), ["all 5 classes"]),
            # Zero classes
            Mistake(f"{op}: no classes", lambda f, op=op: getattr(f, op)(torch.zeros(3, 0), torch.zeros(3).long()), ["Target 0 is out of bounds"]),
            Mistake(f"{op}: no classes in planes", lambda f, op=op: getattr(f, op)(torch.zeros(3, 0, 2, 2), torch.zeros(3, 2, 2).long()), ["Target 0 is out of bounds"]),
            Mistake(f"{op}: unbatched, no classes", lambda f, op=op: getattr(f, op)(torch.zeros(0), torch.tensor(0)), ["Target 0 is out of bounds"]),
        )
    ),
    Mistake("probabilities: scalar input", lambda f: f.cross_entropy(torch.tensor(1.0), torch.tensor(1.0)), ["cross_entropy", "dimension"]),
    Mistake("nll_loss: scalar input", lambda f: f.nll_loss(torch.tensor(1.0), torch.tensor(0)), [r"Expected 1 or more dimensions \(got 0\)"]),
    Mistake("nll_loss: probabilities", lambda f: f.nll_loss(x, p), ["nll_loss", "multi-target not supported"]),
    Mistake("integer target of the input's shape", lambda f: f.cross_entropy(x, torch.zeros_like(x).long()),
            ["Expected floating point type for target with class probabilities, got Long", "argmax"]),
    Mistake("boolean target of the input's shape", lambda f: f.cross_entropy(x, p > 0.1), ["Expected floating point", "Bool"]),
    Mistake("probabilities: other classes", lambda f: f.cross_entropy(x, p[:, :4]), ["cross_entropy", r"\[3, 4\]"]),
    Mistake("probabilities: ignore_index", lambda f: f.cross_entropy(x, p, ignore_index=0), ["ignore_index is not supported", "0"]),
    Mistake("probabilities: short weight", lambda f: f.cross_entropy(x, p, _weight(torch.float32, 4)), ["all 5 classes", r"\[4\]"]),
    Mistake("probabilities: weight matrix", lambda f: f.cross_entropy(image, image, _weight(torch.float32, 5, 1)), ["all 5 classes", r"\[5, 1\]"]),
    Mistake("probabilities: integer input", lambda f: f.cross_entropy(x.long(), p), ["cross_entropy", "not implemented"]),
    Mistake("probabilities: elsewhere", lambda f: f.cross_entropy(x, p.to("meta")), ["device"]),
    Mistake("smoothing above one", lambda f: f.cross_entropy(x, t, label_smoothing=1.1), [r"label_smoothing must be between 0.0 and 1.0. Got: 1.1"]),
    Mistake("smoothing of probabilities above one", lambda f: f.cross_entropy(x, p, label_smoothing=1.1), [r"label_smoothing must be between 0.0 and 1.0"]),
    Mistake("smoothing as text", lambda f: f.cross_entropy(x, t, label_smoothing="0.1"), ["label_smoothing"], TypeError),
    # nllx raises where torch takes a negative or undefined smoothing for zero.
    Mistake("negative smoothing", lambda f: f.cross_entropy(x, t, label_smoothing=-0.1), [r"between 0.0 and 1.0. Got: -0.1"], RuntimeError),
    Mistake("undefined smoothing", lambda f: f.cross_entropy(x, p, label_smoothing=math.nan), [r"between 0.0 and 1.0. Got: nan"], RuntimeError),
    Mistake("log_softmax: dim", lambda f: f.log_softmax(x, 2), [r"range of \[-2, 1\], but got 2"]),
    Mistake("log_softmax: negative dim", lambda f: f.log_softmax(x, -3), [r"range of \[-2, 1\], but got -3"]),
    Mistake("log_softmax: dim of a scalar", lambda f: f.log_softmax(torch.tensor(1.0), 1), [r"range of \[-1, 0\], but got 1"]),
    Mistake("log_softmax: fractional dim", lambda f: f.log_softmax(x, 1.0), ["dim", "int"], TypeError),
    Mistake("log_softmax: integers", lambda f: f.log_softmax(x.long(), 1), ["log_softmax", "not implemented", "Long"]),
    Mistake("log_softmax: to integers", lambda f: f.log_softmax(x, 1, dtype=torch.int64), ["log_softmax", "not implemented", "Long"]),
    Mistake("log_softmax: complex", lambda f: f.log_softmax(x + 0j, 1), ["log_softmax", "not implemented", "Complex"]),
    Mistake("log_softmax: no tensor", lambda f: f.log_softmax([1.0], 0), []),
    Mistake("sparse input", lambda f: f.cross_entropy(x.to_sparse(), t), []),
]  # fmt: skip


@pytest.mark.parametrize("mistake", _MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake(mistake: Mistake) -> None:
    if mistake.torch_type is not None:
        expected = mistake.torch_type
    else:
        with pytest.raises(Exception) as torchs:  # noqa: B017, PT011 - whatever torch raises
            mistake.call(F)
        expected = torchs.type
    with pytest.raises(Exception) as raised:  # noqa: B017, PT011
        mistake.call(nllx.functional)
    assert raised.type is expected
    for expression in mistake.message:
        raised.match(expression)


# Class indices out of range


def _bad_target(shape: tuple[int, ...], position: tuple[int, ...], value: int, dtype: torch.dtype) -> Tensor:
    target = torch.zeros(shape, dtype=dtype)
    target[position] = value
    return target


_BAD_TARGETS = {
    "above": ((3, 5), (1,), 5, torch.int64, {}),
    "negative": ((3, 5), (2,), -1, torch.int64, {}),
    "default ignore_index where another is given": ((3, 5), (0,), -100, torch.int64, {"ignore_index": -1}),
    "2^32 + 1": ((3, 5), (1,), 2**32 + 1, torch.int64, {}),
    "-2^32 + 1": ((3, 5), (1,), -(2**32) + 1, torch.int64, {}),
    "largest": ((3, 5), (1,), 2**63 - 1, torch.int64, {}),
    "smallest": ((3, 5), (1,), -(2**63), torch.int64, {}),
    "int32": ((3, 5), (1,), 2**31 - 1, torch.int32, {}),
    "int16": ((3, 5), (1,), -7, torch.int16, {}),
    "int8": ((3, 5), (1,), -128, torch.int8, {}),
    "byte": ((3, 5), (1,), 255, torch.uint8, {"ignore_index": -1}),
    "weighted": ((3, 5), (1,), 5, torch.int64, {"weight": torch.ones(5)}),
    "many rows": ((5000, 5), (4321,), 6, torch.int64, {}),
    "wide rows": ((3, 50257), (2,), 50257, torch.int64, {}),
    "sequence": ((3, 5, 7), (2, 6), 12, torch.int64, {}),
    "image": ((2, 5, 6, 9), (1, 3, 5), 12, torch.int64, {}),
    "one class": ((3, 1), (1,), 1, torch.int64, {}),
    "bfloat16": ((3, 5, 4), (1, 2), 9, torch.int64, {}),
}


@pytest.mark.parametrize("op", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", _BAD_TARGETS)
def test_target_out_of_range(op: str, reduction: str, name: str) -> None:
    """IndexError with torch's sentence, the position and the value, from the forward and from the backward operator."""
    shape, position, value, dtype, options = _BAD_TARGETS[name]
    x = torch.randn(shape, dtype=torch.bfloat16 if name == "bfloat16" else torch.float32)
    target = _bad_target((shape[0], *shape[2:]), position, value, dtype)
    message = rf"Target {value} is out of bounds\..*target\[{', '.join(map(str, position))}\]"
    function = getattr(nllx.functional, op)
    for logits in (x, x.clone().requires_grad_()):
        with pytest.raises(IndexError, match=message):
            function(logits, target, reduction=reduction, **options)
    if op == "cross_entropy":
        with pytest.raises(IndexError, match=message):
            function(x, target, reduction=reduction, label_smoothing=0.1, **options)
    if x.dim() > 2:
        with pytest.raises(IndexError, match=message):
            function(x.transpose(1, -1).contiguous().transpose(1, -1), target, reduction=reduction, **options)

    number = {"none": 0, "mean": 1, "sum": 2}[reduction]
    arguments = (options.get("weight"), number, options.get("ignore_index", -100))
    saved = getattr(ops, f"{op}_forward")(x, torch.zeros_like(target), *arguments)[1:]
    grad = torch.ones(target.shape if reduction == "none" else ())
    backward = (grad, x, target, arguments[0], *saved, *arguments[1:])
    with pytest.raises(IndexError, match=message):
        if op == "cross_entropy":
            ops.cross_entropy_backward(*backward, 0.0)
        else:
            ops.nll_loss_backward(*backward)


def test_unbatched_target_out_of_range() -> None:
    for function in (nllx.functional.cross_entropy, nllx.functional.nll_loss):
        with pytest.raises(IndexError, match=r"Target 5 is out of bounds"):
            function(x[0], torch.tensor(5))
        with pytest.raises(IndexError, match=r"Target 5 is out of bounds.*target\[0\]"):
            function(x[0], torch.tensor([5]))


def test_first_bad_target_is_named() -> None:
    """Whatever the number of threads: the first in row-major order."""
    target = torch.zeros(20_000, dtype=torch.int64)
    target[[7_001, 12_345, 19_999]] = torch.tensor([8, 9, 10])
    for _ in range(5):
        with pytest.raises(IndexError, match=r"Target 8 is out of bounds\..*target\[7001\]"):
            nllx.functional.cross_entropy(torch.zeros(20_000, 8), target)


def test_target_changed_to_a_bad_one_before_backward() -> None:
    """Autograd notices a change of the target, and the kernel a class out of range where autograd is told not to look."""
    for change in (lambda target: target.fill_(9), lambda target: target.data.fill_(9)):
        logits, target = x.clone().requires_grad_(), t.clone()
        loss = nllx.functional.cross_entropy(logits, target)
        change(target)
        with pytest.raises((RuntimeError, IndexError), match=r"modified by an inplace operation|Target 9 is out of bounds"):
            loss.backward()


def test_nothing_is_written_before_an_error() -> None:
    before = x.clone()
    with pytest.raises(IndexError):
        nllx.functional.cross_entropy(x, torch.tensor([0, 1, 5]))
    assert torch.equal(x, before)
    # And the next call is not affected.
    torch.testing.assert_close(nllx.functional.cross_entropy(x, t), F.cross_entropy(x, t))


# Operators called by hand


def _saved() -> tuple[Tensor, Tensor]:
    _, lse, total_weight = ops.cross_entropy_forward(x, t)
    return lse, total_weight


_OPERATOR_MISTAKES: dict[str, Callable[[], object]] = {
    "reduction of the operator": lambda: ops.cross_entropy(x, t, None, 3),
    "negative reduction": lambda: ops.nll_loss(x, t, None, -1),
    "backward reduction": lambda: ops.cross_entropy_backward(torch.ones(()), x, t, None, *_saved(), 3, -100, 0.0),
    "short lse": lambda: ops.cross_entropy_backward(torch.ones(()), x, t, None, _saved()[0][:2], _saved()[1], 1, -100, 0.0),
    "lse of another dtype": lambda: ops.cross_entropy_backward(
        torch.ones(()), x, t, None, _saved()[0].half(), _saved()[1], 1, -100, 0.0
    ),
    "empty total weight": lambda: ops.cross_entropy_backward(
        torch.ones(()), x, t, None, _saved()[0], torch.ones(0), 1, -100, 0.0
    ),
    "total weight of another dtype": lambda: ops.cross_entropy_backward(
        torch.ones(()), x, t, None, _saved()[0], torch.ones((), dtype=torch.int64), 1, -100, 0.0
    ),
    "gradient of a row for a mean": lambda: ops.cross_entropy_backward(torch.ones(3), x, t, None, *_saved(), 1, -100, 0.0),
    "one gradient for all rows": lambda: ops.cross_entropy_backward(torch.ones(()), x, t, None, *_saved(), 0, -100, 0.0),
    "integer gradient": lambda: ops.cross_entropy_backward(torch.ones((), dtype=torch.int64), x, t, None, *_saved(), 1, -100, 0.0),
    "backward shape": lambda: ops.cross_entropy_backward(torch.ones(()), x, t[:2], None, *_saved(), 1, -100, 0.0),
    "backward weight": lambda: ops.cross_entropy_backward(torch.ones(()), x, t, torch.ones(4), *_saved(), 1, -100, 0.0),
    "lse elsewhere": lambda: ops.cross_entropy_backward(
        torch.ones(()), x, t, None, _saved()[0].to("meta"), _saved()[1], 1, -100, 0.0
    ),
    "nll_loss: empty total weight": lambda: ops.nll_loss_backward(torch.ones(()), x, t, None, torch.ones(0), 1, -100),
    "nll_loss: gradient of a row for a mean": lambda: ops.nll_loss_backward(torch.ones(3), x, t, None, torch.ones(()), 1, -100),
    "nll_loss: short weight": lambda: ops.nll_loss_backward(torch.ones(()), x, t, torch.ones(4), torch.ones(()), 1, -100),
    "log_softmax: gradient of another shape": lambda: ops.log_softmax_backward(torch.ones(3, 4), x, 1),
    "log_softmax: gradient of another dtype": lambda: ops.log_softmax_backward(x.long(), x, 1),
    "log_softmax: backward dim": lambda: ops.log_softmax_backward(x, x, 2),
    "log_softmax: forward of integers": lambda: ops.log_softmax_forward(x.long(), 1),
    "probabilities where indices were": lambda: ops.cross_entropy_backward(
        torch.ones(()), x, p, None, _saved()[0][:1], _saved()[1], 1, -100, 0.0
    ),
}


@pytest.mark.parametrize("name", _OPERATOR_MISTAKES)
def test_operator_mistake(name: str) -> None:
    """Operators check what they are given; none reads memory that is not there."""
    with pytest.raises((RuntimeError, ValueError, IndexError, NotImplementedError)) as raised:
        _OPERATOR_MISTAKES[name]()
    assert "INTERNAL ASSERT" not in str(raised.value)


def _messages() -> dict[str, str]:
    messages = {}
    for mistake in _MISTAKES:
        try:
            mistake.call(nllx.functional)
        except Exception as error:
            messages[mistake.name] = str(error)
    return messages


def test_messages_are_for_people() -> None:
    for name, message in _messages().items():
        assert "INTERNAL ASSERT" not in message, name


def test_modules_raise_at_the_call() -> None:
    """As torch's: options are looked at when the loss is computed."""
    for package in (torch.nn, nllx):
        with pytest.raises(ValueError, match="avg is not a valid value for reduction"):
            package.CrossEntropyLoss(reduction="avg")(x, t)
        with pytest.raises(RuntimeError, match=r"label_smoothing must be between"):
            package.CrossEntropyLoss(label_smoothing=2.0)(x, t)


def _is_module(value: object) -> bool:
    return isinstance(value, ModuleType)

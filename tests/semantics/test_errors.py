"""Bad input: torch's exception types, messages that name the argument and the fix, and never a crash."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nllx
from nllx import _operators

ops = torch.ops.nllx
F = torch.nn.functional

x = torch.linspace(-1, 1, 15).reshape(3, 5)
t = torch.tensor([0, 4, 2])
image, labels = x[:, :, None, None].expand(3, 5, 2, 4), t[:, None, None].expand(3, 2, 4)
p = x.softmax(1)
ones = torch.ones


@dataclasses.dataclass
class Mistake:
    """A call that raises.

    message: expressions that the message of nllx matches, each.
    error: the exception, where it is not that of torch for the same call; torch may have none there.
    """

    name: str
    function: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    message: tuple[str, ...]
    error: type[Exception] | None = None

    def make(self, functional: Any) -> Tensor:
        return getattr(functional, self.function)(*self.arguments, **self.options)


def _mistakes_of_both_losses(op: str) -> list[Mistake]:
    mistakes = []

    def bad(name: str, *message: str, of: tuple[Any, ...], **options: Any) -> None:
        mistakes.append(Mistake(f"{op}: {name}", op, of, options, message))

    batch = r"Expected input batch_size \(3\) to match target batch_size \(2\)\."
    bad("batch", op, batch, of=(x, t[:2]))
    bad("batch of images", op, batch, of=(image, labels[:2]))
    bad("scalar target of a batch", op, r"batch_size \(0\)", of=(x, t[0]))
    bad("(N, 1) target", op, "target", r"\[3, 1\]", of=(x, t[:, None]))
    bad("(1, N) target", op, r"batch_size \(1\)", of=(x, t[None]))
    bad("target of the batch for sequences", op, r"target size \[3, 2\], got \[3\]", of=(image[..., 0], t))
    bad("spatial size", op, r"\[3, 5, 2, 4\].*\[3, 2, 3\]", of=(image, labels[..., :3]))
    bad("flattened target", op, r"\[3, 2, 4\]", of=(image, labels.flatten(1)))
    bad("class dimension in the target", op, "dimension: 4", of=(image, labels[:, None]))
    bad("unbatched with two targets", op, "1D target must have size 1", of=(x[0], t[:2]))
    bad("unbatched with a matrix", op, "0D or 1D target", of=(x[0], t[:1, None]))

    bad("integer input", op, "not implemented", "Long", of=(x.long(), t))
    bad("boolean input", op, "not implemented", "Bool", of=(x > 0, t))
    bad("complex input", op, "not implemented", "Complex", of=(x + 0j, t))
    for target in (t.float(), t.half(), t + 0j):
        dtype = str(target.dtype).removeprefix("torch.")
        bad(f"{dtype} target", op, "target has dtype", r"call target\.long\(\)", of=(x, target))
    bad("float64 weight", op, "weight", "Float but found Double", of=(x, t, ones(5).double()))
    bad("half weight", op, "weight", "Float but found Half", of=(x, t, ones(5).half()))
    bad("integer weight", op, "weight", "Float but found Long", of=(x, t, ones(5).long()))
    bad("weight of the other half", op, "Half but found BFloat16", of=(x.half(), t, ones(5).bfloat16()))

    bad("short weight", op, "all 5 classes", r"\[4\]", of=(x, t, ones(4)))
    bad("long weight", op, "all 5 classes", r"\[6\]", of=(image, labels, ones(6)))
    bad("weight of one", op, "all 5 classes", r"\[1\]", of=(x, t, ones(1)))
    bad("weight matrix", op, "all 5 classes", r"\[5, 1\]", of=(x, t, ones(5, 1)))
    bad("weight with a gradient", op, "not differentiable.*weight.*detach", of=(x, t, ones(5).requires_grad_()))

    bad("reduction", "avg is not a valid value for reduction", of=(x, t), reduction="avg")
    bad("no reduction", "None is not a valid value for reduction", of=(x, t), reduction=None)
    bad("fractional ignore_index", "ignore_index", of=(x, t), ignore_index=1.5)
    bad("boolean ignore_index", "ignore_index.*must be int, not bool", of=(x, t), ignore_index=True)
    bad("ignore_index of 65 bits", "ignore_index.*Overflow", of=(x, t), ignore_index=2**63)
    bad("no input", "Tensor", of=(None, t))
    bad("list target", "target", "Tensor", of=(x, [0, 4, 2]))
    bad("list weight", "weight", "Tensor", of=(x, t, [1.0] * 5))

    bad("target elsewhere", "target", "device", of=(x, t.to("meta")))
    bad("weight elsewhere", "weight", "device", of=(x, t, ones(5, device="meta")))
    bad("input elsewhere", "device", of=(x.to("meta"), t))

    # Two at once: the batch comes first, then dtype, weight, range.
    bad("batch and dtype", batch, of=(x, t[:2].float()))
    bad("dtype and weight", "target has dtype", of=(x, t.float(), ones(4)))
    bad("weight and range", "all 5 classes", of=(x, t + 9, ones(4)))

    bad("no classes", "Target 0 is out of bounds", of=(torch.zeros(3, 0), torch.zeros(3).long()))
    bad("no classes in planes", "Target 0 is out of bounds", of=(torch.zeros(3, 0, 2, 2), torch.zeros(3, 2, 2).long()))
    bad("unbatched, no classes", "Target 0 is out of bounds", of=(torch.zeros(0), torch.tensor(0)))
    return mistakes


def _other_mistakes() -> list[Mistake]:
    mistakes = []

    def bad(
        function: str,
        name: str,
        *message: str,
        of: tuple[Any, ...],
        error: type[Exception] | None = None,
        **options: Any,
    ) -> None:
        mistakes.append(Mistake(f"{function}: {name}", function, of, options, message, error))

    scalar = torch.tensor(1.0)
    bad("cross_entropy", "scalar", "dimension", of=(scalar, scalar))
    bad("nll_loss", "scalar", r"Expected 1 or more dimensions \(got 0\)", of=(scalar, torch.tensor(0)))
    bad("nll_loss", "probabilities", "multi-target not supported", of=(x, p))

    shape_of_input = "Expected floating point type for target with class probabilities"
    bad("cross_entropy", "one-hot integers", shape_of_input, "got Long", "argmax", of=(x, torch.zeros_like(x).long()))
    bad("cross_entropy", "one-hot booleans", shape_of_input, "got Bool", of=(x, p > 0.1))
    bad("cross_entropy", "probabilities of other classes", r"\[3, 4\]", of=(x, p[:, :4]))
    bad("cross_entropy", "probabilities and ignore_index", "ignore_index is not supported", of=(x, p), ignore_index=0)
    bad("cross_entropy", "probabilities, short weight", "all 5 classes", r"\[4\]", of=(x, p, ones(4)))
    bad("cross_entropy", "probabilities, weight matrix", "all 5 classes", r"\[5, 1\]", of=(image, image, ones(5, 1)))
    # torch returns a complex loss.
    complex_weight = torch.ones(5) + 0j
    bad("cross_entropy", "complex weight", "must be real", of=(x, p, complex_weight), error=NotImplementedError)
    bad("cross_entropy", "probabilities, integer input", "not implemented", of=(x.long(), p))
    bad("cross_entropy", "probabilities elsewhere", "device", of=(x, p.to("meta")))
    bad("cross_entropy", "sparse", of=(x.to_sparse(), t))

    limits = "label_smoothing must be between 0.0 and 1.0. Got: "
    bad("cross_entropy", "smoothing above one", limits + "1.1", of=(x, t), label_smoothing=1.1)
    bad("cross_entropy", "probabilities, smoothing above one", limits + "1.1", of=(x, p), label_smoothing=1.1)
    bad("cross_entropy", "smoothing as text", "label_smoothing", of=(x, t), label_smoothing="0.1")
    bad("cross_entropy", "smoothing of each class", "label_smoothing", of=(x, t), label_smoothing=ones(5) / 10)
    bad(
        "cross_entropy",
        "smoothing that is learned",
        "must be float",
        of=(x, t),
        label_smoothing=ones(()).requires_grad_(),
    )
    # torch takes a negative or undefined smoothing for zero.
    bad("cross_entropy", "negative smoothing", limits + "-0.1", of=(x, t), label_smoothing=-0.1, error=RuntimeError)
    bad("cross_entropy", "undefined smoothing", limits + "nan", of=(x, p), label_smoothing=math.nan, error=RuntimeError)

    bad("log_softmax", "dim", r"range of \[-2, 1\], but got 2", of=(x, 2))
    bad("log_softmax", "negative dim", r"range of \[-2, 1\], but got -3", of=(x, -3))
    bad("log_softmax", "dim of a scalar", r"range of \[-1, 0\], but got 1", of=(scalar, 1))
    bad("log_softmax", "fractional dim", "dim", of=(x, 1.0))
    bad("log_softmax", "boolean dim", "dim", of=(x, True))
    bad("log_softmax", "dim of 65 bits", "dim", of=(x, 2**63))
    bad("log_softmax", "integers", "log_softmax", "not implemented", "Long", of=(x.long(), 1))
    bad("log_softmax", "to integers", "log_softmax", "not implemented", "Long", of=(x, 1), dtype=torch.int64)
    bad("log_softmax", "complex", "log_softmax", "not implemented", "Complex", of=(x + 0j, 1))
    return mistakes


_MISTAKES = [*_mistakes_of_both_losses("cross_entropy"), *_mistakes_of_both_losses("nll_loss"), *_other_mistakes()]


def _check(mistake: Mistake) -> None:
    if mistake.error is not None:
        expected = mistake.error
    else:
        with pytest.raises(Exception) as torchs:
            mistake.make(F)
        expected = torchs.type
    with pytest.raises(Exception) as raised:
        mistake.make(nllx.functional)
    assert raised.type is expected
    assert "INTERNAL ASSERT" not in str(raised.value)
    for expression in mistake.message:
        raised.match(expression)


@pytest.mark.parametrize("mistake", _MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake(mistake: Mistake) -> None:
    _check(mistake)


def _by_definition(op: str, input: Tensor, *arguments: Any) -> Tensor:
    if op == "log_softmax":
        dim, dtype = arguments
        return _operators.log_softmax.forward(input if dtype is None else input.to(dtype), dim)
    return getattr(_operators, op).forward(input, *arguments)[0]


@pytest.mark.parametrize(
    "mistake", [m for m in _MISTAKES if not m.name.endswith(": sparse")], ids=lambda mistake: mistake.name
)
def test_mistake_in_the_definition(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition, which serves transforms and derivatives, looks at its arguments as the kernels do."""
    for op in ("cross_entropy", "nll_loss", "log_softmax"):
        monkeypatch.setattr(nllx.functional, f"_{op}", functools.partial(_by_definition, op))
    _check(mistake)


@pytest.mark.parametrize("op", ["cross_entropy", "nll_loss"])
def test_weights_have_no_derivative_under_transforms(op: str) -> None:
    def loss(weight: Tensor) -> Tensor:
        return getattr(nllx.functional, op)(x, t, weight)

    for transform in (
        lambda: torch.func.grad(loss)(ones(5)),
        lambda: torch.func.jvp(loss, (ones(5),), (ones(5),)),
        lambda: torch.func.vmap(torch.func.grad(loss))(ones(2, 5)),
        lambda: torch.func.grad(lambda w: torch.vmap(lambda x: getattr(nllx.functional, op)(x, t, w))(x[None]).sum())(
            ones(5)
        ),
    ):
        with pytest.raises(RuntimeError, match=r"not differentiable with respect to argument 'weight'"):
            transform()


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
    weight, numbers = options.get("weight"), (number, options.get("ignore_index", -100))
    no_options = [None] * (4 if op == "cross_entropy" else 0)
    saved = getattr(ops, f"{op}_forward")(x, torch.zeros_like(target), weight, *no_options, *numbers)[1:]
    grad = torch.ones(target.shape if reduction == "none" else ())
    backward = (grad, x, target, weight, *no_options, *saved, *numbers)
    if op == "cross_entropy":
        backward = (*backward, 0.0, 1.0, 1.0, 0.0, 0.0, [True, False])
    with pytest.raises(IndexError, match=message):
        getattr(ops, f"{op}_backward")(*backward)


@pytest.mark.parametrize("op", ["cross_entropy", "nll_loss"])
def test_target_out_of_range_under_transforms(op: str) -> None:
    """The message names the function that was called."""
    with pytest.raises(IndexError, match=rf"{op}: Target 9 is out of bounds\..*target\[1\]"):
        torch.func.grad(lambda a: getattr(nllx.functional, op)(a, torch.tensor([0, 9, 2])))(x)


def test_unbatched_target_out_of_range() -> None:
    for function in (nllx.functional.cross_entropy, nllx.functional.nll_loss):
        with pytest.raises(IndexError, match=r"Target 5 is out of bounds"):
            function(x[0], torch.tensor(5))
        with pytest.raises(IndexError, match=r"Target 5 is out of bounds.*target\[0\]"):
            function(x[0], torch.tensor([5]))


@pytest.mark.parametrize("op", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("shape", [(20_000, 8), (400, 300), (1, 8, 20_000), (40, 8, 500)])
def test_first_bad_target_is_named(op: str, shape: tuple[int, ...]) -> None:
    """The first in row-major order, whichever thread meets one first."""
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    last = target.numel() - 1
    places = [last // 3, last // 3 + 1, last // 3 + 7, last // 2, last]  # neighbours, and far apart
    target.view(-1)[places] = torch.arange(900, 905)
    position = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(places[0]), target.shape))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            with pytest.raises(IndexError, match=rf"Target 900 is out of bounds\..*target\[{position}\]"):
                getattr(nllx.functional, op)(torch.zeros(shape), target)
    finally:
        torch.set_num_threads(before)


def test_target_changed_to_a_bad_one_before_backward() -> None:
    """Autograd notices the change, or, where it is told not to look, the kernel the class."""
    for change in (lambda target: target.fill_(9), lambda target: target.data.fill_(9)):
        logits, target = x.clone().requires_grad_(), t.clone()
        loss = nllx.functional.cross_entropy(logits, target)
        change(target)
        with pytest.raises((RuntimeError, IndexError), match=r"inplace operation|Target 9 is out of bounds"):
            loss.backward()


def test_nothing_is_written_before_an_error() -> None:
    before = x.clone()
    with pytest.raises(IndexError):
        nllx.functional.cross_entropy(x, torch.tensor([0, 1, 5]))
    assert torch.equal(x, before)
    # And the next call is not affected.
    torch.testing.assert_close(nllx.functional.cross_entropy(x, t), F.cross_entropy(x, t))


# Operators called by hand


def _cross_entropy_backward(**changed: Any) -> Tensor:
    _, row_stats, total_weight = ops.cross_entropy_forward(x, t)
    arguments = {"grad_output": ones(()), "logits": x, "target": t, "weight": None}
    arguments |= {"row_stats": row_stats, "total_weight": total_weight}
    arguments |= {"reduction": 1, "ignore_index": -100, "label_smoothing": 0.0}
    arguments |= {"sample_weight": None, "logit_scale": None, "temperature": None, "divisor": None}
    arguments |= {"scale": 1.0, "sharpness": 1.0, "softcap": 0.0, "z_loss": 0.0, "output_mask": [True, False]}
    return ops.cross_entropy_backward(**arguments | changed)[0]


def _nll_loss_backward(**changed: Any) -> Tensor:
    arguments = {"grad_output": ones(()), "log_probs": x, "target": t, "weight": None}
    arguments |= {"total_weight": torch.tensor(3.0), "reduction": 1, "ignore_index": -100}
    return ops.nll_loss_backward(**arguments | changed)


def test_operators_called_by_hand() -> None:
    """What the mistakes below are made of is right without them."""
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(_cross_entropy_backward(), torch.autograd.grad(F.cross_entropy(leaf, t), leaf)[0])
    torch.testing.assert_close(_nll_loss_backward(), torch.autograd.grad(F.nll_loss(leaf, t), leaf)[0])


_OPERATOR_MISTAKES: dict[str, Callable[[], object]] = {
    "reduction": lambda: ops.cross_entropy(x, t, reduction=4),
    "negative reduction": lambda: ops.nll_loss(x, t, None, -1),
    "backward: reduction": lambda: _cross_entropy_backward(reduction=4),
    "backward: row_stats of fewer rows": lambda: _cross_entropy_backward(row_stats=ones(2, 2)),
    "backward: row_stats of one number": lambda: _cross_entropy_backward(row_stats=ones(3)),
    "backward: row_stats of another dtype": lambda: _cross_entropy_backward(row_stats=ones(3, 2).double()),
    "backward: row_stats elsewhere": lambda: _cross_entropy_backward(row_stats=ones(3, 2, device="meta")),
    "backward: no total weight": lambda: _cross_entropy_backward(total_weight=ones(0)),
    "backward: total weight of another dtype": lambda: _cross_entropy_backward(total_weight=torch.tensor(3)),
    "backward: gradients of rows for a mean": lambda: _cross_entropy_backward(grad_output=ones(3)),
    "backward: one gradient for all rows": lambda: _cross_entropy_backward(reduction=0),
    "backward: integer gradient": lambda: _cross_entropy_backward(grad_output=torch.tensor(1)),
    "backward: batch": lambda: _cross_entropy_backward(target=t[:2]),
    "backward: short weight": lambda: _cross_entropy_backward(weight=ones(4)),
    "backward: smoothing": lambda: _cross_entropy_backward(label_smoothing=2.0),
    "backward: other logits": lambda: _cross_entropy_backward(logits=x[:2], target=t[:2]),
    "nll_loss backward: no total weight": lambda: _nll_loss_backward(total_weight=ones(0)),
    "nll_loss backward: gradients of rows for a mean": lambda: _nll_loss_backward(grad_output=ones(3)),
    "nll_loss backward: short weight": lambda: _nll_loss_backward(weight=ones(4)),
    "log_softmax backward: gradient of another shape": lambda: ops.log_softmax_backward(ones(3, 4), x, 1),
    "log_softmax backward: integer gradient": lambda: ops.log_softmax_backward(x.long(), x, 1),
    "log_softmax backward: dim": lambda: ops.log_softmax_backward(x, x, 2),
    "log_softmax forward: integers": lambda: ops.log_softmax_forward(x.long(), 1),
}


@pytest.mark.parametrize("name", _OPERATOR_MISTAKES)
def test_operator_mistake(name: str) -> None:
    """Operators check what they are given; none reads memory that is not there."""
    with pytest.raises((RuntimeError, ValueError, IndexError, NotImplementedError)) as raised:
        _OPERATOR_MISTAKES[name]()
    assert "INTERNAL ASSERT" not in str(raised.value)


def test_modules_raise_at_the_call() -> None:
    """As torch's: options are looked at when the loss is computed."""
    for package in (torch.nn, nllx):
        with pytest.raises(ValueError, match="avg is not a valid value for reduction"):
            package.CrossEntropyLoss(reduction="avg")(x, t)
        with pytest.raises(RuntimeError, match=r"label_smoothing must be between"):
            package.CrossEntropyLoss(label_smoothing=2.0)(x, t)


@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 4, 4, 3)])
def test_classes_that_are_last(shape: tuple[int, ...]) -> None:
    """The message knows the way out, which works."""
    logits, target = torch.zeros(shape), torch.zeros(shape[:-1], dtype=torch.long)
    with pytest.raises(RuntimeError, match=r"seem to be last here, so call logits\.movedim\(-1, 1\)"):
        nllx.functional.cross_entropy(logits, target)
    nllx.functional.cross_entropy(logits.movedim(-1, 1), target)
    with pytest.raises(RuntimeError, match=r"the classes are dimension 1 of logits$"):
        nllx.functional.cross_entropy(logits, target[:, :-1])

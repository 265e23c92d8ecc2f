"""Tensors that no one has checked, of any shape, stride, offset, dtype and bits, with any options: a call gives what
torch gives, or raises, and touches no memory that is not its own (tools/sanitize_extension.sh runs this file in an
address-sanitized build)."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import nllx

F = torch.nn.functional
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.uint8]
OTHERS = [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16]
# What a caller can catch: a crash, and errors of Python's own making, are neither.
REFUSALS = (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError)
INT64 = torch.iinfo(torch.int64)

ends = [0, 1, -1, -100, 255, 256, INT64.min, INT64.max, 2**31, -(2**31)]
any_dtype = st.sampled_from([*FLOATS, *FLOATS, *FLOATS, *INTEGERS, *OTHERS])
index_dtype = st.sampled_from([*INTEGERS, *INTEGERS, *INTEGERS, *OTHERS, torch.float32])
any_shape = st.lists(st.one_of(st.integers(0, 6), st.integers(0, 70)), max_size=4)
likely = st.integers(0, 7).map(bool)  # mostly true


def memory(bits: bytes, shape: list[int], stride: list[int], dtype: torch.dtype, shift: int) -> Tensor:
    """A tensor that begins `shift` bytes into a heap block, which ends with it. `bits` are repeated over it."""
    window = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    block = torch.empty(shift + window * dtype.itemsize, dtype=torch.uint8)
    if not window:
        return torch.empty(shape, dtype=dtype)
    block.copy_(torch.frombuffer(bytearray(bits * math.ceil(len(block) / len(bits)))[: len(block)], dtype=torch.uint8))
    if shift % dtype.itemsize:  # torch refuses it of its own views, and not of memory that comes from outside
        flat = torch.frombuffer(memoryview(block.numpy()), dtype=dtype, offset=shift, count=window)
    else:
        flat = block[shift:].view(dtype)
    return flat.as_strided(shape, stride)


@st.composite
def tensors(draw: st.DrawFn, shape: list[int], dtype: torch.dtype, tame: bool) -> Tensor:
    order = draw(st.permutations(range(len(shape))))
    stride, room = [0] * len(shape), 1
    for d in order:
        stride[d] = draw(st.sampled_from([room, room, room, room, 0, 1, 2, room + 1]))
        room = max(room, 1 + (shape[d] - 1) * stride[d] if shape[d] else 1) + draw(st.sampled_from([0, 0, 3]))
    shift = draw(st.sampled_from([0, 0, 1, 2, 4, 8, 12, 63]))
    bits = draw(st.binary(min_size=64, max_size=64))
    t = memory(bits, shape, stride, dtype, shift)
    if tame and dtype in FLOATS and t.numel():
        window = t.as_strided([1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))], [1])
        numbers = torch.frombuffer(bytearray(bits), dtype=torch.int8).repeat(math.ceil(len(window) / 64))
        window.copy_(numbers[: len(window)] / 16)
    return t


@st.composite
def targets(draw: st.DrawFn, shape: list[int], classes: int, tame: bool) -> Tensor:
    """Class indices."""
    dtype = draw(st.sampled_from(INTEGERS) if tame or draw(likely) else index_dtype)
    t = draw(tensors(shape, dtype, tame))
    if dtype in INTEGERS and t.numel() and (tame or draw(likely)):
        width = torch.iinfo(dtype)
        number = st.integers(0, max(classes - 1, 0))
        if not tame and not draw(likely):
            number = st.one_of(number, st.sampled_from([*ends, classes]))
        size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        some = draw(st.lists(number, min_size=1, max_size=7))
        values = [min(max(some[i % len(some)], width.min), width.max) for i in range(size)]
        t.as_strided([size], [1]).copy_(torch.tensor(values, dtype=torch.int64))
    return t


@st.composite
def arguments(draw: st.DrawFn, op: str, tame: bool) -> dict[str, Any]:
    shape = draw(any_shape if not tame else st.lists(st.integers(1, 40), min_size=1, max_size=4))
    assume(math.prod(shape) < 20_000)
    classes = shape[min(len(shape), 2) - 1] if shape else 1
    rest = shape[:1] * (len(shape) > 1) + shape[2:]
    dtype = draw(st.sampled_from(FLOATS) if tame or draw(likely) else any_dtype)
    keywords: dict[str, Any] = {"input": draw(tensors(shape, dtype, tame))}
    probabilities = op == "cross_entropy" and draw(st.booleans())
    target_shape = shape if probabilities else rest
    if not tame and not draw(likely):
        target_shape = draw(any_shape)
    if probabilities:
        keywords["target"] = draw(tensors(target_shape, dtype if tame or draw(likely) else draw(any_dtype), tame))
    else:
        keywords["target"] = draw(targets(target_shape, classes, tame))
    if draw(st.booleans()):
        size = [classes] if tame or draw(likely) else draw(any_shape)
        keywords["weight"] = draw(tensors(size, dtype if tame or draw(likely) else draw(any_dtype), tame))
    odd = not tame and not draw(likely)
    keywords["reduction"] = draw(st.sampled_from(["", "batchmean"] if odd else ["mean", "sum", "none"]))
    ignored = [-100] if probabilities and not odd else [-100, 0] if tame else [*ends, 2**63, -(2**70)] if odd else ends
    keywords["ignore_index"] = draw(st.sampled_from(ignored))
    if op == "cross_entropy":
        smoothing = [-0.1, 1.1, math.nan, math.inf] if odd else [0.0, 0.0, 0.1, 1.0]
        keywords["label_smoothing"] = draw(st.sampled_from(smoothing))
    return keywords


def outcome(function: Any, keywords: dict[str, Any], gradient: bool) -> tuple[list[Tensor], Exception | None]:
    """The results with the gradient of the input, or the error."""
    keywords = dict(keywords)
    try:
        if gradient:
            keywords["input"] = keywords["input"].detach().requires_grad_()
        result = function(**keywords)
        if not gradient:
            return [result], None
        return [result, *torch.autograd.grad(result.sum(), keywords["input"])], None
    except REFUSALS as error:
        return [], error


def without(keywords: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in keywords.items() if key != name}


def copies(keywords: dict[str, Any]) -> dict[str, Any]:
    """Plain tensors of the same values, for torch: of others some of its losses read elsewhere."""
    return {name: torch.stack([v])[0] if isinstance(v, Tensor) else v for name, v in keywords.items()}


def bits(t: Tensor) -> Tensor:
    return torch.empty(t.numel(), dtype=t.dtype).copy_(t.flatten()).view(torch.uint8)


ops = pytest.mark.parametrize("op", ["cross_entropy", "nll_loss"])


@ops
@given(st.data())
def test_any_arguments(op: str, data: st.DataObject) -> None:
    """A refusal or a result of the right shape, and the arguments stay as they were."""
    keywords = data.draw(arguments(op, tame=False))
    before = {name: bits(v) for name, v in keywords.items() if isinstance(v, Tensor)}
    logits = keywords["input"]
    results, _ = outcome(getattr(nllx.functional, op), keywords, gradient=logits.is_floating_point())
    rest = [*logits.shape[:1], *logits.shape[2:]] if logits.dim() > 1 else []
    if results:
        assert list(results[0].shape) == (rest if keywords["reduction"] == "none" else [])
    with contextlib.suppress(*REFUSALS):
        results.extend(nllx.functional.cross_entropy_value_and_grad(**{"logits": logits, **without(keywords, "input")}))
        assert results[-2].shape == ()
    assert all(gradient.shape == logits.shape for gradient in results[1::2])
    for name, value in before.items():
        assert torch.equal(bits(keywords[name]), value), name


@ops
@given(st.data())
def test_arguments_that_torch_takes(op: str, data: st.DataObject) -> None:
    keywords = data.draw(arguments(op, tame=True))
    dtype = keywords["input"].dtype
    exact = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in copies(keywords).items()
    }
    if not exact["target"].is_floating_point():
        exact["target"] = exact["target"].long()
    expected, refused = outcome(getattr(F, op), exact, gradient=True)
    actual, error = outcome(getattr(nllx.functional, op), keywords, gradient=True)
    assert (error is None) == (refused is None), (error, refused)
    tolerance = {"rtol": 20 * torch.finfo(dtype).eps, "atol": 1e-2 if dtype.itemsize == 2 else 2e-4}
    for got, want in zip(actual, expected, strict=True):
        want = want.to(dtype)
        assert_close(got, want, equal_nan=True, **tolerance)


@given(st.data())
def test_any_log_softmax(data: st.DataObject) -> None:
    tame = data.draw(st.booleans())
    shape = data.draw(any_shape)
    assume(math.prod(shape) < 20_000)
    dtype = data.draw(st.sampled_from(FLOATS) if tame else any_dtype)
    keywords = {"input": data.draw(tensors(shape, dtype, tame)), "dim": data.draw(st.integers(-5, 5))}
    actual, error = outcome(nllx.functional.log_softmax, keywords, gradient=dtype.is_floating_point)
    if tame:
        expected, refused = outcome(F.log_softmax, copies(keywords), gradient=True)
        assert (error is None) == (refused is None), (error, refused)
        tolerance = {"rtol": 20 * torch.finfo(dtype).eps, "atol": 0.1 if dtype.itemsize == 2 else 1e-4}
        for got, want in zip(actual, expected, strict=True):
            assert_close(got, want, equal_nan=True, **tolerance)


def apart(t: Tensor) -> bool:
    """Whether every element has a place of its own, as far as nested strides tell."""
    room = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride < room:
                return False
            room = stride * size
    return True


@given(st.data())
def test_any_out(data: st.DataObject) -> None:
    """Where the gradient goes: of any shape and stride, also memory that is that of the logits or a part of it. What can be
    written is taken."""
    keywords = data.draw(arguments("cross_entropy", tame=True))
    if keywords["reduction"] == "none":
        keywords["reduction"] = "sum"
    logits = keywords.pop("input")
    kind = data.draw(st.sampled_from(["any", "same", "shape", "shape", "dense", "part"]))
    if kind == "same":
        out = logits
    elif kind == "dense":
        out = torch.empty_like(logits)
    elif kind == "part":
        out = logits[..., : data.draw(st.integers(0, logits.shape[-1]))]
    else:
        shape = list(logits.shape) if kind == "shape" else data.draw(any_shape)
        assume(math.prod(shape) < 20_000)
        out = data.draw(tensors(shape, logits.dtype if kind == "shape" else data.draw(any_dtype), tame=True))
    plain = torch.stack([logits])[0]
    fits = out.shape == logits.shape and out.dtype == logits.dtype and apart(out)
    try:
        loss, gradient = nllx.functional.cross_entropy_value_and_grad(logits, out=out, **keywords)
    except REFUSALS:
        if fits:
            raise
        return
    assert gradient is out
    want_loss, want = nllx.functional.cross_entropy_value_and_grad(plain, **keywords)
    assert_close(loss, want_loss, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert_close(out, want, equal_nan=True, rtol=1e-2 if out.dtype.itemsize == 2 else 1e-5, atol=1e-5)


@given(st.data())
def test_inplace_backward(data: st.DataObject) -> None:
    """The gradient over the logits, of an incoming gradient that may lie in their memory too: refused, or right."""
    drawn = data.draw(arguments("cross_entropy", tame=True))
    keywords = {n: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in drawn.items()}
    logits = keywords.pop("input")
    plain = torch.stack([logits])[0].requires_grad_()
    want = nllx.functional.cross_entropy(plain, **keywords)
    leaf = logits.clone().requires_grad_()
    hidden = leaf * 1
    loss = nllx.functional.cross_entropy(hidden, **keywords, inplace_backward=True)
    assert_close(loss, want, equal_nan=True)
    incoming = torch.rand(want.shape)
    if hidden.is_contiguous() and loss.numel() <= hidden.numel() and data.draw(st.booleans()):
        incoming = hidden.detach().view(-1)[: loss.numel()].view(loss.shape)
    (want_gradient,) = torch.autograd.grad(want, plain, incoming.to(want.dtype).clone())
    (gradient,) = torch.autograd.grad(loss, leaf, incoming.to(loss.dtype))
    assert_close(gradient, want_gradient, equal_nan=True, rtol=1e-5, atol=1e-5)


@given(st.data())
def test_operators_called_by_hand(data: st.DataObject) -> None:
    """What the backward operators save and get may be anything too."""
    tame = data.draw(likely)
    keywords = data.draw(arguments("cross_entropy", tame))
    logits, target, weight = keywords["input"], keywords["target"], keywords.get("weight")
    ignore_index = max(min(keywords["ignore_index"], INT64.max), INT64.min)
    reduction = data.draw(st.integers(0, 3) if tame else st.integers(-1, 4))
    smoothing = keywords["label_smoothing"]
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32

    def some(shape: list[int], dtype: torch.dtype) -> Tensor:
        if not data.draw(likely):
            shape = data.draw(any_shape)
        if not data.draw(likely):
            dtype = data.draw(any_dtype)
        assume(math.prod(shape) < 20_000)
        return data.draw(tensors(shape, dtype, tame=data.draw(st.booleans())))

    rows = [*logits.shape[:1], *logits.shape[2:]] if logits.dim() > 1 else []
    grad_output, stats, total = some(rows if reduction == 0 else [], acc), some([*rows, 2], acc), some([], acc)
    no_options = (1.0, 1.0, 0.0, 0.0)
    saved = (None, None, None, None, stats, total, reduction, ignore_index, smoothing, *no_options)
    out = torch.empty_like(logits)
    backward = torch.ops.nllx.cross_entropy_backward
    calls = [
        lambda: backward(grad_output, logits, target, weight, *saved, [True, False])[0],
        lambda: backward.out(grad_output, logits, target, weight, *saved, out=out),
        lambda: torch.ops.nllx.nll_loss_backward(grad_output, logits, target, weight, total, reduction, ignore_index),
        lambda: torch.ops.nllx.log_softmax_backward(
            some(list(logits.shape), logits.dtype), logits, data.draw(st.integers(-4, 3))
        ),
    ]
    for call in calls:
        try:
            result = call()
        except REFUSALS:
            continue
        assert result.shape == logits.shape


def test_most_arguments_are_taken() -> None:
    """The generators above make what reaches a kernel, and not refusals alone."""
    taken = {"any": 0, "by hand": 0}

    @settings(max_examples=60, database=None, derandomize=True)
    @given(st.data())
    def count(data: st.DataObject) -> None:
        keywords = data.draw(arguments("cross_entropy", tame=False))
        taken["any"] += bool(outcome(nllx.functional.cross_entropy, keywords, gradient=False)[0])
        keywords = data.draw(arguments("cross_entropy", tame=True))
        taken["by hand"] += bool(outcome(nllx.functional.cross_entropy, keywords, gradient=True)[0])

    count()
    assert taken["any"] >= 6, taken
    assert taken["by hand"] >= 55, taken


@pytest.mark.parametrize("kept", [0, 4], ids=["freed", "shrunk"])
def test_memory_that_was_freed(kept: int) -> None:
    """Its storage is resized by whoever holds it, as sharded training does: an error, and not a null pointer; freed weights
    are not taken for none."""
    f, ops = nllx.functional, torch.ops.nllx
    logits, target, weight = torch.randn(50, 10), torch.randint(10, (50,)), torch.rand(10)
    soft, out = torch.rand(50, 10), torch.empty(50, 10)
    loss, stats, total = ops.cross_entropy_forward(logits, target)

    def backward(grad: Tensor, x: Tensor, y: Tensor, row_stats: Tensor) -> Tensor:
        options = (1, -100, 0.0, 1.0, 1.0, 0.0, 0.0, [True, False])
        return ops.cross_entropy_backward(grad, x, y, None, None, None, None, None, row_stats, total, *options)[0]

    calls = {
        "logits": (logits, lambda t: f.cross_entropy(t, target)),
        "log_probs": (logits, lambda t: f.nll_loss(t, target)),
        "input": (logits, lambda t: f.log_softmax(t, 1)),
        "value_and_grad": (logits, lambda t: f.cross_entropy_value_and_grad(t, target)),
        "index": (target, lambda t: f.cross_entropy(logits, t)),
        "probabilities": (soft, lambda t: f.cross_entropy(logits, t)),
        "weight": (weight, lambda t: f.cross_entropy(logits, target, t)),
        "weight of nll_loss": (weight, lambda t: f.nll_loss(logits, target, t)),
        "out": (out, lambda t: f.cross_entropy_value_and_grad(logits, target, out=t)),
        "saved logits": (
            logits,
            lambda t: backward(loss, t, target, stats),
        ),
        "stats": (stats, lambda t: backward(loss, logits, target, t)),
        "grad_output": (logits, lambda t: ops.log_softmax_backward(t, soft, 1)),
        "output": (soft, lambda t: ops.log_softmax_backward(logits, t, 1)),
    }
    for name, (tensor, call) in calls.items():
        freed = tensor.clone()
        freed.untyped_storage().resize_(kept)
        with pytest.raises(RuntimeError, match=r"has been freed|not allocated"):
            pytest.fail(f"{name}: {call(freed)}")
    gone = logits.clone().requires_grad_()
    loss = f.nll_loss(gone, target)
    gone.untyped_storage().resize_(0)
    loss.backward()  # needs no log-probabilities, as torch's
    assert gone.grad is not None
    assert gone.grad.count_nonzero() == 50


@pytest.mark.parametrize("shape", [(1000, 10), (1000, 500), (300, 20000)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_incoming_gradient_in_the_memory_of_the_logits(shape: tuple[int, int], reduction: str) -> None:
    leaf, target = torch.randn(shape, requires_grad=True), torch.randint(shape[1], shape[:1])
    hidden = leaf * 1
    loss = nllx.functional.cross_entropy(hidden, target, reduction=reduction, inplace_backward=True)
    incoming = hidden.detach().view(-1)[: loss.numel()].view(loss.shape)
    expected = torch.nn.functional.cross_entropy(leaf, target, reduction=reduction)
    (want,) = torch.autograd.grad(expected, leaf, incoming.clone())
    (got,) = torch.autograd.grad(loss, leaf, incoming)
    assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_out_that_is_negated() -> None:
    out = torch._neg_view(torch.zeros(8, 10))
    with pytest.raises(RuntimeError, match="out is a negated view"):
        nllx.functional.cross_entropy_value_and_grad(torch.randn(8, 10), torch.randint(10, (8,)), out=out)


HUGE = [2**36, 2**40, 2**61, 2**62, 2**63 - 1]  # no machine has the memory for a number for each


@given(st.lists(st.one_of(st.sampled_from([0, 1, 2, 5]), st.sampled_from(HUGE)), min_size=1, max_size=5), st.data())
def test_huge_shapes(shape: list[int], data: st.DataObject) -> None:
    """Sizes whose products do not fit: of tensors without elements, and of a single element that is expanded."""
    dtype = data.draw(st.sampled_from(FLOATS))
    meta = data.draw(st.booleans())
    rest = shape[:1] * (len(shape) > 1) + shape[2:]
    soft = data.draw(st.booleans())
    try:
        logits = torch.zeros([1] * len(shape), dtype=dtype).expand(shape)
        target = logits if soft else torch.zeros([1] * len(rest), dtype=torch.int64).expand(rest)
    except RuntimeError:
        return  # torch has no such tensor
    assume(math.prod(shape) < 1000 or math.prod(rest) >= 2**36)  # or it takes long, and raises nothing
    if meta:
        logits, target = logits.to("meta"), target.to("meta")
    for reduction in ("none", "mean", "sum"):
        for smoothing in (0.0, 0.1):
            keywords = {"target": target, "reduction": reduction, "label_smoothing": smoothing}
            outcome(nllx.functional.cross_entropy, {"input": logits, **keywords}, gradient=True)
            with contextlib.suppress(*REFUSALS):
                nllx.functional.cross_entropy_value_and_grad(logits, **keywords)
        if not soft:
            outcome(
                nllx.functional.nll_loss, {"input": logits, "target": target, "reduction": reduction}, gradient=True
            )
    for dim in range(len(shape)):
        if math.prod(shape) < 1000 or math.prod(shape) >= 2**36:
            outcome(nllx.functional.log_softmax, {"input": logits, "dim": dim}, gradient=True)

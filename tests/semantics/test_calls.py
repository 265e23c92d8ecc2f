"""The way of a call: functional -> nllx._C -> dispatcher, and the node that autograd keeps. By value, against torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import nllx
from nllx import _C


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator)
    return logits, torch.randint(5, (6,), generator=generator), torch.rand(5, generator=generator) + 0.5


def test_direct_calls_are_the_operators() -> None:
    logits, target, weight = _inputs()
    ops = torch.ops.nllx
    assert torch.equal(
        _C.cross_entropy(logits, target, weight, *[None] * 4, 2, 1, 0.1, 1.0, 1.0, 0.0, 0.0, None, False),
        ops.cross_entropy(logits, target, weight, reduction=2, ignore_index=1, label_smoothing=0.1),
    )
    assert torch.equal(_C.nll_loss(logits, target, None, 0, -100, None), ops.nll_loss(logits, target, None, 0, -100))
    assert torch.equal(_C.log_softmax(logits, -1, None), ops.log_softmax(logits, -1))


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (_C.cross_entropy, (None, torch.zeros(1), None, *[None] * 4, 1, -100, 0.0, 1.0, 1.0, 0.0, 0.0, None, False)),
        (_C.cross_entropy, (torch.zeros(1, 2), [0], None, *[None] * 4, 1, -100, 0.0, 1.0, 1.0, 0.0, 0.0, None, False)),
        (
            _C.cross_entropy,
            (torch.zeros(1, 2), torch.zeros(1), 1.0, *[None] * 4, 1, -100, 0.0, 1.0, 1.0, 0.0, 0.0, None, False),
        ),
        (
            _C.cross_entropy,
            (torch.zeros(1, 2), torch.zeros(1), None, *[None] * 4, "mean", -100, 0.0, 1.0, 1.0, 0.0, 0.0, None, False),
        ),
        (
            _C.cross_entropy,
            (torch.zeros(1, 2), torch.zeros(1), None, *[None] * 4, 1, -100, "0", 1.0, 1.0, 0.0, 0.0, None, False),
        ),
        (_C.nll_loss, (torch.zeros(1, 2),)),
        (_C.log_softmax, (3, 1, None)),
    ],
)
def test_direct_calls_refuse_what_is_no_argument(function, arguments: tuple[object, ...]) -> None:
    with pytest.raises(TypeError):
        function(*arguments)


def test_jit_trace_records_the_operators() -> None:
    logits, target, weight = _inputs()

    def losses(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = nllx.functional.log_softmax(x, 1)
        return nllx.functional.cross_entropy(x, y, weight), nllx.functional.nll_loss(log_probs, y)

    traced = torch.jit.trace(losses, (logits, target))
    other = logits.flip(0) * 2
    for found, wanted in zip(
        traced(other, target), (F.cross_entropy(other, target, weight), F.cross_entropy(other, target)), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "log_softmax"])
def test_nodes(name: str) -> None:
    """What the node keeps is freed by a backward, and a second one says so; hooks see and change what is saved."""
    logits, target, _ = _inputs()
    args = (1,) if name == "log_softmax" else (target,)
    leaf = logits.clone().requires_grad_()
    output = getattr(nllx.functional, name)(leaf, *args).sum()
    node = output.grad_fn.next_functions[0][0]
    assert node.name().startswith("Nllx")
    # Of the cross entropy's logit_scale, which was not given, there is none.
    functions = [function for function, _ in node.next_functions if function is not None]
    assert functions == [leaf.sum().grad_fn.next_functions[0][0]]
    output.backward()
    reference = logits.clone().requires_grad_()
    getattr(F, name)(reference, *args).sum().backward()
    torch.testing.assert_close(leaf.grad, reference.grad)
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()

    packed = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    leaf.grad = None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = getattr(nllx.functional, name)(leaf, *args).sum()
    assert packed
    output.backward()
    torch.testing.assert_close(leaf.grad, reference.grad)

"""torch's exporters to ONNX on models with nllx's losses, and in a patched process: what they write computes the same."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import nllx

onnx = pytest.importorskip("onnx", exc_type=ImportError)
reference = pytest.importorskip("onnx.reference", exc_type=ImportError)
pytest.importorskip("onnxscript", exc_type=ImportError)

_x = torch.arange(12.0).view(3, 4).sin()
_t, _p = torch.tensor([0, 3, 1]), torch.arange(15.0).view(3, 5).softmax(1)
_w = torch.linspace(0.5, 2, 5)


class _Model(torch.nn.Module):
    def __init__(self, last: torch.nn.Module) -> None:
        super().__init__()
        self.linear, self.last = torch.nn.Linear(4, 5), last

    def forward(self, x: Tensor, *target: Tensor) -> Tensor:
        return self.last(self.linear(x), *target)


_MODELS: dict[str, Callable[[], tuple[torch.nn.Module, tuple[Tensor, ...]]]] = {
    "LogSoftmax": lambda: (torch.nn.LogSoftmax(1), ()),
    "nllx.LogSoftmax": lambda: (nllx.LogSoftmax(1), ()),
    "CrossEntropyLoss": lambda: (torch.nn.CrossEntropyLoss(_w, ignore_index=3), (_t,)),
    "nllx.CrossEntropyLoss": lambda: (nllx.CrossEntropyLoss(_w, ignore_index=3), (_t.int(),)),
    "smoothed": lambda: (nllx.CrossEntropyLoss(_w, label_smoothing=0.1, ignore_index=3), (_t,)),
    "probabilities": lambda: (nllx.CrossEntropyLoss(_w, reduction="none"), (_p,)),
    "nllx.NLLLoss": lambda: (nllx.NLLLoss(_w), (_t,)),
    "over nothing": lambda: (nllx.NLLLoss(ignore_index=3, zero_division=0), (_t * 0 + 3,)),
}


@pytest.mark.parametrize("model", _MODELS.values(), ids=_MODELS.keys())
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("dynamo", [True, False])
def test_exported(model: Callable[[], Any], patched: bool, dynamo: bool) -> None:
    torch.manual_seed(0)
    last, target = model()
    module, arguments = _Model(last), (_x, *target)
    expected = module(*arguments).detach()
    file = io.BytesIO()
    with nllx.patched() if patched else contextlib.nullcontext():
        program = torch.onnx.export(module, arguments, None if dynamo else file, dynamo=dynamo)
    proto = program.model_proto if dynamo else onnx.load_from_string(file.getvalue())
    session = reference.ReferenceEvaluator(proto)
    names = [value.name for value in proto.graph.input]
    (actual,) = session.run(None, {name: value.numpy() for name, value in zip(names, arguments, strict=True)})
    assert_close(torch.as_tensor(actual), expected)

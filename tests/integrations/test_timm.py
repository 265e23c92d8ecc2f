"""timm's losses against nllx's, and the recipe that its training script uses with Mixup."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from training import assert_runs_alike, assert_trains_alike, train

import nllx

timm = pytest.importorskip("timm", exc_type=ImportError)
losses = pytest.importorskip("timm.loss", exc_type=ImportError)

_CLASSES = 12


def _model() -> torch.nn.Module:
    return timm.create_model("resnet10t", pretrained=False, num_classes=_CLASSES)


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    return images, torch.randint(_CLASSES, (4,), generator=generator)


def _mixed(seed: int) -> tuple[Tensor, Tensor]:
    """Mixup or CutMix, whose targets are probabilities, smoothed."""
    numpy.random.seed(seed)
    mixup = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=_CLASSES)
    return mixup(*_batch(seed))


def _by(criterion: Any) -> Any:
    return lambda model, batch: criterion(model(batch[0]), batch[1])


_CASES = [
    (losses.LabelSmoothingCrossEntropy(0.1), nllx.CrossEntropyLoss(label_smoothing=0.1), _batch),
    (losses.SoftTargetCrossEntropy(), nllx.CrossEntropyLoss(), _mixed),
]


@pytest.mark.parametrize(("theirs", "ours", "batch"), _CASES, ids=lambda value: type(value).__name__)
def test_loss_and_gradient_are_theirs(theirs: torch.nn.Module, ours: torch.nn.Module, batch: Any) -> None:
    target = batch(0)[1]
    logits = torch.randn(4, _CLASSES, dtype=torch.float64, requires_grad=True)
    target = target.double() if target.is_floating_point() else target
    values = [criterion(logits, target) for criterion in (theirs, ours)]
    assert_close(values[1], values[0])
    assert_close(*(torch.autograd.grad(value, logits)[0] for value in values))


@pytest.mark.parametrize(("theirs", "ours", "batch"), _CASES, ids=lambda value: type(value).__name__)
def test_trains_alike(theirs: torch.nn.Module, ours: torch.nn.Module, batch: Any) -> None:
    """Their loss patched, and the recipe: nllx's loss in its place, which takes Mixup's targets as they are."""
    batches = [batch(seed) for seed in range(3)]
    torchs, _ = assert_trains_alike(_model, _by(theirs), batches, "log_softmax", rate=0.01)
    assert_runs_alike(train(_model, _by(ours), batches, patched=False, rate=0.01), torchs)

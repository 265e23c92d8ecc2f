"""segmentation_models_pytorch: its SoftCrossEntropyLoss, a U-Net that trains with it, and what nllx's loss differs in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from training import assert_runs_alike, assert_trains_alike, train

import nllx

smp = pytest.importorskip("segmentation_models_pytorch", exc_type=ImportError)

_CLASSES, _IGNORED = 5, 255


def _unet() -> torch.nn.Module:
    """In float64: batch normalization over the few pixels of its deepest layer amplifies the rounding of float32."""
    return smp.Unet("resnet18", encoder_weights=None, classes=_CLASSES).double()


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(_CLASSES, (2, 64, 64), generator=generator)
    target[:, :5] = _IGNORED
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=generator), target


def _by(criterion: Any) -> Any:
    return lambda model, batch: criterion(model(batch[0]), batch[1])


def _ours(smoothing: float) -> Any:
    """Their loss by nllx. They smooth as torch does, but in their mean the ignored pixels count, as losses of 0."""
    criterion = nllx.CrossEntropyLoss(ignore_index=_IGNORED, label_smoothing=smoothing, reduction="sum")
    return lambda logits, target: criterion(logits, target) / target.numel()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_loss_and_gradient_are_theirs(smoothing: float, layout: torch.memory_format) -> None:
    theirs = smp.losses.SoftCrossEntropyLoss(smooth_factor=smoothing, ignore_index=_IGNORED)
    logits = torch.randn(2, _CLASSES, 64, 64, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    target = _batch(0)[1]
    values = [criterion(logits, target) for criterion in (theirs, _ours(smoothing))]
    assert_close(values[1], values[0])
    assert_close(*(torch.autograd.grad(value, logits)[0] for value in values))
    with nllx.patched():
        assert_close(theirs(logits, target), values[0])


def test_trains_alike() -> None:
    theirs = smp.losses.SoftCrossEntropyLoss(smooth_factor=0.1, ignore_index=_IGNORED)
    batches = [_batch(seed) for seed in range(3)]
    torchs, _ = assert_trains_alike(_unet, _by(theirs), batches, "log_softmax", rate=0.01)
    assert_runs_alike(train(_unet, _by(_ours(0.1)), batches, patched=False, rate=0.01), torchs)


def test_torchs_loss_trains_alike() -> None:
    """The loss of the library's own examples for several classes."""
    criterion = torch.nn.CrossEntropyLoss(ignore_index=_IGNORED)
    assert_trains_alike(_unet, _by(criterion), [_batch(seed) for seed in range(3)], rate=0.01)

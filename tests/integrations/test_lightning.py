"""Lightning's Trainer on converted and on patched modules, and torchmetrics' perplexity against nllx's loss."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import nllx

lightning = pytest.importorskip("lightning")
torchmetrics = pytest.importorskip("torchmetrics", exc_type=ImportError)

_CLASSES, _STEPS, _PADDING = 17, 6, -1


class _Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Embedding(_CLASSES, 16), torch.nn.Linear(16, _CLASSES))
        weight = torch.linspace(0.5, 2, _CLASSES)
        self.criterion = torch.nn.CrossEntropyLoss(weight, ignore_index=_PADDING, label_smoothing=0.1)
        self.losses: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        tokens, target = batch
        loss = self.criterion(self.net(tokens).transpose(1, 2), target)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _data() -> torch.utils.data.DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(_CLASSES, (4 * _STEPS, 9), generator=generator)
    target = (tokens * 3 + 1) % _CLASSES
    target[:, 7:] = _PADDING
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens, target), batch_size=4)


def _fit(change: Any = lambda module: module, precision: str = "32-true") -> _Module:
    lightning.seed_everything(0, verbose=False)
    module = change(_Module())
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, _data())
    return module


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("way", ["convert", "patched"])
def test_trains_alike(way: str, precision: str) -> None:
    expected = _fit(precision=precision)
    nllx.patch_report(reset=True)
    with nllx.patched() if way == "patched" else contextlib.nullcontext():
        actual = _fit(nllx.convert if way == "convert" else lambda module: module, precision=precision)
    if way == "patched":
        assert nllx.patch_report(reset=True)["cross_entropy"] == {"nllx": _STEPS}
    else:
        assert type(actual.criterion) is nllx.CrossEntropyLoss
    assert len(expected.losses) == _STEPS
    # In bfloat16 the gradient is rounded to 8 bits, and a rounding the other way is carried on by the training.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if precision == "32-true" else {"rtol": 1e-3, "atol": 1e-3}
    assert_close(actual.losses, expected.losses, **tolerance)
    for a, b in zip(actual.parameters(), expected.parameters(), strict=True):
        assert_close(a, b, **tolerance)


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    """Over batches with different numbers of padded tokens: sums of losses over the number of tokens that count."""
    metric = torchmetrics.text.Perplexity(ignore_index=_PADDING)
    criterion = nllx.CrossEntropyLoss(ignore_index=_PADDING, reduction="sum")
    total, count = torch.zeros([]), 0
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(2, 8, _CLASSES, generator=generator)
        target = torch.randint(_CLASSES, (2, 8), generator=generator)
        target[:, : seed + 1] = _PADDING
        metric.update(logits, target)
        total += criterion(logits.transpose(1, 2), target)
        count += int((target != _PADDING).sum())
    assert_close((total / count).exp(), metric.compute())

"""Losses in other processes: sent there as pickles, called by the workers of a DataLoader, shared tensors."""

from __future__ import annotations

import concurrent.futures
import multiprocessing

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import nllx

_OPTIONS = {"ignore_index": 0, "label_smoothing": 0.1, "reduction": "mean"}


def _problem(count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, 4, generator=generator)
    return logits, torch.arange(count) % 4, torch.rand(4, generator=generator) + 0.5


def _step(criterion: torch.nn.Module, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x = logits.detach().requires_grad_()
    output = criterion(x, target)
    return output.detach(), torch.autograd.grad(output.sum(), x)[0]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_modules_are_sent_to_processes(method: str) -> None:
    logits, target, weight = _problem()
    modules = [
        (nllx.CrossEntropyLoss(weight, **_OPTIONS), torch.nn.CrossEntropyLoss(weight, **_OPTIONS)),
        (nllx.NLLLoss(weight, ignore_index=0), torch.nn.NLLLoss(weight, ignore_index=0)),
    ]
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as processes:
        for ours, theirs in modules:
            result = processes.submit(_step, ours, logits, target).result()
            assert_close(result, _step(theirs, logits, target))
        log_probs = processes.submit(nllx.LogSoftmax(dim=1), logits).result()
        assert_close(log_probs, logits.log_softmax(1))


def test_shared_logits() -> None:
    """Logits and targets in shared memory are read in the other process; its gradient comes back the same way."""
    logits, target, weight = _problem()
    criterion = nllx.CrossEntropyLoss(weight, **_OPTIONS)
    expected = _step(torch.nn.CrossEntropyLoss(weight, **_OPTIONS), logits, target)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=torch.multiprocessing.get_context("spawn")) as processes:
        result = processes.submit(_step, criterion, logits.share_memory_(), target.share_memory_()).result()
        assert_close(result, expected)


class _Losses(torch.utils.data.Dataset):
    """The loss of one example, made by a worker."""

    def __init__(self) -> None:
        self.logits, self.target, weight = _problem(12)
        self.criterion = nllx.CrossEntropyLoss(weight, label_smoothing=0.1)

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return _step(self.criterion, self.logits[index], self.target[index])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method: str) -> None:
    """Forked ones too, after the parent used the kernels."""
    data = _Losses()
    theirs = torch.nn.CrossEntropyLoss(data.criterion.weight, label_smoothing=0.1)
    expected = [_step(theirs, logits, target) for logits, target in zip(data.logits, data.target, strict=True)]
    assert_close([data[i] for i in range(len(data))], expected)
    batches = list(torch.utils.data.DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context=method))
    assert_close(torch.cat([losses for losses, _ in batches]), torch.stack([loss for loss, _ in expected]))
    assert_close(torch.cat([gradients for _, gradients in batches]), torch.stack([g for _, g in expected]))

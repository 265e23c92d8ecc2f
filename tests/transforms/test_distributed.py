"""Training on two processes (gloo): DistributedDataParallel and FSDP2 with nllx's losses, against one process and torch's."""

from __future__ import annotations

import copy
import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import nllx

_PROCESSES, _STEPS, _CLASSES = 2, 5, 7
Loss = Callable[[Tensor, Tensor], Tensor]


def _net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, _CLASSES))


def _batches() -> list[tuple[Tensor, Tensor]]:
    """Of 12 rows, some of them padding: more in the first half, which goes to the first process."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(_STEPS):
        target = torch.randint(_CLASSES, (12,), generator=generator)
        target[[0, 2, 3, 9]] = -100
        batches.append((torch.randn(12, 5, generator=generator), target))
    return batches


def _sum(package: Any) -> Loss:
    return package.CrossEntropyLoss(torch.linspace(0.5, 2, _CLASSES), label_smoothing=0.1, reduction="sum")


def _weights(target: Tensor) -> Tensor:
    """The sum of the weights of the rows that count: what the mean divides by."""
    return torch.linspace(0.5, 2, _CLASSES)[target[target != -100]].sum()


def _train_alone(loss: Loss) -> list[float]:
    """One process on whole batches, as the others are to come out."""
    net = _net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    losses = []
    for x, target in _batches():
        optimizer.zero_grad()
        value = loss(net(x), target) / _weights(target)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def _wrap(kind: str, net: torch.nn.Sequential) -> torch.nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(net)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if kind == "fsdp2, bfloat16" else MixedPrecisionPolicy()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (_PROCESSES,))
    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(net, mesh=mesh, mp_policy=policy)


def _train_on(rank: int, kind: str, parts: int, package: Any) -> list[float]:
    """A process of two: its half of each batch in `parts` steps of accumulated gradients, divided by the weights of all."""
    model, loss = _wrap(kind, _net()), _sum(package)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = []
    for x, target in _batches():
        optimizer.zero_grad()
        divisor, total = _weights(target), torch.zeros([])
        half = slice(rank * 6, rank * 6 + 6)
        for part_x, part_target in zip(x[half].chunk(parts), target[half].chunk(parts), strict=True):
            logits = checkpoint(model, part_x, use_reentrant=False) if kind == "ddp" else model(part_x)
            if package is torch.nn:  # whose loss takes no float32 weights beside bfloat16 logits
                logits = logits.float()
            value = loss(logits, part_target) / divisor
            (value * _PROCESSES).backward()  # the wrappers average the gradients of the processes
            total += value.detach()
        optimizer.step()
        torch.distributed.all_reduce(total)
        losses.append(total.item())
    return losses


def _train_together(rank: int, kind: str, parts: int, results: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the machine's name resolves to
    store = torch.distributed.FileStore(str(results / "store"), _PROCESSES)
    minute = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=_PROCESSES, timeout=minute)
    try:
        losses = [_train_on(rank, kind, parts, package) for package in (nllx, torch.nn)]
        torch.distributed.barrier()
        torch.save(losses, results / f"{rank}.pt")
    finally:
        # The model is gone by now. One that outlives its group takes the group down itself, in a destructor that holds
        # the GIL and joins gloo's threads, one of which may be waiting for the GIL (seen with torch 2.13).
        torch.distributed.destroy_process_group()
    # Without the end of the interpreter, at which FSDP2's groups still live and torch may abort ("terminate called without
    # an active exception": a thread of gloo's asks for the GIL then).
    os._exit(0)


def _spawn(*arguments: Any) -> None:
    """torch.multiprocessing.spawn with a limit: processes that wait for each other for ever are ended, and the test fails."""
    context = torch.multiprocessing.spawn(_train_together, arguments, nprocs=_PROCESSES, join=False)
    end = time.monotonic() + 180
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, "the processes did not end"
    finally:
        for process in context.processes:
            process.kill()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2, bfloat16"])
def test_two_processes_train_as_one(kind: str, parts: int, tmp_path: Path) -> None:
    expected = _train_alone(_sum(torch.nn))
    assert_close(_train_alone(_sum(nllx)), expected, rtol=1e-6, atol=0)
    _spawn(kind, parts, tmp_path)
    half = "bfloat16" in kind
    for rank in range(_PROCESSES):
        actual, torchs = torch.load(tmp_path / f"{rank}.pt")
        # In bfloat16 the model's own rounding is large, and the same with either loss.
        assert_close(actual, torchs, rtol=2e-3 if half else 1e-6, atol=0)
        assert_close(actual, expected, rtol=0.02 if half else 1e-6, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_loss_and_accumulation(reentrant: bool) -> None:
    """The loss inside of the checkpoint, in parts whose sums are divided by the weights of all rows."""

    def gradients(package: Any) -> list[Tensor]:
        net, loss = _net(), _sum(package)
        x, target = _batches()[0]
        for part_x, part_target in zip(x.chunk(3), target.chunk(3), strict=True):

            def step(x: Tensor, target: Tensor = part_target) -> Tensor:
                return loss(net(x), target)

            part = part_x.requires_grad_() if reentrant else part_x
            (checkpoint(step, part, use_reentrant=reentrant) / _weights(target)).backward()
        return [copy.deepcopy(p.grad) for p in net.parameters()]

    assert_close(gradients(nllx), gradients(torch.nn))

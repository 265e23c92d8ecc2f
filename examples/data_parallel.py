"""DistributedDataParallel on two processes, with gradients accumulated over parts and a mean over all tokens that count.

Parts and processes have different numbers of padded tokens. Means of their means would weigh tokens unequally, so the losses
are sums, divided by the number of tokens of the whole batch.

    python examples/data_parallel.py
"""

import contextlib
import os
import tempfile

import torch
import torch.distributed
import torch.multiprocessing
from show import curve, table
from torch.nn.parallel import DistributedDataParallel

import nllx

PROCESSES, PARTS, STEPS, TOKENS, VOCABULARY, PADDING = 2, 2, 30, 64, 500, -1


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token pairs that every process makes alike: y = 3 x mod 61, with padding, more of it at the front."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(61, (TOKENS,), generator=generator)
    padded = torch.rand(TOKENS, generator=generator) < torch.linspace(0.8, 0.0, TOKENS)
    return tokens, (3 * tokens % 61).masked_fill(padded, PADDING)


def train(rank: int, processes: int, device: torch.device) -> list[float]:
    """The loss of each step, of the whole batch."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, 32), torch.nn.Linear(32, VOCABULARY)).to(device)
    model = DistributedDataParallel(net)
    criterion = nllx.CrossEntropyLoss(ignore_index=PADDING, reduction="sum")
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-2)
    losses = []
    for step in range(STEPS):
        tokens, target = (t.to(device) for t in batch(step))
        # Of the whole batch; torch.distributed.all_reduce it where no process has it all.
        count = (target != PADDING).sum()
        total = torch.zeros((), device=device)
        mine = (t.chunk(processes)[rank].chunk(PARTS) for t in (tokens, target))
        for number, (x, y) in enumerate(zip(*mine, strict=True), 1):
            # Gradients are exchanged once for all parts, and DistributedDataParallel takes their mean over the processes.
            with contextlib.nullcontext() if number == PARTS else model.no_sync():
                loss = criterion(model(x), y) / count
                (loss * processes).backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        torch.distributed.all_reduce(total)
        losses.append(total.item())
    return losses


def process(rank: int, processes: int, folder: str) -> None:
    """One process of `processes`; the first saves the loss of each step."""
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= PROCESSES
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the processes are on one machine
    store = torch.distributed.FileStore(f"{folder}/store-{processes}", processes)
    torch.distributed.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=processes)
    losses = train(rank, processes, device)
    if rank == 0:
        torch.save(losses, f"{folder}/losses-{processes}.pt")
    torch.distributed.barrier()
    # After the model is gone: one that outlives its group ends it in a destructor that can wait for ever (torch 2.13).
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, PROCESSES):
            torch.multiprocessing.spawn(process, (processes, folder), nprocs=processes)
        alone, together = (torch.load(f"{folder}/losses-{processes}.pt") for processes in (1, PROCESSES))
    curve(alone, "one process")
    curve(together, f"{PROCESSES} processes")
    difference = max(abs(a - b) for a, b in zip(alone, together, strict=True))
    rows = [["one process", alone[-1]], [f"{PROCESSES} processes", together[-1]], ["largest difference", difference]]
    table([["", "last loss"], *rows])
    assert difference < 1e-3, "processes and parts must not change the loss"

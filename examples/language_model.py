"""The loss of a language model: a large vocabulary, padding, and what a step costs beside torch's loss.

Token -1 is padding: `ignore_index=-1` keeps it out of the loss, the gradient and the divisor of the mean. torch writes the
log-probabilities, as large as the logits, to memory; nllx does not, and with `inplace_backward=True` the gradient takes the
place of the logits.

    python examples/language_model.py
"""

import resource
import statistics
import subprocess
import sys
import time

import torch
from show import DEVICE, curve, progress, synchronize, table

import nllx

VOCABULARY, WIDTH, SEQUENCES, LENGTH, STEPS = 32000, 64, 12, 64, 8
LOSSES = {
    "torch": torch.nn.CrossEntropyLoss(ignore_index=-1),
    "nllx": nllx.CrossEntropyLoss(ignore_index=-1),
    "nllx, in place": nllx.CrossEntropyLoss(ignore_index=-1, inplace_backward=True),
}


def memory() -> float:
    """The most memory that the process, or the GPU, has held so far, MiB."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences that count up, each of another length: a token is the one before plus one."""
    first = torch.randint(VOCABULARY // 2, (SEQUENCES, 1), generator=generator) % 97
    tokens = first + torch.arange(LENGTH + 1)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (SEQUENCES, 1), generator=generator)
    target = tokens[:, 1:].masked_fill(torch.arange(LENGTH) >= lengths, -1)
    return tokens[:, :-1].to(DEVICE), target.to(DEVICE)


def train(name: str) -> tuple[list[float], float, float]:
    """Losses, the median time of loss and gradient in ms, and the memory that they add to the logits in MiB."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    embedding = torch.nn.Embedding(VOCABULARY, WIDTH, device=DEVICE)
    head = torch.nn.Linear(WIDTH, VOCABULARY, device=DEVICE)
    optimizer = torch.optim.AdamW([*embedding.parameters(), *head.parameters()], lr=3e-2)
    criterion, losses, times, added = LOSSES[name], [], [], 0.0
    for _ in progress(range(STEPS), name):
        tokens, target = batch(generator)
        logits = head(embedding(tokens)).flatten(0, 1)
        synchronize()
        before, start = memory(), time.perf_counter()
        loss = criterion(logits, target.flatten())
        (gradient,) = torch.autograd.grad(loss, logits)  # the loss alone is timed: loss.backward() does the rest too
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
        added = max(added, memory() - before)  # of the first step: later ones find the memory there
        logits.backward(gradient)
        del logits, gradient
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, statistics.median(times), added


if len(sys.argv) > 1:  # a process of its own for each loss, since the memory of a process never shrinks
    print(*train(sys.argv[1]), sep="\n")
else:
    rows: list[list[object]] = [["loss", "loss and gradient, ms", "added memory, MiB", "last loss"]]
    for name in LOSSES:
        run = subprocess.run([sys.executable, __file__, name], check=True, stdout=subprocess.PIPE, text=True)
        lines = run.stdout.splitlines()
        losses = [float(v) for v in lines[0].strip("[]").split(",")]
        curve(losses, name)
        rows.append([name, float(lines[1]), float(lines[2]), losses[-1]])
    table(rows)
    assert abs(rows[1][3] - rows[2][3]) < 1e-3, "the two losses train alike"  # type: ignore[operator]

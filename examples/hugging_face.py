"""A language model of Hugging Face transformers, whose loss is its own code, put on nllx by one line: `nllx.patch()`.

The model is built from a configuration and learns from synthetic text; nothing is downloaded. It is trained twice from the same
seed, with torch's loss and with nllx's: the same losses, in less time. The same line goes in front of the `Trainer`.

    pip install transformers
    python examples/hugging_face.py
"""

import statistics
import time

import torch
import transformers
from show import DEVICE, curve, progress, synchronize, table

import nllx

VOCABULARY, SEQUENCES, LENGTH, STEPS = 32000, 8, 96, 10


def batch(step: int) -> dict[str, torch.Tensor]:
    """Text that counts up in steps of its own; labels of -100, behind its end, do not count."""
    generator = torch.Generator().manual_seed(step)
    first, stride, length = (torch.randint(low, high, (SEQUENCES, 1), generator=generator) for low, high in _RANGES)
    place = torch.arange(LENGTH)
    tokens = (first + stride * place) % 300
    inside = place < length
    return {
        "input_ids": tokens.to(DEVICE),
        "attention_mask": inside.long().to(DEVICE),
        "labels": tokens.masked_fill(~inside, -100).to(DEVICE),
    }


_RANGES = [(0, 300), (1, 4), (LENGTH // 2, LENGTH + 1)]


def train(name: str) -> tuple[list[float], float]:
    """The loss of each step, and the median time of a step in ms."""
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, times = [], []
    for step in progress(range(STEPS), name):
        inputs = batch(step)
        synchronize()
        start = time.perf_counter()
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
        losses.append(loss.item())
    return losses, statistics.median(times)


before, before_ms = train("torch")

nllx.patch()  # the one line
after, after_ms = train("nllx.patch()")
report = nllx.patch_report()
nllx.unpatch()

curve(before, "torch")
curve(after, "nllx.patch()")
rows = [["torch", before_ms, before[-1], "–"], ["nllx.patch()", after_ms, after[-1], str(report["cross_entropy"])]]
table([["loss", "step, ms", "last loss", "calls of cross_entropy, by what ran"], *rows])
assert report["cross_entropy"] == {"nllx": STEPS}
assert max(abs(a - b) for a, b in zip(before, after, strict=True)) < 1e-3, "the patch must not change the loss"

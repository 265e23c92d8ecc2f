"""A small transformer language model over the words of Python's own manual, ``pydoc_data.topics``.

A sequence is a paragraph. Paragraphs differ in length, so batches are padded, and the loss skips the padding by
``ignore_index``.
"""

import math
import re
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from .training import SEED, Task

WORD = re.compile(r"\w+|([^\w\s])\1*")  # a word, or a run of one punctuation mark
BOUNDARY = 0  # the token before the first word of a paragraph and after its last
PADDING = -100  # in targets; no token has this id
MAX_LENGTH = 64
EPOCHS = 3
BATCH_SIZE = 32
WIDTH = 128
LAYERS = 2
HEADS = 4


def load_paragraphs() -> tuple[list[Tensor], int]:
    """Token ids (int64) of every paragraph, a long one in pieces of ``MAX_LENGTH``, and the size of the vocabulary."""
    # Topics repeat each other: a paragraph must not be in the training and in the held-out data.
    paragraphs = dict.fromkeys(paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n"))
    texts = [[match.group() for match in WORD.finditer(paragraph)] for paragraph in paragraphs]
    words = sorted({word for text in texts for word in text})
    ids = {word: index for index, word in enumerate(words, start=BOUNDARY + 1)}
    pieces = [piece for text in texts if text for piece in torch.tensor([ids[word] for word in text]).split(MAX_LENGTH)]
    return pieces, len(words) + 1


def make_batch(paragraphs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Input tokens (N, T) and the token that follows each as a flat target (N·T), both padded to the longest."""
    inputs = pad_sequence([F.pad(ids, (1, 0), value=BOUNDARY) for ids in paragraphs], batch_first=True)
    target = pad_sequence([F.pad(ids, (0, 1), value=BOUNDARY) for ids in paragraphs], True, PADDING)
    return inputs, target.flatten()


class Block(nn.Module):
    """Causal self-attention, then a two-layer perceptron, each with layer norm before it and a residual around it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        # No bias: the softmax does not see a shift of all keys, so its gradient would be nothing but rounding noise.
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        with sdpa_kernel(SDPBackend.MATH):  # the one backend that is deterministic everywhere
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.perceptron(x)


class LanguageModel(nn.Module):
    """Tokens (N, T) to logits (N·T, vocabulary)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(MAX_LENGTH + 1, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)).flatten(0, 1))


def language_model_task() -> Task:
    paragraphs, vocabulary = load_paragraphs()
    test = paragraphs[::10]
    train = [ids for index, ids in enumerate(paragraphs) if index % 10]
    order = torch.Generator().manual_seed(SEED)
    batches = [
        make_batch([train[index] for index in batch])
        for _ in range(EPOCHS)
        for batch in torch.randperm(len(train), generator=order).split(BATCH_SIZE)
    ]
    targets = torch.cat([target for _, target in batches])
    padding = (targets == PADDING).double().mean().item()

    def evaluate(model: nn.Module, device: torch.device) -> dict[str, float]:
        right, count, total_loss = 0, 0, 0.0
        for start in range(0, len(test), BATCH_SIZE):
            inputs, target = make_batch(test[start : start + BATCH_SIZE])
            logits = model(inputs.to(device)).cpu()
            right += int((logits.argmax(1) == target).sum())
            count += int((target != PADDING).sum())
            total_loss += F.cross_entropy(logits, target, ignore_index=PADDING, reduction="sum").item()
        return {"accuracy": right / count, "perplexity": math.exp(total_loss / count)}

    return Task(
        name="language model",
        description=(
            f"{len(train)} + {len(test)} paragraphs, a vocabulary of {vocabulary}, {padding:.0%} padding, "
            f"logits (N·T, {vocabulary}) with N·T up to {BATCH_SIZE * (MAX_LENGTH + 1)}"
        ),
        batches=batches,
        build_model=lambda: LanguageModel(vocabulary),
        build_optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
        evaluate=evaluate,
        loss_arguments={"ignore_index": PADDING},
    )

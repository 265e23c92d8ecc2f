"""A small language model learns by reinforcement: PPO on the log-probability and the entropy of each token, in one pass.

    python examples/policy_gradient.py

The reward of a token is 1 where it is even and larger than the one before, so that the model has to read. Afterwards the time
of a step's statistics, and what is saved for the backward, beside the same in plain torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from show import DEVICE, curve, progress, table
from torch import Tensor

from nllx.functional import softmax_statistics

VOCABULARY, WIDTH, BATCH, LENGTH, STEPS, EPOCHS = 64, 48, 128, 12, 120, 2
CLIP, BONUS = 0.2, 0.01


class Policy(torch.nn.Module):
    """The next token's logits from the token before."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


@torch.no_grad()
def generate(policy: Policy) -> Tensor:
    tokens = torch.randint(VOCABULARY // 2, (BATCH, 1), device=DEVICE)
    for _ in range(LENGTH):
        probabilities = policy(tokens[:, -1]).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)], 1)
    return tokens


def train() -> list[float]:
    policy = Policy().to(DEVICE)
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    rewards: list[float] = []
    for _ in progress(range(STEPS), "PPO"):
        tokens = generate(policy)
        before, actions = tokens[:, :-1], tokens[:, 1:]
        reward = ((actions % 2 == 0) & (actions > before)).float()
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        with torch.no_grad():
            old = softmax_statistics(policy(before), actions, outputs=["log_prob"]).log_prob
        for _ in range(EPOCHS):
            s = softmax_statistics(policy(before), actions)
            ratio = (s.log_prob - old).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
            loss = -(gain + BONUS * s.entropy).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rewards.append(reward.mean().item())
    return rewards


def by_torch(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.float(), -1)
    return log_p.gather(-1, actions[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def by_nllx(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    s = softmax_statistics(logits, actions, outputs=["log_prob", "entropy"])
    return s.log_prob, s.entropy


def measure(statistics: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Milliseconds of a forward and a backward, and saved bytes in those of the logits (which a model has anyway)."""
    logits = torch.randn(1024, 8000, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    actions = torch.randint(8000, (1024,), device=DEVICE)
    saved: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        kept = statistics(logits, actions)  # alive, so that no storage is used twice
    saved.pop(logits.untyped_storage().data_ptr(), None)
    del kept
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        log_prob, entropy = statistics(logits, actions)
        (log_prob.sum() + entropy.sum()).backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        best = min(best, 1000 * (time.perf_counter() - start))
    return best, sum(saved.values()) / logits.nbytes


def main() -> None:
    torch.manual_seed(0)
    rewards = train()
    curve(rewards, "reward of a token")
    rows = [(name, *measure(f)) for name, f in (("plain torch", by_torch), ("nllx", by_nllx))]
    table([("log-probability and entropy", "ms", "saved, in logits"), *rows])
    assert sum(rewards[-10:]) / 10 > 2 * rewards[0], "the policy has not learnt"


if __name__ == "__main__":
    main()

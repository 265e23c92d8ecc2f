"""Two encoders learn which pairs belong together (InfoNCE), and the scale of their similarities with them.

    python examples/contrastive.py

Each thing is seen twice, through two matrices that nobody knows, with noise. Of a batch, every view is told from all others, by
rows and by columns of one matrix of similarities; the scale is a parameter, and gets its gradient.
"""

from __future__ import annotations

import torch
from show import DEVICE, curve, progress, table
from torch import Tensor

from nllx.functional import softmax_statistics

THINGS, VIEW, WIDTH, BATCH, STEPS = 12, 24, 16, 256, 150

torch.manual_seed(0)
first_view, second_view = (torch.randn(THINGS, VIEW, device=DEVICE) for _ in range(2))


def draw(count: int) -> tuple[Tensor, Tensor]:
    things = torch.randn(count, THINGS, device=DEVICE)
    return tuple(things @ view + 0.5 * torch.randn(count, VIEW, device=DEVICE) for view in (first_view, second_view))


def encoder() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(VIEW, 64), torch.nn.GELU(), torch.nn.Linear(64, WIDTH)).to(DEVICE)


class Pairs(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = encoder(), encoder()
        self.log_scale = torch.nn.Parameter(torch.tensor(14.0, device=DEVICE).log())

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and how many of the pairs are found."""
        a, b = (torch.nn.functional.normalize(f(x), dim=1) for f, x in ((self.first, a), (self.second, b)))
        similarity, pair = a @ b.t(), torch.arange(len(a), device=DEVICE)
        both = [softmax_statistics(similarity, pair, dim=d, logit_scale=self.log_scale.exp()) for d in (1, 0)]
        loss = -sum(s.log_prob.mean() for s in both) / 2
        found = sum((s.prediction == pair).float().mean() for s in both) / 2
        return loss, found


def main() -> None:
    model = Pairs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, found = [], []
    before = model.log_scale.exp().item()
    for _ in progress(range(STEPS), "InfoNCE"):
        loss, share = model(*draw(BATCH))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        found.append(share.item())
    curve(losses, "loss")
    curve(found, "pairs found")
    with torch.no_grad():
        held_out, share = model(*draw(BATCH))
    table(
        [
            ("", "before", "after"),
            ("loss", losses[0], held_out.item()),
            ("pairs found", found[0], share.item()),
            ("scale", before, model.log_scale.exp().item()),
        ]
    )
    assert share > 0.5 > 5 * found[0], "the pairs are not found"
    assert model.log_scale.grad is not None
    assert model.log_scale.grad != 0


if __name__ == "__main__":
    main()

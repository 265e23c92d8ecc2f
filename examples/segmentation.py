"""Segmentation in channels-last, with class weights for classes of few pixels and borders that do not count.

Weights of one over the frequency make the rare classes count as much as the background; the mean divides by the sum of the
weights of all pixels that count. `ignore_index=255` leaves out the pixels that nobody labelled. Channels-last logits are read
where they lie.

    python examples/segmentation.py
"""

import torch
from show import DEVICE, curve, progress, table
from torch import Tensor

import nllx

CLASSES, SIZE, BATCH, STEPS, IGNORED = 4, 48, 8, 60, 255


def scenes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy pictures with discs of three kinds on a background, and the class of each pixel; edges are not labelled."""
    grid = torch.arange(SIZE)
    x, target = torch.zeros(count, 3, SIZE, SIZE), torch.zeros(count, SIZE, SIZE, dtype=torch.int64)
    for kind, radius in ((1, 9), (2, 5), (3, 3)):
        center = torch.randint(radius, SIZE - radius, (count, 2), generator=generator)
        squares = (grid - center[:, :1])[:, :, None] ** 2 + (grid - center[:, 1:])[:, None, :] ** 2
        target[squares <= radius**2] = kind
        x[:, kind - 1][squares <= radius**2] = 1.5
        target[(squares > radius**2) & (squares <= (radius + 1) ** 2)] = IGNORED
    return x + torch.randn(x.shape, generator=generator), target


def inverse_frequencies(target: Tensor) -> Tensor:
    """Weights with which every class adds as much to the loss."""
    counts = torch.bincount(target[target != IGNORED], minlength=CLASSES).float()
    return counts.sum() / (CLASSES * counts.clamp(min=1))


def train(name: str, weight: Tensor | None) -> tuple[list[float], Tensor]:
    """Losses of all steps, and the share of each class's pixels that is found on other pictures."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 5, padding=2),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 16, 5, padding=2),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, CLASSES, 1),
    ).to(DEVICE, memory_format=torch.channels_last)
    criterion = nllx.CrossEntropyLoss(weight, ignore_index=IGNORED).to(DEVICE)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for _ in progress(range(STEPS), name):
        x, target = scenes(BATCH, generator)
        logits = net(x.to(DEVICE, memory_format=torch.channels_last))
        assert logits.is_contiguous(memory_format=torch.channels_last)
        loss = criterion(logits, target.to(DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    x, target = scenes(32, generator)
    with torch.no_grad():
        found = net(x.to(DEVICE, memory_format=torch.channels_last)).argmax(1).cpu() == target
    return losses, torch.stack([found[target == c].float().mean() for c in range(CLASSES)])


weight = inverse_frequencies(scenes(64, torch.Generator().manual_seed(1))[1])
plain, weighted = train("equal weights", None), train("inverse frequencies", weight)
curve(plain[0], "equal weights")
curve(weighted[0], "inverse frequencies")
table(
    [
        ["class", "weight", "found with equal weights", "found with inverse frequencies"],
        *(
            [name, weight[c].item(), plain[1][c].item(), weighted[1][c].item()]
            for c, name in enumerate(("background", "large discs", "discs", "small discs"))
        ),
    ]
)
assert weighted[1].mean() > plain[1].mean(), "rare classes should be found more often"

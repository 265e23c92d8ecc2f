"""Image classification with label smoothing, and with Mixup, whose targets are probabilities.

Mixup (Zhang et al., 2018) trains on x = λ x₁ + (1 - λ) x₂ with the target λ y₁ + (1 - λ) y₂: a probability for each class,
which `nllx.CrossEntropyLoss` takes as torch's does. Label smoothing spreads a share of each target over all classes.

    python examples/image_classification.py
"""

import torch
from show import DEVICE, curve, progress, table
from torch import Tensor
from torch.nn import functional as F

import nllx

CLASSES, STEPS, BATCH = 10, 120, 64


def images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy 16 x 16 pictures of stripes, whose direction is the class."""
    target = torch.randint(CLASSES, (count,), generator=generator)
    angle = target * (torch.pi / CLASSES)
    line = torch.linspace(-3, 3, 16)
    across = angle.cos()[:, None, None] * line[:, None] + angle.sin()[:, None, None] * line
    phase = 6 * torch.rand(count, 1, 1, generator=generator)
    noise = torch.randn(count, 16, 16, generator=generator)
    return ((2 * across + phase).sin() + noise)[:, None], target


def mixup(x: Tensor, target: Tensor, strength: float, smoothing: float) -> tuple[Tensor, Tensor]:
    """Each image mixed with another one of the batch, and the probabilities of the classes."""
    share = torch.distributions.Beta(strength, strength).sample().to(x.device)
    other = torch.randperm(len(x), device=x.device)
    one_hot = F.one_hot(target, CLASSES).to(x.dtype)
    probabilities = share * one_hot + (1 - share) * one_hot[other]
    return share * x + (1 - share) * x[other], (1 - smoothing) * probabilities + smoothing / CLASSES


def train(name: str, strength: float) -> tuple[list[float], float]:
    """Losses of all steps, and the accuracy on other images."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 5, padding=2),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(16, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(128, CLASSES),
    ).to(DEVICE)
    smoothed, soft = nllx.CrossEntropyLoss(label_smoothing=0.1), nllx.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    losses = []
    for _ in progress(range(STEPS), name):
        x, target = (t.to(DEVICE) for t in images(BATCH, generator))
        if strength:
            x, probabilities = mixup(x, target, strength, smoothing=0.1)
            loss = soft(net(x), probabilities)
        else:
            loss = smoothed(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    x, target = images(1000, generator)
    with torch.no_grad():
        accuracy = (net(x.to(DEVICE)).argmax(1).cpu() == target).float().mean().item()
    return losses, accuracy


runs = {"label smoothing": train("label smoothing", 0.0), "Mixup": train("Mixup", 0.4)}
for name, (losses, _) in runs.items():
    curve(losses, name)
table([["", "last loss", "accuracy"], *([name, losses[-1], accuracy] for name, (losses, accuracy) in runs.items())])
assert runs["label smoothing"][1] > 0.5, "it should have learned"

"""Knowledge distillation: a small network learns the probabilities of a larger one.

The student's loss (Hinton et al., 2015) is a mean of the cross entropy with the labels and T² times that with the teacher's
probabilities, both softened by the temperature T. Probability targets go to `nllx.functional.cross_entropy` as they are.

    python examples/distillation.py
"""

import torch
from show import DEVICE, curve, progress, table
from torch import Tensor

import nllx

CLASSES, FEATURES, BATCH, TEMPERATURE, LABELLED = 20, 16, 128, 4.0, 400
cross_entropy = nllx.functional.cross_entropy

torch.manual_seed(0)
hidden = torch.nn.Sequential(torch.nn.Linear(FEATURES, 64), torch.nn.Tanh(), torch.nn.Linear(64, CLASSES)).to(DEVICE)
for p in hidden.parameters():
    p.requires_grad_(False).mul_(3)


def draw(count: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, FEATURES, device=DEVICE)
    return x, hidden(x).argmax(1)


def network(width: int) -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(FEATURES, width), torch.nn.ReLU(), torch.nn.Linear(width, CLASSES)).to(
        DEVICE
    )


def fit(
    net: torch.nn.Module, name: str, steps: int, teacher: torch.nn.Module | None = None, fresh: bool = False
) -> list[float]:
    """Trains on the labelled points, or on fresh ones; with a teacher, on its probabilities for fresh points too."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for _ in progress(range(steps), name):
        pick = torch.randint(LABELLED, (BATCH,), device=DEVICE)
        x, target = draw(BATCH) if fresh else (points[pick], labels[pick])
        loss = cross_entropy(net(x), target)
        if teacher is not None:
            x = torch.randn(BATCH, FEATURES, device=DEVICE)  # nobody labelled these
            with torch.no_grad():
                probabilities = (teacher(x) / TEMPERATURE).softmax(1)
            loss = 0.3 * loss + 0.7 * TEMPERATURE**2 * cross_entropy(net(x) / TEMPERATURE, probabilities)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def accuracy(net: torch.nn.Module) -> float:
    with torch.no_grad():
        return (net(test).argmax(1) == expected).float().mean().item()


points, labels = draw(LABELLED)
test, expected = draw(4000)
teacher, alone, student = network(256), network(32), network(32)
curves = {
    "teacher": fit(teacher, "teacher", 400, fresh=True),
    "student alone": fit(alone, "student alone", 400),
    "student of the teacher": fit(student, "student of the teacher", 400, teacher),
}
for name, losses in curves.items():
    curve(losses, name)
scores = [accuracy(net) for net in (teacher, alone, student)]
table([["", "accuracy"], *([name, score] for name, score in zip(curves, scores, strict=True))])
assert scores[2] > scores[1], "the teacher should help"

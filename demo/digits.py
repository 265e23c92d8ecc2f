"""Handwritten digits: 1797 images of 8 × 8 pixels that scikit-learn ships, ten classes, a small convolutional net."""

import torch
from sklearn.datasets import load_digits as load_from_sklearn
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from .training import SEED, Task

EPOCHS = 20
BATCH_SIZE = 64


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) in [0, 1] and labels (N) for training, then for testing."""
    digits = load_from_sklearn()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=SEED, stratify=digits.target)
    return images[train], labels[train], images[test], labels[test]


def build_model() -> nn.Module:
    """Images (N, 1, 8, 8) to logits (N, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.GELU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def digits_task() -> Task:
    images, labels, test_images, test_labels = load_digits()
    order = torch.Generator().manual_seed(SEED)
    batches = [
        (images[batch], labels[batch])
        for _ in range(EPOCHS)
        for batch in torch.randperm(len(labels), generator=order).split(BATCH_SIZE)
    ]

    def evaluate(model: nn.Module, device: torch.device) -> dict[str, float]:
        predicted = model(test_images.to(device)).argmax(1).cpu()
        return {"accuracy": (predicted == test_labels).double().mean().item()}

    return Task(
        name="digits",
        description=f"{len(labels)} + {len(test_labels)} images of 8 × 8 pixels, logits ({BATCH_SIZE}, 10)",
        batches=batches,
        build_model=build_model,
        build_optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
        evaluate=evaluate,
    )

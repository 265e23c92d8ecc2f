"""Per-pixel classification: handwritten digits scattered over larger images, eleven classes, class weights.

A pixel belongs to the class of the digit whose ink it shows, else to the background.
"""

import torch
from torch import Tensor, nn

from .digits import load_digits
from .training import SEED, Task

SIZE = 48  # of an image
CELL = 12  # images are divided into cells, each with at most one digit of 8 × 8 pixels somewhere in it
BACKGROUND = 10
CLASSES = 11
INK = 0.3  # darker than this, in [0, 1], is ink
NOISE = 0.1
IMAGES = 1024
TEST_IMAGES = 128
EPOCHS = 6
BATCH_SIZE = 16


def paste_digits(digits: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 1, SIZE, SIZE), float32, and the class of every pixel (count, SIZE, SIZE), int64."""
    images = NOISE * torch.randn(count, 1, SIZE, SIZE, generator=generator)
    classes = torch.full((count, SIZE, SIZE), BACKGROUND)
    cells = [(n, y, x) for n in range(count) for y in range(0, SIZE, CELL) for x in range(0, SIZE, CELL)]
    chosen = torch.randint(2 * len(labels), (len(cells),), generator=generator)  # half of the cells stay empty
    shifts = torch.randint(CELL - 8 + 1, (len(cells), 2), generator=generator)
    for (n, y, x), digit, (down, right) in zip(cells, chosen.tolist(), shifts.tolist(), strict=True):
        if digit < len(labels):
            window = (n, slice(y + down, y + down + 8), slice(x + right, x + right + 8))
            images[:, 0][window] += digits[digit, 0]
            classes[window][digits[digit, 0] > INK] = labels[digit]
    return images, classes


def build_model() -> nn.Module:
    """Images (N, 1, SIZE, SIZE) to logits (N, CLASSES, SIZE, SIZE): fully convolutional, half resolution inside."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, stride=2),
        nn.GELU(),
        nn.Conv2d(32, 48, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(48, 48, 3, padding=2, dilation=2),
        nn.GELU(),
        nn.Conv2d(48, 48, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(48, CLASSES * 4, 1),
        nn.PixelShuffle(2),
    )


def segmentation_task() -> Task:
    digits, labels, test_digits, test_labels = load_digits()
    generator = torch.Generator().manual_seed(SEED)
    images, classes = paste_digits(digits, labels, IMAGES, generator)
    test_images, test_classes = paste_digits(test_digits, test_labels, TEST_IMAGES, generator)
    batches = [
        (images[batch], classes[batch])
        for _ in range(EPOCHS)
        for batch in torch.randperm(IMAGES, generator=generator).split(BATCH_SIZE)
    ]
    frequency = classes.flatten().bincount(minlength=CLASSES) / classes.numel()

    def evaluate(model: nn.Module, device: torch.device) -> dict[str, float]:
        predicted = model(test_images.to(device)).argmax(1).cpu()
        # confusion[c, p]: the number of pixels of class c that were predicted as p
        pairs = test_classes * CLASSES + predicted
        confusion = pairs.flatten().bincount(minlength=CLASSES**2).view(CLASSES, CLASSES).double()
        right = confusion.diagonal()
        return {
            "accuracy": (right.sum() / confusion.sum()).item(),
            "mean IoU": (right / (confusion.sum(0) + confusion.sum(1) - right)).mean().item(),
        }

    return Task(
        name="segmentation",
        description=(
            f"{IMAGES} + {TEST_IMAGES} images of {SIZE} × {SIZE} pixels, {frequency[BACKGROUND]:.0%} background, "
            f"logits ({BATCH_SIZE}, {CLASSES}, {SIZE}, {SIZE})"
        ),
        batches=batches,
        build_model=build_model,
        build_optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3),
        evaluate=evaluate,
        # Rare classes weigh more; the square root keeps the few pixels of a digit from outweighing everything else.
        loss_arguments={"weight": frequency.rsqrt() / frequency.rsqrt().mean()},
    )

"""More classes than a 32-bit index can name. Expanded tensors make them without the memory."""

from __future__ import annotations

import math
import os

import pytest
import torch

from nllx import functional

pytestmark = pytest.mark.slow

CLASSES = 2**31 + 8
BEYOND = 2**31 + 3  # a class whose number does not fit 32 bits


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_nll_loss_forward() -> None:
    log_probs = torch.tensor([[-1.5], [-2.5], [-4.5]]).expand(3, CLASSES)
    loss = functional.nll_loss(log_probs, torch.tensor([BEYOND, -100, 7]), reduction="none")
    assert loss.tolist() == [1.5, 0.0, 4.5]
    with pytest.raises(IndexError, match=str(CLASSES)):
        functional.nll_loss(log_probs, torch.tensor([0, CLASSES, 0]))


def test_cross_entropy_of_planes() -> None:
    """Two pixels of equal logits but for the number of the class: the loss is log C."""
    logits = torch.zeros(1, 1, 2).expand(1, CLASSES, 2)
    loss = functional.cross_entropy(logits, torch.tensor([[BEYOND, -100]]), reduction="none")
    assert loss[0].tolist() == [pytest.approx(math.log(CLASSES), rel=1e-6), 0.0]


@pytest.mark.skipif(_free_bytes() < 12 << 30, reason="needs 12 GiB of free memory")
def test_nll_loss_backward() -> None:
    log_probs = torch.zeros(1, dtype=torch.bfloat16).expand(1, CLASSES).requires_grad_()
    (grad,) = torch.autograd.grad(functional.nll_loss(log_probs, torch.tensor([BEYOND])), log_probs)
    assert grad[0, BEYOND] == -1
    grad[0, BEYOND] = 0
    assert not grad.any()

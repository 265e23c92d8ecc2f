"""What the operators are outside of C++, one module for each: definition, shapes, batching rules."""

from __future__ import annotations

import torch

from nllx._operators import (
    checked_target,
    cross_entropy,
    functorch,
    log_softmax,
    mse_loss,
    nll_loss,
    softmax_statistics,
)

OPERATORS = (
    *cross_entropy.OPERATORS,
    *nll_loss.OPERATORS,
    *log_softmax.OPERATORS,
    *mse_loss.OPERATORS,
    *softmax_statistics.OPERATORS,
)


def register(library: torch.library.Library) -> None:
    """Registers all of it: fakes (which serve meta tensors too), definitions and transforms."""
    for operator in OPERATORS:
        functorch.register(operator, library)
    cross_entropy.register_value_and_grad()
    checked_target.register(library)

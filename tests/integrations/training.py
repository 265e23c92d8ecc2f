"""The same training twice, with torch's losses and with nllx's, and the comparison of the two."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.testing import assert_close

import nllx


class Run(NamedTuple):
    losses: list[Tensor]  # of every step, and of the first batch once more at the end
    gradients: list[dict[str, Tensor]]  # of every parameter, step by step
    calls: dict[str, dict[str, int]]  # nllx.patch_report()


def train(
    build: Callable[[], torch.nn.Module],
    loss: Callable[[torch.nn.Module, Any], Tensor],
    batches: Sequence[Any],
    *,
    patched: bool,
    rate: float = 0.05,
) -> Run:
    """A step of gradient descent for each batch, from the same seed: dropout and initial weights are those of the other run."""
    torch.manual_seed(0)
    model = build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    nllx.patch_report(reset=True)
    losses, gradients = [], []
    with nllx.patched() if patched else contextlib.nullcontext():
        for batch in batches:
            optimizer.zero_grad()
            value = loss(model, batch)
            value.backward()
            losses.append(value.detach())
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            optimizer.step()
        losses.append(loss(model, batches[0]).detach())
    return Run(losses, gradients, nllx.patch_report(reset=True))


def assert_trains_alike(
    build: Callable[[], torch.nn.Module],
    loss: Callable[[torch.nn.Module, Any], Tensor],
    batches: list[Any],
    function: str = "cross_entropy",
    **options: Any,
) -> tuple[Run, Run]:
    """Losses and gradients of every step are torch's; every call of the patched function, one a step or more, ran in nllx."""
    torchs = train(build, loss, batches, patched=False, **options)
    nllxs = train(build, loss, batches, patched=True, **options)
    assert torchs.calls == {name: {} for name in torchs.calls}
    assert nllxs.calls[function].keys() == {"nllx"}, nllxs.calls
    assert nllxs.calls[function]["nllx"] >= len(batches)
    assert_runs_alike(nllxs, torchs)
    return torchs, nllxs


def assert_runs_alike(actual: Run, expected: Run) -> None:
    """Rounding differs from the first step on and every later one amplifies it, to a ReLU that another sign switches.

    What that adds to a gradient is in proportion to the largest gradients of the model, not to those of a layer that a
    normalization leaves with next to none (1e-4 of the largest). A wrong loss is wrong in the largest too.
    """
    assert_close(torch.stack(actual.losses), torch.stack(expected.losses), rtol=2e-5, atol=2e-5)
    assert abs(expected.losses[-1] - expected.losses[0]) > 1e-3, "the training changes the loss"
    for step, (a, b) in enumerate(zip(actual.gradients, expected.gradients, strict=True)):
        assert a.keys() == b.keys()
        largest = max(value.abs().max().item() for value in b.values())
        assert largest > 1e-4
        for name in a:
            assert_close(
                a[name], b[name], rtol=1e-3, atol=1e-4 * largest, msg=lambda m, n=name, s=step: f"{n}, step {s}: {m}"
            )

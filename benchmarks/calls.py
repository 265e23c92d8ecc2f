"""What is timed and checked for one case: calls of a function, in torch's autograd or under ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .shapes import Inputs
from .timing import Call, Prepared

Function = Callable[..., Tensor]

MODES = ("forward", "backward", "forward+backward", "value_and_grad")
DEFAULT_MODES = {"cpu": ("forward", "forward+backward"), "cuda": MODES}


@dataclass(frozen=True)
class Calls:
    """What is timed and checked for one case.

    ``forward()`` returns the output and keeps nothing for a backward. ``forward_backward()`` returns the output and the
    gradient of the logits, which it allocates anew each time. ``backward`` prepares a forward that keeps what it needs
    and returns the gradient. ``value_and_grad()`` returns both without a graph. All return torch tensors on the case's
    device and, on CUDA, give all their work to the current stream. ``restore()`` brings back logits that calls overwrite;
    it precedes each check of values.
    """

    forward: Callable[[], Tensor]
    forward_backward: Callable[[], tuple[Tensor, Tensor]]
    backward: Prepared | None = None
    value_and_grad: Callable[[], tuple[Tensor, Tensor]] | None = None
    restore: Callable[[], object] = lambda: None

    def of(self, mode: str) -> Call | None:
        """The call of one of ``MODES``, None where the provider has none."""
        return getattr(self, mode.replace("+", "_"))


def bind(function: Function, inputs: Inputs) -> Calls:
    """Calls of a function with torch's signature that takes part in torch's autograd."""
    if inputs.per_sample:
        return _bind_per_sample(function, inputs)
    leaf = inputs.logits.detach().requires_grad_()

    @torch.no_grad()
    def forward() -> Tensor:
        return function(inputs.logits, *inputs.args, **inputs.options)

    def forward_backward() -> tuple[Tensor, Tensor]:
        leaf.grad = None
        output = function(leaf, *inputs.args, **inputs.options)
        output.backward(inputs.grad_output)
        assert leaf.grad is not None
        return output, leaf.grad

    def with_graph() -> Tensor:
        return function(leaf, *inputs.args, **inputs.options)

    def backward(output: Tensor) -> Tensor:
        return torch.autograd.grad(output, leaf, inputs.grad_output)[0]

    return Calls(forward, forward_backward, Prepared(with_graph, backward))


def _bind_per_sample(function: Function, inputs: Inputs) -> Calls:
    """Calls under ``torch.func``: the loss, or loss and gradient, of each sample as a batch of one."""

    def loss(logits: Tensor, *args: Tensor) -> Tensor:
        return function(logits.unsqueeze(0), *(arg.unsqueeze(0) for arg in args), **inputs.options)

    losses = torch.func.vmap(loss)
    gradients = torch.func.vmap(torch.func.grad_and_value(loss))

    @torch.no_grad()
    def forward() -> Tensor:
        return losses(inputs.logits, *inputs.args)

    def forward_backward() -> tuple[Tensor, Tensor]:
        gradient, output = gradients(inputs.logits, *inputs.args)
        return output, gradient

    return Calls(forward, forward_backward)

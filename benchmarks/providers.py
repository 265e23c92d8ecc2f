"""Who is timed. One entry of ``PROVIDERS`` each; nothing else in this folder knows their names but ``BASELINE``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .calls import Calls, Function, bind
from .shapes import OPS, Inputs


def bind_nllx(function: Function, inputs: Inputs) -> Calls:
    from nllx import functional

    calls = bind(function, inputs)
    if function is not functional.cross_entropy or inputs.per_sample:
        return calls

    def value_and_grad() -> tuple[Tensor, Tensor]:
        return functional.cross_entropy_value_and_grad(inputs.logits, *inputs.args, **inputs.options)

    return replace(calls, value_and_grad=value_and_grad)


def bind_in_place(function: Function, inputs: Inputs) -> Calls:
    """Calls of a function that may write the gradient over the logits, which are then a copy of the case's.

    The gradient comes from ``autograd.grad``: ``backward`` would copy it into the ``grad`` of a leaf.
    """
    scratch = inputs.logits.clone()
    calls = bind(function, replace(inputs, logits=scratch))
    backward = calls.backward
    if backward is None:
        raise NotImplementedError("is not timed under torch.func")

    def forward_backward() -> tuple[Tensor, Tensor]:
        output = backward.prepare()
        return output, backward.call(output)

    return replace(calls, forward_backward=forward_backward, restore=lambda: scratch.copy_(inputs.logits))


def bind_compiled(function: Function, inputs: Inputs) -> Calls:
    """Calls of ``function`` under ``torch.compile``, default mode, one whole graph, static shapes."""
    torch.compiler.reset()  # a case that is compiled as the ninth of one function would hit the recompilation limit

    def call(logits: Tensor, *args: Tensor, **options: Any) -> Tensor:
        return function(logits, *args, **options)

    return bind(torch.compile(call, fullgraph=True, dynamic=False), inputs)


@dataclass(frozen=True)
class Provider:
    """A source of implementations.

    ``load(device)`` returns a function for each op that it has, by the name in ``Case.op``; it raises, with the reason
    as the message, where the provider is not to be had. ``bind(function, inputs)`` makes the calls of one case; a
    provider outside torch brings its own. It and the calls may raise where they do not support the case: that is
    reported. ``is_yardstick``: it computes something else, for comparison, and its values are not checked.
    """

    name: str
    load: Callable[[torch.device], Mapping[str, Function]]
    bind: Callable[[Function, Inputs], Calls] = bind
    is_yardstick: bool = False


def _policy_loss(log_prob: Tensor, logsumexp: Tensor, entropy: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """Of all statistics of the softmax one number."""
    loss = 1e-4 * logsumexp.square() - log_prob - 0.01 * entropy
    return loss.mean() - 1e-3 * (prediction == target).float().mean()


def _nllx(device: torch.device) -> Mapping[str, Function]:
    from nllx import functional

    def statistics(logits: Tensor, target: Tensor) -> Tensor:
        return _policy_loss(*functional.softmax_statistics(logits, target), target)

    functions = {op: getattr(functional, op) for op in OPS if hasattr(F, op)}
    return functions | {"softmax_statistics": statistics, "cross_entropy_with_options": functional.cross_entropy}


def _plain(device: torch.device) -> Mapping[str, Function]:
    """nllx's cross entropy in the place of what is made of the same rows."""
    from nllx import functional

    def cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        return functional.cross_entropy(logits, target)

    return {"softmax_statistics": cross_entropy, "cross_entropy_with_options": cross_entropy}


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _statistics_by_torch(logits: Tensor, target: Tensor) -> Tensor:
    log_probs = F.log_softmax(_wide(logits), 1)
    log_prob = log_probs.gather(1, target.unsqueeze(1)).squeeze(1)
    entropy = -(log_probs.exp() * log_probs).sum(1)
    return _policy_loss(log_prob, _wide(logits).logsumexp(1), entropy, logits.argmax(1), target)


def _options_by_torch(
    logits: Tensor,
    target: Tensor,
    softcap: float | None = None,
    temperature: float = 1.0,
    logit_scale: float | Tensor = 1.0,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
    divisor: float | None = None,
) -> Tensor:
    z = _wide(logits)
    if isinstance(logit_scale, Tensor):
        z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if temperature != 1.0:
        z = z / temperature
    if not z_loss and sample_weight is None and divisor is None:
        return F.cross_entropy(z, target)
    rows = F.cross_entropy(z, target, reduction="none")
    if z_loss:
        rows = rows + z_loss * z.logsumexp(1).square()
    if sample_weight is not None:
        return (rows * sample_weight).sum() / sample_weight.sum()
    return rows.mean() if divisor is None else rows.sum() / divisor


def torch_functions(device: torch.device) -> Mapping[str, Function]:
    functions = {op: getattr(F, op) for op in OPS if hasattr(F, op)}
    return functions | {
        "softmax_statistics": _statistics_by_torch,
        "cross_entropy_with_options": _options_by_torch,
    }


def _jax(device: torch.device) -> Mapping[str, Function]:
    if device.type != "cpu":
        raise RuntimeError("timed on the CPU alone: JAX gives its work to streams of its own")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if torch.get_num_threads() != cores:
        raise RuntimeError(
            f"JAX uses all of {cores} cores, torch {torch.get_num_threads()}; bind the process to as many"
        )
    from . import jax_losses

    return jax_losses.FUNCTIONS


def bind_jax(function: Function, inputs: Inputs) -> Calls:
    from . import jax_losses

    return jax_losses.bind(function, inputs)


def _on_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise RuntimeError("has kernels for GPUs alone")


def _liger(device: torch.device) -> Mapping[str, Function]:
    _on_cuda(device)
    from liger_kernel.transformers.functional import liger_cross_entropy

    return {"cross_entropy": liger_cross_entropy}


def _quack(device: torch.device) -> Mapping[str, Function]:
    _on_cuda(device)
    from quack.cross_entropy import cross_entropy

    return {"cross_entropy": cross_entropy}


def _fla(device: torch.device) -> Mapping[str, Function]:
    _on_cuda(device)
    from fla.modules import FusedCrossEntropyLoss

    def cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        return FusedCrossEntropyLoss(**options)(logits, target)

    return {"cross_entropy": cross_entropy}


BASELINE = "nllx"  # the table's ratios are to this one

PROVIDERS: list[Provider] = [
    Provider(BASELINE, _nllx, bind=bind_nllx),
    Provider("nllx, cross_entropy alone", _plain, is_yardstick=True),
    Provider("torch", torch_functions),
    Provider("torch.compile", torch_functions, bind=bind_compiled),
    Provider("jax", _jax, bind=bind_jax),
    Provider("liger", _liger, bind=bind_in_place),
    Provider("quack", _quack),
    Provider("fla", _fla),
]

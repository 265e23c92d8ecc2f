"""The losses in JAX, compiled by ``jax.jit``, for the provider ``jax``. Written as a user of JAX would write them.

Arrays come from torch without a copy (DLPack); a channels-last image goes in as (N, d1, ..., dk, C), its memory as it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

from .calls import Calls
from .shapes import Inputs

jax.config.update("jax_enable_x64", True)  # class indices are int64; floating-point arrays stay what they are


def cross_entropy(
    logits: jax.Array,
    target: jax.Array,
    axis: int,
    weight: jax.Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Mean cross entropy with class indices or, where ``target`` has the shape of the logits, probabilities."""
    log_probs = jax.nn.log_softmax(_accumulated(logits), axis=axis)
    classes = logits.shape[axis]
    if target.ndim < logits.ndim:
        return _mean_of_indices(log_probs, target, axis, weight, ignore_index, label_smoothing)
    smooth = _accumulated(target) * (1.0 - label_smoothing) + label_smoothing / classes
    if weight is not None:
        smooth = smooth * _along(weight, axis, logits.ndim)
    return -jnp.sum(smooth * log_probs) / (logits.size // classes)


def nll_loss(
    log_probs: jax.Array, target: jax.Array, axis: int, weight: jax.Array | None = None, ignore_index: int = -100
) -> jax.Array:
    """Mean negative log likelihood of class indices."""
    return _mean_of_indices(_accumulated(log_probs), target, axis, weight, ignore_index, 0.0)


def log_softmax(x: jax.Array, axis: int) -> jax.Array:
    return jax.nn.log_softmax(x, axis=axis)


def _accumulated(x: jax.Array) -> jax.Array:
    """Half precision in float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _along(weight: jax.Array, axis: int, ndim: int) -> jax.Array:
    shape = [1] * ndim
    shape[axis] = weight.shape[0]
    return _accumulated(weight).reshape(shape)


def _mean_of_indices(
    log_probs: jax.Array,
    target: jax.Array,
    axis: int,
    weight: jax.Array | None,
    ignore_index: int,
    label_smoothing: float,
) -> jax.Array:
    counts = target != ignore_index
    index = jnp.where(counts, target, 0)
    picked = jnp.take_along_axis(log_probs, jnp.expand_dims(index, axis), axis=axis).squeeze(axis)
    row_weight = (
        counts.astype(log_probs.dtype) if weight is None else jnp.where(counts, _accumulated(weight)[index], 0.0)
    )
    loss = -(1.0 - label_smoothing) * jnp.sum(row_weight * picked)
    if label_smoothing:
        weighted = log_probs if weight is None else log_probs * _along(weight, axis, log_probs.ndim)
        uniform = jnp.where(counts, weighted.sum(axis=axis), 0.0)
        loss -= label_smoothing / log_probs.shape[axis] * jnp.sum(uniform)
    return loss / jnp.sum(row_weight)


def mse_loss(input: jax.Array, target: jax.Array, axis: int) -> jax.Array:
    return jnp.mean(jnp.square(_accumulated(input) - _accumulated(target)))


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "cross_entropy": cross_entropy,
    "nll_loss": nll_loss,
    "log_softmax": log_softmax,
    "mse_loss": mse_loss,
}


def bind(function: Callable[..., Any], inputs: Inputs) -> Calls:
    """Calls of ``jit(function)`` and of ``jit(value_and_grad(function))``, or its vjp where there is an incoming gradient."""
    if inputs.per_sample:
        raise NotImplementedError("is not timed under jax.vmap")
    logits = inputs.logits
    last = logits.dim() == 4 and logits.is_contiguous(memory_format=torch.channels_last)
    axis = -1 if last else 1
    dtype = logits.dtype

    def to_jax(tensor: Tensor) -> jax.Array:
        if last and tensor.shape == logits.shape:
            tensor = tensor.movedim(1, -1)
        return jnp.from_dlpack(tensor.contiguous())

    def to_torch(array: jax.Array) -> Tensor:
        tensor = torch.from_dlpack(jax.block_until_ready(array))
        return tensor.movedim(-1, 1) if last and tensor.dim() == logits.dim() else tensor

    x = to_jax(logits)
    options = {
        key: to_jax(value) if isinstance(value, Tensor) else value
        for key, value in inputs.options.items()
        if key != "dim"  # of log_softmax: always 1, which is `axis`
    }
    args = [to_jax(arg) for arg in inputs.args]

    # Arrays are arguments: what a jitted function closes over is compiled in as a constant.
    arrays = {key: value for key, value in options.items() if isinstance(value, jax.Array)}
    constants = {key: value for key, value in options.items() if key not in arrays}

    def call(logits: jax.Array, args: list[jax.Array], arrays: dict[str, jax.Array]) -> jax.Array:
        output = function(logits, *args, axis=axis, **arrays, **constants)
        return output.astype(x.dtype)

    forward = jax.jit(call)
    if inputs.grad_output is None:
        both = jax.jit(jax.value_and_grad(call))

        def forward_backward() -> tuple[Tensor, Tensor]:
            output, gradient = both(x, args, arrays)
            return to_torch(output).to(dtype), to_torch(gradient)
    else:
        grad_output = to_jax(inputs.grad_output)

        @jax.jit
        def with_vjp(logits: jax.Array, grad_output: jax.Array) -> tuple[jax.Array, jax.Array]:
            output, vjp = jax.vjp(lambda logits: call(logits, args, arrays), logits)
            return output, vjp(grad_output)[0]

        def forward_backward() -> tuple[Tensor, Tensor]:
            output, gradient = with_vjp(x, grad_output)
            return to_torch(output), to_torch(gradient)

    return Calls(lambda: to_torch(forward(x, args, arrays)), forward_backward)

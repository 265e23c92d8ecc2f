"""Operators under the transforms of torch.func.

Outside of these transforms csrc/operators/autograd.h has the derivatives. functorch's own calls come here: the forward and the
first derivative, of the inputs for which there is one, are the kernels, under ``vmap`` too, and every other derivative is that
of the definition. csrc/grad_level.cpp has the graph of a level of grad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType, pop_dynamic_layer_stack, push_dynamic_layer_stack
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI
from torch.autograd import forward_ad

from nllx import _C
from nllx._operators.operator import Operator, whole


def _any_tangent(arguments: Sequence[Any]) -> bool:
    """Whether one is a dual number; outside of forward mode without a look at them."""
    return forward_ad._current_level >= 0 and any(_C.has_tangent(t) for t in arguments if isinstance(t, Tensor))


def _as_tuple(results: Any) -> tuple[Tensor | None, ...]:
    return results if isinstance(results, tuple) else (results,)


def _like(results: Sequence[Tensor | None], given: Any) -> Any:
    """One result alone, as an operator with one has it."""
    return tuple(results) if isinstance(given, tuple) else results[0]


def _by_samples(definition: Callable[..., Any], in_dims: Sequence[int | None], arguments: Sequence[Any]) -> Any:
    """The definition of each sample, by torch's batching rules. Results that a mask leaves out stay None."""
    kept: list[int] = []
    given: Any = None

    def of_sample(*tensors: Any) -> tuple[Tensor, ...]:
        nonlocal given
        values = iter(tensors)
        given = definition(*(next(values) if isinstance(a, Tensor) else a for a in arguments))
        results = _as_tuple(given)
        kept[:] = [i for i, result in enumerate(results) if result is not None]
        return tuple(results[i] for i in kept)  # type: ignore[misc]

    places = [i for i, a in enumerate(arguments) if isinstance(a, Tensor)]
    found = torch.vmap(of_sample, tuple(in_dims[i] for i in places))(*(arguments[i] for i in places))
    results: list[Tensor | None] = [None] * len(_as_tuple(given))
    for i, result in zip(kept, found, strict=True):
        results[i] = result
    return _like(results, given)


def transformed(of: Operator, differentiate: Callable[..., None] = _C.differentiate_level) -> Callable[..., Any]:
    """An operator as a call that functorch can transform.

    It does what the outermost transform asks for, and calls the operator again for the ones inside of it. `differentiate`: of
    the extension that the operator's derivatives are in.
    """
    operator = getattr(torch.ops.nllx, of.name).default

    def inner(*arguments: Any) -> Any:
        """The operator under the rest of the transforms."""
        return operator(*arguments) if _functorch.peek_interpreter_stack() is None else transform(*arguments)

    def differentiated(interpreter: Any, arguments: Sequence[Any]) -> Any:
        level, lift, grad_mode = interpreter.level(), interpreter._cptr.lift, torch.is_grad_enabled()
        plain = [_functorch._unwrap_for_grad(a, level) if isinstance(a, Tensor) else a for a in arguments]
        torch._C._set_grad_enabled(grad_mode and interpreter.prev_grad_mode())
        layer = pop_dynamic_layer_stack()
        try:
            result = inner(*plain)
        finally:
            push_dynamic_layer_stack(layer)
            torch._C._set_grad_enabled(grad_mode)
        wrapped = tuple(None if t is None else _functorch._wrap_for_grad(t, level) for t in _as_tuple(result))
        lifted = tuple(lift(a) if isinstance(a, Tensor) else a for a in arguments)
        differentiate(of.name, lifted, tuple(plain), wrapped)
        return _like(wrapped, result)

    def of_samples(interpreter: Any, arguments: Sequence[Any]) -> Any:
        level = interpreter.level()
        pairs = [_functorch._unwrap_batched(a, level) if isinstance(a, Tensor) else (a, None) for a in arguments]
        plain, in_dims = [pair[0] for pair in pairs], tuple(pair[1] for pair in pairs)
        layer = pop_dynamic_layer_stack()
        try:
            if in_dims.count(None) == len(in_dims):
                return inner(*plain)
            result = None if of.batched is None else of.batched(interpreter.batch_size(), in_dims, *plain)
            if result is None:
                result = _by_samples(of.definition, in_dims, plain), 0
        finally:
            push_dynamic_layer_stack(layer)
        output, dim = result
        batched = [None if t is None else _functorch._add_batch_dim(t, dim, level) for t in _as_tuple(output)]
        return _like(batched, output)

    def transform(*arguments: Any) -> Any:
        interpreter: Any = retrieve_current_functorch_interpreter()
        kind = interpreter.key()
        if of.refuse is not None:
            of.refuse(*arguments)
        if kind == TransformType.Grad and not _any_tangent(arguments):
            return differentiated(interpreter, arguments)
        if of.check is not None:
            of.check(*arguments)
        if kind == TransformType.Vmap:
            return of_samples(interpreter, arguments)
        if kind in (TransformType.Jvp, TransformType.Grad):
            return of.definition(*arguments)
        level = FunctorchFunctionalizeAPI(interpreter)
        plain = level.unwrap_tensors(tuple(arguments))
        with level.redispatch_to_next():
            result = operator(*plain)
        return level.wrap_tensors(result)

    def call(*given: Any) -> Any:
        return transform(*(_functorch.unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in given))

    return whole(of.name, call)


def vector_jacobian_product(definition: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """The gradients of arguments of an operator, from (gradients of its first results, *arguments, which of them)."""

    def vjp(grads: Sequence[Tensor | None], *rest: Any) -> list[Tensor]:
        arguments, which = rest[:-1], rest[-1]

        def differentiated(*values: Tensor) -> tuple[Tensor, ...]:
            full = list(arguments)
            for i, value in zip(which, values, strict=True):
                full[i] = value
            results = _as_tuple(definition(*full))
            return tuple(results[i] for i, grad in enumerate(grads) if grad is not None)  # type: ignore[misc]

        of_results = torch.func.vjp(differentiated, *(arguments[i] for i in which))[1]
        return list(of_results(tuple(grad for grad in grads if grad is not None)))

    return vjp


def register(
    of: Operator, library: torch.library.Library, differentiate: Callable[..., None] = _C.differentiate_level
) -> None:
    """Registers the operator without data, its definition, the operator under transforms, which see this and not the kernels,
    and the gradients that csrc/grad_level.cpp asks for."""
    torch.library.register_fake(f"nllx::{of.name}", whole(of.name, of.fake))
    key, composite = "FuncTorchDynamicLayerFrontMode", "CompositeImplicitAutograd"
    library.impl(f"_{of.name}_definition", of.definition, composite)
    library.impl(of.name, transformed(of, differentiate), key)
    for each in (key, composite):
        library.impl(f"_{of.name}_vjp", vector_jacobian_product(of.definition), each)

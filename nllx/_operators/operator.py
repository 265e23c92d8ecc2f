"""What an operator with derivatives is made of in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Operator(NamedTuple):
    """``torch.ops.nllx.<name>``, whose kernels are in C++.

    definition: the same in differentiable torch operations. It is three things: the oracle that the kernels are tested against,
        their documentation, and what torch differentiates where the kernels have no derivative (higher order, forward mode,
        functorch's transforms, arguments without a kernel's gradient). Slow and plain on purpose.
    fake: the results' shapes, dtypes, devices and strides, from arguments without data.
    batched: the batching rule: from the number of samples, the dimension of each argument that holds them (None: it is shared)
        and the arguments, to the results and the dimension that holds the samples; None where there is no kernel for them,
        which leaves the definition, as having no rule does.
    check: raises for arguments, as they are in one sample, that do not fit: under transforms, where another problem reaches the
        kernels.
    refuse: raises where a derivative is asked for that the operator has not.
    """

    name: str
    definition: Callable[..., Any]
    fake: Callable[..., Any]
    batched: Callable[..., Any] | None = None
    check: Callable[..., Any] | None = None
    refuse: Callable[..., Any] | None = None


def whole(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with all arguments of the operator: the dispatcher leaves out those that are their defaults."""
    schema = getattr(torch.ops.nllx, name).default._schema
    defaults = [argument.default_value for argument in schema.arguments]
    return lambda *given: function(*given, *defaults[len(given) :])

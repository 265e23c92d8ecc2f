"""What torch does to a loss, apart from calling it: one table of transforms, each run on any package's losses.

A row of ``TRANSFORMS`` takes a ``Subject`` (a loss and its tensors, of torch or of nllx) and returns tensors;
test_transforms.py compares those of the two packages, and docs/transforms.md is the list of what came out.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo.compiled_autograd
import torch._inductor
import torch.fx.experimental.proxy_tensor
import torch.overrides
import torch.utils._python_dispatch
from cases import ELEMENTWISE, Case, Problem, build
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

SAMPLES = 3


def numbers(like: Tensor) -> Tensor:
    """Numbers of size one, not all the same, without a generator of random ones, which vmap does not take."""
    count = torch.arange(like.numel(), dtype=like.dtype, device=like.device)
    return (0.7 * count).cos().view(like.shape) + 1.5


class Subject:
    """A loss with several samples of its tensors.

    leaves: what it is differentiated with respect to, the logits alone or the probabilities and weights too.
    """

    def __init__(self, case: Case, functional: Any, device: str, input_only: bool) -> None:
        self.case, self.functional, self.input_only = case, functional, input_only
        names = [case.name, *(f"{case.name} {i}" for i in range(1, SAMPLES))]
        self.samples = [build(dataclasses.replace(case, name=name), device) for name in names]
        problem = self.samples[0]
        self.leaves = [problem.input] if input_only else problem.differentiable
        self.target, self.weight = problem.target, problem.weight

    def loss(self, x: Tensor, target: Tensor | None, weight: Tensor | None) -> Tensor:
        """The loss of all its tensors, as the case has it."""
        return Problem(self.case, x, target, weight).call(self.functional)

    def output(self, *leaves: Tensor) -> Tensor:
        """The loss of the tensors that it is differentiated with respect to."""
        rest = (self.target, self.weight)[len(leaves) - 1 :]
        return self.loss(*leaves, *rest)

    def value(self, *leaves: Tensor) -> Tensor:
        """One number, not linear in the loss."""
        output = self.output(*leaves)
        return (output * numbers(output)).sum() + output.square().sum()

    def required(self) -> tuple[Tensor, ...]:
        """The leaves, requiring gradients."""
        return tuple(leaf.detach().requires_grad_() for leaf in self.leaves)

    def directions(self) -> tuple[Tensor, ...]:
        """A direction for each leaf."""
        return tuple(numbers(leaf) for leaf in self.leaves)

    @property
    def argnums(self) -> tuple[int, ...]:
        return tuple(range(len(self.leaves)))

    def stacked(self, *dims: int | None) -> tuple[Tensor | None, ...]:
        """Input, target and weight of all samples along `dims`; those of the first where it is None."""
        stacks: list[Tensor | None] = []
        for name, dim in zip(("input", "target", "weight"), dims, strict=True):
            tensors = [getattr(sample, name) for sample in self.samples]
            if tensors[0] is None:
                stacks.append(None)
            elif dim is None:
                stacks.append(tensors[0])
            else:  # laid out as the dimension says
                stacks.append(torch.stack(tensors, dim % (tensors[0].dim() + 1)))
        return tuple(stacks)

    def dims(self, x: int | None, target: int | None, weight: int | None) -> tuple[int | None, ...]:
        """in_dims of the tensors that the loss has."""
        first = self.samples[0]
        return x, None if first.target is None else target, None if first.weight is None else weight


Run = Callable[[Subject], Any]


@dataclasses.dataclass(frozen=True)
class Transform:
    """name: as users say it. run: what it does to a loss. compiles: whether it takes the time of a compiler of Python;
    builds: that of a C++ compiler too. eager: what torch's loss is asked for instead, where that time is better spent.
    """

    name: str
    run: Run
    compiles: bool = False
    builds: bool = False
    eager: Run | None = None

    def __str__(self) -> str:
        return re.sub(r"\W+", "_", self.name).strip("_")


TRANSFORMS: list[Transform] = []


def _transform(
    name: str, compiles: bool = False, builds: bool = False, eager: Run | None = None
) -> Callable[[Run], Run]:
    def add(run: Run) -> Run:
        TRANSFORMS.append(Transform(name, run, compiles, builds, eager))
        return run

    return add


def _gradients(subject: Subject, function: Callable[..., Tensor] | None = None, **options: Any) -> list[Tensor]:
    leaves = subject.required()
    value = (function or subject.value)(*leaves)
    return list(torch.autograd.grad(value, leaves, **options))


# ---- autograd ----


@_transform("`backward`")
def _(s: Subject) -> Any:
    leaves = s.required()
    s.value(*leaves).backward()
    return [leaf.grad for leaf in leaves]


@_transform("`backward` twice, `retain_graph`")
def _(s: Subject) -> Any:
    leaves = s.required()
    value = s.value(*leaves)
    value.backward(retain_graph=True)
    value.backward()
    return [leaf.grad for leaf in leaves]


@_transform("gradient penalty, `create_graph`")
def _(s: Subject) -> Any:
    leaves = s.required()
    first = torch.autograd.grad(s.value(*leaves), leaves, create_graph=True)
    penalty = sum((g.square().sum() + (g * numbers(g)).sum() for g in first), leaves[0].new_zeros([]))
    return [*first, *torch.autograd.grad(penalty, leaves)]


@_transform("third order")
def _(s: Subject) -> Any:
    leaves = s.required()
    value = s.value(*leaves)
    for power in (2, 3):
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        value = sum((g.pow(power).sum() for g in grads), leaves[0].new_zeros([]))
    return torch.autograd.grad(value, leaves)


@_transform("anomaly mode")
def _(s: Subject) -> Any:
    with torch.autograd.set_detect_anomaly(True):
        return _gradients(s)


@_transform("tensor hooks, `retain_grad`")
def _(s: Subject) -> Any:
    leaves, seen = s.required(), []
    leaves[0].register_hook(lambda grad: 2 * grad)
    x = leaves[0] * 1.5
    x.register_hook(lambda grad: seen.append(grad) or grad + 1)
    x.retain_grad()
    output = s.output(x, *leaves[1:])
    output.register_hook(lambda grad: seen.append(grad) or 3 * grad)
    output.grad_fn.register_prehook(lambda grads: seen.append(grads[0]))  # type: ignore[union-attr]
    output.sum().backward()
    return [leaf.grad for leaf in leaves], x.grad, seen


@_transform("module hooks")
def _(s: Subject) -> Any:
    class Loss(torch.nn.Module):
        def forward(self, *leaves: Tensor) -> Tensor:
            return s.output(*leaves)

    module, seen = Loss(), []
    module.register_forward_pre_hook(lambda module, args: seen.extend(args))
    module.register_forward_hook(lambda module, args, output: output * 2)
    module.register_full_backward_pre_hook(lambda module, grads: (grads[0] + 1,))
    module.register_full_backward_hook(lambda module, grad_input, grad_output: seen.extend([*grad_input, *grad_output]))
    return _gradients(s, lambda *leaves: module(*leaves).sum()), seen


@_transform("`saved_tensors_hooks`")
def _(s: Subject) -> Any:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: [t.clone()], lambda packed: packed[0].clone()):
        return _gradients(s)


@_transform("`save_on_cpu`")
def _(s: Subject) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return _gradients(s)


@_transform("`checkpoint`, reentrant")
def _(s: Subject) -> Any:
    return _gradients_of_backward(s, lambda *leaves: checkpoint(s.value, *leaves, use_reentrant=True))


@_transform("`checkpoint`, not reentrant")
def _(s: Subject) -> Any:
    return _gradients(s, lambda *leaves: checkpoint(s.value, *leaves, use_reentrant=False))


def _gradients_of_backward(s: Subject, function: Callable[..., Tensor]) -> Any:
    leaves = s.required()
    function(*leaves).backward()
    return [leaf.grad for leaf in leaves]


@_transform("`inference_mode`, `no_grad`")
def _(s: Subject) -> Any:
    leaves = s.required()
    with torch.inference_mode():
        inference = s.output(*leaves)
    with torch.no_grad():
        return inference.clone(), s.output(*leaves), inference.is_inference()


@_transform("`grad(is_grads_batched=True)`")
def _(s: Subject) -> Any:
    leaves = s.required()
    output = s.output(*leaves)
    grads = torch.stack([numbers(output) * k for k in (1.0, -2.0, 0.5)])
    return torch.autograd.grad(output, leaves, grads, is_grads_batched=True)


@_transform("`autograd.functional.jacobian`")
def _(s: Subject) -> Any:
    jacobian, leaves = torch.autograd.functional.jacobian, tuple(s.leaves)
    return [
        jacobian(s.output, leaves),
        jacobian(s.output, leaves, vectorize=True),
        jacobian(s.output, leaves, vectorize=True, strategy="forward-mode"),
    ]


@_transform("`autograd.functional.hessian`, `hvp`, `vhp`, `jvp`")
def _(s: Subject) -> Any:
    functional, leaves = torch.autograd.functional, tuple(s.leaves)
    return [
        functional.hessian(s.value, leaves),
        functional.hessian(s.value, leaves, vectorize=True),
        functional.hessian(s.value, leaves, vectorize=True, outer_jacobian_strategy="forward-mode"),
        functional.hvp(s.value, leaves, s.directions()),
        functional.vhp(s.value, leaves, s.directions()),
        functional.jvp(s.output, leaves, s.directions()),
    ]


@_transform("many threads at once")
def _(s: Subject) -> Any:
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        return list(threads.map(lambda _: _gradients(s), range(16)))


# ---- forward mode ----


@contextlib.contextmanager
def _duals(s: Subject, requires_grad: bool = False) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """The leaves, and the leaves with tangents."""
    with forward_ad.dual_level():
        leaves = s.required() if requires_grad else tuple(s.leaves)
        yield leaves, tuple(map(forward_ad.make_dual, leaves, s.directions()))


@_transform("dual numbers")
def _(s: Subject) -> Any:
    with _duals(s) as (_, duals):
        return tuple(forward_ad.unpack_dual(s.output(*duals)))


@_transform("dual numbers, forward over reverse")
def _(s: Subject) -> Any:
    with _duals(s, requires_grad=True) as (leaves, duals):
        grads = torch.autograd.grad(s.value(*duals), leaves)
        return [tuple(forward_ad.unpack_dual(grad)) for grad in grads]


@_transform("dual numbers, reverse over forward")
def _(s: Subject) -> Any:
    with _duals(s, requires_grad=True) as (leaves, duals):
        tangent = forward_ad.unpack_dual(s.value(*duals)).tangent
        return torch.autograd.grad(tangent, leaves)


# ---- torch.func ----

func = torch.func


@_transform("`func.grad`, `grad_and_value`")
def _(s: Subject) -> Any:
    return func.grad(s.value, s.argnums)(*s.leaves), func.grad_and_value(s.value, s.argnums)(*s.leaves)


@_transform("`func.grad` of `func.grad`")
def _(s: Subject) -> Any:
    def penalty(*leaves: Tensor) -> Tensor:
        return sum((g.square().sum() for g in func.grad(s.value, s.argnums)(*leaves)), leaves[0].new_zeros([]))

    return func.grad(penalty, s.argnums)(*s.leaves)


@_transform("`func.vjp`")
def _(s: Subject) -> Any:
    output, pullback = func.vjp(s.output, *s.leaves)
    return output, pullback(numbers(output)), pullback(torch.ones_like(output))


@_transform("`func.jvp`")
def _(s: Subject) -> Any:
    return func.jvp(s.output, tuple(s.leaves), s.directions())


@_transform("`func.linearize`")
def _(s: Subject) -> Any:
    output, linear = func.linearize(s.output, *s.leaves)
    return output, linear(*s.directions()), linear(*(2 * d for d in s.directions()))


@_transform("`func.jacrev`")
def _(s: Subject) -> Any:
    return func.jacrev(s.output, s.argnums)(*s.leaves), func.jacrev(s.output, s.argnums, chunk_size=2)(*s.leaves)


@_transform("`func.jacfwd`")
def _(s: Subject) -> Any:
    return func.jacfwd(s.output, s.argnums)(*s.leaves)


@_transform("`func.hessian`")
def _(s: Subject) -> Any:
    return func.hessian(s.value, s.argnums)(*s.leaves)


@_transform("`jacrev` of `jacrev`, `jacrev` of `jacfwd`")
def _(s: Subject) -> Any:
    first, second = func.jacrev(s.value, s.argnums), func.jacfwd(s.value, s.argnums)
    return func.jacrev(first, s.argnums)(*s.leaves), func.jacrev(second, s.argnums)(*s.leaves)


@_transform("`func.jvp` of `func.grad`")
def _(s: Subject) -> Any:
    return func.jvp(func.grad(s.value, s.argnums), tuple(s.leaves), s.directions())


@_transform("`func.grad` of `func.jvp`")
def _(s: Subject) -> Any:
    def tangent(*leaves: Tensor) -> Tensor:
        return func.jvp(s.value, leaves, s.directions())[1]

    return func.grad(tangent, s.argnums)(*s.leaves)


@_transform("`func.jvp` of `func.jvp`")
def _(s: Subject) -> Any:
    def tangent(*leaves: Tensor) -> Tensor:
        return func.jvp(s.output, leaves, s.directions())[1]

    return func.jvp(tangent, tuple(s.leaves), s.directions())


@_transform("`func.functional_call`")
def _(s: Subject) -> Any:
    net = torch.nn.Linear(2, s.leaves[0].numel(), dtype=s.leaves[0].dtype, device=s.leaves[0].device)
    parameters = {"weight": torch.linspace(-1, 1, net.weight.numel()).to(net.weight).view_as(net.weight)}

    def value(parameters: dict[str, Tensor]) -> Tensor:
        x = func.functional_call(net, parameters, (net.weight.new_ones(2),)) - net.bias
        return s.value(x.view_as(s.leaves[0]))

    return func.grad(value)(parameters)


# ---- vmap ----


def _in_dims(s: Subject) -> Iterator[tuple[int | None, ...]]:
    """Every combination, without those that map nothing."""
    first = s.samples[0]
    dims = []
    for tensor in (first.input, first.target, first.weight):
        dims.append([None] if tensor is None else [None, *range(tensor.dim() + 1), -1])
    for chosen in itertools.product(*dims):
        if any(dim is not None for dim in chosen):
            yield chosen


@_transform("`vmap`, every `in_dims`")
def _(s: Subject) -> Any:
    return [torch.vmap(s.loss, in_dims)(*s.stacked(*in_dims)) for in_dims in _in_dims(s)]


@_transform("`vmap` with `chunk_size`, `out_dims`")
def _(s: Subject) -> Any:
    in_dims = s.dims(0, 0, None)
    tensors = s.stacked(*in_dims)
    return [
        torch.vmap(s.loss, in_dims, chunk_size=2)(*tensors),
        torch.vmap(s.loss, in_dims, out_dims=-1)(*tensors),
    ]


def _sample_value(s: Subject) -> Callable[..., Tensor]:
    def value(x: Tensor, target: Tensor | None, weight: Tensor | None) -> Tensor:
        output = s.loss(x, target, weight)
        return (output * numbers(output)).sum() + output.square().sum()

    return value


@_transform("`vmap` of `grad`: per-sample gradients")
def _(s: Subject) -> Any:
    gradient = func.grad(_sample_value(s), s.argnums)
    return [torch.vmap(gradient, in_dims)(*s.stacked(*in_dims)) for in_dims in _in_dims(s)]


@_transform("`grad` of `vmap`")
def _(s: Subject) -> Any:
    results = []
    for in_dims in (s.dims(0, 0, None), s.dims(0, None, None), s.dims(-1, 0, None), s.dims(0, 0, 0)):

        def total(*tensors: Tensor | None, dims: tuple[int | None, ...] = in_dims) -> Tensor:
            return torch.vmap(s.loss, dims)(*tensors).square().sum()

        results.append(func.grad(total, s.argnums)(*s.stacked(*in_dims)))
    return results


@_transform("`vmap` of `vmap`")
def _(s: Subject) -> Any:
    inner, outer = s.dims(0, 0, None), s.dims(-1, -1, None)
    tensors = s.stacked(*inner)
    twice = [t if t is None or d is None else torch.stack([t, 2 * t], -1) for t, d in zip(tensors, outer, strict=True)]
    if not s.case.has_probabilities and s.target is not None:
        twice[1] = torch.stack([tensors[1], tensors[1]], -1)  # type: ignore[list-item]
    both = torch.vmap(torch.vmap(s.loss, inner), outer)(*twice)
    gradients = torch.vmap(torch.vmap(func.grad(_sample_value(s), s.argnums), inner), outer)(*twice)
    # The same targets for every outer sample.
    shared = torch.vmap(torch.vmap(s.loss, inner), (-1, None, None))(twice[0], tensors[1], tensors[2])
    return both, gradients, shared


@_transform("`vmap` of `jvp`, `jvp` of `vmap`")
def _(s: Subject) -> Any:
    in_dims = s.dims(0, 0, None)
    x, target, weight = s.stacked(*in_dims)
    tangents = numbers(x)  # type: ignore[arg-type]

    def forward(x: Tensor, target: Tensor | None, tangent: Tensor) -> Any:
        return func.jvp(lambda x: s.loss(x, target, weight), (x,), (tangent,))

    mapped = torch.vmap(forward, (0, in_dims[1], 0))(x, target, tangents)
    return mapped, func.jvp(lambda x: torch.vmap(s.loss, in_dims)(x, target, weight), (x,), (tangents,))


@_transform("`vmap` of `hessian`")
def _(s: Subject) -> Any:
    in_dims = s.dims(0, 0, None)
    return torch.vmap(func.hessian(_sample_value(s)), in_dims)(*s.stacked(*in_dims))


@_transform("`backward` through `vmap`")
def _(s: Subject) -> Any:
    in_dims = s.dims(0, 0, None)
    x, target, weight = s.stacked(*in_dims)
    x = x.detach().requires_grad_()  # type: ignore[union-attr]
    value = torch.vmap(s.loss, in_dims)(x, target, weight).square().sum()
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    return first, torch.autograd.grad(first.square().sum(), x)


# ---- precision ----


def _autocast(dtype: torch.dtype) -> Run:
    def run(s: Subject) -> Any:
        """Half-precision logits in, a float32 loss out, and a gradient in the logits' dtype."""
        leaves = [leaf.to(torch.float32 if i else dtype).requires_grad_() for i, leaf in enumerate(s.leaves)]
        rest = [t if t is None or not t.is_floating_point() else t.float() for t in (s.target, s.weight)]
        with torch.autocast(leaves[0].device.type, dtype):
            output = s.loss(*leaves, *rest[len(leaves) - 1 :])
            value = (output.float() * numbers(output.float())).sum()

            def score(x: Tensor) -> Tensor:
                output = s.loss(x, *rest).float()
                return (output * numbers(output)).sum()

            scores = func.grad(score)(leaves[0].detach())
        return output, torch.autograd.grad(value, leaves), scores

    return run


_transform("autocast to bfloat16")(_autocast(torch.bfloat16))
_transform("autocast to float16")(_autocast(torch.float16))


@_transform("`GradScaler`")
def _(s: Subject) -> Any:
    device = s.leaves[0].device.type
    x = torch.nn.Parameter(s.leaves[0].to(torch.float32))
    rest = [t if t is None or not t.is_floating_point() else t.float() for t in (s.target, s.weight)]
    optimizer, scaler = torch.optim.SGD([x], lr=0.1), torch.amp.GradScaler(device, init_scale=2.0**40)
    history = []
    for _ in range(4):  # overflows in float16 until the scale is small enough
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            value = s.loss(x.half(), *rest).square().sum()
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        history += [value.detach(), torch.tensor(scaler.get_scale())]
    return history, x.detach()


# ---- tracing ----


def _with_gradients(function: Callable[..., Tensor], s: Subject) -> Any:
    """The output of a function of the leaves, and gradients."""
    leaves = s.required()
    output = function(*leaves)
    return output, torch.autograd.grad(output, leaves, numbers(output))


@_transform("`make_fx`, forward and backward")
def _(s: Subject) -> Any:
    gradient = func.grad_and_value(_sample_value(s), s.argnums)
    tensors = s.stacked(None, None, None)

    def backward(x: Tensor, target: Tensor | None, weight: Tensor | None) -> Any:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(s.loss(x, target, weight).sum(), x)

    graphs = [
        torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode=mode)(*tensors)
        for mode in ("real", "fake", "symbolic")
        for function in (gradient, backward)
    ]
    return [graph(*tensors) for graph in graphs]


@_transform("`func.functionalize`")
def _(s: Subject) -> Any:
    def in_place(*leaves: Tensor) -> Tensor:
        x = leaves[0].clone()
        x.mul_(2)
        x.select(0, 0).add_(1)
        return s.output(x, *leaves[1:])

    return func.functionalize(in_place)(*s.leaves)


@_transform("`jit.trace`")
def _(s: Subject) -> Any:
    class Net(torch.nn.Module):
        def forward(self, *leaves: Tensor) -> Tensor:
            return s.output(*(leaf * 2 for leaf in leaves))

    return _with_gradients(torch.jit.trace(Net(), tuple(s.leaves), check_trace=False), s)


def _compile(function: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True, **options)


for _dynamic in (False, True):
    _transform(f"`compile(fullgraph=True, dynamic={_dynamic})`", compiles=True)(
        lambda s, dynamic=_dynamic: _with_gradients(_compile(s.output, dynamic=dynamic), s)
    )
_transform("`compile` of `func.grad`", compiles=True)(
    lambda s: _compile(func.grad_and_value(s.value, s.argnums))(*s.leaves)
)
_transform("`compile` of `func.jvp`", compiles=True)(
    lambda s: _compile(lambda *leaves: func.jvp(s.output, leaves, s.directions()))(*s.leaves)
)
_transform("`compile` of `func.jacrev`, `jacfwd`", compiles=True)(
    lambda s: [_compile(jacobian(s.output))(*s.leaves) for jacobian in (func.jacrev, func.jacfwd)]
)


@_transform("`compile` of `vmap`, `vmap` of `grad`", compiles=True)
def _(s: Subject) -> Any:
    in_dims = s.dims(0, 0, None)
    tensors = s.stacked(*in_dims)
    return [
        _compile(torch.vmap(function, in_dims))(*tensors)
        for function in (s.loss, func.grad_and_value(_sample_value(s), s.argnums))
    ]


_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def _eager_modes(s: Subject) -> Any:
    output, gradients = _with_gradients(s.output, s)
    return [output, *gradients] * len(_MODES)


@_transform("`compile(mode=...)`, every mode", compiles=True, builds=True, eager=_eager_modes)
def _(s: Subject) -> Any:
    results = []
    for mode in _MODES:
        output, gradients = _with_gradients(_compile(s.output, "inductor", mode=mode), s)
        results += [output.clone(), *(gradient.clone() for gradient in gradients)]  # the next graph takes their memory
    return results


@_transform("compiled autograd", compiles=True)
def _(s: Subject) -> Any:
    leaves = s.required()

    def step(*leaves: Tensor) -> None:
        s.value(*leaves).backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        torch._dynamo.reset()
        torch.compile(step, backend="aot_eager")(*leaves)
    eager = [leaf.grad for leaf in leaves]
    leaves = s.required()
    with torch._dynamo.compiled_autograd._enable(lambda graph: _compile(graph)):
        s.value(*leaves).backward()
    return eager, [leaf.grad for leaf in leaves]


class _Net(torch.nn.Module):
    """A loss as a module whose inputs are its tensors."""

    def __init__(self, s: Subject) -> None:
        super().__init__()
        self.call = s.loss

    def forward(self, x: Tensor, target: Tensor | None, weight: Tensor | None) -> Tensor:
        return self.call(x * 2, target, weight)


@_transform("`torch.export`, with and without decompositions", compiles=True)
def _(s: Subject) -> Any:
    tensors = s.stacked(None, None, None)
    results = []
    for strict in (False, True):
        program = torch.export.export(_Net(s), tensors, strict=strict)
        results += [program.module()(*tensors), program.run_decompositions().module()(*tensors)]
    return results


@_transform("`torch.export` of dynamic shapes", compiles=True)
def _(s: Subject) -> Any:
    if len(s.case.shape) == 1:
        return []
    batch = torch.export.Dim("batch", min=2, max=64)
    rows = {0: batch} if s.case.op == "log_softmax" or s.target is not None else None
    of_elements = s.case.op in ELEMENTWISE
    shapes = (rows, None if s.target is None else rows, rows if of_elements else None)
    tensors = s.stacked(None, None, None)
    program = torch.export.export(_Net(s), tensors, dynamic_shapes=shapes)
    more = [t if (i == 2 and not of_elements) or t is None else torch.cat([t, t]) for i, t in enumerate(tensors)]
    return program.module()(*tensors), program.run_decompositions().module()(*more)


@_transform("AOTInductor", compiles=True, builds=True, eager=lambda s: _Net(s)(*s.stacked(None, None, None)))
def _(s: Subject) -> Any:
    tensors = s.stacked(None, None, None)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        program = torch.export.export(_Net(s), tensors)
        package = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/loss.pt2")
        return torch._inductor.aoti_load_package(package)(*tensors)


# ---- tensors of other kinds ----


class _Mode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class _Dispatch(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@_transform("`TorchFunctionMode`, `TorchDispatchMode`")
def _(s: Subject) -> Any:
    with _Mode():
        seen = _with_gradients(s.output, s)
    with _Dispatch():
        return seen, _with_gradients(s.output, s)


class _Subclass(Tensor):
    """Keeps its type, as torch's default does for every subclass."""


@_transform("subclass with `__torch_function__`")
def _(s: Subject) -> Any:
    leaves = [leaf.as_subclass(_Subclass).requires_grad_() for leaf in s.leaves]
    output = s.output(*leaves)
    gradients = torch.autograd.grad(output, leaves, numbers(output.as_subclass(Tensor)))
    return isinstance(output, _Subclass), output.as_subclass(Tensor), [g.as_subclass(Tensor) for g in gradients]


@_transform("wrapper with `__torch_dispatch__`")
def _(s: Subject) -> Any:
    from torch.testing._internal.two_tensor import TwoTensor

    leaves = [TwoTensor(leaf.clone(), 2 * leaf).requires_grad_() for leaf in s.leaves]
    output = s.output(*leaves)
    gradients = torch.autograd.grad(output, leaves, torch.ones_like(output))
    return [(t.a, t.b) for t in (output.detach(), *gradients)]


@_transform("meta device")
def _(s: Subject) -> Any:
    """Shapes, dtypes and strides, without data."""
    leaves = [leaf.to("meta").requires_grad_() for leaf in s.leaves]
    rest = [None if t is None else t.to("meta") for t in (s.target, s.weight)]
    output = s.loss(*leaves, *rest[len(leaves) - 1 :])
    gradients = torch.autograd.grad(output, leaves, torch.ones_like(output))
    return [(t.device.type, t.dtype, tuple(t.shape)) for t in (output, *gradients)]


@_transform("`FakeTensorMode`")
def _(s: Subject) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        leaves = [mode.from_tensor(leaf).requires_grad_() for leaf in s.leaves]
        rest = [None if t is None else mode.from_tensor(t) for t in (s.target, s.weight)]
        output = s.loss(*leaves, *rest[len(leaves) - 1 :])
        gradients = torch.autograd.grad(output, leaves, torch.ones_like(output))
        return [(str(t.device), t.dtype, tuple(t.shape)) for t in (output, *gradients)]

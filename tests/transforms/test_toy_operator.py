"""Derivatives of an operator with three inputs and two outputs (``toy_operator.cpp``): what csrc/operators/autograd.h,
csrc/grad_level.cpp and nllx/_operators/functorch.py make of its schemas, against the same in torch's operations."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint
from torch.utils.cpp_extension import load
from transforms import TRANSFORMS, Subject, Transform

from nllx._operators import functorch
from nllx._operators.operator import Operator

_ROOT = next(parent for parent in Path(__file__).resolve().parents if (parent / "csrc").is_dir())


def _forward(a: Tensor, b: Tensor, c: Tensor | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    n = torch.full([], a.numel(), dtype=a.dtype)
    return a * b * scale / n, (a if c is None else c * a).sum() / n, n


def _backward(
    grad_y: Tensor | None,
    grad_z: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    n: Tensor,
    scale: float,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    zero = torch.zeros_like(a)
    of_y = zero if grad_y is None else grad_y * scale / n
    of_z = zero if grad_z is None else (grad_z / n).expand_as(a)
    gradients = of_y * b + of_z * (1 if c is None else c), of_y * a, None if c is None else of_z * a
    return tuple(g if wanted else None for g, wanted in zip(gradients, output_mask, strict=True))


def _forward_batched(size: int, dims: Any, *arguments: Any) -> tuple[tuple[Tensor, ...], Any] | None:
    """A rule for some samples only, as a kernel has it."""
    a, b, c, scale = arguments
    if dims[0] != 0 or dims[1] is not None or c is not None:
        return None
    n = torch.full([size], a[0].numel(), dtype=a.dtype)
    return (a * b * scale / a[0].numel(), a.flatten(1).sum(1) / a[0].numel(), n), 0


def _like(*tensors: Tensor | None) -> Any:
    return tuple(None if t is None else torch.empty_like(t) for t in tensors)


@pytest.fixture(scope="module", autouse=True)
def library() -> Any:
    folder = _ROOT / "build" / "toy_operator"
    folder.mkdir(parents=True, exist_ok=True)
    load(
        "nllx_toy_operator",
        [str(Path(__file__).with_name("toy_operator.cpp")), str(_ROOT / "csrc" / "saved_tensor.cpp")],
        extra_include_paths=[str(_ROOT / "csrc")],
        extra_cflags=["-O1", "-fvisibility=hidden"],
        build_directory=str(folder),
        is_python_module=False,
    )
    library = torch.library.Library("nllx", "IMPL")
    functorch.register(
        Operator(
            "toy_forward",
            _forward,
            lambda a, b, c=None, scale=1.0: (torch.empty_like(a), a.new_empty([]), a.new_empty([])),
            _forward_batched,
        ),
        library,
    )
    functorch.register(
        Operator(
            "toy_backward",
            _backward,
            lambda grad_y, grad_z, a, b, c, n, scale, mask: tuple(
                torch.empty_like(t) if wanted and t is not None else None
                for t, wanted in zip((a, b, c), mask, strict=True)
            ),
        ),
        library,
    )
    return library


def _toy(*arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.nllx.toy(*arguments)


def _torchs(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _forward(*arguments)[:2]


def _inputs(shape: tuple[int, ...] = (2, 3)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return a, b, c


# What a user makes of the outputs: of both, of either, of one twice.
_USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "both": lambda y, z: y.square().sum() + y.sum() * z.exp(),
    "y": lambda y, z: y.sin().sum(),
    "z": lambda y, z: z.exp(),
}


@pytest.mark.parametrize("use", _USES)
@pytest.mark.parametrize("wanted", [w for n in (1, 2, 3) for w in itertools.combinations(range(3), n)])
@pytest.mark.parametrize("optional", [True, False])
def test_gradients(use: str, wanted: tuple[int, ...], optional: bool) -> None:
    """Of any inputs, of any outputs, first and second, by one call of the backward kernel."""
    wanted = wanted if optional else tuple(i for i in wanted if i < 2)
    if not wanted:
        return
    found = []
    for toy in (_toy, _torchs):
        inputs = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(_inputs())]
        leaves = [inputs[i] for i in wanted]
        given = (*inputs[:2], inputs[2] if optional else None, 0.7)

        # In torch's operations z does not come from b at all, and has no gradient, where toy's is 0.
        def zero(toy: Any = toy, leaves: Any = leaves) -> Any:
            return 0 if toy is _toy else 0 * sum(leaf.square().sum() for leaf in leaves)

        torch.ops.nllx.toy_backward_calls()
        first = torch.autograd.grad(_USES[use](*toy(*given)) + zero(), leaves)
        if toy is _toy:
            assert torch.ops.nllx.toy_backward_calls() == 1
        again = torch.autograd.grad(_USES[use](*toy(*given)) + zero(), leaves, create_graph=True)
        total = sum(g.square().sum() for g in again) + zero()
        second = torch.autograd.grad(total, leaves, materialize_grads=True) if total.requires_grad else ()
        found.append([*first, *(second or [torch.zeros_like(leaf) for leaf in leaves])])
    assert_close(*found)


def test_gradcheck() -> None:
    inputs = [t.requires_grad_() for t in _inputs()]
    options = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(_toy, inputs, check_batched_forward_grad=True, **options)
    assert torch.autograd.gradgradcheck(_toy, inputs, check_fwd_over_rev=True, check_batched_grad=True)


def test_opcheck() -> None:
    inputs = [t.requires_grad_() for t in _inputs()]
    torch.library.opcheck(torch.ops.nllx.toy_forward, (*inputs, 0.5))
    n = torch.full([], 6.0, dtype=torch.float64)
    arguments = (inputs[0].detach(), None, *inputs, n, 0.5, [True, False, True])
    # A gradient that is not wanted is None, which the schema calls a Tensor, as ATen's do.
    torch.library.opcheck(torch.ops.nllx.toy_backward, arguments, test_utils=("test_autograd_registration",))


def _of(use: str, toy: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *inputs: _USES[use](*toy(*inputs, 0.7))


_TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Any]] = {
    "grad": lambda f, x: torch.func.grad(f, (0, 1, 2))(*x),
    "grad of one": lambda f, x: torch.func.grad(f, 1)(*x),
    "jacrev": lambda f, x: torch.func.jacrev(f, (0, 2))(*x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f, (0, 1))(*x),
    "hessian": lambda f, x: torch.func.hessian(f, (0, 1, 2))(*x),
    "jacrev of jacrev": lambda f, x: torch.func.jacrev(torch.func.jacrev(f, (0, 1)), (1, 2))(*x),
    "jvp of grad": lambda f, x: torch.func.jvp(lambda *y: torch.func.grad(f, (0, 1, 2))(*y), x, x),
    "grad of grad": lambda f, x: torch.func.grad(lambda *y: torch.func.grad(f)(*y).square().sum(), (0, 1, 2))(*x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f, (0, 1, 2)))(*(torch.stack([t, 2 * t]) for t in x)),
    "vmap of grad, shared": lambda f, x: torch.func.vmap(torch.func.grad(f, (0, 1, 2)), (0, None, 1))(
        torch.stack([x[0], -x[0]]), x[1], torch.stack([x[2], x[1]], 1)
    ),
    "grad of vmap": lambda f, x: torch.func.grad(lambda *y: torch.func.vmap(f)(*y).sum(), (0, 1, 2))(*x),
    "vmap of vmap": lambda f, x: torch.func.vmap(torch.func.vmap(f, (0, 0, 0)), (0, 0, 0))(
        *(torch.stack([t, 2 * t]) for t in x)
    ),
    "functionalize": lambda f, x: torch.func.functionalize(torch.func.grad(f, (0, 1, 2)))(*x),
    "linearize": lambda f, x: torch.func.linearize(f, *x)[1](*x),
}


@pytest.mark.parametrize("use", _USES)
@pytest.mark.parametrize("transform", _TRANSFORMS)
def test_under_transforms(transform: str, use: str) -> None:
    results = [_TRANSFORMS[transform](_of(use, toy), _inputs()) for toy in (_toy, _torchs)]
    assert_close(*results)


class _Toy(Subject):
    """Both outputs, of three inputs, in the place of a loss."""

    def loss(self, x: Tensor, target: Tensor | None, weight: Tensor | None) -> Tensor:
        y, z = self.functional(x, target, weight, 0.7)
        return y * z.exp()


@pytest.mark.parametrize(
    "transform",
    [pytest.param(t, marks=pytest.mark.slow if t.compiles else ()) for t in TRANSFORMS if not t.builds],
    ids=str,
)
def test_every_transform(transform: Transform) -> None:
    """The table of transforms.py, as the losses have it."""
    case = Case("toy", "", (3, 4), op="mse_loss", target="any_numbers", weight="positive", dtype=torch.float64)
    expected, ours = (transform.run(_Toy(case, toy, "cpu", input_only=False)) for toy in (_torchs, _toy))
    (got, got_tree), (want, want_tree) = tree_flatten(ours), tree_flatten(expected)
    assert got_tree == want_tree
    # There some of torch's operations are in float32, and others round their operands.
    loose = {"rtol": 2e-2, "atol": 1e-3} if "autocast" in transform.name else {}
    for a, b in zip(got, want, strict=True):
        if isinstance(b, Tensor):
            assert_close(a, b, **loose)
        else:
            assert a == b


@pytest.mark.parametrize("batched", [(0, None, None), (1, None, None), (0, 0, None), (None, 1, None), (0, 0, 0)])
def test_batching(batched: tuple[int | None, ...]) -> None:
    """By the rule, and by the definition where it takes none of these samples."""
    a, b, c = (t if dim is not None else t[0] for t, dim in zip(_inputs((3, 3)), batched, strict=True))
    given = (a, b, c if batched[2] is not None else None)
    found = [torch.func.vmap(lambda *x, f=toy: f(*x, 0.7), batched)(*given) for toy in (_toy, _torchs)]
    assert_close(*found)


def test_forward_mode_and_duals_of_gradients() -> None:
    found = []
    for toy in (_toy, _torchs):
        a, b, c = _inputs()
        with forward_ad.dual_level():
            x = [forward_ad.make_dual(t, t.cos()) for t in (a, b, c)]
            outputs = [forward_ad.unpack_dual(t).tangent for t in toy(*x)]
            leaf = x[0].detach().requires_grad_()
            y, z = toy(forward_ad.make_dual(leaf, a), *x[1:])
            (grad,) = torch.autograd.grad(y.square().sum() * z, leaf)
            found.append([*outputs, grad, forward_ad.unpack_dual(grad).tangent])
    assert_close(*found)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("use", _USES)
def test_compiled(use: str, backend: str) -> None:
    if backend == "inductor" and use != "both":
        return
    torch.compiler.reset()
    found = []
    for toy in (torch.compile(_of(use, _toy), backend=backend, fullgraph=True), _of(use, _torchs)):
        inputs = [t.requires_grad_(i != 1) for i, t in enumerate(_inputs())]
        value = toy(*inputs)
        found.append([value, *torch.autograd.grad(value, [inputs[0], inputs[2]], materialize_grads=True)])
    assert_close(*found)


@pytest.mark.parametrize("use", _USES)
def test_compiled_autograd(use: str) -> None:
    torch.compiler.reset()
    found = []
    for compiled, toy in ((True, _toy), (False, _torchs)):
        inputs = [t.requires_grad_(i != 1) for i, t in enumerate(_inputs())]
        value = _of(use, toy)(*inputs)
        if compiled:
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
                value.backward()
        else:
            value.backward()
        found.append(
            [torch.zeros([]) if t.grad is None or not t.grad.any() else t.grad for t in (inputs[0], inputs[2])]
        )
    assert_close(*found)


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("changed", range(3))
def test_changed_in_between(changed: int, hooks: bool) -> None:
    inputs = [t.requires_grad_() for t in _inputs()]
    copies = [t * 1 for t in inputs]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t) if hooks else torch.enable_grad():
        value = _USES["both"](*_toy(*copies))
    with torch.no_grad():
        copies[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_checkpoint() -> None:
    found = []
    for toy in (_toy, _torchs):
        inputs = [t.requires_grad_() for t in _inputs()]
        value = checkpoint(_of("both", toy), *inputs, use_reentrant=False)
        found.append(torch.autograd.grad(value, inputs))
    assert_close(*found)


def test_nodes() -> None:
    a, b, c = (t.requires_grad_() for t in _inputs())
    y, z = _toy(a, b, c)
    assert y.grad_fn.name() == z.grad_fn.name() == "ToyBackward"
    assert len(y.grad_fn.next_functions) == 3
    assert [t.output_nr for t in (y, z)] == [0, 1]
    assert not torch.ops.nllx.toy_forward(a, b, c, 1.0)[2].requires_grad

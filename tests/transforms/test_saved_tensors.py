"""What is saved for a backward and changed before it: the right gradient or RuntimeError, under any hooks of saved tensors,
where autograd itself compares no versions; and gradients written over logits that something else still needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import allow_mutation_on_saved_tensors, save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import nllx

F = torch.nn.functional
x = torch.linspace(-2, 3, 30, dtype=torch.float64).view(6, 5).sin() * 3
t = torch.tensor([0, 2, 3, 4, -100, 1])

# Heads of a model: from the leaf and a cross entropy to a loss. `before` and `after` are of the loss.


def _two(a: Tensor, ce: Any) -> Tensor:
    h = a * 2
    return 0.3 * ce(h, t) + 0.7 * ce(h, t.flip(0))


def _z_loss_before(a: Tensor, ce: Any) -> Tensor:
    h = a * 2
    z = h.logsumexp(1).square().sum()
    return ce(h, t) + z


def _z_loss_after(a: Tensor, ce: Any) -> Tensor:
    h = a * 2
    return ce(h, t) + h.logsumexp(1).square().sum()


def _tanh(a: Tensor, ce: Any) -> Tensor:
    return ce((a * 2).tanh(), t)


def _softmax_before(a: Tensor, ce: Any) -> Tensor:
    h = a * 2
    p = h.softmax(1)
    return ce(h, t) + (p * h).sum()


def _softmax_of(a: Tensor, ce: Any) -> Tensor:
    return ce((a * 2).softmax(1), t)


def _whole_views(a: Tensor, ce: Any) -> Tensor:
    h = a * 2
    return ce(h.view(6, 5), t) + 2 * ce(h.view(3, 2, 5).flatten(0, 1), t.flip(0))


def _views_that_overlap(a: Tensor, ce: Any) -> Tensor:
    h = a * 2
    return ce(h[:4], t[:4]) + 2 * ce(h[2:], t[2:])


def _metrics(a: Tensor, ce: Any) -> Tensor:
    """Something is made of the logits after the loss, without a graph."""
    h = a * 2
    kept = h.detach()
    loss = ce(h, t)
    return loss + 0 * kept.sum()


def _changed(a: Tensor, ce: Any) -> Tensor:
    h = a * 2
    loss = ce(h, t)
    with torch.no_grad():
        h.mul_(0.5)
    return loss


def _changed_in_the_middle(a: Tensor, ce: Any) -> Tensor:
    h = a * 2
    loss = ce(h, t)
    with torch.no_grad():
        h.mul_(0.5)
    return loss + ce(h, t)


def _changed_in_part(a: Tensor, ce: Any) -> Tensor:
    h = a * 2
    loss = ce(h, t)
    with torch.no_grad():
        h[0].zero_()
    return loss + a.exp().sum()  # something is saved after the change


def _changed_through_a_view(a: Tensor, ce: Any) -> Tensor:
    h = a * 2
    loss = ce(h.view(3, 2, 5).flatten(0, 1), t)
    with torch.no_grad():
        h.view(-1)[3] = 7
    return loss + a.exp().sum()


def _changed_before(a: Tensor, ce: Any) -> Tensor:
    h = (a * 2).mul_(1.5).add_(1)
    return ce(h, t)


def _replaced(a: Tensor, ce: Any) -> Tensor:
    h = a * 2
    loss = ce(h, t)
    h.data = torch.ones_like(h)
    return loss + a.exp().sum()


def _replaced_twice(a: Tensor, ce: Any) -> Tensor:
    """The second memory may have the address of the first."""
    h = a * 2
    loss = ce(h, t)
    h.data = torch.ones_like(h)
    h.data = torch.zeros_like(h)
    return loss + a.exp().sum()


def _set(a: Tensor, ce: Any) -> Tensor:
    h = a * 2
    loss = ce(h, t)
    with torch.no_grad():
        h.set_(torch.ones_like(h))
    return loss + a.exp().sum()


_HEADS = [
    head for name, head in vars().copy().items() if name.startswith("_") and getattr(head, "__module__", "") == __name__
]


# What a step does with its head: from the head and the leaf to the loss.
Run = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def _under(context: Callable[[], Any]) -> Run:
    def run(head: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
        with context():
            return head(a)

    return run


def _hooks(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor] = lambda kept: kept) -> Run:
    return _under(lambda: saved_tensors_hooks(pack, unpack))


def _checkpoint(**options: Any) -> Run:
    return lambda head, a: checkpoint(head, a, **{"use_reentrant": False, **options})


_RUNS: dict[str, Run] = {
    "no hooks": _under(contextlib.nullcontext),
    "identity": _hooks(lambda saved: saved),
    "detach": _hooks(lambda saved: saved.detach()),
    "data": _hooks(lambda saved: saved.data),
    "view": _hooks(lambda saved: (saved.reshape(-1), saved.shape), lambda kept: kept[0].view(kept[1])),
    "NumPy": _hooks(lambda saved: saved.detach().numpy(), torch.from_numpy),
    "DLPack": _hooks(lambda saved: saved.detach(), torch.from_dlpack),
    "clone": _hooks(lambda saved: saved.clone()),
    "clones of the small": _hooks(lambda saved: saved if saved.numel() > 12 else saved.clone()),
    "save_on_cpu": _under(save_on_cpu),
    "checkpoint": _checkpoint(),
    "reentrant checkpoint": _checkpoint(use_reentrant=True),
    "checkpoint to its end": _checkpoint(early_stop=False),
    "checkpoints": lambda head, a: _checkpoint()(lambda b: _checkpoint()(head, b), a),
}


def _gradient(run: Run, head: Callable[[Tensor], Tensor], backwards: int = 1) -> Tensor:
    leaf = x.clone().requires_grad_()
    loss = run(head, leaf)
    for remaining in reversed(range(backwards)):
        leaf.grad = None
        loss.backward(retain_graph=remaining > 0)
    assert leaf.grad is not None
    return leaf.grad


def _attempt(run: Run, head: Callable[[Tensor], Tensor], backwards: int = 1) -> Tensor | None:
    """The gradient, or None where autograd's error came."""
    try:
        return _gradient(run, head, backwards)
    except RuntimeError as error:
        message = str(error)
    assert "modified by an inplace operation" in message or "given other memory" in message, message
    return None


# What must come out right, and not as an error: memory of its own, or nothing that is changed at all.
_RIGHT = {
    ("clone", "_changed"), ("clone", "_changed_in_part"), ("checkpoint", "_changed"), ("checkpoints", "_changed"),
    *((run, head.__name__) for run in _RUNS for head in (_metrics, _changed_before, _tanh)),
    *((run, head.__name__) for run in _RUNS if run not in ("no hooks", "reentrant checkpoint") for head in _HEADS[:8]),
}  # fmt: skip


@pytest.mark.parametrize("head", _HEADS, ids=lambda head: head.__name__[1:])
@pytest.mark.parametrize("run", _RUNS)
def test_right_or_an_error(run: str, head: Callable[[Tensor, Any], Tensor]) -> None:
    expected = _gradient(_RUNS["no hooks"], lambda a: head(a, F.cross_entropy))
    for inplace in (False, True):
        for backwards in (1, 2):

            def ours(a: Tensor, inplace: bool = inplace) -> Tensor:
                return head(a, lambda h, y: nllx.functional.cross_entropy(h, y, inplace_backward=inplace))

            gradient = _attempt(_RUNS[run], ours, backwards)
            if gradient is not None:
                assert_close(gradient, expected)
            else:
                assert (run, head.__name__) not in _RIGHT or (run == "no hooks" and inplace and backwards == 2)


@pytest.mark.parametrize("head", _HEADS, ids=lambda head: head.__name__[1:])
@pytest.mark.parametrize("inplace", [False, True])
def test_mutation_that_autograd_allows(head: Callable[[Tensor, Any], Tensor], inplace: bool) -> None:
    expected = _gradient(_RUNS["no hooks"], lambda a: head(a, F.cross_entropy))
    leaf = x.clone().requires_grad_()
    # What torch's mode does not see: a change of a part that begins elsewhere in memory than what was saved.
    unseen = pytest.raises(RuntimeError, match="modified by an inplace operation")
    with allow_mutation_on_saved_tensors(), unseen if head is _changed_through_a_view else contextlib.nullcontext():
        head(leaf, lambda h, y: nllx.functional.cross_entropy(h, y, inplace_backward=inplace)).backward()
        assert_close(leaf.grad, expected)


@pytest.mark.parametrize("run", ["identity", "view", "NumPy", "checkpoint to its end"])
def test_patched_torch(run: str) -> None:
    expected = _gradient(_RUNS[run], lambda a: _changed(a, F.cross_entropy))
    assert_close(expected, _gradient(_RUNS["no hooks"], lambda a: _changed(a, F.cross_entropy)))
    with nllx.patched(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        _gradient(_RUNS[run], lambda a: _changed(a, lambda h, y: F.cross_entropy(h, y)) + a.exp().sum())


_ARGUMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "target": lambda h, y: nllx.functional.cross_entropy(h, y),
    "target of nll_loss": lambda h, y: nllx.functional.nll_loss(h, y),
    "probabilities": lambda h, p: nllx.functional.cross_entropy(h, p),
    "weight": lambda h, w: nllx.functional.cross_entropy(h, t, w),
    "input of mse_loss": lambda h, v: nllx.functional.mse_loss(v, h),
    "target of mse_loss": lambda h, v: nllx.functional.mse_loss(h, v),
    "weight of mse_loss": lambda h, w: nllx.functional.mse_loss(h, h.flip(0), weight=w),
}


@pytest.mark.parametrize("argument", _ARGUMENTS)
@pytest.mark.parametrize("run", ["no hooks", "identity", "detach", "NumPy", "clone"])
def test_other_arguments_that_change(argument: str, run: str) -> None:
    changed = {
        "probabilities": x.softmax(1),
        "weight": torch.ones(5).double(),
        **dict.fromkeys((a for a in _ARGUMENTS if a.endswith("mse_loss")), x.exp()),
    }.get(argument, t.clamp(min=0)).clone()

    def head(a: Tensor) -> Tensor:
        loss = _ARGUMENTS[argument](a * 2, changed)
        changed.mul_(0)
        return loss

    before = changed.clone()
    if run == "clone":
        assert_close(_gradient(_RUNS[run], head), _gradient(_RUNS[run], lambda a: _ARGUMENTS[argument](a * 2, before)))
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            _gradient(_RUNS[run], head)


@pytest.mark.parametrize("run", ["no hooks", "identity", "view", "NumPy"])
def test_an_output_that_changes(run: str) -> None:
    """log_softmax saves its output."""

    def head(a: Tensor) -> Tensor:
        output = nllx.functional.log_softmax(a * 2, 1)
        loss = output.square().sum()
        with torch.no_grad():
            output.mul_(0.5)
        return loss

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        _gradient(_RUNS[run], head)


def _returned(compiled: Any) -> Callable[[Tensor], Tensor]:
    """The compiled function returns the logits, which change then."""

    def head(a: Tensor) -> Tensor:
        loss, h = compiled(a)
        with torch.no_grad():
            h.mul_(0.5)
        return loss

    return head


def _given(compiled: Any) -> Callable[[Tensor], Tensor]:
    """The logits are given to the compiled function, and change then."""

    def head(a: Tensor) -> Tensor:
        h = a * 2
        loss = compiled(h)
        with torch.no_grad():
            h.mul_(0.5)
        return loss

    return head


_OPERATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": nllx.functional.cross_entropy,
    "inplace_backward": lambda h, y: nllx.functional.cross_entropy(h, y, inplace_backward=True),
    "nll_loss": lambda h, y: nllx.functional.nll_loss(nllx.functional.log_softmax(h, 1), y),
    "mse_loss": lambda h, y: nllx.functional.mse_loss(h, x.exp()),
}


@pytest.mark.parametrize("operator", _OPERATORS)
@pytest.mark.parametrize(
    "run",
    ["no hooks", "identity", "detach", "NumPy", "DLPack", "clone", "clones of the small", "checkpoint to its end"],
)
def test_compiled(operator: str, run: str) -> None:
    """Compiled functions save for themselves, through the same hooks."""
    torch._dynamo.reset()
    call = _OPERATORS[operator]

    def both(a: Tensor) -> tuple[Tensor, Tensor]:
        h = a * 2
        return call(h, t), h

    returned = _returned(torch.compile(both, backend="aot_eager"))
    given = _given(torch.compile(lambda h: call(h, t), backend="aot_eager"))
    torchs = F.cross_entropy if operator != "mse_loss" else lambda h, _: F.mse_loss(h, x.exp())
    expected = _gradient(_RUNS["no hooks"], lambda a: torchs(a * 2, t))
    for head in (returned, given):
        gradient = _attempt(_RUNS[run], head)
        if gradient is not None:
            assert_close(gradient, expected)
        else:
            assert run != "clone"


def test_compiled_with_hooks_that_copy_some() -> None:
    """Of copies of what a forward has noted its versions on, and of arguments that are copied or not."""
    torch._dynamo.reset()
    logits = torch.compile(lambda h: nllx.functional.cross_entropy(h, t), backend="aot_eager")
    target = t.clamp(min=0)

    def changed_between(a: Tensor) -> Tensor:
        h = a * 2
        loss = logits(h)
        with torch.no_grad():
            h.mul_(2)
        return loss + 0 * logits(h)

    def changed_target(a: Tensor) -> Tensor:
        loss = labelled(a)
        target.copy_((target + 1) % 5)
        return loss

    labelled = torch.compile(lambda a: nllx.functional.cross_entropy(a * 1, target), backend="aot_eager")
    floats = _hooks(lambda saved: saved.clone() if saved.is_floating_point() else saved)
    for run, head in ((_RUNS["clones of the small"], changed_between), (floats, changed_target)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            _gradient(run, head)


def test_memory_that_is_used_again_with_and_without_hooks() -> None:
    """A forward under hooks has nothing to say of a later one on the same memory, in eager or compiled code."""
    torch._dynamo.reset()
    compiled = torch.compile(nllx.functional.cross_entropy, backend="aot_eager")
    likelihood = torch.compile(nllx.functional.nll_loss, backend="aot_eager")
    target = t.clamp(min=0)
    leaf = torch.nn.Parameter(x.clone())
    for step in range(6):
        context = (
            saved_tensors_hooks(lambda saved: saved, lambda kept: kept) if step % 2 == 0 else contextlib.nullcontext()
        )
        for ours, theirs in (
            (compiled, F.cross_entropy),
            (nllx.functional.cross_entropy, F.cross_entropy),
            (likelihood, F.nll_loss),
        ):
            with context:
                loss = ours(leaf, target)
            (gradient,) = torch.autograd.grad(loss, leaf)
            assert_close(gradient, torch.autograd.grad(theirs(leaf, target), leaf)[0])
            with torch.no_grad():
                leaf.sub_(gradient)
                target.copy_((target + 1) % 5)
        with context, torch.no_grad():
            nllx.functional.cross_entropy(leaf.detach(), target)


def test_compiled_heads() -> None:
    """Under hooks, and with checkpoints around the compiled function and inside of it."""
    for head in _HEADS[:8]:
        expected = _gradient(_RUNS["no hooks"], lambda a, head=head: head(a, F.cross_entropy))
        torch._dynamo.reset()

        def ours(a: Tensor, head: Any = head) -> Tensor:
            return head(a, lambda h, y: nllx.functional.cross_entropy(h, y, inplace_backward=True))

        compiled = torch.compile(ours, backend="aot_eager")
        for run in ("no hooks", "identity", "checkpoint"):
            assert_close(_gradient(_RUNS[run], compiled), expected)
        inside = torch.compile(lambda a, ours=ours: checkpoint(ours, a, use_reentrant=False), backend="aot_eager")
        assert_close(_gradient(_RUNS["no hooks"], inside), expected)


def test_compiled_autograd_with_hooks() -> None:
    expected = _gradient(_RUNS["no hooks"], lambda a: _z_loss_after(a, F.cross_entropy))

    def enable() -> Any:
        return torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager"))

    for run in ("no hooks", "identity", "clone"):
        with enable():
            assert_close(_gradient(_RUNS[run], lambda a: _z_loss_after(a, nllx.functional.cross_entropy)), expected)
        with enable(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
            _gradient(_RUNS[run], lambda a: _changed(a, nllx.functional.cross_entropy))


# Gradients over the logits, where something else lies in their memory.


def _after(kept: Callable[[Tensor], Any]) -> tuple[Tensor, Any, Tensor]:
    """The logits as they were, what was kept of them through the backward, and the gradient."""
    leaf = x.clone().requires_grad_()
    h = leaf * 2
    before, keep = h.detach().clone(), kept(h)
    nllx.functional.cross_entropy(h, t, inplace_backward=True).backward()
    assert leaf.grad is not None
    return before, keep, leaf.grad


@pytest.mark.parametrize(
    "kept",
    [
        Tensor.detach,
        lambda h: h.data,
        lambda h: h.detach().numpy(),
        lambda h: h[1:3].detach(),
        lambda h: h.view(-1)[:7].detach(),
    ],
    ids=["detach", "data", "NumPy", "slice", "view"],
)
def test_what_was_kept_of_the_logits_stays(kept: Callable[[Tensor], Any]) -> None:
    before, keep, gradient = _after(kept)
    assert_close(torch.as_tensor(keep), kept(before) if isinstance(keep, Tensor) else before)
    assert_close(gradient, _gradient(_RUNS["no hooks"], lambda a: F.cross_entropy(a * 2, t)))


def test_memory_that_is_not_torchs_own_is_not_written_over() -> None:
    """Of NumPy, or of a storage that the base of a view has left."""
    array = x.numpy() * 0
    leaf = x.clone().requires_grad_()
    h = torch.from_numpy(array).copy_(leaf * 2)
    nllx.functional.cross_entropy(h, t, inplace_backward=True).backward()
    assert_close(torch.from_numpy(array), x * 2)
    h = leaf * 2
    view = h.view(-1, 5)
    kept = view.detach()
    with torch.no_grad():
        h.set_(torch.zeros_like(h))
    before = kept.clone()
    with contextlib.suppress(RuntimeError):  # the version of the base has risen
        nllx.functional.cross_entropy(view, t, inplace_backward=True).backward()
    assert_close(kept, before)


def test_compiled_without_a_backend_is_not_in_place() -> None:
    """Where Dynamo traces an autograd.Function, versions are not compared."""

    class Squares(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            ctx.save_for_backward(h)
            return h.square().sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * grad

    def head(a: Tensor, ce: Any) -> Tensor:
        h = a * 2
        z = Squares.apply(h)
        return ce(h, t) + z

    torch._dynamo.reset()
    inplace = torch.compile(
        lambda a: head(a, lambda h, y: nllx.functional.cross_entropy(h, y, inplace_backward=True)), backend="eager"
    )
    expected = _gradient(_RUNS["no hooks"], lambda a: head(a, F.cross_entropy))
    assert_close(_gradient(_RUNS["no hooks"], inplace), expected)


def test_memory_that_begins_before() -> None:
    """Hooks that keep nothing, and find the logits again in the memory that they lie in."""
    memory, alive = bytearray(800), []

    def find(kept: Tensor | None) -> Tensor:
        return torch.frombuffer(memory, dtype=torch.float64)[10:40].view(6, 5) if kept is None else kept

    def head(a: Tensor) -> Tensor:
        lying = torch.frombuffer(memory, dtype=torch.float64, offset=80, count=30).view(6, 5)
        h = lying.copy_(a * 2)
        alive.append(h)
        loss = nllx.functional.cross_entropy(h, t)
        with torch.no_grad():
            h.mul_(0.5)
        return loss

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        _gradient(_hooks(lambda saved: None if saved.shape == (6, 5) else saved, find), head)


def test_hooks_that_keep_memory_once() -> None:
    """Of two forwards on the same memory, at two versions: the second is right, and the first is not."""
    kept: dict[Any, Tensor] = {}
    once = _hooks(lambda saved: kept.setdefault((saved.data_ptr(), saved.shape), saved))

    def head(a: Tensor, first: bool) -> Tensor:
        kept.clear()
        h = a * 2
        losses = [nllx.functional.cross_entropy(h, t)]
        with torch.no_grad():
            h.mul_(0.5)
        losses.append(nllx.functional.cross_entropy(h, t))
        return losses[0 if first else 1]

    assert_close(
        _gradient(once, lambda a: head(a, False)), _gradient(_RUNS["no hooks"], lambda a: F.cross_entropy(a, t)) * 2
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        _gradient(once, lambda a: head(a, True))


@pytest.mark.parametrize("run", ["no hooks", "identity", "checkpoint", "clone"])
@pytest.mark.parametrize("op", ["cross_entropy", "log_softmax", "nll_loss"])
def test_forward_derivatives_are_differentiated(op: str, run: str) -> None:
    """Of torch's log_softmax they are not: an error, or wrong where hooks keep the memory."""
    direction = x.flip(0).cos()

    def call(a: Tensor) -> Tensor:
        if op == "log_softmax":
            return (nllx.functional.log_softmax(a, 1) * x).sum()
        return getattr(nllx.functional, op)(a, t)

    def head(a: Tensor) -> Tensor:
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(a * 2, direction))).tangent
        assert tangent is not None
        return tangent + 0 * a.sum()

    def defined(a: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(call(h := a * 2), h, create_graph=True)
        return (first * direction).sum() + 0 * a.sum()

    assert_close(_gradient(_RUNS[run], head), _gradient(_RUNS["no hooks"], defined))


def test_memory_replaced_before_a_pullback() -> None:
    h = x.clone()
    _, pullback = torch.func.vjp(lambda a: nllx.functional.cross_entropy(a, t), h)
    h.data = torch.zeros_like(h)
    with pytest.raises(RuntimeError, match="given other memory"):
        pullback(torch.ones([]).double())


def test_alone_the_logits_become_the_gradient() -> None:
    """Of a view too, as language models have it, whose base autograd keeps."""
    for kept in (lambda h: None, lambda h: h):
        assert_close(_after(kept)[2], _gradient(_RUNS["no hooks"], lambda a: F.cross_entropy(a * 2, t)))
    leaf = x.clone().requires_grad_()
    h = leaf * 2
    nllx.functional.cross_entropy(h.view(2, 3, 5).flatten(0, 1), t, inplace_backward=True).backward()
    assert_close(2 * h.detach(), leaf.grad)


def test_hooks_get_the_memory_of_the_logits() -> None:
    """And not a copy: offloading moves what there is, and no more."""
    h = x.clone().requires_grad_() * 2
    got: list[int] = []
    with saved_tensors_hooks(lambda saved: got.append(saved.data_ptr()), lambda kept: kept):
        nllx.functional.cross_entropy(h, t)
    assert got[0] == h.data_ptr()


# What docs/differences.md says of it.


def test_logits_reused_in_a_compiled_step() -> None:
    def step(a: Tensor, ce: Any) -> Tensor:
        h = a * 2
        loss = ce(h, t)
        h.mul_(0.5)
        return loss + h.sum()

    for ce, raises in ((F.cross_entropy, False), (nllx.functional.cross_entropy, True)):
        torch._dynamo.reset()
        compiled = torch.compile(lambda a, ce=ce: step(a, ce), backend="aot_eager")
        with pytest.raises(Exception, match="modified by an inplace operation") if raises else contextlib.nullcontext():
            compiled(x.clone().requires_grad_()).backward()


def test_hooks_of_lower_precision() -> None:
    def error(ce: Any, dtype: torch.dtype, offset: float) -> float:
        def head(a: Tensor) -> Tensor:
            return ce(a + offset, t)

        run = _hooks(
            lambda saved: saved.to(dtype) if saved.is_floating_point() else saved,
            lambda kept: kept.double() if kept.is_floating_point() else kept,
        )
        return (_gradient(run, head) - _gradient(_RUNS["no hooks"], head)).abs().max().item()

    ours, torchs = nllx.functional.cross_entropy, F.cross_entropy
    for dtype, small in ((torch.bfloat16, 2e-3), (torch.float16, 3e-4)):
        assert max(error(torchs, dtype, 0), error(torchs, dtype, 1000), error(ours, dtype, 0)) < small
    assert 0.01 < error(ours, torch.bfloat16, 1000) < 0.3
    assert not error(ours, torch.float16, 1e5) < 1  # NaN


def test_a_slice_keeps_the_whole() -> None:
    for ce, kept in ((F.cross_entropy, False), (nllx.functional.cross_entropy, True)):
        h = torch.randn(6, 4, 5, requires_grad=True) * 2
        whole = StorageWeakRef(h.untyped_storage())
        loss = ce(h[:, -1], t)
        del h
        assert whole.expired() != kept
        h = torch.randn(6, 4, 5, requires_grad=True) * 2
        whole = StorageWeakRef(h.untyped_storage())
        loss = ce(h[:, -1].clone(), t)
        del h
        assert whole.expired()
        loss.backward()


def test_patched_inside_of_a_full_graph() -> None:
    def inside(a: Tensor) -> Tensor:
        with nllx.patched():
            return F.cross_entropy(a, t)

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(inside, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    with nllx.patched():
        around = torch.compile(lambda a: F.cross_entropy(a, t), backend="eager", fullgraph=True)(x)
    assert_close(around, F.cross_entropy(x, t))

"""softmax_statistics against formulas in float64, written here: values, each gradient alone and together, orders, options."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import nllx
from nllx.functional import SoftmaxStatistics, softmax_statistics

NAMES = SoftmaxStatistics._fields
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Shape and dimension of the classes: rows, planes, both around the widths of vectors and blocks, few long rows in segments.
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "one row": ((7,), -1),
    "one class": ((5, 1), 1),
    "short rows": ((33, 10), -1),
    "rows": ((6, 257), 1),
    "several blocks": ((3, 5003), -1),
    "segments": ((2, 40001), -1),
    "sequences": ((2, 3, 50), -1),
    "planes": ((2, 21, 5, 13), 1),
    "wide planes": ((1, 150, 40), 1),
    "planes of many rows": ((2, 3, 700), 1),
    "first dimension": ((9, 17), 0),
}
# How the same logits lie in memory.
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "with gaps": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    "in wider rows": lambda x: torch.nn.functional.pad(x, (0, 3), value=torch.nan)[..., : x.shape[-1]],
}


def _formulas(x: Tensor, target: Tensor | None, dim: int, ignore_index: int = -100) -> list[Tensor | None]:
    """log_prob, logsumexp, entropy and prediction, in float64."""
    x = x.double()
    counted = None
    if target is not None:
        counted = target != ignore_index
        x = torch.where(counted.unsqueeze(dim), x, 0.0)
    lse = torch.logsumexp(x, dim)
    # From the maximum: the logarithm of a sum of lowest numbers would lose its digits.
    m = x.detach().amax(dim, keepdim=True)
    shifted = x - torch.where(m.isinf(), 0.0, m)
    log_sum = torch.logsumexp(shifted, dim, keepdim=True)
    log_p = shifted - log_sum
    lse = torch.where(lse.isinf(), lse, (m + log_sum).squeeze(dim))
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, log_p)).sum(dim)
    entropy = torch.where(lse == -torch.inf, torch.nan, entropy)
    prediction = x.argmax(dim)
    if target is None or counted is None:
        return [None, lse, entropy, prediction]
    index = torch.where(counted, target, 0).long().unsqueeze(dim)
    log_prob = log_p.gather(dim, index).squeeze(dim)
    numbers = [torch.where(counted, t, 0.0) for t in (log_prob, lse, entropy)]
    return [*numbers, torch.where(counted, prediction, -1)]


def _problem(
    shape: str, dtype: torch.dtype, layout: str = "contiguous", scale: float = 2.0
) -> tuple[Tensor, Tensor, int]:
    size, dim = SHAPES[shape]
    generator = torch.Generator().manual_seed(len(size) * size[dim])
    x = LAYOUTS[layout]((scale * torch.randn(size, generator=generator, dtype=torch.float64)).to(dtype))
    rows = [*size]
    classes = rows.pop(dim)
    target = torch.randint(classes, rows, generator=generator)
    if target.numel() > 2:
        target.view(-1)[1] = -100
    return x, target, dim


def _tolerance(dtype: torch.dtype, classes: int) -> dict[str, float]:
    """Of float32 arithmetic, and of the dtype that the gradient is rounded to."""
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return {"rtol": 16 * eps, "atol": 16 * eps * max(1.0, torch.tensor(float(classes)).log().item())}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: str, dtype: torch.dtype, layout: str) -> None:
    """Of all outputs together, with and without a target."""
    x, target, dim = _problem(shape, dtype, layout)
    for given in (target, None):
        ours, theirs = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
        found, wanted = softmax_statistics(ours, given, dim=dim), _formulas(theirs, given, dim)
        losses = []
        for name, a, b in zip(NAMES, found, wanted, strict=True):
            if b is None:
                assert a is None
            elif name == "prediction":
                assert a.dtype == torch.int64
                assert torch.equal(a, b)
            else:
                assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                assert a.shape == b.shape
                assert_close(a.double(), b, **_tolerance(dtype, x.shape[dim]))
                weight = torch.linspace(-1, 1.5, b.numel(), dtype=torch.float64).reshape(b.shape)
                losses.append(((a.double() * weight).sum(), (b * weight).sum()))
        (grad,) = torch.autograd.grad(sum(a for a, _ in losses), ours)
        (want,) = torch.autograd.grad(sum(b for _, b in losses), theirs)
        assert grad.dtype == dtype
        assert grad.stride() == torch.empty_like(x).stride()
        eps = torch.finfo(dtype).eps
        assert_close(
            grad.double(),
            want.double(),
            rtol=16 * eps,
            atol=32 * torch.finfo(torch.float32).eps if dtype != torch.float64 else 1e-14,
        )


@pytest.mark.parametrize("wanted", [w for n in (1, 2, 3) for w in itertools.combinations(NAMES[:3], n)], ids="-".join)
@pytest.mark.parametrize("shape", ["rows", "segments", "planes", "short rows"])
def test_each_gradient(shape: str, wanted: tuple[str, ...]) -> None:
    """Outputs alone and together, asked for alone or with others, are the same bits."""
    x, target, dim = _problem(shape, torch.float64)
    theirs = x.clone().requires_grad_()
    formulas = dict(zip(NAMES, _formulas(theirs, target, dim), strict=True))
    (want,) = torch.autograd.grad(sum((formulas[name] ** 2).sum() for name in wanted), theirs)
    grads = []
    for outputs in (None, wanted):
        ours = x.clone().requires_grad_()
        found = softmax_statistics(ours, target, dim=dim, outputs=outputs)
        if outputs:
            assert [name for name in NAMES if getattr(found, name) is not None] == list(wanted)
        grads += torch.autograd.grad(sum((getattr(found, name) ** 2).sum() for name in wanted), ours)
    assert torch.equal(*grads)
    assert_close(grads[0], want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", ["one row", "short rows", "sequences", "first dimension"])
def test_gradcheck(shape: str) -> None:
    x, target, dim = _problem(shape, torch.float64)
    x = x.narrow(dim, 0, min(4, x.shape[dim])).clone().requires_grad_()
    target = target.where(target < x.shape[dim], 0)

    def f(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(softmax_statistics(x, target, dim=dim)[:3])

    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, x, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype: torch.dtype, planes: bool) -> None:
    """Masked classes, rows of nothing but masks, the lowest number, infinity, NaN, ties."""
    lowest = torch.finfo(dtype).min
    rows = [
        [0.0, -torch.inf, 1.0, -torch.inf, 2.0],
        [-torch.inf] * 5,
        [-torch.inf, lowest, lowest, -torch.inf, lowest],
        [lowest] * 5,
        [1.0, 2.0, torch.nan, 3.0, torch.nan],
        [1.0, torch.inf, 0.0, torch.inf, 2.0],
        [3.0, 3.0, 1.0, 3.0, 3.0],
        [-torch.inf, -5.0, -torch.inf, -torch.inf, -torch.inf],
    ]
    x = torch.tensor(rows, dtype=dtype)
    target = torch.tensor([2, 0, 1, 4, 0, 2, 1, 1])
    dim = 1
    if planes:
        x, dim = x.t().contiguous(), 0
    ours, theirs = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    found, wanted = softmax_statistics(ours, target, dim=dim), _formulas(theirs, target, dim)
    finite = torch.tensor([0, 2, 3, 6, 7])
    for a, b in zip(found, wanted, strict=True):
        if a.is_floating_point():
            assert_close(a[finite].double(), b[finite], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(a, b)
    assert found.logsumexp[1] == -torch.inf
    for statistic in (found.entropy, found.log_prob):
        assert statistic[[1, 4, 5]].isnan().all()
    assert found.logsumexp[4].isnan()
    assert found.logsumexp[5] == torch.inf
    total = sum(t.index_select(0, finite).sum() for t in found[:3])
    want = sum(t.index_select(0, finite).sum() for t in wanted[:3])
    (grad,), (expected,) = torch.autograd.grad(total, ours), torch.autograd.grad(want, theirs)
    assert_close(
        grad.index_select(1 - dim, finite).double(),
        expected.index_select(1 - dim, finite).double(),
        rtol=4 * torch.finfo(dtype).eps,
        atol=4e-6,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("classes", "masked"), [(1500, slice(0, 1024)), (70_000, slice(60_000, None)), (70_000, slice(0, 40_000))]
)
def test_blocks_of_masks(classes: int, masked: slice, dtype: torch.dtype) -> None:
    """A block or a segment of a row that holds nothing but the lowest number, beside others."""
    x = torch.randn(2, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:, masked] = torch.finfo(dtype).min
    for dim in (1, 0):
        ours, theirs = (x.movedim(1, dim).contiguous().requires_grad_() for _ in range(2))
        found, wanted = softmax_statistics(ours, dim=dim), _formulas(theirs, None, dim)
        for name in ("logsumexp", "entropy"):
            a, b = getattr(found, name), wanted[NAMES.index(name)]
            assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
        grads = [torch.autograd.grad(s[1].sum() + s[2].sum(), leaf)[0] for s, leaf in ((found, ours), (wanted, theirs))]
        assert_close(grads[0].double(), grads[1].double(), rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_hold_anything(dtype: torch.dtype) -> None:
    x = torch.randn(4, 9).to(dtype)
    x[1], x[3] = torch.nan, torch.inf
    target = torch.tensor([2, 7, 0, 7])
    for logits, dim in ((x, -1), (x.t().contiguous(), 0)):
        ours = logits.clone().requires_grad_()
        found = softmax_statistics(ours, target, dim=dim, ignore_index=7)
        for statistic in found[:3]:
            assert (statistic[[1, 3]] == 0).all()
            assert statistic[[0, 2]].isfinite().all()
        assert found.prediction[[1, 3]].tolist() == [-1, -1]
        (grad,) = torch.autograd.grad(sum(t.sum() for t in found[:3]), ours)
        assert (grad.movedim(dim, -1)[[1, 3]] == 0).all()
        (second,) = torch.autograd.grad(
            sum(
                g.square().sum()
                for g in torch.autograd.grad(
                    sum(t.sum() for t in softmax_statistics(ours, target, dim=dim, ignore_index=7)[:3]),
                    ours,
                    create_graph=True,
                )
            ),
            ours,
        )
        assert (second.movedim(dim, -1)[[1, 3]] == 0).all()


def test_index_dtypes() -> None:
    x = torch.randn(5, 9)
    target = torch.tensor([0, 3, 8, 3, 1])
    want = softmax_statistics(x, target)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        assert all(torch.equal(a, b) for a, b in zip(softmax_statistics(x, target.to(dtype)), want, strict=True))


@pytest.mark.parametrize("shape", ["segments", "rows", "planes of many rows"])
def test_same_bits_for_any_number_of_threads(shape: str) -> None:
    x, target, dim = _problem(shape, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            leaf = x.clone().requires_grad_()
            found = softmax_statistics(leaf, target, dim=dim)
            results.append([*found, *torch.autograd.grad(sum(t.sum() for t in found[:3]), leaf)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_of_the_logits_size_is_saved() -> None:
    x = torch.randn(64, 1000, requires_grad=True)
    target = torch.randint(1000, (64,))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append((t.numel(), t.data_ptr())) or t, lambda t: t):
        softmax_statistics(x, target)
    assert [size for size, pointer in sizes if pointer != x.data_ptr()] == [64, 64 * 3]
    with torch.no_grad():
        assert softmax_statistics(x, target).log_prob.grad_fn is None


@pytest.mark.parametrize("in_dims", [(0, 0), (1, 0), (0, None), (None, 0), (2, 1)])
def test_vmap(in_dims: tuple[int | None, int | None]) -> None:
    x, target = torch.randn(3, 4, 5), torch.randint(5, (3, 4))
    logits = x if in_dims[0] is None else x.movedim(0, in_dims[0])
    labels = target if in_dims[1] is None else target.movedim(0, in_dims[1])
    if in_dims[0] is None:
        logits = x[0]
    if in_dims[1] is None:
        labels = target[0]
    found = torch.vmap(lambda a, b: tuple(softmax_statistics(a, b)), in_dims)(logits, labels)
    for i in range(3):
        want = softmax_statistics(x[0 if in_dims[0] is None else i], target[0 if in_dims[1] is None else i])
        for a, b in zip(found, want, strict=True):
            assert_close(a[i], b)
    partial = torch.vmap(lambda a: softmax_statistics(a, outputs=["entropy"]).entropy)(x)
    assert_close(partial, softmax_statistics(x).entropy)
    grads = torch.vmap(torch.func.grad(lambda a, b: sum(t.sum() for t in softmax_statistics(a, b)[:3])))(x, target)
    leaf = x.clone().requires_grad_()
    assert_close(grads, *torch.autograd.grad(sum(t.sum() for t in softmax_statistics(leaf, target)[:3]), leaf))


def test_opcheck() -> None:
    x, target = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.tensor([1, -100, 4])
    for arguments in (
        (x, target),
        (x, None, None, None, 0, -100, 1.0, 1.0, 0.0, True, False),
        (x, target, x.detach()[:, 0], x[:, 1].detach().exp(), 1, -100, 1.5, 1.0, 3.0, False, True),
    ):
        torch.library.opcheck(torch.ops.nllx.softmax_statistics_forward, arguments)
        torch.library.opcheck(torch.ops.nllx.softmax_statistics, arguments)
    stats = torch.ops.nllx.softmax_statistics_forward(x.detach(), target)[-1]
    g = torch.randn(3, dtype=torch.float64)
    scale = x.detach()[:, 0]
    for grads, scales in (((g, g, g), (scale, None)), ((None, g, None), (None, None))):
        saved = (x.detach(), target, *scales, stats)
        options = (-1, -100, 1.0, 1.0, 0.0, True, True, [True, scales[0] is not None])
        torch.library.opcheck(torch.ops.nllx.softmax_statistics_backward, (*grads, *saved, *options))


# ---- options ----


def _z(x: Tensor, scale: Any, softcap: float | None, temperature: Any) -> Tensor:
    z = x.double() * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("kind", ["number", "tensor", "per row"])
def test_scale_softcap_and_temperature(kind: str, softcap: float | None, dtype: torch.dtype) -> None:
    x, target, dim = _problem("sequences", dtype)
    scale = {"number": 1.7, "tensor": torch.tensor(1.7), "per row": torch.rand(target.shape) + 0.5}[kind]
    temperature = {"number": 0.6, "tensor": torch.tensor(0.6), "per row": torch.rand(target.shape) + 0.5}[kind]
    leaves = [
        [t.detach().clone().requires_grad_() for t in (x, scale, temperature) if isinstance(t, Tensor)]
        for _ in range(2)
    ]

    def taken(tensors: list[Tensor], rows: bool) -> tuple[Tensor, Any, Any]:
        logits, *factors = tensors if len(tensors) > 1 else (tensors[0], scale, temperature)
        return logits, *(f.unsqueeze(dim) if rows and isinstance(f, Tensor) and f.dim() else f for f in factors)  # type: ignore[return-value]

    logits, s, t = taken(leaves[0], rows=False)
    found = softmax_statistics(logits, target, dim=dim, logit_scale=s, softcap=softcap, temperature=t)
    logits, s, t = taken(leaves[1], rows=True)
    wanted = _formulas(_z(logits, s, softcap, t), target, dim)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a.to(b.dtype), b, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(sum(a.double().sum() for a in found[:3]), leaves[0])
    want = torch.autograd.grad(sum(b.sum() for b in wanted[:3]), leaves[1])
    for a, b in zip(grads, want, strict=True):
        assert_close(a, b.to(a.dtype), rtol=max(1e-4, 4 * torch.finfo(a.dtype).eps), atol=1e-4)


def test_a_softcap_is_a_number() -> None:
    x, target, _ = _problem("rows", torch.float64)
    with pytest.raises(TypeError, match=r"'softcap' must be float"):
        softmax_statistics(x, target, softcap=torch.tensor(3.0, requires_grad=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_under_options_ignored_rows_hold_anything_too(bad: float) -> None:
    x = torch.randn(3, 5)
    x[1, 2] = bad
    factors = torch.tensor([1.5, 0.0, 0.7])
    target = torch.tensor([0, -100, 4])
    leaves = [t.clone().requires_grad_() for t in (x, torch.tensor(2.0), factors)]
    found = softmax_statistics(leaves[0], target, logit_scale=leaves[1], softcap=5.0, temperature=leaves[2])
    grads = torch.autograd.grad(sum(t.sum() for t in found[:3]), leaves)
    kept = torch.tensor([0, 2])
    others = [t.clone().requires_grad_() for t in (x[kept], torch.tensor(2.0), factors[kept])]
    found = softmax_statistics(others[0], target[kept], logit_scale=others[1], softcap=5.0, temperature=others[2])
    expected = torch.autograd.grad(sum(t.sum() for t in found[:3]), others)
    assert_close([grads[0][kept], grads[1], grads[2][kept]], [*expected])
    assert (grads[0][1] == 0).all()
    assert grads[2][1] == 0


def test_masked_classes_under_a_scale() -> None:
    """The limit, where torch's product of a gradient of zero and infinity is NaN."""
    x = torch.tensor([[1.0, 2.0, -torch.inf]], dtype=torch.float64)
    grads = []
    for logits in (x, x[:, :2]):
        factors = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, 0.7)]
        found = softmax_statistics(logits, torch.tensor([0]), logit_scale=factors[0], temperature=factors[1])
        grads.append(torch.autograd.grad(sum(t.sum() for t in found[:3]), factors))
    assert_close(*grads)
    found = softmax_statistics(x, logit_scale=torch.tensor(-1.0))
    assert found.prediction == 2


def test_compiled_with_a_temperature_that_changes() -> None:
    x = torch.randn(4, 9)
    compiled = torch.compile(lambda x, t: softmax_statistics(x, temperature=t, softcap=10.0).entropy, fullgraph=True)
    for temperature in (0.5, 0.25, 0.3):
        assert_close(compiled(x, temperature), softmax_statistics(x, temperature=temperature, softcap=10.0).entropy)


def test_under_a_softcap_a_mask_is_none() -> None:
    found = softmax_statistics(torch.tensor([0.0, -torch.inf]), softcap=5.0)
    assert_close(found.logsumexp, torch.tensor([0.0, -5.0]).logsumexp(0))


_BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "negative softcap": ({"softcap": -1.0}, ValueError, "softcap must be a positive number"),
    "softcap of zero": ({"softcap": 0}, ValueError, "softcap must be a positive number"),
    "NaN temperature": ({"temperature": float("nan")}, ValueError, "temperature must be a positive number"),
    "temperature of zero": ({"temperature": 0.0}, ValueError, "temperature must be a positive number"),
    "infinite scale": ({"logit_scale": float("inf")}, ValueError, "logit_scale must be a finite number"),
    "scale of the wrong shape": ({"logit_scale": torch.ones(3)}, ValueError, "one number per row, of shape"),
    "scale of the wrong type": ({"logit_scale": "2"}, TypeError, "logit_scale"),
    "complex scale": ({"logit_scale": torch.ones((), dtype=torch.complex64)}, TypeError, "logit_scale"),
    "array as scale": ({"logit_scale": np.array([1.0, 2.0])}, TypeError, "logit_scale"),
    "number as outputs": ({"outputs": 5}, TypeError, "outputs"),
    "unknown output": ({"outputs": ["entropie"]}, ValueError, "outputs must be of"),
    "a name as outputs": ({"outputs": "entropy"}, ValueError, "outputs must be of"),
    "log_prob of nothing": ({"target": None, "outputs": ["log_prob"]}, ValueError, "log_prob is of a target"),
    "class out of range": ({"target": torch.tensor([0, 5])}, IndexError, "out of bounds"),
    "shape of the target": ({"target": torch.tensor([0])}, RuntimeError, "Expected target size"),
    "dtype of the target": ({"target": torch.tensor([0.0, 1.0])}, RuntimeError, "expected target dtype"),
    "dimension": ({"dim": 2}, IndexError, "Dimension out of range"),
    "type of the target": ({"target": [0, 1]}, TypeError, "target"),
}


@pytest.mark.parametrize("bad", _BAD)
def test_errors(bad: str) -> None:
    """From the kernels, and from the fakes but for what depends on data."""
    options, kind, message = _BAD[bad]
    arguments: dict[str, Any] = {"target": torch.tensor([0, 1]), **options}
    x = torch.randn(2, 5)
    with pytest.raises(kind, match=message):
        softmax_statistics(x, **arguments)
    if bad != "class out of range":
        moved = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in arguments.items()}
        with pytest.raises(kind, match=message):
            softmax_statistics(x.to("meta"), **moved)


def test_no_rows_and_no_classes() -> None:
    found = softmax_statistics(torch.randn(0, 5), torch.empty(0, dtype=torch.int64))
    assert [t.shape for t in found] == [(0,)] * 4
    found = softmax_statistics(torch.randn(0, 0), torch.empty(0, dtype=torch.int64))
    assert [t.shape for t in found] == [(0,)] * 4
    for device in ("cpu", "meta"):
        with pytest.raises(IndexError, match="have no classes"):
            softmax_statistics(torch.randn(3, 0, device=device))
        with pytest.raises(IndexError, match="no dimension"):
            softmax_statistics(torch.tensor(1.0, device=device))
    with pytest.raises(NotImplementedError, match="not implemented for 'Long'"):
        softmax_statistics(torch.ones(2, 3, dtype=torch.int64))


def test_compiled() -> None:
    x, target = torch.randn(6, 40, requires_grad=True), torch.randint(40, (6,))

    def f(x: Tensor) -> Tensor:
        found = nllx.functional.softmax_statistics(x, target, softcap=10.0)
        return (
            (found.log_prob * found.entropy.detach()).sum() + found.entropy.sum() + (found.prediction == target).sum()
        )

    compiled = torch.compile(f, fullgraph=True)
    assert_close(compiled(x), f(x))
    assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(f(x), x))

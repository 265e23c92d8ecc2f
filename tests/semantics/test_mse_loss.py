"""``mse_loss``: what torch's does, asked at run time, over dtypes, layouts and shapes; orders and transforms are in the tables
of transforms and of torch's databases."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import nllx

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_REDUCTIONS = ("none", "mean", "sum")


def _numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return numbers.to(device or torch.get_default_device(), dtype)


def _differentiated(function: Callable[..., Tensor], tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """Loss and gradients of input, target and weight, with an incoming gradient that is not constant."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    loss = function(*leaves[:2], weight=leaves[2] if len(leaves) > 2 else None, **options)
    grad = _numbers(*loss.shape, seed=9, dtype=loss.dtype, device=loss.device.type)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, grad)]


def _assert_no_less_accurate(tensors: list[Tensor], **options: Any) -> None:
    """Within a few roundings of the float64 result: of the differences and products in the arithmetic, of the result in its
    own dtype."""
    actual = _differentiated(nllx.functional.mse_loss, tensors, **options)
    exact = _differentiated(F.mse_loss, [t.double() for t in tensors], **options)
    largest = max(e.abs().max().item() for e in exact if e.numel()) if exact[1].numel() else 0.0
    for a, e in zip(actual, exact, strict=True):
        limits = torch.finfo(a.dtype)
        e = torch.where(e.abs() > limits.max, math.inf * e.sign(), e)
        rounding = 8 * limits.eps  # the incoming gradient in half precision is rounded too
        assert_close(
            a.double(), e, rtol=rounding, atol=rounding * min(largest, 1) + limits.smallest_normal * limits.eps
        )


_LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "one number": lambda: _numbers(),
    "one element": lambda: _numbers(1),
    "nothing": lambda: _numbers(3, 0),
    "a vector": lambda: _numbers(1001),
    "blocks": lambda: _numbers(37, 4099),
    "transposed": lambda: _numbers(65, 33).t(),
    "channels last": lambda: _numbers(2, 5, 7, 9).contiguous(memory_format=torch.channels_last),
    "padded": lambda: _numbers(9, 40)[:, :33],
    "stepped": lambda: _numbers(9, 66)[:, ::2],
    "expanded": lambda: _numbers(1, 33).expand(17, 33),
    "expanded inside": lambda: _numbers(17, 1).expand(17, 33),
    "shifted": lambda: _numbers(130)[1:],
    "permuted": lambda: _numbers(4, 5, 6, 7).permute(2, 0, 3, 1),
    "many dimensions": lambda: _numbers(2, 3, 2, 3, 2, 3, 2, 3)[:, ::2, :, ::2, :, ::2, :, ::2],
}


@pytest.mark.parametrize("reduction", _REDUCTIONS)
@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_values(dtype: torch.dtype, layout: str, reduction: str, device: str) -> None:
    """Every layout with itself, with a contiguous partner, and with weights in either's layout."""
    arranged = _LAYOUTS[layout]().to(dtype).to(device)
    plain = _numbers(*arranged.shape, seed=1, dtype=dtype, device=device)
    weight = _numbers(*arranged.shape, seed=2, dtype=dtype, device=device).abs() + 0.5
    for tensors in ([arranged, plain], [plain, arranged], [arranged, arranged * 0.5], [plain, arranged, weight]):
        if arranged.numel() == 0 and reduction == "mean":
            assert all(nllx.functional.mse_loss(*tensors[:2]).isnan().tolist() for _ in [0])
            continue
        _assert_no_less_accurate(tensors, reduction=reduction)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "layouts", list(itertools.permutations(["transposed", "contiguous", "stepped"], 2)), ids="-".join
)
def test_strides_are_torchs(layouts: tuple[str, str], weighted: bool, device: str) -> None:
    made = {
        "transposed": _numbers(7, 5, device=device).t(),
        "contiguous": _numbers(5, 7, device=device),
        "stepped": _numbers(5, 14, device=device)[:, ::2],
    }
    x, y = (made[name] for name in layouts)
    weight = {"weight": made["transposed"]} if weighted else {}
    for device_type in (device, "meta"):
        a, b, w = (t.to(device_type) if device_type == "meta" else t for t in (x, y, made["transposed"]))
        options = {"weight": w} if weight else {}
        loss = nllx.functional.mse_loss(a, b, reduction="none", **options)
        assert loss.stride() == F.mse_loss(x, y, reduction="none", **weight).stride()


@pytest.mark.parametrize("reduction", _REDUCTIONS)
def test_broadcasting_with_torchs_warning(reduction: str) -> None:
    x, y = _numbers(3, 1, 5), _numbers(4, 1, seed=1)
    for weighted in (False, True):
        tensors = [x, y, x.abs() + 1] if weighted else [x, y]
        with warnings.catch_warnings(record=True) as ours:
            warnings.simplefilter("always")
            actual = _differentiated(nllx.functional.mse_loss, tensors, reduction=reduction)
        with warnings.catch_warnings(record=True) as theirs:
            warnings.simplefilter("always")
            expected = _differentiated(F.mse_loss, tensors, reduction=reduction)
        assert_close(actual, expected)
        assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]
        assert [w.filename for w in ours] == [__file__] * len(ours)


def test_the_warning_names_the_line_that_called() -> None:
    with nllx.patched(), pytest.warns(UserWarning, match="Using a target size") as seen:
        F.mse_loss(_numbers(3, 1), _numbers(3, 4))
    assert seen[0].filename == __file__


@pytest.mark.parametrize("dtypes", list(itertools.product((*_DTYPES, torch.int64, torch.uint8), repeat=2)), ids=str)
def test_promotion(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The dtype of torch's result, its values, and gradients in the dtypes of the arguments."""
    values = (_numbers(6, 4) * 3).abs().round()
    x, y = values.to(dtypes[0]), values.flip(0).to(dtypes[1])
    for weight in (None, (values.abs() + 1).float(), (values.abs() + 1).double(), (values.abs() + 1).half()):
        try:
            expected = F.mse_loss(x, y, reduction="none", weight=weight)
        except (NotImplementedError, RuntimeError) as error:
            with pytest.raises(type(error)):
                nllx.functional.mse_loss(x, y, reduction="none", weight=weight)
            continue
        if not any(
            t.is_floating_point() for t in (x, y)
        ):  # torch's weighted formula takes integers, in their arithmetic
            with pytest.raises(NotImplementedError):
                nllx.functional.mse_loss(x, y, reduction="none", weight=weight)
            continue
        loose = {"rtol": 2e-2, "atol": 2e-2} if expected.dtype in (torch.float16, torch.bfloat16) else {}
        if {*dtypes} & {torch.float16, torch.bfloat16}:  # torch rounds the square before it weighs it
            loose = {"rtol": 2e-2, "atol": 2e-2}
        leaves = [t.requires_grad_() if t.is_floating_point() else t for t in (x.clone(), y.clone())]
        actual = nllx.functional.mse_loss(*leaves, reduction="none", weight=weight)
        assert_close(actual.detach(), expected, **loose)
        if actual.requires_grad:
            actual.sum().backward()
            assert all(t.grad.dtype == t.dtype for t in leaves if t.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """Sums of many numbers in float32, where the exact mean of squares is known to the last bit of the result."""
    x = torch.full((100_000,), 1.5, dtype=dtype)
    y = torch.full((100_000,), 0.25, dtype=dtype)
    assert nllx.functional.mse_loss(x, y) == torch.tensor(1.5625, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nllx.functional.mse_loss(x, y, reduction="sum")
        assert loss.dtype == F.mse_loss(x, y).dtype == torch.float32
    assert loss == 156250


def test_special_numbers() -> None:
    x = torch.tensor([math.inf, math.nan, 1.0, math.inf, 3.0])
    y = torch.tensor([1.0, 1.0, -math.inf, math.inf, 1.0])
    w = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    for weight in (None, w):
        for reduction in _REDUCTIONS:
            actual, expected = (
                f(x, y, reduction=reduction, weight=weight) for f in (nllx.functional.mse_loss, F.mse_loss)
            )
            assert_close(actual, expected, equal_nan=True)
    assert nllx.functional.mse_loss(x[4:], y[4:], weight=w[4:]).isnan()  # 0 / 0


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)], ids=str)
def test_gradients_that_are_wanted_alone_are_made(wanted: tuple[int, ...]) -> None:
    tensors = [_numbers(50, 60).requires_grad_(0 in wanted), _numbers(50, 60, seed=1).requires_grad_(1 in wanted)]
    seen: list[list[bool]] = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.nllx.mse_loss_backward.default:
                seen.append(args[-1])
            return function(*args, **(kwargs or {}))

    with Mode():
        loss = nllx.functional.mse_loss(*tensors)
        found = torch.autograd.grad(loss, [tensors[i] for i in wanted])
    assert seen == [[0 in wanted, 1 in wanted]]
    assert_close(found, torch.autograd.grad(F.mse_loss(*tensors), [tensors[i] for i in wanted]))


@pytest.mark.parametrize("shape", [(3,), (70_001,), (513, 1025)], ids=str)
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = [_numbers(*shape, seed=i, dtype=dtype) for i in range(3)]
    weighted = functools.partial(nllx.functional.mse_loss, weight=tensors[2])

    def both() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors[:2]]
        losses = [nllx.functional.mse_loss(*leaves), weighted(*leaves), weighted(*leaves, reduction="none")]
        return [*losses, *(g for loss in losses for g in torch.autograd.grad(loss.sum(), leaves))]

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(both())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("places", [(0, 1), (1, 0)], ids=str)
def test_integers_are_not_rounded_under_autocast(half: torch.dtype, places: tuple[int, int]) -> None:
    """torch's loss promotes to float32 there, in which these integers are what they are. (Its backward takes none in 2.11.)"""
    pair = [torch.tensor([256.0, 1.0, 3.0]).to(half), torch.tensor([257, 7001, 4099])]
    tensors = [pair[i] for i in places]
    results = []
    for function, given in ((nllx.functional.mse_loss, tensors), (F.mse_loss, [t.float() for t in tensors])):
        leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in given]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = function(*leaves, reduction="sum")
            assert loss.dtype == F.mse_loss(*tensors, reduction="sum").dtype == torch.float32
            mapped = torch.vmap(functools.partial(function, reduction="none"))(*given)
        (gradient,) = torch.autograd.grad(loss, leaves[places.index(0)])
        results.append([loss, mapped, gradient.to(half)])
    assert_close(*results)


def test_factors_do_not_underflow_or_overflow() -> None:
    """The weight multiplies the incoming gradient, and that the difference, as in torch's formula."""
    for x, w, g in ((3e-18, 1e-26, 1.0), (1e10, 1e30, 1e-30), (1e-30, 1e30, 1.0)):
        for device in ("cpu",):
            values = torch.tensor([x, x / 3], device=device), torch.full((2,), w, device=device)
            found = []
            for function in (nllx.functional.mse_loss, F.mse_loss):
                leaf = values[0].clone().requires_grad_()
                reduction = "mean" if g == 1 else "sum"
                loss = function(leaf, torch.zeros_like(leaf), weight=values[1], reduction=reduction)
                found.append(torch.autograd.grad(loss, leaf, torch.tensor(g))[0])
            assert_close(*found, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("reduction", _REDUCTIONS)
@pytest.mark.parametrize("target", [(3,), (0, 3), (2, 3), (4, 1, 3)], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64])
def test_weights_beside_shapes_that_torch_warns_of(
    target: tuple[int, ...], reduction: str, weight_dtype: torch.dtype
) -> None:
    for shape in ((), (1,), (1, 1), (1, 3)):
        tensors = [_numbers(*shape), _numbers(*target, seed=1), _numbers(*shape, seed=2, dtype=weight_dtype).abs() + 1]
        if shape != target:
            actual = _differentiated(nllx.functional.mse_loss, tensors, reduction=reduction)
            assert_close(actual, _differentiated(F.mse_loss, tensors, reduction=reduction))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", [nllx.functional.mse_loss, F.mse_loss])
def test_a_reduction_of_old_beside_weights(function: Callable[..., Tensor]) -> None:
    x = _numbers(3)
    with pytest.raises(ValueError, match="reduction"):
        function(x, x, reduction="elementwise_mean", weight=x)


_ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no tensor": (lambda: nllx.functional.mse_loss([1.0], _numbers(1)), TypeError, "argument 'input' must be Tensor"),
    "shapes": (lambda: nllx.functional.mse_loss(_numbers(3), _numbers(4)), RuntimeError, "must match"),
    "weight's shape": (
        lambda: nllx.functional.mse_loss(_numbers(3), _numbers(3), weight=_numbers(1)),
        ValueError,
        "Weights and input must have the same size",
    ),
    "reduction": (
        lambda: nllx.functional.mse_loss(_numbers(3), _numbers(3), reduction="meen"),
        ValueError,
        "meen is not a valid value for reduction",
    ),
    "integers": (
        lambda: nllx.functional.mse_loss(torch.arange(3), torch.arange(3)),
        NotImplementedError,
        "\"mse_loss\" not implemented for 'Long'",
    ),
    "complex": (
        lambda: nllx.functional.mse_loss(torch.zeros(3, dtype=torch.complex64), _numbers(3)),
        NotImplementedError,
        "\"mse_loss\" not implemented for 'ComplexFloat'",
    ),
    "a complex weight": (
        lambda: nllx.functional.mse_loss(_numbers(3), _numbers(3), weight=torch.ones(3, dtype=torch.complex64)),
        RuntimeError,
        "mse_loss: ",
    ),
    "operator, shapes": (
        lambda: torch.ops.nllx.mse_loss_forward(_numbers(3), _numbers(4)),
        RuntimeError,
        "mse_loss: target must have the shape of input",
    ),
    "operator, dtypes": (
        lambda: torch.ops.nllx.mse_loss_forward(_numbers(3), _numbers(3).double()),
        RuntimeError,
        "mse_loss: expected scalar type Float but found Double for target",
    ),
    "operator, reduction": (
        lambda: torch.ops.nllx.mse_loss_forward(_numbers(3), _numbers(3), None, 7),
        ValueError,
        "7 is not a valid value for reduction",
    ),
}


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize("mistake", _ERRORS)
def test_errors(mistake: str, on_meta: bool) -> None:
    call, error, message = _ERRORS[mistake]
    with torch.device("meta") if on_meta else torch.device("cpu"), pytest.raises(error, match=message):
        call()


def test_deprecated_arguments() -> None:
    x, y = _numbers(3, 4), _numbers(3, 4, seed=1)
    for size_average, reduce in itertools.product((None, True, False), repeat=2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = F.mse_loss(x, y, size_average, reduce)
            assert_close(nllx.functional.mse_loss(x, y, size_average, reduce), expected)
            assert_close(nllx.MSELoss(size_average, reduce)(x, y), expected)


def test_expanded_targets_share_a_gradient() -> None:
    """A target that is one number for all, as a value head has it."""
    x, y = _numbers(30, 40).requires_grad_(), _numbers(1, 40, seed=1).requires_grad_()
    loss = nllx.functional.mse_loss(x, y.expand(30, 40))
    expected = F.mse_loss(x, y.expand(30, 40))
    assert_close(torch.autograd.grad(loss, [x, y]), torch.autograd.grad(expected, [x, y]))


def test_not_what_was_saved() -> None:
    """Each argument that is changed before the backward is noticed, as torch's loss notices it."""
    for changed in range(3):
        tensors = [_numbers(4, 5, seed=i).requires_grad_(i < 2) * 1 for i in range(3)]
        loss = nllx.functional.mse_loss(*tensors[:2], weight=tensors[2])
        with torch.no_grad():
            tensors[changed].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

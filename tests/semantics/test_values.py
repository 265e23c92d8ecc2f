"""Values: every row of the table against torch in float64, and against torch's own error."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, HIGHER_ORDER_CASES, OPERATORS, Case, build, select
from oracle import answer, check_against_torch, check_output

import nllx


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value(case: Case, device: str) -> None:
    problem = build(case, device)
    output = problem.call(nllx.functional)
    expected = build(case).for_torch().call(torch.nn.functional)
    assert output.dtype == expected.dtype
    assert output.shape == expected.shape
    assert output.is_contiguous()
    assert output.device == problem.input.device
    check_output(case, output)


@pytest.mark.parametrize(
    "case",
    # In float64 the exact answer is torch's own.
    select(lambda case: case.same_as_torch and torch.float64 not in (case.dtype, case.target_dtype, case.out_dtype)),
    ids=str,
)
def test_no_less_accurate_than_torch(case: Case, device: str) -> None:
    check_against_torch(case, answer(build(case, device), nllx.functional, input_only=True))


@pytest.mark.parametrize("op", OPERATORS)
def test_operator_is_the_function(op: str, device: str) -> None:
    """``torch.ops.nllx`` takes what ``nllx.functional`` takes, with the reduction as a number."""
    for case in HIGHER_ORDER_CASES:
        if case.op == op:
            problem = build(case, device)
            output = getattr(torch.ops.nllx, op)(*problem.op_arguments())
            assert torch.equal(output, problem.call(nllx.functional)) or output.isnan().all()


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_over_many_classes_of_planes(weighted: bool, device: str) -> None:
    """Thousands of terms of one size, added one by one in float32, would lose a digit."""
    generator = torch.Generator().manual_seed(0)
    classes = 22805
    logits = torch.randn(2, classes, 24, generator=generator).to(device)
    target = (torch.randn(2, classes, 24, generator=generator) / 4).softmax(1).to(device)
    weight = (torch.rand(classes, generator=generator) + 0.5).to(device) if weighted else None
    options = {"reduction": "none", "label_smoothing": 0.1}
    loss = nllx.functional.cross_entropy(logits, target, weight, **options)
    exact = torch.nn.functional.cross_entropy(
        logits.double(), target.double(), None if weight is None else weight.double(), **options
    )
    assert ((loss.double() - exact) / exact).abs().max() < 4e-7


def test_sums_over_many_classes_of_planes_in_float64() -> None:
    """The terms of smoothing, and the incoming gradient of ``log_softmax``, are summed as well as those of rows are."""
    logits = (torch.randn(3, 50257, generator=torch.Generator().manual_seed(0)) * 3).double()
    planes = logits.t().contiguous().t()
    target = torch.zeros(3, dtype=torch.long)
    for weight in (None, torch.linspace(0.5, 1.5, 50257, dtype=torch.float64)):
        options = {"weight": weight, "reduction": "none", "label_smoothing": 1.0}
        loss = nllx.functional.cross_entropy(planes, target, **options)
        torch.testing.assert_close(loss, nllx.functional.cross_entropy(logits, target, **options), rtol=2e-15, atol=0)
    for dtype, rtol in ((torch.float64, 4e-15), (torch.float32, 2e-6)):
        gradients = []
        for x in (planes.to(dtype, copy=True), logits.clone()):
            x.requires_grad_()
            nllx.functional.log_softmax(x, 1).backward(torch.full(x.shape, 0.1, dtype=x.dtype))
            gradients.append(x.grad)
        torch.testing.assert_close(
            gradients[0].double(), gradients[1], rtol=rtol, atol=float(gradients[1].abs().max()) * rtol
        )


def test_classes_without_probability_at_the_ends_of_the_range() -> None:
    """They add nothing, also where the largest logit is further away than the largest number."""
    for dtype in (torch.float32, torch.float64):
        for classes in (7, 300, 8191):
            for shape in ((1, classes), (1, classes, 1)):
                logits = torch.full(shape, torch.finfo(dtype).min, dtype=dtype)
                target = torch.zeros_like(logits)
                logits[:, -1] = torch.finfo(dtype).max
                target[:, -1] = 1
                assert nllx.functional.cross_entropy(logits, target) == 0


@pytest.mark.parametrize("shape", [(9, 7), (2, 7, 40), (2, 130, 40)])
@pytest.mark.parametrize("scale", [1.0, 1e31, 1e38])
def test_masked_classes_without_weight_before_large_logits(shape: tuple[int, ...], scale: float, device: str) -> None:
    """Classes at -inf whose weight is 0 add nothing, however far the largest logit is from them."""
    logits = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape).to(device) * scale
    weight = torch.ones(shape[1], device=device)
    for masked in (1, 4, 5, shape[1] - 2):
        hidden = logits.clone()
        hidden[:, :masked] = -torch.inf
        weight[:masked] = 0
        kept = hidden[:, masked:].double()
        target = torch.full((shape[0], *shape[2:]), shape[1] - 1, device=device)
        options = {"reduction": "none", "label_smoothing": 0.1}
        loss = nllx.functional.cross_entropy(hidden, target, weight, **options)
        log_probs = kept.log_softmax(1)
        expected = -0.9 * log_probs[:, -1] - 0.1 / shape[1] * log_probs.sum(1)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)

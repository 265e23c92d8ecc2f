"""Torch's semantics, edge by edge. Where nllx does as torch does, torch itself is asked at run time; where the
documentation of nllx names a difference, the test's name begins with ``test_nllx``."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from cases import REDUCTIONS, Case, build
from oracle import answer
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing import assert_close

import nllx

F = torch.nn.functional
N = nllx.functional

inf, nan = math.inf, math.nan
LOSSES = ("cross_entropy", "nll_loss")
HALVES = (torch.bfloat16, torch.float16)

x = torch.tensor([[0.5, -1.0, 2.0, 0.0], [1.5, 0.25, -0.5, 1.0], [-2.0, 0.0, 0.75, 3.0]])
t = torch.tensor([2, 0, 1])
w = torch.tensor([0.5, 1.0, 2.0, 4.0])
p = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 1.0, 0.0], [0.7, 0.1, 0.1, 0.1]])


def grad_of(functional: Any, op: str, logits: Tensor, *arguments: Any, **options: Any) -> Tensor:
    leaf = logits.detach().requires_grad_()
    return torch.autograd.grad(getattr(functional, op)(leaf, *arguments, **options).sum(), leaf)[0]


def same(op: str, *arguments: Any, **options: Any) -> Tensor:
    """nllx's result, equal to torch's in value, shape and dtype."""
    result = getattr(N, op)(*arguments, **options)
    assert_close(result, getattr(F, op)(*arguments, **options), equal_nan=True)
    return result


def same_with_gradient(op: str, *arguments: Any, **options: Any) -> Tensor:
    result = same(op, *arguments, **options)
    assert_close(grad_of(N, op, *arguments, **options), grad_of(F, op, *arguments, **options), equal_nan=True)
    return result


class TestFormulas:
    """lp = log_softmax(x), valid rows V, smoothing ε, weights w, classes C."""

    lp = x.log_softmax(1)
    y = torch.tensor([2, -100, 1])
    picked = ((0, 2), (2, 1))  # the valid rows with their classes

    def _parts(self, smoothing: float, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = sum((1 - smoothing) * -weight[c] * self.lp[r, c] for r, c in self.picked)
        total += sum(smoothing / 4 * -(weight * self.lp[r]).sum() for r, _ in self.picked)
        return total, sum(weight[c] for _, c in self.picked)

    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
    @pytest.mark.parametrize("weight", [None, w])
    def test_sum_of_indices(self, smoothing: float, weight: Tensor | None) -> None:
        total, _ = self._parts(smoothing, torch.ones(4) if weight is None else weight)
        got = same("cross_entropy", x, self.y, weight, reduction="sum", label_smoothing=smoothing)
        assert_close(got, total)

    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
    @pytest.mark.parametrize("weight", [None, w])
    def test_mean_divides_both_terms_by_the_weights_of_the_targets(
        self, smoothing: float, weight: Tensor | None
    ) -> None:
        total, divisor = self._parts(smoothing, torch.ones(4) if weight is None else weight)
        assert_close(same("cross_entropy", x, self.y, weight, label_smoothing=smoothing), total / divisor)

    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
    def test_probabilities(self, smoothing: float) -> None:
        smoothed = p * (1 - smoothing) + smoothing / 4
        total = -(w * smoothed * self.lp).sum()
        assert_close(same("cross_entropy", x, p, w, reduction="sum", label_smoothing=smoothing), total)
        assert_close(same("cross_entropy", x, p, w, label_smoothing=smoothing), total / 3)

    def test_mean_of_probabilities_counts_positions(self) -> None:
        images, targets = x.view(1, 4, 3, 1).repeat(2, 1, 1, 5), p.view(1, 4, 3, 1).repeat(2, 1, 1, 5)
        total = same("cross_entropy", images, targets, w, reduction="sum")
        assert_close(same("cross_entropy", images, targets, w), total / (2 * 3 * 5))

    def test_one_hot_and_index_have_different_weighted_means(self) -> None:
        one_hot = F.one_hot(t, 4).float()
        by_index, by_probability = same("cross_entropy", x, t, w), same("cross_entropy", x, one_hot, w)
        assert_close(by_index * w[t].sum() / 3, by_probability)
        assert not torch.isclose(by_index, by_probability)

    def test_unreduced_shapes(self) -> None:
        image = torch.randn(2, 4, 3, 5)
        assert same("cross_entropy", image, torch.zeros(2, 3, 5).long(), reduction="none").shape == (2, 3, 5)
        assert same("cross_entropy", image, image.softmax(1), reduction="none").shape == (2, 3, 5)

    def test_weighted_mean_divides_by_the_weights_present(self) -> None:
        log_probs = torch.tensor([[-0.1, -5.0], [-6.0, -2.0]])
        weight = torch.tensor([1.0, 20.0])
        assert_close(same("nll_loss", log_probs, torch.tensor([0, 1]), weight), torch.tensor((0.1 + 40.0) / 21))

    def test_smoothing_counts_the_true_class_too(self) -> None:
        loss = same("cross_entropy", x, t, label_smoothing=1.0, reduction="none")
        assert_close(loss, -self.lp.mean(1))


class TestShapes:
    @pytest.mark.parametrize("op", LOSSES)
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_unbatched(self, op: str, reduction: str) -> None:
        """A target of shape () or (1); torch has no gradient for the latter."""
        assert same_with_gradient(op, x[0], t[0], reduction=reduction).shape == ()
        assert same(op, x[0], t[:1], reduction=reduction).shape == ()
        expected = grad_of(F, op, x[0], t[0], reduction=reduction)
        assert_close(grad_of(N, op, x[0], t[:1], reduction=reduction), expected)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_unbatched_probabilities(self, reduction: str) -> None:
        assert same_with_gradient("cross_entropy", x[0], p[0], w, reduction=reduction).shape == ()

    def test_one_class_one_column(self) -> None:
        """(N, 1) targets of C = 1 are probabilities."""
        assert_close(same("cross_entropy", torch.randn(3, 1), torch.ones(3, 1), reduction="none"), torch.zeros(3))
        with pytest.raises(RuntimeError, match="Expected floating point type"):
            N.cross_entropy(torch.randn(3, 1), torch.zeros(3, 1).long())

    @pytest.mark.parametrize("op", LOSSES)
    @pytest.mark.parametrize("shape", [(0, 4), (0, 4, 5), (3, 4, 0), (3, 4, 0, 2), (3, 4, 2, 0)])
    def test_nothing_to_reduce(self, op: str, shape: tuple[int, ...]) -> None:
        logits, target = torch.randn(shape), torch.zeros(shape[:1] + shape[2:]).long()
        assert same_with_gradient(op, logits, target).isnan()
        assert same_with_gradient(op, logits, target, reduction="sum") == 0
        assert same_with_gradient(op, logits, target, reduction="none").shape == target.shape

    def test_nothing_to_reduce_of_probabilities(self) -> None:
        logits = torch.randn(0, 4)
        assert same_with_gradient("cross_entropy", logits, logits).isnan()
        assert same_with_gradient("cross_entropy", logits, logits, reduction="sum") == 0

    def test_zero_classes_of_probabilities(self) -> None:
        logits = torch.zeros(3, 0)
        assert same("cross_entropy", logits, logits).isnan()
        assert same("cross_entropy", logits, logits, reduction="sum") == 0
        assert_close(same("cross_entropy", logits, logits, reduction="none"), torch.zeros(3))

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_one_class_has_no_loss(self, reduction: str) -> None:
        assert (
            same_with_gradient("cross_entropy", torch.randn(3, 1), torch.zeros(3).long(), reduction=reduction) == 0
        ).all()

    @pytest.mark.parametrize("op", [*LOSSES, "log_softmax"])
    @pytest.mark.parametrize("leaf", [True, False])
    def test_gradient_of_channels_last_is_channels_last(self, op: str, leaf: bool) -> None:
        logits = torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last).requires_grad_()
        target = torch.zeros(2, 3, 5).long()
        output = N.log_softmax(logits, 1) if op == "log_softmax" else getattr(N, op)(logits, target)
        if leaf:
            output.sum().backward()
            gradient = logits.grad
        else:
            (gradient,) = torch.autograd.grad(output, logits, torch.ones_like(output))
        if leaf or op != "log_softmax":  # the gradient of log_softmax has the layout of its output
            assert gradient.is_contiguous(memory_format=torch.channels_last)

    def test_nllx_backward_of_a_permuted_image(self) -> None:
        """torch 2.13 raises "grad_input must be contiguous"."""
        logits, target = torch.randn(2, 3, 5, 4).permute(0, 3, 1, 2), torch.randint(4, (2, 3, 5))
        expected = grad_of(F, "nll_loss", logits.contiguous(), target, w)
        assert_close(grad_of(N, "nll_loss", logits, target, w), expected)

    @pytest.mark.parametrize("op", LOSSES)
    @pytest.mark.parametrize("inner", [(3,), (3, 5), (3, 1, 2)])
    def test_weight_of_an_image_needs_the_right_count_alone(self, op: str, inner: tuple[int, ...]) -> None:
        image, target = torch.randn(2, 4, *inner), torch.randint(4, (2, *inner))
        for shape in ((4, 1), (1, 4), (2, 2)):
            same_with_gradient(op, image, target, w.view(shape))

    @pytest.mark.parametrize("op", LOSSES)
    def test_nllx_unbatched_target_of_one(self, op: str) -> None:
        """torch's backward raises."""
        assert_close(same(op, x[0], t[:1]), getattr(F, op)(x[0], t[0]))
        with pytest.raises(RuntimeError, match="size mismatch"):
            grad_of(F, op, x[0], t[:1])
        assert_close(grad_of(N, op, x[0], t[:1], w), grad_of(F, op, x[0], t[0], w))

    def test_nllx_smoothed_losses_take_the_shapes_of_plain_ones(self) -> None:
        """torch's sum over the classes does not broadcast there."""
        image, target = torch.randn(2, 4, 3), torch.randint(4, (2, 3))
        options = {"label_smoothing": 0.1, "reduction": "none"}
        for arguments, plain in (
            ((x[0], t[:1]), (x[0], t[0])),
            ((image, target, w.view(2, 2)), (image, target, w)),
        ):
            with pytest.raises(RuntimeError, match=r"shape|size"):
                F.cross_entropy(*arguments, **options)
            assert_close(N.cross_entropy(*arguments, **options), F.cross_entropy(*plain, **options))

    @pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 4), (2, 3, 4), (2, 3, 4, 5)])
    def test_log_softmax_of_any_dimension(self, shape: tuple[int, ...]) -> None:
        value = torch.randn(shape)
        for dim in range(-max(1, len(shape)), max(1, len(shape))):
            same_with_gradient("log_softmax", value, dim)
        if not shape:
            assert N.log_softmax(value, 0) == 0


class TestDtypes:
    @pytest.mark.parametrize("op", LOSSES)
    @pytest.mark.parametrize("shape", [(6, 4), (2, 4, 3), (2, 4, 3, 2)])
    @pytest.mark.parametrize(
        "dtype",
        [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64, torch.bool],
    )
    def test_nllx_index_dtypes(self, op: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        logits, target = torch.randn(shape), torch.randint(4, shape[:1] + shape[2:])
        target.view(-1)[1] = 3
        if dtype == torch.bool:
            target = target % 2
        smoothed = {"label_smoothing": 0.1} if op == "cross_entropy" else {}
        for options in ({}, {"ignore_index": 3}, smoothed):
            assert_close(getattr(N, op)(logits, target.to(dtype), **options), getattr(F, op)(logits, target, **options))
            expected = grad_of(F, op, logits, target, **options)
            assert_close(grad_of(N, op, logits, target.to(dtype), **options), expected)

    @pytest.mark.parametrize("op", LOSSES)
    def test_unsigned_targets_under_transforms(self, op: str) -> None:
        """And in compiled code and gradients of gradients, which the definition has."""
        for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.bool):
            target = torch.tensor([[1, 0, 1], [0, 0, 1]])
            logits = torch.randn(2, 3, 4, dtype=torch.float64)

            def loss(x: Tensor, y: Tensor) -> Tensor:
                return getattr(N, op)(x, y, ignore_index=0)

            def second(x: Tensor, y: Tensor) -> Tensor:
                return torch.func.grad(lambda a: torch.func.grad(loss)(a, y).square().sum())(x)

            compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
            for call in (torch.func.vmap(loss), torch.func.vmap(torch.func.grad(loss)), torch.func.vmap(second)):
                assert_close(call(logits, target.to(dtype)), call(logits, target))
            assert_close(compiled(logits[0], target[0].to(dtype)), loss(logits[0], target[0]))

    def test_unsigned_targets_and_the_largest_ignore_index(self) -> None:
        for call in (N.cross_entropy, torch.compile(N.cross_entropy, backend="aot_eager")):
            target = torch.tensor([0, 2**64 - 5], dtype=torch.uint64)
            with pytest.raises(Exception, match="cannot be told from larger indices"):
                call(torch.randn(2, 5), target, ignore_index=2**63 - 1)

    def test_unsigned_targets_out_of_range(self) -> None:
        """As the numbers that they are: those that no int64 holds are no ignore_index of the same bits."""
        for value in (2**16 - 1, 2**32 - 1, 2**64 - 1, 2**64 - 100):
            target = torch.tensor([0, value], dtype=getattr(torch, f"uint{value.bit_length()}"))
            shown = min(value, 2**63 - 1)
            for shape in ((2, 5), (1, 5, 2)):
                with pytest.raises(IndexError, match=f"Target {shown} is out of bounds"):
                    N.cross_entropy(torch.randn(shape), target.view(shape[:1] + shape[2:]), ignore_index=-100)
            with pytest.raises(IndexError, match=f"Target {shown}"):
                torch.func.grad(lambda x, y=target: torch.func.grad(N.cross_entropy)(x, y).sum())(torch.randn(2, 5))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
    def test_output_and_gradient_have_the_dtype_of_the_input(self, dtype: torch.dtype) -> None:
        for op in LOSSES:
            assert getattr(N, op)(x.to(dtype), t).dtype == dtype
            assert grad_of(N, op, x.to(dtype), t).dtype == dtype
        assert N.log_softmax(x.to(dtype), 1).dtype == dtype

    @pytest.mark.parametrize("input_dtype", [torch.float32, torch.float64, *HALVES])
    @pytest.mark.parametrize("target_dtype", [torch.float32, torch.float64, *HALVES])
    def test_probabilities_promote(self, input_dtype: torch.dtype, target_dtype: torch.dtype) -> None:
        for weight in (None, w, w.double(), w.bfloat16()):
            expected = F.cross_entropy(x.to(input_dtype), p.to(target_dtype), weight)
            got = N.cross_entropy(x.to(input_dtype), p.to(target_dtype), weight)
            assert got.dtype == expected.dtype
            assert_close(got, expected, rtol=2e-2, atol=2e-2)  # torch rounds every step to half precision
            assert grad_of(N, "cross_entropy", x.to(input_dtype), p.to(target_dtype), weight).dtype == input_dtype

    @pytest.mark.parametrize("op", LOSSES)
    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64])
    def test_nllx_precise_weight_beside_half(self, op: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
        """Weights that half precision would round: 1 + 2^-12 counts as such."""
        weight = torch.full((4,), 1 + 2.0**-12, dtype=weight_dtype)
        rows = torch.zeros(4096, 4, dtype=dtype)
        if op == "nll_loss":
            rows -= 1
        got = getattr(N, op)(rows, torch.zeros(4096).long(), weight, reduction="sum")
        expected = getattr(F, op)(rows.double(), torch.zeros(4096).long(), weight.double(), reduction="sum")
        assert_close(got, expected.to(dtype), rtol=0, atol=0)

    def test_log_softmax_casts_first(self) -> None:
        large = torch.tensor([[1000, 1001, 998]], dtype=torch.int32)
        for source in (large, large.half(), large.bfloat16(), large > 999):
            same("log_softmax", source, 1, dtype=torch.float32)
            same("log_softmax", source, 1, dtype=torch.float64)
        gradient = grad_of(N, "log_softmax", x.half(), 1, dtype=torch.float32)
        assert gradient.dtype == torch.float16

    def test_nllx_float16_mean_does_not_overflow(self) -> None:
        """torch adds 60,000 losses of 3 in float16 and returns inf."""
        rows = torch.zeros(60_000, 20, dtype=torch.float16)
        got = N.cross_entropy(rows, torch.zeros(60_000).long())
        assert_close(got, torch.tensor(math.log(20), dtype=torch.float16), rtol=0, atol=0)

    def test_nllx_bfloat16_mean_counts_rows_exactly(self) -> None:
        """torch counts 3000 rows as 3008 in bfloat16."""
        for count in (1023, 3000):
            log_probs = torch.full((count, 2), -1.0, dtype=torch.bfloat16)
            assert N.nll_loss(log_probs, torch.zeros(count).long()) == 1
            gradient = grad_of(N, "nll_loss", log_probs, torch.zeros(count).long())
            assert_close(gradient[:, 0], torch.full((count,), -1 / count).bfloat16(), rtol=0, atol=0)


class TestOptions:
    @pytest.mark.parametrize("op", LOSSES)
    @pytest.mark.parametrize("index", [-100, -1, 0, 2, 3, 4, 255, 2**31, -(2**40)])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_any_ignore_index(self, op: str, index: int, reduction: str) -> None:
        """No part of loss, gradient or divisor, but its class stays in the softmax of other rows."""
        target = torch.tensor([2, index, 1])
        same_with_gradient(op, x, target, w, ignore_index=index, reduction=reduction)
        losses = getattr(N, op)(x, target, w, ignore_index=index, reduction="none")
        assert losses[1] == 0
        assert (grad_of(N, op, x, target, w, ignore_index=index)[1] == 0).all()

    def test_ignore_index_of_a_byte(self) -> None:
        """Byte 255 is class 255, and not -1, unless it is ignored."""
        logits = torch.randn(2, 256)
        target = torch.tensor([255, 3], dtype=torch.uint8)
        assert same_with_gradient("cross_entropy", logits, target, ignore_index=-1) != 0
        same_with_gradient("cross_entropy", logits, target, ignore_index=255)

    def test_negative_ignore_index_beside_probabilities(self) -> None:
        for index in (-1, -100):
            same("cross_entropy", x, p, ignore_index=index)

    @pytest.mark.parametrize("op", LOSSES)
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_negative_and_zero_weights(self, op: str, reduction: str) -> None:
        same_with_gradient(op, x, t, torch.tensor([-1.0, 0.0, 2.0, 0.0]), reduction=reduction)

    def test_all_weights_zero(self) -> None:
        weight = torch.zeros(4)
        assert same_with_gradient("cross_entropy", x, t, weight).isnan()
        assert grad_of(N, "cross_entropy", x, t, weight).isnan().all()
        assert same_with_gradient("nll_loss", x, t, weight).isnan()
        for op in LOSSES:
            assert same_with_gradient(op, x, t, weight, reduction="sum") == 0

    def test_weight_zero_under_vmap_over_weights(self) -> None:
        """Where the divisor is 0 the target's entry is NaN and the others are not, in the definition too."""
        weights = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0]])

        gradients = torch.vmap(torch.func.grad(lambda x, w: N.nll_loss(x, t, w)), (None, 0))(x, weights)
        each = torch.stack([grad_of(F, "nll_loss", x, t, w) for w in weights])  # torch's own vmap has NaN everywhere
        assert each.isnan().any()
        assert_close(gradients, each, equal_nan=True)

    @pytest.mark.parametrize("reduction", ["none", "sum"])
    def test_nllx_ignored_rows_of_no_classes(self, reduction: str) -> None:
        """torch's smoothing is the mean over no classes, NaN."""
        options = {"reduction": reduction, "label_smoothing": 0.1}
        arguments = torch.randn(3, 0), torch.full((3,), -100)
        assert F.cross_entropy(*arguments, **options).isnan().all()
        assert (N.cross_entropy(*arguments, **options) == 0).all()

    def test_all_weights_zero_with_smoothing(self) -> None:
        """The weights of the targets are zero, those of other classes are not: 0 / 0 + number / 0."""
        weight = torch.tensor([0.0, 0.0, 0.0, 1.0])
        assert same_with_gradient("cross_entropy", x, t, weight, label_smoothing=0.1).isnan()
        target = torch.tensor([2, -100, 1])
        gradient = grad_of(N, "cross_entropy", x, target, weight, label_smoothing=0.1)
        assert gradient.isnan().all(1).tolist() == [True, False, True]
        assert (gradient[1] == 0).all()
        same_with_gradient("cross_entropy", x, t, weight, label_smoothing=0.1, reduction="sum")

    def test_weight_of_a_class_that_no_target_names(self) -> None:
        weight = torch.tensor([1.0, 2.0, 3.0, nan])
        assert same_with_gradient("cross_entropy", x, t, weight).isfinite()
        assert same_with_gradient("nll_loss", x, t, weight).isfinite()
        assert same("cross_entropy", x, t, weight, label_smoothing=0.1).isnan()

    def test_gradients_of_probabilities_and_weights(self) -> None:
        gradients = []
        for functional in (N, F):
            leaves = [tensor.clone().double().requires_grad_() for tensor in (x, p, w)]
            loss = functional.cross_entropy(*leaves, label_smoothing=0.1)
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            second = torch.autograd.grad(sum((g * g).sum() for g in first), leaves)
            gradients.append([*first, *second])
        assert_close(*gradients, rtol=1e-12, atol=1e-13)

    def test_weight_with_a_gradient_where_none_is_recorded(self) -> None:
        weight = w.clone().requires_grad_()
        with torch.no_grad():
            assert_close(N.cross_entropy(x, t, weight), F.cross_entropy(x, t, weight))

    def test_reductions_by_their_old_name(self) -> None:
        with pytest.warns(UserWarning, match="elementwise_mean"):
            assert_close(N.cross_entropy(x, t, reduction="elementwise_mean"), F.cross_entropy(x, t))

    @pytest.mark.parametrize("value", [True, 0, torch.tensor(0.1), torch.tensor(1), np.float32(0.1), np.float64(0.1)])
    def test_smoothing_of_other_types(self, value: Any) -> None:
        same_with_gradient("cross_entropy", x, t, label_smoothing=value)

    @pytest.mark.parametrize("value", [torch.tensor(1), torch.tensor([1]), np.int64(1), np.int8(1)])
    def test_integers_of_other_types(self, value: Any) -> None:
        for op in LOSSES:
            same_with_gradient(op, x, t, ignore_index=value)
        if not isinstance(value, Tensor) or value.dim() == 0:
            same_with_gradient("log_softmax", x, value)


class TestValues:
    @pytest.mark.parametrize("op", LOSSES)
    def test_all_rows_ignored(self, op: str) -> None:
        target = torch.full((3,), -100)
        assert same_with_gradient(op, x, target).isnan()
        assert (grad_of(N, op, x, target) == 0).all()
        assert same_with_gradient(op, x, target, reduction="sum") == 0
        assert (same_with_gradient(op, x, target, reduction="none") == 0).all()

    def test_all_rows_ignored_with_smoothing(self) -> None:
        target = torch.full((3,), -100)
        assert same("cross_entropy", x, target, label_smoothing=0.1).isnan()

    @pytest.mark.parametrize("columns", [4, 40, 1030])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_infinities(self, columns: int, dtype: torch.dtype) -> None:
        row, target = torch.linspace(-1, 1, columns, dtype=dtype)[None], torch.tensor([1])
        for place, value, expected in ((0, inf, nan), (1, inf, nan), (1, -inf, inf), (0, -inf, None)):
            logits = row.clone()
            logits[0, place] = value
            loss = N.cross_entropy(logits, target)
            assert_close(loss, F.cross_entropy(logits, target), equal_nan=True)
            if expected is not None:
                assert_close(loss, torch.tensor(expected, dtype=dtype), equal_nan=True)
            theirs = grad_of(F, "cross_entropy", logits.to(torch.promote_types(dtype, torch.float32)), target)
            assert_close(grad_of(N, "cross_entropy", logits, target), theirs.to(dtype), equal_nan=True)
        assert same("cross_entropy", torch.full_like(row, -inf), target).isnan()

    def test_masked_classes_as_if_they_were_not_there(self) -> None:
        for columns in (10, 100, 5000):
            logits = torch.randn(3, columns)
            masked = torch.cat([torch.full((3, columns), -inf), logits, torch.full((3, 2 * columns), -inf)], 1)
            assert_close(N.cross_entropy(masked, t + columns), N.cross_entropy(logits, t))

    def test_nllx_infinite_coefficient_of_the_largest_logit(self) -> None:
        """NaN, where torch has inf; that of another class gives inf in both."""
        logits, weight = torch.tensor([[3.0, 1.0, 2.0, 0.0]]), torch.ones(4)
        for place in range(4):
            infinite = weight.clone()
            infinite[place] = inf
            for target, options in (
                (torch.tensor([1]), {"weight": infinite, "label_smoothing": 0.1}),
                (infinite[None] / 4, {}),
            ):
                got, theirs = (f.cross_entropy(logits, target, reduction="sum", **options) for f in (N, F))
                assert theirs == inf
                assert got.isnan() if place == 0 else got == inf

    @pytest.mark.parametrize("op", LOSSES)
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_nllx_zero_weight_of_a_masked_target(self, op: str, reduction: str) -> None:
        """0 · (-inf) is 0; in torch NaN."""
        logits = x.clone()
        logits[0, 2] = -inf
        weight = torch.tensor([1.0, 1.0, 0.0, 1.0])
        without = torch.tensor([-100, 0, 1])
        got, expected = (getattr(N, op)(logits, y, weight, reduction=reduction) for y in (t, without))
        assert_close(got, expected)
        gradient = grad_of(N, op, logits, t, weight, reduction=reduction)
        assert_close(gradient, grad_of(N, op, logits, without, weight, reduction=reduction))
        assert getattr(F, op)(logits, t, weight, reduction="sum").isnan()

    @pytest.mark.parametrize("columns", [4, 1030])
    def test_nllx_zero_probability_of_a_masked_class(self, columns: int) -> None:
        """0 · (-inf) is 0; in torch NaN."""
        logits, target = torch.randn(3, columns), torch.randn(3, columns).softmax(1)
        masked = torch.cat([logits, torch.full((3, 7), -inf)], 1)
        padded = torch.cat([target, torch.zeros(3, 7)], 1)
        assert_close(N.cross_entropy(masked, padded), F.cross_entropy(logits, target))
        gradient = grad_of(N, "cross_entropy", masked, padded)
        assert_close(gradient[:, :columns], grad_of(F, "cross_entropy", logits, target))
        assert (gradient[:, columns:] == 0).all()
        assert F.cross_entropy(masked, padded).isnan()

    def test_smoothing_over_a_masked_class(self) -> None:
        logits = x.clone()
        logits[0, 0] = -inf
        assert same("cross_entropy", logits, t, label_smoothing=0.1) == inf
        assert same("cross_entropy", logits, p, label_smoothing=0.1) == inf

    @pytest.mark.parametrize("value", [nan, inf, -inf])
    @pytest.mark.parametrize("op", LOSSES)
    @pytest.mark.parametrize("shape", [(4, 10), (4, 1030), (4, 10, 3)])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_nllx_ignored_rows_may_hold_anything(
        self, value: float, op: str, shape: tuple[int, ...], smoothing: float
    ) -> None:
        """No part of the loss, a zero gradient, and no effect on other rows; in torch the gradient is NaN."""
        options: dict[str, Any] = {"label_smoothing": smoothing} if op == "cross_entropy" else {}
        clean, target = torch.randn(shape), torch.randint(10, shape[:1] + shape[2:])
        target[2] = -100
        spoilt = clean.clone()
        spoilt[2] = value
        for reduction in REDUCTIONS:
            got, expected = (getattr(N, op)(v, target, reduction=reduction, **options) for v in (spoilt, clean))
            assert torch.equal(got, expected)
            got, expected = (grad_of(N, op, v, target, reduction=reduction, **options) for v in (spoilt, clean))
            assert torch.equal(got, expected)
            assert (got[2] == 0).all()

    def test_nan_stays_in_its_row(self) -> None:
        logits = x.clone()
        logits[1, 3] = nan
        loss = same_with_gradient("cross_entropy", logits, t, reduction="none")
        assert loss.isnan().tolist() == [False, True, False]
        gradient = grad_of(N, "cross_entropy", logits, t)
        assert gradient.isnan().any(1).tolist() == [False, True, False]

    def test_targets_are_compared_as_64_bit_numbers(self) -> None:
        for value in (2**32 + 1, 2**33, -(2**32) + 1):
            for op in LOSSES:
                with pytest.raises(IndexError, match=f"Target {value} is out of bounds"):
                    getattr(N, op)(x, torch.tensor([0, value, 1]))
                same(op, x, torch.tensor([0, value, 1]), ignore_index=value)
        # An ignore_index that 32 bits would make 1.
        same("cross_entropy", x, torch.tensor([0, 1, 1]), ignore_index=2**32 + 1)
        same("cross_entropy", x, torch.tensor([0, 1, 1]).int().long(), ignore_index=2**32 + 1)
        assert_close(
            N.cross_entropy(x, torch.tensor([0, 1, 1]).int(), ignore_index=2**32 + 1),
            F.cross_entropy(x, torch.tensor([0, 1, 1])),
        )

    def test_minus_100_is_nothing_special_beside_another_ignore_index(self) -> None:
        with pytest.raises(IndexError, match="Target -100 is out of bounds"):
            N.cross_entropy(x, torch.tensor([0, -100, 1]), ignore_index=-1)


class TestViews:
    """Strides, offsets, the negative bit and lazily conjugated views, of all arguments."""

    def test_of_logits(self) -> None:
        z = torch.complex(torch.randn(6, 4), torch.randn(6, 4))
        for view in (z.real, z.imag, z.conj().imag, z.conj().real, z.real[::2], z.imag.T.contiguous().T):
            same_with_gradient("cross_entropy", view, torch.tensor([0, 1, 2, 3, 0, 1])[: len(view)], w)
            same_with_gradient("log_softmax", view, 1)
            same_with_gradient("nll_loss", view, torch.tensor([0, 1, 2, 3, 0, 1])[: len(view)])

    def test_of_targets_weights_and_probabilities(self) -> None:
        z = torch.complex(p, -p).conj()
        assert z.imag.is_neg()
        same_with_gradient("cross_entropy", x, z.imag, torch._neg_view(-w))
        same_with_gradient("cross_entropy", x, torch._neg_view(-t), torch.complex(w, w).real)
        same_with_gradient("cross_entropy", x, torch.stack([t, t + 9], 1)[:, 0], w.repeat(2).view(2, 4)[1])

    def test_gradient_through_a_conjugated_view(self) -> None:
        gradients = []
        for functional in (N, F):
            z = torch.complex(x, x).requires_grad_()
            functional.cross_entropy(z.conj().imag, t).backward()
            gradients.append(z.grad)
        assert_close(*gradients)

    def test_of_parameters_and_subclasses(self) -> None:
        class Marked(torch.Tensor):
            pass

        assert type(N.cross_entropy(x.as_subclass(Marked), t)) is Marked
        assert type(N.cross_entropy(torch.nn.Parameter(x), t)) is torch.Tensor

    def test_objects_that_override_functions(self) -> None:
        """``__torch_function__`` is asked about the function that was called, with its arguments."""

        class Recorder:
            calls: ClassVar[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]] = []

            @classmethod
            def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> str:
                cls.calls.append((function, args, kwargs or {}))
                return "recorded"

        recorder = Recorder()
        assert N.cross_entropy(recorder, t, label_smoothing=0.25) == "recorded"
        assert N.nll_loss(x, recorder) == "recorded"
        assert N.log_softmax(recorder, 1) == "recorded"
        assert [call[0] for call in Recorder.calls] == [N.cross_entropy, N.nll_loss, N.log_softmax]
        assert Recorder.calls[0][2]["label_smoothing"] == 0.25
        assert Recorder.calls[1][1][1] is recorder


class TestLargeOffsets:
    """Two pages of a tensor of 4 GiB: offsets in elements that 32 bits do not hold."""

    @pytest.mark.parametrize("op", [*LOSSES, "log_softmax"])
    def test_offsets_beyond_32_bits(self, op: str, device: str) -> None:
        buffer = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
        values = torch.tensor([[0.5, -1.0, 2.0, 0.0, 1.0], [1.5, 0.25, -0.5, 1.0, 3.0]], device=device).bfloat16()
        rows = buffer.as_strided((2, 5), (2**31, 1)).copy_(values)
        # As rows, as a transposed matrix, as planes of two classes and as two planes.
        for view in (rows, rows.T, rows[None], rows[:, :, None], rows[:, None]):
            target = torch.zeros(view.shape[:1] + view.shape[2:], dtype=torch.int64, device=device)
            arguments = (1,) if op == "log_softmax" else (target,)
            got, expected = (getattr(N, op)(v, *arguments) for v in (view, view.contiguous()))
            assert torch.equal(got, expected)
            got, expected = (grad_of(N, op, v, *arguments) for v in (view, view.contiguous()))
            assert torch.equal(got, expected)


class TestThreads:
    def test_calls_from_several_python_threads(self) -> None:
        logits, target = torch.randn(2000, 50), torch.randint(50, (2000,))
        expected = grad_of(N, "cross_entropy", logits, target)
        with ThreadPoolExecutor(4) as pool:
            gradients = list(pool.map(lambda _: grad_of(N, "cross_entropy", logits, target), range(16)))
        assert all(torch.equal(gradient, expected) for gradient in gradients)


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        """Losses in float32 (float64 stays), log_softmax as it is, gradients in the dtype of the logits."""
        for weight in (None, w, w.bfloat16(), w.double()):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                for op in LOSSES:
                    try:
                        expected = getattr(F, op)(x.to(dtype), t, weight)
                    except RuntimeError:  # a float64 weight beside others; nllx takes it beside half precision
                        continue
                    got = getattr(N, op)(x.to(dtype), t, weight)
                    assert_close(got, expected)
                    assert grad_of(N, op, x.to(dtype), t, weight).dtype == dtype
                for target in (p, p.to(dtype), p.double()):
                    assert_close(N.cross_entropy(x.to(dtype), target), F.cross_entropy(x.to(dtype), target))
                # Torch rounds twice to half precision.
                rounding = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
                assert_close(N.log_softmax(x.to(dtype), 1), F.log_softmax(x.to(dtype), 1), **rounding)

    @pytest.mark.parametrize("dtype", HALVES)
    def test_nllx_loss_is_not_rounded_to_half(self, dtype: torch.dtype) -> None:
        logits, target = torch.randn(64, 100).to(dtype), torch.randint(100, (64,))
        with torch.autocast("cpu", dtype=dtype):
            loss = N.cross_entropy(logits, target)
            gradient = grad_of(N, "cross_entropy", logits, target)
        assert_close(loss, F.cross_entropy(logits.float(), target))
        assert_close(gradient, grad_of(F, "cross_entropy", logits.float(), target).to(dtype))


class TestNestedTensors:
    """torch's losses take none of them, its log_softmax the jagged ones without a gradient."""

    @staticmethod
    def _nested(layout: torch.layout = torch.jagged) -> Tensor:
        torch.manual_seed(0)
        return torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)], layout=layout, requires_grad=True)

    def test_log_softmax(self) -> None:
        nested = self._nested()
        for dim in (-1, 2):
            output, expected = N.log_softmax(nested, dim), F.log_softmax(nested.detach(), dim)
            assert output.shape == expected.shape
            assert_close(output.values(), expected.values())
            assert_close((output + nested).values(), (expected + nested).values())
        grad = torch.randn(5, 5)
        (got,) = torch.autograd.grad(output.values(), nested, grad)
        values = nested.values().detach().requires_grad_()
        assert_close(got.values(), torch.autograd.grad(F.log_softmax(values, -1), values, grad)[0])
        turned = nested.transpose(1, 2)
        assert_close(N.log_softmax(turned, 1).values(), F.log_softmax(turned.detach(), 1).values())
        assert N.log_softmax(nested, -1, dtype=torch.float64).dtype == torch.float64
        compiled = torch.compile(lambda x: N.log_softmax(x, -1), backend="aot_eager", fullgraph=True)
        assert_close(compiled(nested).values(), output.values())

    def test_refused_with_a_way_out(self) -> None:
        nested = self._nested()
        target = torch.nested.nested_tensor_from_jagged(torch.tensor([0, 1, 2, 3, 4]), nested.offsets())
        for loss in (N.cross_entropy, N.nll_loss):
            with pytest.raises(NotImplementedError, match=r"nested.*values\(\)"):
                loss(nested, target)
        assert_close(
            N.cross_entropy(nested.values(), target.values()), F.cross_entropy(nested.values(), target.values())
        )
        for dim in (0, 1):
            with pytest.raises(NotImplementedError, match="jagged"):
                N.log_softmax(nested, dim)
        for functional in (F, N):  # of the strided kind it is a tensor of another backend
            with pytest.raises(NotImplementedError, match="NestedTensor"):
                functional.log_softmax(self._nested(torch.strided), -1)


class TestTransforms:
    """Other ways to differentiate give what torch's functions give."""

    functions: tuple[Callable[[Any, Tensor], Tensor], ...] = (
        lambda f, a: f.cross_entropy(a, t, w, label_smoothing=0.1),
        lambda f, a: f.cross_entropy(a, torch.tensor([2, -100, 1]), reduction="sum"),
        lambda f, a: f.cross_entropy(a, p.double(), w.double()),
        lambda f, a: f.nll_loss(a, t, reduction="none").sum(),
        lambda f, a: f.log_softmax(a, 1).square().sum(),
        lambda f, a: f.log_softmax(a, 0).exp().square().sum(),
    )

    def _both(self, transform: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> None:
        for function in self.functions:
            weighted = function
            got, expected = (transform(lambda a, g=g, h=weighted: h(g, a.to(torch.float32))) for g in (N, F))
            assert_close(got, expected)

    def test_func_grad(self) -> None:
        self._both(lambda f: torch.func.grad(f)(x))

    def test_jvp(self) -> None:
        self._both(lambda f: torch.func.jvp(f, (x,), (x.sin(),))[1])

    def test_hessian(self) -> None:
        self._both(lambda f: torch.func.hessian(f)(x))

    def test_forward_mode(self) -> None:
        def tangent(function: Callable[[Tensor], Tensor]) -> Tensor:
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.cos()))).tangent

        self._both(tangent)

    def test_vmap(self) -> None:
        stacked = torch.stack([x, 2 * x, x - 1])
        self._both(lambda f: torch.vmap(f)(stacked))
        self._both(lambda f: torch.vmap(torch.func.grad(f))(stacked))

    @pytest.mark.parametrize("dtype", HALVES)
    def test_autocast(self, dtype: torch.dtype) -> None:
        """Torch's autocast holds inside of the transforms: losses in float32, which 70000 is too large for in float16."""
        logits, classes = torch.full((7, 4), 1e4).to(dtype), torch.arange(7) % 4
        logits[:, 0] = 0.0

        def transformed(functional: Any) -> list[Tensor]:
            def entropy(a: Tensor) -> Tensor:
                return functional.cross_entropy(a, classes, torch.ones(4), reduction="sum")

            def likelihood(a: Tensor) -> Tensor:
                return functional.nll_loss(-a, classes, reduction="sum")

            results = []
            with torch.autocast("cpu", dtype=dtype):
                for f in (entropy, likelihood):
                    results.extend(torch.func.grad_and_value(f)(logits))
                    results.extend(torch.func.jvp(f, (logits,), (torch.ones_like(logits),)))
                    results.extend(torch.vmap(torch.func.grad_and_value(f))(logits[None]))
            return results

        for got, expected in zip(transformed(N), transformed(F), strict=True):
            assert_close(got, expected)
        with torch.autocast("cpu", dtype=dtype):  # where torch's vmap forgets autocast
            assert torch.vmap(lambda a: N.cross_entropy(a, classes))(logits[None]).dtype == torch.float32

    def test_no_classes(self) -> None:
        def loss(functional: Any, a: Tensor) -> Tensor:
            return functional.cross_entropy(a, torch.full((3,), -100), reduction="sum", label_smoothing=0.1)

        a = torch.zeros(3, 0)
        assert_close(torch.func.grad(lambda a: loss(N, a))(a), torch.func.grad(lambda a: loss(F, a))(a))

    def test_vmap_over_ignored_rows(self) -> None:
        def loss(row: Tensor, target: Tensor) -> Tensor:
            return N.cross_entropy(row[None], target[None])

        gradients = torch.vmap(torch.func.grad(loss))(x, torch.tensor([2, -100, 1]))
        assert (gradients[1] == 0).all()
        assert gradients.isfinite().all()

    def test_bad_target_under_vmap(self) -> None:
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            torch.vmap(lambda a, b: N.cross_entropy(a[None], b[None]))(x, t + 9)


def test_no_warnings(recwarn: pytest.WarningsRecorder) -> None:
    for case in (
        Case("a", "", (4, 5)),
        Case("b", "", (4, 5), target="probabilities"),
        Case("c", "", (4, 5), op="log_softmax"),
    ):
        answer(build(case), N)
    assert not recwarn.list


def test_autocast_with_float64_weights_and_probabilities() -> None:
    """The loss is promoted to float64, as torch's is, and not asked for in float32."""
    logits, target, weight = torch.randn(3, 5), torch.rand(3, 5), torch.rand(5, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = nllx.functional.cross_entropy(logits.bfloat16(), target.bfloat16(), weight)
        theirs = torch.nn.functional.cross_entropy(logits.bfloat16(), target.bfloat16(), weight)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

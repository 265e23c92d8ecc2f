"""Batching rules of the losses of classes: per-sample problems become one problem for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from nllx._operators.losses import mean_divisor
from nllx._operators.shapes import NONE, SUM, holds, is_counted

Dims = tuple[int | None, ...]  # of each argument the dimension that holds the samples; None: it is shared


def leading(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """A view with the batch dimension in front."""
    if dim == 0:
        return tensor
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


class Samples:
    """`size` problems (C) or (N, C, d1, ..., dk) as one of (N', C, d1', ...) that reads the logits where they lie.

    The samples go before the rows, between rows and classes, or to the inner dimensions, wherever their dimension joins
    without a copy. The rows of the whole are then in another order, so it is solved without a reduction.
    """

    def __init__(self, logits: Tensor, dim: int | None, size: int) -> None:
        self.size = size
        self.logits = logits = leading(logits, dim, size)
        self.unbatched = logits.dim() == 2  # a sample is (C)
        self.single = self.unbatched or (
            logits.dim() == 3 and holds(logits.shape[1] == 1)
        )  # a sample is one row of the whole
        self.rows: tuple[int, ...] = ()
        if self.single:
            self.logits = logits if self.unbatched else logits.squeeze(1)
            return
        self.rows = (logits.shape[1], *logits.shape[3:])
        samples, n = logits.shape[0], logits.shape[1]
        of_samples, of_n = logits.stride(0), logits.stride(1)
        if holds(n == 1) or holds(samples == 1) or holds(of_samples == n * of_n):
            self.place = 0
        elif holds(of_n == samples * of_samples):
            self.place = 1
        else:
            self.place = -1
        self.logits = self._join(logits)

    def _join(self, t: Tensor, trailing: int = 0) -> Tensor:
        """(size, N, ...) as the joined problem has it; `trailing` dimensions belong to a row and stay the last."""
        if self.place == -1:
            return t.movedim(0, -1 - trailing)
        return (t if self.place == 0 else t.transpose(0, 1)).flatten(0, 1)

    def split(self, t: Tensor, trailing: int = 0) -> Tensor:
        """The reverse: a result of the joined problem with the samples in front."""
        if self.single:
            return t if self.unbatched else t.unsqueeze(1)
        if self.place == -1:
            return t.movedim(-1 - trailing, 0)
        if self.place == 0:
            return t.unflatten(0, (self.size, self.rows[0]))
        return t.unflatten(0, (self.rows[0], self.size)).transpose(0, 1)

    def join_classes(self, t: Tensor, dim: int | None) -> Tensor:
        """A tensor whose samples have the shape of the logits."""
        t = leading(t, dim, self.size)
        if self.single:
            return t if self.unbatched else t.squeeze(1)
        return self._join(t)

    def join_rows(self, t: Tensor, dim: int | None, *trailing: int) -> Tensor:
        """A tensor whose samples have one element, or the dimensions `trailing`, for each row."""
        t = leading(t, dim, self.size)
        if self.single:
            return t.reshape(self.size, *trailing)
        return self._join(t.reshape(self.size, *self.rows, *trailing), len(trailing))

    def each(self, t: Tensor, dim: int | None) -> Tensor:
        """A tensor with one number for each sample, as one number for each row."""
        t = leading(t, dim, self.size)
        if self.single:
            return t
        return self._join(t.reshape(self.size, *[1] * len(self.rows)).expand(self.size, *self.rows))

    def sum(self, rows: Tensor) -> Tensor:
        """The sums over the rows of each sample, of what the joined problem has for each row."""
        return rows if self.single else self.split(rows).flatten(1).sum(1)

    def divisors(
        self,
        op: str,
        target: Tensor,
        weight: Tensor | None,
        classes: int,
        reduction: int,
        ignore_index: int,
        label_smoothing: float,
        probabilities: bool,
        acc: torch.dtype,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """The divisor of the mean of each sample: the sum of the weights of the targets present, or the number of rows; each
        times the weight of the row (of the joined problem), where rows have weights."""
        if probabilities and sample_weight is not None and classes:
            return mean_divisor(self.sum(cast(sample_weight, acc)), reduction, 0.0)
        if probabilities:
            rows = 1
            for size in self.rows:
                rows = rows * size
            divisor = torch.full([self.size], rows if classes else 0, dtype=acc, device=target.device)
            return mean_divisor(divisor, reduction, 0.0)
        valid = is_counted(target, ignore_index)
        if weight is None:
            present = valid.to(acc)
        else:
            index = torch.ops.nllx._checked_target(target, classes, ignore_index, op)
            present = torch.where(
                valid, weight.reshape(-1).to(acc)[index], torch.zeros([], dtype=acc, device=target.device)
            )
        if sample_weight is not None:
            present = torch.where(valid, present * cast(sample_weight, acc), torch.zeros_like(present))
        return mean_divisor(self.sum(present), reduction, label_smoothing)

    def reduce(self, rows: Tensor, divisors: Tensor, reduction: int) -> Tensor:
        if reduction == NONE:
            return self.split(rows)
        return self.sum(rows) if reduction == SUM else self.sum(rows) / divisors

    def incoming(
        self,
        grad_output: Tensor,
        dim: int | None,
        total_weight: Tensor,
        weight_dim: int | None,
        reduction: int,
    ) -> Tensor:
        """The incoming gradient of each row."""
        if reduction == NONE:
            return self.join_rows(grad_output, dim)
        if reduction == SUM:
            return self.each(grad_output, dim)
        grad_output = leading(cast(grad_output, total_weight.dtype), dim, self.size)
        return self.each(grad_output / leading(total_weight, weight_dim, self.size), 0)


def flat(weight: Tensor | None) -> Tensor | None:
    """Losses of more than two dimensions take a weight of any shape, and the joined problem has other dimensions."""
    return None if weight is None else weight.reshape(-1)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``to``, which takes its time where there is nothing to do too."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)

"""Results are the same, bit for bit, for any number of threads, on every run, wherever a tensor starts in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import Case, Problem, build, select
from oracle import answer
from torch import Tensor

import nllx

# More than one partition of rows, of tiles of a plane, and of both, so that threads share the work.
_LARGE = [
    Case("many_rows", "", (20_011, 10), ignored="some", weight="positive", label_smoothing=0.1),
    Case("many_rows_sum", "", (20_011, 10), reduction="sum", dtype=torch.bfloat16),
    Case("wide_rows", "", (37, 30_011), ignored="some"),
    Case("planes", "", (3, 19, 4001), ignored="some", weight="positive"),
    Case("one_plane", "", (1, 7, 70_001)),
    Case("channels_last", "", (2, 21, 64, 65), layout="channels_last", weight="positive"),
    Case("neither", "", (3, 21, 33, 65), layout="neither"),
    Case("sum_of_weights", "", (3, 70_001), weight="positive", label_smoothing=0.1),
    Case("probabilities", "", (4_001, 33), target="probabilities", weight="positive", label_smoothing=0.1),
    Case("probability_planes", "", (3, 19, 2001), target="probabilities"),
    Case("nll_loss", "", (50_021, 10), op="nll_loss", weight="positive", ignored="some"),
    Case("nll_loss_planes", "", (3, 19, 4001), op="nll_loss", weight="positive", ignored="some"),
    Case("log_softmax", "", (4_001, 33), op="log_softmax"),
    Case("log_softmax_planes", "", (3, 19, 4001), op="log_softmax"),
]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _results(problem: Problem) -> list[Tensor]:
    """Output and gradient of the input, as bytes, since NaN is not equal to itself."""
    problem = Problem(problem.case, problem.input.detach().requires_grad_(), problem.target, problem.weight)
    output = problem.call(nllx.functional)
    (gradient,) = torch.autograd.grad(output, problem.input, torch.full_like(output, 0.7))
    return [t.detach().contiguous().cpu().flatten().view(torch.uint8) for t in (output, gradient)]


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", _LARGE, ids=str)
def test_number_of_threads(case: Case) -> None:
    problem, results = build(case), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(_results(problem))
    for other in results[1:]:
        assert _equal(results[0], other)


@pytest.mark.parametrize("case", _LARGE, ids=str)
def test_repeated_runs(case: Case, device: str) -> None:
    problem = build(case, device)
    first = _results(problem)
    for _ in range(3):
        assert _equal(first, _results(problem))


@pytest.mark.parametrize("case", select(lambda case: case.layout == "contiguous" and case.numel < 20_000), ids=str)
def test_start_of_the_storage(case: Case) -> None:
    """Where vectors begin does not change what is added to what."""
    problem = build(case)
    first = _results(problem)
    for offset in (1, 3):
        buffer = problem.input.new_empty(case.numel + offset)
        buffer[offset:] = problem.input.flatten()
        moved = Problem(case, buffer[offset:].view(case.shape), problem.target, problem.weight)
        assert _equal(first, _results(moved))


@pytest.mark.parametrize("case", _LARGE, ids=str)
def test_rows_do_not_depend_on_their_neighbours(case: Case) -> None:
    """A loss of a batch is that of its rows, bit for bit: no row is summed differently for its place."""
    if case.reduction != "none" and case.op != "log_softmax":
        case = dataclasses.replace(case, reduction="none")
    whole = build(case)
    output = whole.call(nllx.functional)
    for i in (0, case.shape[0] // 2, case.shape[0] - 1):
        part = whole.target[i : i + 1] if whole.target is not None else None
        alone = Problem(case, whole.input[i : i + 1], part, whole.weight).call(nllx.functional)
        assert torch.equal(alone[0], output[i])


def test_gradients_of_probabilities_repeat(device: str) -> None:
    problem = build(next(case for case in _LARGE if case.target == "probabilities"), device)
    first, second = (answer(problem, nllx.functional).grads for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("probabilities", [False, True])
def test_size_of_the_batch(probabilities: bool) -> None:
    """Large gradients are written past the caches, line by line: a row's gradient is the same in a small batch."""
    rows, classes = 7000, 1001  # 28 MB; rows start anywhere in a line
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(0))
    if probabilities:
        target, options = logits.flip(0).softmax(1), {}
    else:
        target = torch.arange(rows) % classes
        options = {"weight": torch.linspace(0.5, 2, classes), "label_smoothing": 0.1}

    def gradient(part: slice) -> torch.Tensor:
        leaf = logits[part].clone().requires_grad_()
        loss = nllx.functional.cross_entropy(leaf, target[part], reduction="sum", **options)
        return torch.autograd.grad(loss, leaf)[0]

    whole = gradient(slice(None))
    parts = [gradient(slice(start, start + 1000)) for start in range(0, rows, 1000)]
    assert torch.equal(whole, torch.cat(parts))


# A row's loss and gradient have the same bits whatever stands beside it (docs/how-it-works.md, "Batch invariance").

_INVARIANT: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda x, y, p, w: nllx.functional.cross_entropy(x, y, w, reduction="none"),
    "smoothed": lambda x, y, p, w: nllx.functional.cross_entropy(x, y, w, reduction="none", label_smoothing=0.1),
    "probabilities": lambda x, y, p, w: nllx.functional.cross_entropy(x, p, w, reduction="none"),
    "nll_loss": lambda x, y, p, w: nllx.functional.nll_loss(x, y, w, reduction="none"),
    "log_softmax": lambda x, y, p, w: nllx.functional.log_softmax(x, 1),
}


def _rows_of(call: Callable[..., Tensor], x: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and gradients, a row each."""
    leaf = x.detach().requires_grad_()
    losses = call(leaf, *arguments)
    (gradient,) = torch.autograd.grad(losses, leaf, torch.full_like(losses, 0.7))
    if x.dim() == 3:
        losses, gradient = (t.movedim(1, -1).flatten(0, 1) if t.dim() == 3 else t.flatten() for t in (losses, gradient))
    return losses.detach(), gradient


def _placed(rows: Tensor, place: str) -> Tensor:
    count, classes = rows.shape
    if place == "with gaps":
        return torch.nn.functional.pad(rows, (0, 3), value=torch.nan)[:, :classes]
    if place == "every second":
        return rows.repeat_interleave(2, 0)[::2]
    offset = {"as it is": 0, "from an offset": 1, "from another": 5}[place]
    return torch.nn.functional.pad(rows.flatten(), (offset, 0))[offset:].view(count, classes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", _INVARIANT.values(), ids=_INVARIANT.keys())
def test_rows_do_not_depend_on_their_batch(call: Callable[..., Tensor], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for classes in (1, 2, 7, 10, 33, 100, 257, 1000, 4097, 20_000):
        rows = 70 if classes < 10_000 else 5
        x = (torch.randn(rows, classes, generator=generator) * 5).to(dtype)
        p = torch.rand(rows, classes, generator=generator).softmax(1).to(dtype)
        y = torch.randint(classes, (rows,), generator=generator)
        w = (torch.rand(classes, generator=generator) + 0.5).to(dtype)
        whole = _rows_of(call, x, y, p, w)
        for place in ("as it is", "with gaps", "every second", "from an offset", "from another"):
            for size in (1, 2, 3, 64, rows):
                chosen = torch.randperm(rows, generator=generator)[:size]
                part = _rows_of(call, _placed(x[chosen], place), y[chosen], p[chosen], w)
                for ours, theirs in zip(part, whole, strict=True):
                    assert torch.equal(ours, theirs[chosen]), (classes, place, size)


@pytest.mark.parametrize("call", _INVARIANT.values(), ids=_INVARIANT.keys())
def test_pixels_do_not_depend_on_their_image(call: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 7, 21, 150, 1000):
        x = torch.randn(3, classes, 130, generator=generator) * 5
        p = torch.rand(x.shape, generator=generator).softmax(1)
        y = torch.randint(classes, (3, 130), generator=generator)
        w = torch.rand(classes, generator=generator) + 0.5
        whole = _rows_of(call, x, y, p, w)
        for size in (2, 3, 64, 129):
            chosen = torch.randperm(130, generator=generator)[:size]
            part = _rows_of(call, *(t[1:2, ..., chosen].contiguous() for t in (x, y, p)), w)
            for ours, theirs in zip(part, whole, strict=True):
                assert torch.equal(ours, theirs[130 + chosen]), (classes, size)

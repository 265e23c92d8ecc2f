"""Indices beyond 2^31: logits and gradients that are so far apart, of which only the pages in use exist."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Problem, build
from comparison import check_same, variant
from emulator import Kernels
from launches import Settings, run
from memory import SparseMemory, sparse

FAR = 2**31 + 64  # elements; 16-byte aligned, so that rows are divided as those beside each other are


@pytest.mark.parametrize("op", ["cross_entropy", "nll_loss", "log_softmax"])
@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        pytest.param((3, 64), (FAR, 1), id="rows"),
        pytest.param((3, 512), (FAR, 1), id="wide rows"),
        pytest.param((1, 3, 64), (0, FAR, 1), id="planes"),
        pytest.param((3, 3, 64), (FAR, 64, 1), id="images"),
    ],
)
def test_far_apart(op: str, shape: tuple[int, ...], stride: tuple[int, ...], kernels: Kernels) -> None:
    case = variant(Case("", "", shape, op=op, dtype=torch.bfloat16, reduction="none"))
    problem = build(case)
    try:
        input = sparse(shape, torch.bfloat16, stride)
    except OSError as error:
        pytest.skip(f"no {2 * FAR} bytes of addresses: {error}")
    input.copy_(problem.input)
    far = run(kernels, Problem(case, input, problem.target), Settings(memory=SparseMemory))
    check_same(far, run(kernels, problem), "the distance of rows or classes")

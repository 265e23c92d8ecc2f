"""Large results on the CPU lie in memory that is kept between steps."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from nllx.functional import cross_entropy, log_softmax

_LARGE = (1000, 2500)  # 10 MB


def _gradient(logits: Tensor) -> Tensor:
    leaf = logits.detach().requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy(leaf, torch.zeros(len(logits), dtype=torch.int64)), leaf)
    return grad


def test_living_results_share_nothing() -> None:
    logits = torch.randn(_LARGE)
    expected = _gradient(logits[:10])
    results = [_gradient(logits) for _ in range(4)]
    ranges = sorted((g.data_ptr(), g.data_ptr() + g.nbytes) for g in results)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))
    view = results.pop()[5:]  # a view keeps what it looks at
    copy = view.clone()
    del results
    for _ in range(3):
        _gradient(-logits)
        log_softmax(logits, 1)
    assert torch.equal(view, copy)
    torch.testing.assert_close(_gradient(logits)[:10] * len(logits), expected * 10)


def test_results_grow_and_shrink() -> None:
    for rows in (1000, 3000, 500, 1500, 1001):
        logits = torch.randn(rows, 2500)
        target = torch.zeros(rows, dtype=torch.int64)
        leaf = logits.requires_grad_()
        expected = torch.autograd.grad(torch.nn.functional.cross_entropy(leaf, target), leaf)[0]
        torch.testing.assert_close(_gradient(logits), expected)


def test_results_can_be_resized_and_swapped() -> None:
    grad = _gradient(torch.randn(_LARGE))
    first = grad[0].clone()
    grad.resize_(2000, 2500)
    assert torch.equal(grad[0], first)
    moved = torch.empty(0).set_(grad.untyped_storage(), 0, (2500,))
    del grad
    assert torch.equal(moved, first)


def test_the_profiler_sees_the_memory() -> None:
    with torch.profiler.profile(profile_memory=True) as profile:
        grad = _gradient(torch.randn(_LARGE))
    assert any(event.cpu_memory_usage >= grad.nbytes for event in profile.key_averages())


_PROGRAM = """
import torch, nllx
target = torch.zeros(4000, dtype=torch.int64)
for step in range(10):
    logits = torch.randn(4000, 2500, requires_grad=True)
    nllx.functional.cross_entropy(logits, target).backward()
    del logits
for rows in range(1000, 4000, 100):  # sizes that no kept block fits exactly
    logits = torch.zeros(rows, 2500, requires_grad=True)
    nllx.functional.cross_entropy(logits, target[:rows]).backward()
    del logits
import resource
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize("keep", ["0", "1"])
def test_memory_does_not_grow(keep: str) -> None:
    """No more than logits, random numbers and gradient at once: 40 MB each."""
    environment = {**os.environ, "NLLX_CPU_KEEP_MEMORY": keep}
    run = subprocess.run([sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before = subprocess.run(
        [
            sys.executable,
            "-c",
            "import torch, nllx, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)",
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    used = (int(run.stdout) - int(before.stdout)) * 1024
    assert used < 200e6

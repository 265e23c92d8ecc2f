"""Many threads, numbers of threads that change, and forks, with results that have to be the same bit for bit."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nllx

ROOT = Path(nllx.__file__).resolve().parent.parent


def _problems() -> list[Callable[[], tuple[Tensor, ...]]]:
    f = nllx.functional
    generator = torch.Generator().manual_seed(0)

    def problem(*shape: int, dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[], tuple[Tensor, ...]]:
        values = torch.randn(shape, generator=generator).to(dtype)
        target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)

        def run() -> tuple[Tensor, ...]:
            leaf = values.clone().requires_grad_()
            loss = f.cross_entropy(leaf, target, **options)
            return loss.detach(), torch.autograd.grad(loss, leaf)[0]

        return run

    x, target = torch.randn(512, 300, generator=generator), torch.randint(300, (512,), generator=generator)
    return [
        problem(512, 10),
        problem(300, 1000, label_smoothing=0.1),
        problem(3, 100_000),
        problem(2, 21, 80, 80, weight=torch.rand(21, generator=generator)),
        problem(256, 4096, dtype=torch.bfloat16),
        lambda: f.cross_entropy_value_and_grad(x, target),
        lambda: (f.log_softmax(x, 1), f.nll_loss(x, target)),
    ]


def _same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_threads_while_the_number_of_threads_changes(
    amount: Callable[[int, int], int], note: Callable[..., None]
) -> None:
    problems = _problems()
    expected = [problem() for problem in problems]
    before, stop = torch.get_num_threads(), threading.Event()
    rounds = amount(10, 2000)

    def change() -> None:
        while not stop.is_set():
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                stop.wait(0.001)

    def work(seed: int) -> int:
        for i in range(rounds):
            k = (seed + i) % len(problems)
            assert _same(problems[k](), expected[k]), k
        return rounds

    changing = threading.Thread(target=change)
    changing.start()
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            done = sum(threads.map(work, range(8)))
    finally:
        stop.set()
        changing.join()
        torch.set_num_threads(before)
    note(threads=8, calls=done)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forks_after_use(amount: Callable[[int, int], int], note: Callable[..., None]) -> None:
    """As workers of a DataLoader: one thread each, since the pools of OpenMP do not survive a fork."""
    problems = _problems()
    expected = [problem() for problem in problems]

    def child(queue: Any) -> None:
        torch.set_num_threads(1)
        queue.put([_same(problem(), wanted) for problem, wanted in zip(problems, expected, strict=True)])

    context = multiprocessing.get_context("fork")
    forks = amount(3, 200)
    for _ in range(forks):
        queue = context.Queue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        assert queue.get(timeout=120) == [True] * len(problems)
        process.join(120)
        assert process.exitcode == 0
        assert all(_same(problem(), wanted) for problem, wanted in zip(problems, expected, strict=True))
    note(forks=forks)


def test_results_of_other_processes_are_the_same(tmp_path: Any) -> None:
    """Bit for bit, whatever the process, its memory's alignment and its number of threads."""
    import subprocess

    program = (
        "import sys, torch; sys.path[:0] = sys.argv[2:]; import test_threads; torch.set_num_threads(int(sys.argv[1]));"
        "kept = [torch.empty(int(sys.argv[1]) * 7 + i) for i in range(50)];"  # other addresses
        "torch.save([problem() for problem in test_threads._problems()], sys.argv[2] + '/out.pt')"
    )
    expected = [problem() for problem in _problems()]
    here, root = os.path.dirname(__file__), os.path.dirname(os.path.dirname(nllx.__file__))
    for threads in ("1", "2", "5"):
        subprocess.run([sys.executable, "-c", program, threads, str(tmp_path), here, root], check=True, timeout=300)
        actual = torch.load(tmp_path / "out.pt")
        assert all(_same(tuple(a), b) for a, b in zip(actual, expected, strict=True)), threads


@pytest.mark.skipif(getattr(sys, "_is_gil_enabled", lambda: True)(), reason="Python has its lock")
def test_the_lock_stays_off() -> None:
    """An extension that does not say that it can do without gives free-threaded Python its lock back when it is loaded."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import sys, nllx; print(sys._is_gil_enabled())"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "False", run.stderr

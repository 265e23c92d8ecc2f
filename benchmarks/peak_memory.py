"""Peak memory: on a CPU what is resident in a forward and backward, each provider in a process of its own; on a GPU what
is allocated in a call.

As a program it measures one provider here and prints a JSON object, bytes by case:
``python -m benchmarks.peak_memory PROVIDER DTYPE THREADS CASE …``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .calls import Calls
from .providers import PROVIDERS, Provider
from .shapes import CASES, Case, make_inputs
from .timing import Call, ready

SMALLEST = 4 << 20
"""Bytes of logits from which on a case is measured: below, what an allocator keeps hides what the call needs."""


def is_supported() -> bool:
    """Whether this system tells, and forgets on request, a process's peak."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def _resident(entry: str) -> int:
    """``VmRSS``, what is resident, or ``VmHWM``, the most that was since it was reset; in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(entry))


def peak_bytes(calls: Calls) -> int:
    """The most that a forward and backward adds to what is resident, its gradient included.

    The gradient of the call before stays alive, as what is added must be new memory.
    """
    calls.forward_backward()
    output, gradient = calls.forward_backward()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    calls.forward_backward()
    peak = _resident("VmHWM")
    del output, gradient
    return peak - before


def allocated_peak_bytes(call: Call, device: torch.device) -> int:
    """The most that a call adds to what is allocated on a GPU, its results included.

    What the call before returned stays alive, as what is added must be new memory.
    """
    kept = call()
    one = ready(call)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = one()
    peak = torch.cuda.max_memory_allocated(device)
    del kept, result
    return peak - before


def measure_here(provider: Provider, cases: Sequence[Case], dtype: torch.dtype) -> dict[str, int]:
    """Bytes by case, without the cases that the provider does not support."""
    device = torch.device("cpu")
    functions = provider.load(device)
    result = {}
    for case in cases:
        if case.op not in functions:
            continue
        try:
            result[case.name] = peak_bytes(provider.bind(functions[case.op], make_inputs(case, dtype, device)))
        except Exception as reason:  # the timed run reports why a provider cannot do a case
            print(f"{provider.name} on {case.name}: {reason}", file=sys.stderr)
    return result


def measure_apart(provider: Provider, cases: Sequence[Case], dtype: torch.dtype) -> dict[str, int]:
    """As ``measure_here``, in a process of its own, where nllx keeps no memory from one call to the next."""
    names = [case.name for case in cases if case.elements * dtype.itemsize >= SMALLEST]
    if not names or not is_supported():
        return {}
    words = [provider.name, str(dtype).removeprefix("torch."), str(torch.get_num_threads()), *names]
    run = subprocess.run(
        [sys.executable, "-m", __name__, *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "NLLX_CPU_KEEP_MEMORY": "0"},
        cwd=Path(__file__).parents[1],
    )
    return json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else {}


def main(words: Sequence[str]) -> None:
    name, dtype, threads, *names = words
    torch.set_num_threads(int(threads))
    provider = next(one for one in PROVIDERS if one.name == name)
    cases = [case for case in CASES if case.name in names]
    print(json.dumps(measure_here(provider, cases, getattr(torch, dtype))))


if __name__ == "__main__":
    main(sys.argv[1:])

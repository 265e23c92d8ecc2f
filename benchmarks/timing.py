"""Times several calls alternately, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch

Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)


class Timer(Protocol):
    """Times ``repetitions`` calls and returns the seconds of one."""

    enough_seconds: float
    """A measurement repeats the call until it takes this long,"""
    most_repetitions: int
    """but at most this often."""

    def __call__(self, call: Call, repetitions: int) -> float: ...


class CpuTimer:
    """Wall clock around a loop. Inputs that fit the caches stay there, as when a network has just written them."""

    enough_seconds = 0.01
    most_repetitions = 10_000

    def __call__(self, call: Call, repetitions: int) -> float:
        start = time.perf_counter()
        for _ in range(repetitions):
            call()
        return (time.perf_counter() - start) / repetitions


class CudaTimer:
    """CUDA events around each call, the L2 cache flushed before it; the median of the repetitions.

    The time is that of the stream: it includes the host's part only where the host is slower than the flush.
    """

    enough_seconds = 0.01
    most_repetitions = 50

    def __init__(self, device: torch.device) -> None:
        self._device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(4 * l2_bytes, dtype=torch.int8, device=device)

    def __call__(self, call: Call, repetitions: int) -> float:
        events = []
        for _ in range(repetitions):
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize(self._device)
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def make_timer(device: torch.device) -> Timer:
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def _repetitions(call: Call, timer: Timer) -> int:
    """How many calls make a measurement long enough. Finding out is the warm-up."""
    timer(call, 1)
    count = 1
    while count < timer.most_repetitions:
        taken = timer(call, count) * count
        if taken >= timer.enough_seconds:
            break
        growth = min(10.0, 1.2 * timer.enough_seconds / taken)
        count = min(math.ceil(count * growth), timer.most_repetitions)
    return count


def time_in_rounds(calls: Mapping[Key, Call], timer: Timer, rounds: int, rng: random.Random) -> dict[Key, list[float]]:
    """Seconds per call of each of ``calls``, one value a round: element i of every list was measured in round i.

    Each round times every call once, in an order drawn anew. The garbage collector is off meanwhile.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    collected = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        repetitions = {key: _repetitions(call, timer) for key, call in calls.items()}
        order = list(calls)
        for _ in range(rounds):
            rng.shuffle(order)
            for key in order:
                seconds[key].append(timer(calls[key], repetitions[key]))
    finally:
        if collected:
            gc.enable()
    return seconds


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of ``values``, of which there are at least two."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "n": len(values)}


def paired_ratio(seconds: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Summary of ``seconds / others`` taken round by round, so that a slow round counts against both."""
    return summary([mine / other for mine, other in zip(seconds, others, strict=True)])

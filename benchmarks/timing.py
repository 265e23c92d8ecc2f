"""Times several calls alternately, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Prepared:
    """A call of ``call(prepare())`` of which a timer times ``call`` alone, as a backward after its forward."""

    prepare: Callable[[], Any]
    call: Callable[[Any], Any]

    def __call__(self) -> Any:
        return self.call(self.prepare())

    def ready(self) -> Call:
        """What is left to be timed."""
        return partial(self.call, self.prepare())


def ready(call: Call) -> Call:
    return call.ready() if isinstance(call, Prepared) else call


class Timer(Protocol):
    """Times ``repetitions`` calls and returns the seconds of one."""

    enough_seconds: float
    """A measurement repeats the call until it takes this long,"""
    most_repetitions: int
    """but at most this often."""

    def __call__(self, call: Call, repetitions: int) -> float: ...


class WallTimer:
    """Wall clock around a loop. Inputs that fit the caches stay there, as when a network has just written them.

    On CUDA the time ends when the GPU has done everything: the larger of the host's part and the GPU's. What is prepared
    for the calls lives at once, so that such cases must be small.
    """

    enough_seconds = 0.01
    most_repetitions = 10_000

    def __init__(self, device: torch.device) -> None:
        self._synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None

    def __call__(self, call: Call, repetitions: int) -> float:
        calls = [ready(call) for _ in range(repetitions)]
        if self._synchronize:
            self._synchronize()
        start = time.perf_counter()
        for one in calls:
            one()
        if self._synchronize:
            self._synchronize()
        return (time.perf_counter() - start) / repetitions


class CudaTimer:
    """CUDA events: the time of the stream, which includes the host's part only where the GPU has to wait for it.

    Calls on inputs far larger than the L2 cache run back to back between two events. With ``flush``, for inputs that
    the cache could keep, it is overwritten before each call, which then has events of its own; so has a call that
    something is prepared for. Of these the median of the repetitions counts.
    """

    enough_seconds = 0.01
    most_repetitions = 50

    def __init__(self, device: torch.device, flush: bool) -> None:
        self._device = device
        self._flush = flush
        self._buffer = torch.empty(4 * l2_bytes(device), dtype=torch.int8, device=device)

    def __call__(self, call: Call, repetitions: int) -> float:
        if self._flush or isinstance(call, Prepared):
            batch, spans = 1, [self._span(call, 1, self._flush) for _ in range(repetitions)]
        else:  # what is overwritten before the batch gives the host a start over the GPU
            batch, spans = repetitions, [self._span(call, repetitions, True)]
        torch.cuda.synchronize(self._device)
        return statistics.median(start.elapsed_time(end) for start, end in spans) / 1e3 / batch

    def _span(self, call: Call, count: int, flush: bool) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Events around ``count`` calls. What was prepared for them is gone on return."""
        one = ready(call)
        if flush:
            self._buffer.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            one()
        end.record()
        return start, end


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def make_timer(device: torch.device, logits_bytes: int = 0, launch_bound: bool = False) -> Timer:
    """The timer for calls on so many bytes of logits, or for the memory probes."""
    if device.type != "cuda" or launch_bound:
        return WallTimer(device)
    return CudaTimer(device, flush=0 < logits_bytes < 4 * l2_bytes(device))


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

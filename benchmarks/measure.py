"""Checks the providers by value, times those that are right and turns the times into rows."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import peak_memory, providers
from .byte_model import passes
from .calls import DEFAULT_MODES, MODES, Calls, Function, bind
from .memory import MemoryProbes
from .providers import Provider
from .record import Absence, Row
from .shapes import Case, Inputs, make_inputs
from .timing import Timer, paired_ratio, summary, time_in_rounds

# Largest error that counts as right, see ``error``. Rounding an output once to the dtype costs 2^-24, 2^-11 and 2^-8;
# the rest is for providers that round the log-probabilities of magnitude 10 before they exponentiate them, and then
# subtract terms of smoothing that are nearly as large: what they return is listed as an error of some 2e-4.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-10}


def error(value: Tensor, exact: Tensor) -> float:
    """Largest error of ``value``, relative to the exact value or to the mean magnitude, whichever is larger.

    A plain relative error would divide by entries that cancel to nearly 0; one relative to the largest entry would not
    see the gradients of the other classes next to that of the target. A difference of no more than the dtype's smallest
    number does not count. Infinity where anything is not finite.
    """
    if value.shape != exact.shape:
        raise ValueError(f"shape {tuple(value.shape)} instead of {tuple(exact.shape)}")
    difference = (value.double() - exact).abs_()
    difference.sub_(torch.finfo(value.dtype).smallest_normal * torch.finfo(value.dtype).eps).clamp_(min=0)
    magnitude = exact.abs()
    largest = difference.div_(magnitude.clamp_(min=magnitude.mean())).amax().item()
    return largest if largest < float("inf") else float("inf")


class Reference:
    """torch's output and gradient for the same inputs in float64."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.dtype = inputs.logits.dtype
        function = providers.torch_functions(inputs.logits.device)[case.op]
        output, gradient = bind(function, inputs.double()).forward_backward()
        self.output, self.gradient = output.detach(), gradient

    def errors(self, calls: Calls, modes: Sequence[str] = MODES) -> dict[str, float]:
        """Errors of what each mode returns that the provider has."""
        found = {}
        for mode in modes:
            call = calls.of(mode)
            if call is None:
                continue
            calls.restore()
            result: Any = call()
            match mode:
                case "forward":
                    found["forward"] = self._of_output(result)
                case "backward":
                    found["backward"] = self._of_gradient(result)
                case "forward+backward":
                    found["output"] = self._of_output(result[0])
                    found["gradient"] = self._of_gradient(result[1])
                case "value_and_grad":
                    found["value_and_grad"] = max(self._of_output(result[0]), self._of_gradient(result[1]))
        return found

    def _of_output(self, output: Tensor) -> float:
        # A loss in float32 of logits in half precision is not held against a provider.
        if output.dtype != self.dtype and (output.dim() > 0 or output.dtype != torch.float32):
            raise ValueError(f"output {output.dtype} from logits {self.dtype}")
        return error(output.detach(), self.output)

    def _of_gradient(self, gradient: Tensor) -> float:
        if gradient.dtype != self.dtype:
            raise ValueError(f"gradient {gradient.dtype} from logits {self.dtype}")
        return error(gradient, self.gradient)


def load_providers(
    wanted: Sequence[Provider], device: torch.device
) -> tuple[dict[Provider, Mapping[str, Function]], dict[str, str]]:
    """The functions of the providers that are there, and for the others the reason by name."""
    loaded, absent = {}, {}
    for provider in wanted:
        try:
            loaded[provider] = provider.load(device)
        except Exception as reason:  # whatever a foreign package raises on import, the others are still to be timed
            absent[provider.name] = describe(reason)
    return loaded, absent


def describe(reason: Exception) -> str:
    """Type and first line of an exception."""
    lines = str(reason).strip().splitlines()
    return f"{type(reason).__name__}: {lines[0]}" if lines else type(reason).__name__


def measure(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    loaded: Mapping[Provider, Mapping[str, Function]],
    probes: MemoryProbes,
    timer: Timer,
    rounds: int,
    rng: random.Random,
    modes: Sequence[str] | None = None,
) -> tuple[list[Row], list[Absence]]:
    """Time every provider that is right on ``case`` in ``modes``, by default those of the device, together with the
    memory probes."""
    modes = DEFAULT_MODES[device.type] if modes is None else modes
    dtype_name = str(dtype).removeprefix("torch.")
    inputs = make_inputs(case, dtype, device)
    reference = Reference(case, inputs)
    errors: dict[str, dict[str, float]] = {}
    peaks: dict[tuple[str, str], int] = {}
    absences: list[Absence] = []
    calls: dict[tuple[str, str], Callable[[], object]] = {("memory", name): call for name, call in probes.calls.items()}

    def report(provider: Provider, kind: str, reason: str) -> None:
        absences.append(
            {"case": case.name, "dtype": dtype_name, "provider": provider.name, "kind": kind, "reason": reason}
        )

    for provider, functions in loaded.items():
        if case.op not in functions:
            report(provider, "absent", f"has no {case.op}")
            continue
        try:
            bound = provider.bind(functions[case.op], inputs)
            found = {} if provider.is_yardstick else reference.errors(bound, modes)
            mine = {mode: call for mode in modes if (call := bound.of(mode)) is not None}
            if device.type == "cuda":
                for mode, call in mine.items():
                    peaks[provider.name, mode] = peak_memory.allocated_peak_bytes(call, device)
        except Exception as reason:  # of whatever type, it says of this provider only that it cannot do this case
            report(provider, "failed", describe(reason))
            continue
        if found and max(found.values()) > TOLERANCE[dtype]:
            report(provider, "wrong", f"error above {TOLERANCE[dtype]:g}: " + _listed(found))
            continue
        errors[provider.name] = found
        calls.update({(provider.name, mode): call for mode, call in mine.items()})
    del reference

    seconds = time_in_rounds(calls, timer, rounds, rng) if errors else {}
    probed = {probe: seconds["memory", probe] for probe in probes.calls} if errors else {}
    rows: list[Row] = []
    for mode in modes:
        if not any((name, mode) in seconds for name in errors):
            continue
        traffic = passes(case, dtype.itemsize, mode)
        total = sum(one.total for one in traffic)
        # Who has no value_and_grad takes forward and backward for it.
        stand_in = "forward+backward" if mode == "value_and_grad" else mode
        keys = {name: (name, mode) if (name, mode) in seconds else (name, stand_in) for name in errors}
        timed = {name: seconds[key] for name, key in keys.items() if key in seconds}
        for name in errors:
            if (name, mode) not in seconds:
                continue
            taken = seconds[name, mode]
            shares, copy_shares = [], []
            for i, one_taken in enumerate(taken):
                round_probed = {probe: times[i] for probe, times in probed.items()}
                speeds = probes.speeds(round_probed)
                shares.append(sum(one.floor_seconds(speeds) for one in traffic) / one_taken)
                copy_shares.append(total / one_taken / probes.copy_speed(round_probed))
            times = summary(taken)
            rows.append(
                {
                    "case": case.name,
                    "op": case.op,
                    "shape": list(case.shape),
                    "origin": case.origin,
                    "dtype": dtype_name,
                    "mode": mode,
                    "provider": name,
                    "seconds": times,
                    "bytes": total,
                    "gb_per_s": total / times["median"] / 1e9,
                    "share": statistics.median(shares),
                    "copy_share": statistics.median(copy_shares),
                    "memory": probes.summaries(probed),
                    "ratio": {other: paired_ratio(taken, timed[other]) for other in timed if other != name},
                    "error": errors[name],
                    "peak_bytes": peaks.get((name, mode)),
                }
            )
    return rows, absences


def _listed(found: Mapping[str, float]) -> str:
    return ", ".join(f"{what} {size:.1e}" for what, size in found.items())

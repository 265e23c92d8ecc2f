"""The benchmark frame: byte model, harness, checks and records. No test here asserts a speed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import measure, peak_memory, providers, report
from benchmarks.byte_model import Speeds, Traffic, passes
from benchmarks.memory import MemoryProbes
from benchmarks.providers import Calls, Provider
from benchmarks.record import Record, environment, load, save
from benchmarks.shapes import CASES, UNLABELLED, Case, Inputs, make_inputs
from benchmarks.timing import paired_ratio, summary, time_in_rounds

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("case", "element_bytes", "forward", "backward"),
    [
        # 2 × 3 float32 logits are 24 bytes, two int64 targets 16.
        (Case("", "", (2, 3)), 4, Traffic(40, 0), Traffic(40, 24)),
        # Two images of 3 classes and 4 × 5 pixels: 120 bfloat16 logits, 40 targets, 3 weights.
        (Case("", "", (2, 3, 4, 5), weight=True), 2, Traffic(240 + 320 + 6, 0), Traffic(240 + 320 + 6, 240)),
        (Case("", "", (2, 3), probabilities=True), 2, Traffic(24, 0), Traffic(24, 12)),
        (Case("", "", (2, 3), op="nll_loss"), 4, Traffic(8 + 16, 0), Traffic(16, 24)),
        (Case("", "", (2, 3), op="log_softmax"), 4, Traffic(24, 24), Traffic(48, 24)),
    ],
)
def test_byte_model(case: Case, element_bytes: int, forward: Traffic, backward: Traffic) -> None:
    assert passes(case, element_bytes, "forward") == [forward]
    assert passes(case, element_bytes, "forward+backward") == [forward, backward]


def test_floor() -> None:
    speeds = Speeds(read=10.0, read_write=20.0)
    assert Traffic(100, 0).floor_seconds(speeds) == 10
    assert Traffic(100, 100).floor_seconds(speeds) == 10
    assert Traffic(140, 100).floor_seconds(speeds) == 10 + 4
    assert Traffic(40, 100).floor_seconds(speeds) == 7


class FakeTimer:
    """Runs the calls; every call takes as many seconds as the clock of the test says."""

    enough_seconds = 1.0
    most_repetitions = 50

    def __init__(self, seconds: dict[Callable[[], object], float]) -> None:
        self.seconds = seconds
        self.log: list[tuple[Callable[[], object], int]] = []

    def __call__(self, call: Callable[[], object], repetitions: int) -> float:
        for _ in range(repetitions):
            call()
        self.log.append((call, repetitions))
        return self.seconds[call]


def test_rounds() -> None:
    """Each round has every call once, in changing order, and short calls are repeated."""
    counts = {"slow": 0, "fast": 0, "tiny": 0}

    def counter(key: str) -> Callable[[], object]:
        def call() -> None:
            counts[key] += 1

        return call

    calls = {key: counter(key) for key in counts}
    timer = FakeTimer({calls["slow"]: 2.0, calls["fast"]: 0.1, calls["tiny"]: 1e-6})
    seconds = time_in_rounds(calls, timer, 12, random.Random(0))
    assert seconds == {"slow": [2.0] * 12, "fast": [0.1] * 12, "tiny": [1e-6] * 12}

    measured = timer.log[-36:]
    orders = [tuple(call for call, _ in measured[i : i + 3]) for i in range(0, 36, 3)]
    assert all(set(order) == set(calls.values()) for order in orders)
    assert len(set(orders)) > 1
    repetitions = dict(measured)
    assert repetitions[calls["slow"]] == 1
    assert repetitions[calls["fast"]] >= 10
    assert repetitions[calls["tiny"]] == timer.most_repetitions
    assert counts["slow"] > 12  # it was warmed up


def test_statistics() -> None:
    assert summary([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3, "q1": 2, "q3": 4, "n": 5}
    # One round is ten times slower for both: no ratio notices.
    assert paired_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == {"median": 2, "q1": 2, "q3": 2, "n": 3}


def test_error() -> None:
    exact = torch.tensor([1.0, -1.0, 0.0, 2.0], dtype=torch.float64)  # mean magnitude 1
    assert measure.error(exact.float(), exact) == 0
    assert measure.error(torch.tensor([1.0, -1.0, 0.5, 2.0]), exact) == 0.5
    assert measure.error(torch.tensor([1.0, -1.0, 0.0, 3.0]), exact) == 0.5
    assert measure.error(torch.tensor([1.0, -1.0, 0.0, float("nan")]), exact) == float("inf")
    with pytest.raises(ValueError, match="shape"):
        measure.error(exact[:3].float(), exact)
    # Below the range of float16, zero is the right answer.
    assert measure.error(torch.zeros(2, dtype=torch.float16), torch.full((2,), 2.0**-25, dtype=torch.float64)) == 0


def test_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert all(case.origin for case in CASES)


SMALL_CASES = pytest.mark.parametrize(
    "case",
    [
        Case("index", "", (6, 5), label_smoothing=0.1),
        Case("probabilities", "", (6, 5), probabilities=True),
        Case("planes", "", (2, 5, 8, 9), weight=True, ignored=0.3),
        Case("channels-last", "", (2, 5, 8, 9), weight=True, ignored=0.3, channels_last=True),
        Case("nll", "", (6, 5), op="nll_loss"),
        Case("log-softmax", "", (2, 5, 3, 4), op="log_softmax"),
    ],
    ids=lambda case: case.name,
)


@SMALL_CASES
def test_reference_takes_torch_as_right(case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        inputs = make_inputs(case, dtype, CPU)
        assert (
            inputs.logits.is_contiguous(memory_format=torch.channels_last) == case.channels_last or case.shape[2:] == ()
        )
        calls = providers.bind(providers.torch_functions(CPU)[case.op], inputs)
        assert max(measure.Reference(case, inputs).errors(calls).values()) <= measure.TOLERANCE[dtype]
        if case.ignored:
            assert (inputs.args[0] == UNLABELLED).any()


@SMALL_CASES
def test_jax_provider_is_right(case: Case) -> None:
    pytest.importorskip("jax")
    from benchmarks import jax_losses

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        inputs = make_inputs(case, dtype, CPU)
        calls = jax_losses.bind(jax_losses.FUNCTIONS[case.op], inputs)
        assert max(measure.Reference(case, inputs).errors(calls).values()) <= measure.TOLERANCE[dtype]
        _, gradient = calls.forward_backward()
        assert gradient.stride() == inputs.logits.stride()


class FakeProbes(MemoryProbes):
    """Memory probes of known speed, without gigabytes."""

    def __init__(self) -> None:
        self.calls: dict[str, Callable[[], object]] = {"read": lambda: None}

    def speeds(self, seconds: Mapping[str, float]) -> Speeds:
        return Speeds(1e9, 2e9)

    def summaries(self, seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
        return {"read": summary([1e9 for _ in seconds["read"]])}


class ConstantTimer:
    """Every call takes a millisecond."""

    enough_seconds = 1e-3
    most_repetitions = 1

    def __call__(self, call: Callable[[], object], repetitions: int) -> float:
        call()
        return 1e-3


def run() -> Record:
    def missing(device: torch.device) -> dict[str, providers.Function]:
        raise ImportError("not installed here\nand more")

    def forgets_the_mean(function: providers.Function, inputs: Inputs) -> Calls:
        right = providers.bind(function, inputs)

        def forward_backward() -> tuple[torch.Tensor, torch.Tensor]:
            output, gradient = right.forward_backward()
            return output, gradient * 6

        return Calls(right.forward, forward_backward)

    def breaks(function: providers.Function, inputs: Inputs) -> Calls:
        raise RuntimeError("no such shape")

    wanted = [
        Provider("nllx", providers.torch_functions),
        Provider("other", providers.torch_functions),
        Provider("missing", missing),
        Provider("wrong", providers.torch_functions, bind=forgets_the_mean),
        Provider("broken", providers.torch_functions, bind=breaks),
        Provider("partial", lambda device: {}),
    ]
    loaded, absent = measure.load_providers(wanted, CPU)
    assert absent == {"missing": "ImportError: not installed here"}
    probes = FakeProbes()
    record: Record = {
        "environment": environment(CPU),
        "memory": probes.summaries({"read": [1.0, 1.0]}),
        "rows": [],
        "absences": [],
    }
    for dtype in (torch.float32, torch.bfloat16):
        rows, absences = measure.measure(
            Case("six", "a test", (6, 5)), dtype, CPU, loaded, probes, ConstantTimer(), 3, random.Random(0)
        )
        record["rows"] += rows
        record["absences"] += absences
    return record


def test_measure() -> None:
    record = run()
    modes = [(row["provider"], row["mode"]) for row in record["rows"][:4]]
    assert modes == [(name, mode) for mode in measure.MODES for name in ("nllx", "other")]
    found = [(absence["provider"], absence["kind"]) for absence in record["absences"]]
    assert found == [("wrong", "wrong"), ("broken", "failed"), ("partial", "absent")] * 2

    forward, both = record["rows"][0], record["rows"][2]
    assert forward["bytes"] == 30 * 4 + 6 * 8  # the logits and the targets
    assert both["bytes"] == 2 * forward["bytes"] + 30 * 4
    assert forward["gb_per_s"] == pytest.approx(forward["bytes"] / 1e-3 / 1e9)
    assert forward["share"] == pytest.approx(forward["bytes"] / 1e9 / 1e-3)
    # A read of 168 bytes, then 120 read and written at twice the speed and 48 more read.
    assert both["share"] == pytest.approx((168 / 1e9 + 240 / 2e9 + 48 / 1e9) / 1e-3)
    assert forward["ratio"] == {"other": {"median": 1, "q1": 1, "q3": 1, "n": 3}}
    assert forward["seconds"]["n"] == 3


@pytest.mark.skipif(not peak_memory.is_supported(), reason="the system does not tell a process's peak")
def test_peak_memory() -> None:
    """A forward and backward of nllx needs its gradient and nothing else of its size, torch its log-softmax too."""
    case = next(case for case in CASES if case.name == "imagenet-4096x1000")
    logits = case.elements * 4
    peaks = {
        provider.name: peak_memory.measure_apart(provider, [case], torch.float32)[case.name]
        for provider in providers.PROVIDERS
        if provider.name in ("nllx", "torch")
    }
    assert 1.0 <= peaks["nllx"] / logits < 1.2
    assert peaks["torch"] / logits > 1.8


def test_record_table_and_plot(tmp_path: Path) -> None:
    record = run()
    save(record, tmp_path / "results" / "run.json")
    assert load(tmp_path / "results" / "run.json") == record

    text = report.table(record)
    lines = [line for line in text.splitlines() if line.startswith("six")]
    assert len(lines) == len(record["rows"]) == 8
    assert "1.00 ms" in lines[0]
    assert "wrong not timed on six float32, wrong: error above 0.001" in text
    markdown = [line for line in report.table(record, markdown=True).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in markdown}) == 1

    pytest.importorskip("matplotlib")
    from benchmarks.plot import draw

    draw(record, tmp_path / "first.svg")
    draw(load(tmp_path / "results" / "run.json"), tmp_path / "second.svg")
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
    assert b"forward+backward, bfloat16" in (tmp_path / "first.svg").read_bytes()

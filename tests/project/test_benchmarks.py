"""The benchmark frame: byte model, harness, checks and records. No test here asserts a speed."""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import calls as timed
from benchmarks import measure, peak_memory, providers, report, timing
from benchmarks.__main__ import Job, _jobs, main
from benchmarks.byte_model import Speeds, Traffic, passes
from benchmarks.calls import Calls
from benchmarks.memory import MemoryProbes
from benchmarks.providers import Provider
from benchmarks.record import Record, environment, load, save
from benchmarks.shapes import CASES, CUDA_CASES, UNLABELLED, Case, Inputs, make_inputs
from benchmarks.timing import CudaTimer, Prepared, WallTimer, paired_ratio, summary, time_in_rounds

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
    assert passes(case, element_bytes, "backward") == [backward]
    assert passes(case, element_bytes, "forward+backward") == [forward, backward]


def test_byte_model_of_both_at_once() -> None:
    assert passes(Case("", "", (2, 3)), 4, "value_and_grad") == [Traffic(40, 24)]
    with pytest.raises(ValueError, match="sideways"):
        passes(Case("", "", (2, 3)), 4, "sideways")


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


def test_what_is_prepared_is_not_timed() -> None:
    prepared, called = [], []

    def prepare() -> int:
        time.sleep(0.02)
        prepared.append(len(prepared))
        return prepared[-1]

    call = Prepared(prepare, called.append)
    assert WallTimer(CPU)(call, 3) < 0.01
    call()
    assert prepared == called == [0, 1, 2, 3]


class FakeEvent:
    """A CUDA event on a clock that the calls move."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = FakeEvent.clock

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.time - self.time)


@pytest.mark.parametrize("flush", [False, True])
def test_cuda_timer(flush: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the flush nor what is prepared counts."""
    log = []

    class Buffer:
        def zero_(self) -> None:
            log.append("flush")
            FakeEvent.clock += 100

    def prepare() -> float:
        log.append("prepare")
        FakeEvent.clock += 10
        return 2.0

    def call(seconds: float = 1.0) -> None:
        log.append("call")
        FakeEvent.clock += seconds

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 16)
    timer = CudaTimer(CPU, flush)
    timer._buffer = Buffer()
    assert timer(call, 3) == 1
    assert log == (["flush", "call"] * 3 if flush else ["flush", "call", "call", "call"])
    log.clear()
    assert timer(Prepared(prepare, call), 2) == 2
    assert log == ["prepare", *(["flush"] if flush else []), "call"] * 2


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
    for cases in (CASES, CUDA_CASES):
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
        assert all(case.origin for case in cases)


def test_jobs() -> None:
    """What each device runs where the command line names no dtype."""

    def jobs(device: str, **given: object) -> list[Job]:
        options = {"quick": False, "only": None, "dtype": None, "compile": None, **given}
        return _jobs(argparse.Namespace(device=torch.device(device), **options))

    assert [job.name for job in jobs("cpu")] == [f"{case.name} float32" for case in CASES]
    assert all(job.compiled for job in jobs("cpu"))
    assert not any(job.compiled for job in jobs("cpu", quick=True))
    assert len(jobs("cuda")) == 3 * len(CUDA_CASES)
    quick = jobs("cuda", quick=True)
    assert {job.dtype for job in quick} == {torch.bfloat16, torch.float32, torch.float16}
    assert 0 < sum(job.compiled for job in quick) < 5
    assert not any(job.compiled for job in jobs("cuda", quick=True, compile=False))
    named = jobs("cuda", quick=True, dtype="float32", only=re.compile("^tiny"))
    assert [job.name for job in named] == ["tiny-32x10 float32", "tiny-64x100 float32", "tiny-1x1000 float32"]


def test_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.memory.MIB", 1 << 10)
    monkeypatch.setattr("benchmarks.memory._cache_bytes", lambda device: 0)
    path = tmp_path / "run.json"
    words = [
        "--only",
        "^tiny-(32x10|1x1000)$",
        "--rounds",
        "2",
        "--no-compile",
        "--no-peak-memory",
        "--json",
        str(path),
    ]
    assert main([*words, "--budget", "0"]) == 0
    assert load(path)["left_out"] == ["tiny-32x10 float32: no time left", "tiny-1x1000 float32: no time left"]
    assert "left out: tiny-1x1000 float32: no time left" in capsys.readouterr().out
    assert main([*words, "--budget", "1000", "--modes", ",".join(timed.MODES)]) == 0
    record = load(path)
    assert record["left_out"] == []
    modes = [row["mode"] for row in record["rows"] if row["provider"] == "nllx" and row["case"] == "tiny-32x10"]
    assert modes == list(timed.MODES)
    last = record["rows"][-1]
    assert (last["provider"], last["mode"], list(last["ratio"])) == ("nllx", "value_and_grad", ["torch"])
    lines = report.summary_table(record).splitlines()
    assert len(lines) == 1 + 2 * len(timed.MODES)
    assert len(list(tmp_path.iterdir())) == 1  # nothing unfinished is left


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
        calls = timed.bind(providers.torch_functions(CPU)[case.op], inputs)
        assert max(measure.Reference(case, inputs).errors(calls).values()) <= measure.TOLERANCE[dtype]
        if case.ignored:
            assert (inputs.args[0] == UNLABELLED).any()


@SMALL_CASES
def test_every_mode_of_nllx(case: Case) -> None:
    inputs = make_inputs(case, torch.float32, CPU)
    (nllx,) = (provider for provider in providers.PROVIDERS if provider.name == providers.BASELINE)
    calls = nllx.bind(nllx.load(CPU)[case.op], inputs)
    errors = measure.Reference(case, inputs).errors(calls)
    assert max(errors.values()) < 1e-5
    assert ("value_and_grad" in errors) == (case.op == "cross_entropy")
    assert "backward" in errors


def test_a_function_that_overwrites_the_logits() -> None:
    """It is checked on the logits of the case, which stay what they are."""

    class Overwriting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, target):
            loss = torch.nn.functional.cross_entropy(logits, target)
            gradient = logits.softmax(1)
            gradient[torch.arange(len(target)), target] -= 1
            ctx.save_for_backward(logits.detach().copy_(gradient / len(target)))
            return loss

        @staticmethod
        def backward(ctx, grad_output):
            return ctx.saved_tensors[0] * grad_output, None

    case = Case("", "", (6, 5))
    inputs = make_inputs(case, torch.float32, CPU)
    logits = inputs.logits.clone()
    calls = providers.bind_in_place(Overwriting.apply, inputs)
    assert max(measure.Reference(case, inputs).errors(calls).values()) < 1e-5
    assert torch.equal(inputs.logits, logits)


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

    def copy_speed(self, seconds: Mapping[str, float]) -> float:
        return 2e9

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
    def missing(device: torch.device) -> dict[str, timed.Function]:
        raise ImportError("not installed here\nand more")

    def forgets_the_mean(function: timed.Function, inputs: Inputs) -> Calls:
        right = timed.bind(function, inputs)

        def forward_backward() -> tuple[torch.Tensor, torch.Tensor]:
            output, gradient = right.forward_backward()
            return output, gradient * 6

        return Calls(right.forward, forward_backward)

    def breaks(function: timed.Function, inputs: Inputs) -> Calls:
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
        "left_out": [],
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
    assert modes == [(name, mode) for mode in timed.DEFAULT_MODES["cpu"] for name in ("nllx", "other")]
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

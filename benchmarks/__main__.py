"""Command line: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from . import measure, report
from .calls import DEFAULT_MODES, MODES
from .memory import MemoryProbes
from .peak_memory import measure_apart
from .providers import BASELINE, PROVIDERS
from .record import Record, environment, save
from .shapes import CASES, CUDA_CASES, Case
from .timing import make_timer, time_in_rounds

COMPILED = "torch.compile"


@dataclass(frozen=True)
class Job:
    """A case in one dtype, with ``torch.compile`` or without."""

    case: Case
    dtype: torch.dtype
    compiled: bool

    @property
    def name(self) -> str:
        return f"{self.case.name} {_name(self.dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _jobs(options: argparse.Namespace) -> list[Job]:
    """What the command line asks for, in the order of the tables of cases."""
    on_cuda = options.device.type == "cuda"
    jobs = []
    for case in CUDA_CASES if on_cuda else CASES:
        quick = bool(case.quick_dtypes) if on_cuda else case.quick
        if (options.quick and not quick) or (options.only is not None and not options.only.search(case.name)):
            continue
        if options.dtype:
            names = options.dtype.split(",")
        elif on_cuda:
            names = list(case.quick_dtypes) if options.quick else ["bfloat16", "float16", "float32"]
        else:
            names = ["float32"]
        for name in names:
            compiled = not options.quick or (on_cuda and case.quick_compile and name == case.quick_dtypes[0])
            jobs.append(Job(case, getattr(torch, name), compiled if options.compile is None else options.compile))
    return jobs


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"Time {BASELINE} and its peers alternately on named shapes. benchmarks/README.md says how.",
    )
    names = [_name(dtype) for dtype in measure.TOLERANCE]
    parser.add_argument(
        "--dtype",
        help=f"comma-separated, of {','.join(names)} (default: float32; on CUDA bfloat16, float16 and float32, "
        "quick: those of each case)",
    )
    parser.add_argument(
        "--device", type=torch.device, default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="torch's CPU threads (default: torch's choice)")
    parser.add_argument(
        "--only", type=re.compile, metavar="PATTERN", help="cases in whose name this regular expression is found"
    )
    parser.add_argument(
        "--modes",
        help=f"comma-separated, of {','.join(MODES)} (default: {','.join(DEFAULT_MODES['cpu'])}; on CUDA all)",
    )
    parser.add_argument("--quick", action="store_true", help="a few cases and rounds, one to two minutes")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="start no further case after so long, and say which were left out",
    )
    parser.add_argument("--rounds", type=int, help="measurements of each call (default: 11, quick: 3)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help=f"time {COMPILED} too (default: unless --quick; quick on CUDA: on a few cases)",
    )
    parser.add_argument(
        "--peak-memory",
        action=argparse.BooleanOptionalAction,
        help="measure the peak of resident memory too, on the CPU (default: unless --quick)",
    )
    parser.add_argument("--markdown", action="store_true", help="a Markdown table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(arguments)

    options.rounds = options.rounds or (3 if options.quick else 11)
    if options.peak_memory is None:
        options.peak_memory = not options.quick
    if options.rounds < 2:
        parser.error("--rounds must be at least 2: one measurement has no spread")
    options.modes = options.modes.split(",") if options.modes else DEFAULT_MODES[options.device.type]
    for option, given, known in [
        ("--dtype", options.dtype.split(",") if options.dtype else [], names),
        ("--modes", options.modes, MODES),
    ]:
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"{option} takes {','.join(known)}, not {', '.join(unknown)}")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    options.jobs = _jobs(options)
    if not options.jobs:
        cases = CUDA_CASES if options.device.type == "cuda" else CASES
        parser.error("no case left: names are " + ", ".join(case.name for case in cases))
    return options


def main(arguments: list[str] | None = None) -> int:
    started = time.monotonic()
    options = _parse(arguments)
    on_cuda = options.device.type == "cuda"
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device.index is not None:
        torch.cuda.set_device(options.device)  # events and streams belong to the current device
    rng = random.Random(0)
    probes = MemoryProbes(options.device)
    with_compile = any(job.compiled for job in options.jobs)
    wanted = [provider for provider in PROVIDERS if with_compile or provider.name != COMPILED]
    loaded, absent = measure.load_providers(wanted, options.device)

    probed = time_in_rounds(probes.calls, make_timer(options.device), max(options.rounds, 11), rng)
    record: Record = {
        "environment": environment(options.device),
        "memory": probes.summaries(probed),
        "rows": [],
        "absences": [
            {"case": "", "dtype": "", "provider": name, "kind": "absent", "reason": reason}
            for name, reason in absent.items()
        ],
        "left_out": [],
    }
    peaks = {}
    if options.peak_memory and not on_cuda:
        for dtype in dict.fromkeys(job.dtype for job in options.jobs):
            for provider in loaded:
                cases = [job.case for job in options.jobs if job.dtype == dtype]
                peaks[provider.name, dtype] = measure_apart(provider, cases, dtype)
    print(report.preamble(record))
    print(report.header(options.markdown), flush=True)
    try:
        for job in options.jobs:
            case, dtype = job.case, job.dtype
            if options.budget is not None and time.monotonic() - started > options.budget:
                record["left_out"].append(f"{job.name}: no time left")
                continue
            takes_part = {
                provider: functions
                for provider, functions in loaded.items()
                if job.compiled or provider.name != COMPILED
            }
            timer = make_timer(options.device, case.elements * dtype.itemsize, case.launch_bound)
            try:
                rows, absences = measure.measure(
                    case, dtype, options.device, takes_part, probes, timer, options.rounds, rng, options.modes
                )
            except torch.cuda.OutOfMemoryError as reason:
                record["left_out"].append(f"{job.name}: {measure.describe(reason)}")
                rows, absences = [], []
            for row in rows:
                if not on_cuda and row["mode"] == "forward+backward":
                    row["peak_bytes"] = peaks.get((row["provider"], dtype), {}).get(case.name)
                print(report.line(row, options.markdown), flush=True)
            record["rows"] += rows
            record["absences"] += absences
            if options.json:  # a run that is killed at its limit leaves what it has
                save(record, options.json)
            if on_cuda:
                torch.cuda.empty_cache()
    finally:  # what was measured before an interruption is worth keeping
        if options.json:
            save(record, options.json)
        for absence in record["absences"]:
            print(report.absence_line(absence))
        if on_cuda:
            print("\n" + report.summary_table(record))
        for text in report.left_out_lines(record):
            print(text)
        taken = time.monotonic() - started
        print(f"{len(record['rows'])} rows, {len(record['left_out'])} cases left out, {taken:.0f} s")
    return int(any(absence["provider"] == BASELINE for absence in record["absences"]))


if __name__ == "__main__":
    sys.exit(main())

"""Command line: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import random
import re
import sys
from pathlib import Path

import torch

from . import measure, report
from .memory import MemoryProbes
from .peak_memory import measure_apart
from .providers import BASELINE, PROVIDERS
from .record import Record, environment, save
from .shapes import CASES
from .timing import make_timer, time_in_rounds


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"Time {BASELINE} and its peers alternately on named shapes. benchmarks/README.md says how.",
    )
    names = ",".join(str(dtype).removeprefix("torch.") for dtype in measure.TOLERANCE)
    parser.add_argument("--dtype", default="float32", help=f"comma-separated, of {names} (default: %(default)s)")
    parser.add_argument(
        "--device", type=torch.device, default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="torch's CPU threads (default: torch's choice)")
    parser.add_argument(
        "--only", type=re.compile, metavar="PATTERN", help="cases in whose name this regular expression is found"
    )
    parser.add_argument("--quick", action="store_true", help="a few cases and rounds, about a minute")
    parser.add_argument("--rounds", type=int, help="measurements of each call (default: 11, quick: 3)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="time torch.compile too (default: unless --quick)"
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
    if options.compile is None:
        options.compile = not options.quick
    if options.peak_memory is None:
        options.peak_memory = not options.quick
    if options.rounds < 2:
        parser.error("--rounds must be at least 2: one measurement has no spread")
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in measure.TOLERANCE}
    unknown = [name for name in options.dtype.split(",") if name not in dtypes]
    if unknown:
        parser.error(f"--dtype takes {names}, not {', '.join(unknown)}")
    options.dtypes = [dtypes[name] for name in options.dtype.split(",")]
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    options.cases = [
        case
        for case in CASES
        if (case.quick or not options.quick) and (options.only is None or options.only.search(case.name))
    ]
    if not options.cases:
        parser.error("no case left: names are " + ", ".join(case.name for case in CASES))
    return options


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device.index is not None:
        torch.cuda.set_device(options.device)  # events and streams belong to the current device
    rng = random.Random(0)
    timer = make_timer(options.device)
    probes = MemoryProbes(options.device)
    wanted = [provider for provider in PROVIDERS if options.compile or provider.name != "torch.compile"]
    loaded, absent = measure.load_providers(wanted, options.device)

    probed = time_in_rounds(probes.calls, timer, max(options.rounds, 11), rng)
    record: Record = {
        "environment": environment(options.device),
        "memory": probes.summaries(probed),
        "rows": [],
        "absences": [
            {"case": "", "dtype": "", "provider": name, "kind": "absent", "reason": reason}
            for name, reason in absent.items()
        ],
    }
    peaks = {}
    if options.peak_memory and options.device.type == "cpu":
        for dtype in options.dtypes:
            for provider in loaded:
                peaks[provider.name, dtype] = measure_apart(provider, options.cases, dtype)
    print(report.preamble(record))
    print(report.header(options.markdown), flush=True)
    try:
        for case in options.cases:
            for dtype in options.dtypes:
                rows, absences = measure.measure(
                    case, dtype, options.device, loaded, probes, timer, options.rounds, rng
                )
                for row in rows:
                    if row["mode"] == "forward+backward":
                        row["peak_bytes"] = peaks.get((row["provider"], dtype), {}).get(case.name)
                    print(report.line(row, options.markdown), flush=True)
                record["rows"] += rows
                record["absences"] += absences
    finally:  # what was measured before an interruption is worth keeping
        if options.json:
            save(record, options.json)
        for absence in record["absences"]:
            print(report.absence_line(absence))
    return int(any(absence["provider"] == BASELINE for absence in record["absences"]))


if __name__ == "__main__":
    sys.exit(main())

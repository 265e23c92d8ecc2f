"""Tables of a record, in aligned text or Markdown: ``python -m benchmarks.report FILE.json``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from .providers import BASELINE
from .record import Absence, Record, Row, load


def _time(seconds: float) -> str:
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * scale:#.3g}".rstrip(".") + f" {unit}"


def _ratio(row: Row) -> str:
    if row["provider"] == BASELINE:
        return "1"
    return f"{row['ratio'][BASELINE]['median']:.2f}" if BASELINE in row["ratio"] else "-"


def _peak(row: Row) -> str:
    """In multiples of the logits."""
    peak = row.get("peak_bytes")  # older records have none
    logits = math.prod(row["shape"]) * getattr(torch, row["dtype"]).itemsize
    return "-" if peak is None else f"{peak / logits:.2f}"


# Title, width (negative: left-aligned) and text of a column.
COLUMNS: list[tuple[str, int, Callable[[Row], str]]] = [
    ("case", -36, lambda row: row["case"]),
    ("dtype", -8, lambda row: row["dtype"]),
    ("mode", -16, lambda row: row["mode"]),
    ("provider", -14, lambda row: row["provider"]),
    ("time", 8, lambda row: _time(row["seconds"]["median"])),
    ("quartiles", 19, lambda row: f"{_time(row['seconds']['q1'])}–{_time(row['seconds']['q3'])}"),
    (f"× {BASELINE}", 7, _ratio),
    ("GB/s", 7, lambda row: f"{row['gb_per_s']:.3g}"),
    ("share", 6, lambda row: f"{100 * row['share']:.2g}%" if row["share"] < 1 else f"{row['share']:.0%}"),
    ("peak", 6, _peak),
    ("error", 8, lambda row: f"{max(row['error'].values()):.1e}" if row["error"] else "-"),
]


def _line(cells: list[str], markdown: bool) -> str:
    if markdown:
        return "| " + " | ".join(cells) + " |"
    padded = [
        cell.ljust(-width) if width < 0 else cell.rjust(width)
        for cell, (_, width, _) in zip(cells, COLUMNS, strict=True)
    ]
    return " ".join(padded).rstrip()


def header(markdown: bool = False) -> str:
    titles = _line([title for title, _, _ in COLUMNS], markdown)
    if not markdown:
        return titles
    return titles + "\n" + _line(["---" if width < 0 else "---:" for _, width, _ in COLUMNS], markdown)


def line(row: Row, markdown: bool = False) -> str:
    return _line([text(row) for _, _, text in COLUMNS], markdown)


def absence_line(absence: Absence) -> str:
    where = f" on {absence['case']} {absence['dtype']}" if absence["case"] else ""
    return f"{absence['provider']} not timed{where}, {absence['kind']}: {absence['reason']}"


def summary_table(record: Record) -> str:
    """The baseline in short: what it takes, how near it comes to the speed of a copy, and how much longer others take."""
    titles = ("case", "dtype", "mode", f"{BASELINE} ms", "copy", "torch", "compile")
    lines = []
    for row in record["rows"]:
        if row["provider"] != BASELINE:
            continue
        others = [row["ratio"].get(name) for name in ("torch", "torch.compile")]
        lines.append(
            (
                row["case"],
                row["dtype"],
                row["mode"],
                f"{row['seconds']['median'] * 1e3:.4f}",
                f"{row['copy_share']:.0%}",
                *("-" if ratio is None else f"{1 / ratio['median']:.2f}×" for ratio in others),
            )
        )
    widths = (-max(len(cells[0]) for cells in [titles, *lines]), -8, -16, 9, 6, 7, 8)
    return "\n".join(
        " ".join(
            cell.ljust(-width) if width < 0 else cell.rjust(width) for cell, width in zip(cells, widths, strict=True)
        ).rstrip()
        for cells in [titles, *lines]
    )


def left_out_lines(record: Record) -> list[str]:
    return [f"left out: {what}" for what in record.get("left_out", [])]


def preamble(record: Record) -> str:
    """Machine, versions and memory speed in a few lines."""
    environment = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    commit = (environment["commit"] or "no commit")[:12] + (" and changes" if environment["modified"] else "")
    machine = f"{environment['cpu']}, {environment['cpu_capability']}, {environment['threads']} threads"
    if "device_name" in environment:
        capability = "".join(map(str, environment["device_capability"]))
        machine = f"{environment['device_name']}, sm_{capability}, driver {environment.get('driver')}; {machine}"
    speeds = ", ".join(
        f"{name} {speed['median'] / 1e9:.4g} ({speed['q1'] / 1e9:.4g}–{speed['q3'] / 1e9:.4g})"
        for name, speed in record["memory"].items()
    )
    return f"{environment['date']}, {commit}\n{machine}\n{versions}\nmemory, GB/s: {speeds}\n"


def table(record: Record, markdown: bool = False) -> str:
    """The whole record as text."""
    lines = [preamble(record), header(markdown), *(line(row, markdown) for row in record["rows"])]
    if record["absences"]:
        lines += ["", *(("- " if markdown else "") + absence_line(absence) for absence in record["absences"])]
    lines += left_out_lines(record)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("record", type=Path, metavar="FILE.json")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table")
    arguments = parser.parse_args()
    print(table(load(arguments.record), arguments.markdown))


if __name__ == "__main__":
    main()

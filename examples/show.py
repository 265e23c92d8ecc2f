"""A progress bar, a curve and a table for the terminal; nothing about losses."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def progress(items: Sequence[_Item] | range, name: str) -> Iterator[_Item]:
    """The items, with a bar on the standard error, and the time of all at the end."""
    start = time.perf_counter()
    for done, item in enumerate(items, 1):  # type: ignore[var-annotated]
        yield item
        filled = 30 * done // len(items)
        seconds = time.perf_counter() - start
        bar = "█" * filled + "·" * (30 - filled)
        print(f"\r{name:24} [{bar}] {done}/{len(items)} {seconds:5.1f} s", end="", file=sys.stderr)
    print(file=sys.stderr)


def curve(values: Iterable[float], name: str, width: int = 48) -> None:
    """A line of eight heights, and the numbers at both ends."""
    values = [float(v) for v in values]
    step = max(1, len(values) // width)
    means = [sum(values[i : i + step]) / len(values[i : i + step]) for i in range(0, len(values), step)]
    low, high = min(means), max(means)
    bars = "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / (high - low or 1))] for v in means)
    print(f"{name:24} {values[0]:8.4f} {bars} {values[-1]:.4f}")


def table(rows: Sequence[Sequence[object]]) -> None:
    """Rows under their heads, the first one."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for number, row in enumerate(cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("─" * width for width in widths))


def synchronize() -> None:
    """Waits for the GPU, where there is one, so that times are those of the work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()

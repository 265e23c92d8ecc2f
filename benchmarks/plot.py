"""Draws a record: ``python -m benchmarks.plot FILE.json -o FILE.svg``. Nothing is measured here.

``--front`` draws a few cases beside torch, for the top of a page, and not all of them beside the memory's speed.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from .calls import MODES
from .record import Record, load


def draw(record: Record, path: Path) -> None:
    """One panel per dtype and mode: each provider's time on each case in multiples of the memory floor.

    The floor, the black line, is the least time that the byte model allows at the memory speed measured in the same
    rounds. The axis is logarithmic; a bar ends at the median, the line across its end spans the quartiles.
    """
    rows = record["rows"]
    if not rows:
        raise ValueError("the record has no rows")
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    thickness = 0.8 / len(names)
    height = 1.3 + (0.12 + 0.11 * len(names)) * len(cases) * len(dtypes)
    figure, axes = pyplot.subplots(
        len(dtypes),
        len(modes),
        figsize=(5.5 * len(modes), height),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis_row, dtype in zip(axes, dtypes, strict=True):
        for axis, mode in zip(axis_row, modes, strict=True):
            for index, name in enumerate(names):
                shown = [row for row in rows if (row["dtype"], row["mode"], row["provider"]) == (dtype, mode, name)]
                floors = [row["share"] * row["seconds"]["median"] for row in shown]
                median, q1, q3 = (
                    [row["seconds"][key] / floor for row, floor in zip(shown, floors, strict=True)]
                    for key in ("median", "q1", "q3")
                )
                heights = [cases.index(row["case"]) + thickness * (index - (len(names) - 1) / 2) for row in shown]
                axis.barh(heights, median, height=0.9 * thickness, color=f"C{index}", label=name)
                axis.hlines(heights, q1, q3, color="black", linewidth=0.6)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.set_xscale("log")
            axis.set_xlim(left=0.5)
            axis.set_yticks(range(len(cases)), cases, fontsize=8)
            axis.set_title(f"{mode}, {dtype}", fontsize=9)
            axis.grid(axis="x", alpha=0.3)
    axes[0, 0].invert_yaxis()  # shared by all panels: the first case on top
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=len(names), fontsize=8)
    environment = record["environment"]
    machine = environment.get("device_name", f"{environment['cpu']}, {environment['threads']} threads")
    figure.supxlabel("time in multiples of the memory floor (left is faster)", fontsize=9)
    figure.suptitle(f"{machine}, torch {environment['versions']['torch']}", fontsize=10, x=0.02, ha="left")
    _save(figure, path)


# What the front shows: one case of each kind, at least 4 MiB of logits, as memory is not measured below.
FRONT = {
    "lm-1024x50257": "language model\n1024 × 50257",
    "imagenet-4096x1000": "ImageNet\n4096 × 1000",
    "rows-262144x100": "many rows\n262144 × 100",
    "planes-8x21x512x512": "segmentation\n8 × 21 × 512 × 512",
}


def draw_front(record: Record, path: Path) -> None:
    """Eight bars: time and memory of a forward and backward on the cases of ``FRONT``, as shares of torch's.

    The background is left out and the colours are of middle lightness: the picture stands on light and on dark pages.
    """
    rows = {(row["case"], row["provider"]): row for row in record["rows"] if row["mode"] == "forward+backward"}
    times = [rows[case, "nllx"]["ratio"]["torch"]["median"] for case in FRONT]
    peaks = [[rows[case, provider]["peak_bytes"] for case in FRONT] for provider in ("nllx", "torch")]
    memory = [nllx / torch if nllx and torch else math.nan for nllx, torch in zip(*peaks, strict=True)]
    grey = "#808893"
    style = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), grey)
    with matplotlib.rc_context({**style, "font.size": 12}):
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.4), sharey=True, layout="constrained")
        for axis, title, shares in zip(axes, ("time", "memory added"), (times, memory), strict=True):
            axis.barh(range(len(FRONT)), [1.0] * len(FRONT), height=0.62, color=grey, alpha=0.18)
            axis.barh(range(len(FRONT)), shares, height=0.62, color="#e8590c")
            for height, share in enumerate(shares):
                axis.text(share + 0.02, height, f"{_times(1 / share)} less", va="center", weight="bold")
            axis.set_yticks(range(len(FRONT)), FRONT.values())
            axis.set_xlim(0, 1)
            axis.set_xticks([0, 1], ["0", "torch's"])
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            axis.set_title(f"{title}, forward + backward", weight="bold", fontsize=12)
        axes[0].invert_yaxis()
        axes[0].text(0, 1.02, "nllx", color="#e8590c", weight="bold", transform=axes[0].transAxes)
        _save(figure, path, transparent=True)


def _times(ratio: float) -> str:
    """As in the tables: two digits."""
    return f"{ratio:.1f} ×" if ratio < 9.95 else f"{ratio:.0f} ×"


def _save(figure: pyplot.Figure, path: Path, **options: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date and with fixed ids, the same record draws the same file.
    with matplotlib.rc_context({"svg.hashsalt": "nllx"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, **options)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("record", type=Path, metavar="FILE.json")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.svg")
    parser.add_argument("--front", action="store_true", help="time and memory of four cases as shares of torch's")
    arguments = parser.parse_args()
    (draw_front if arguments.front else draw)(load(arguments.record), arguments.output)


if __name__ == "__main__":
    main()

"""Draws a record: ``python -m benchmarks.plot FILE.json -o FILE.svg``. Nothing is measured here."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from .providers import MODES
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
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date and with fixed ids, the same record draws the same file.
    with matplotlib.rc_context({"svg.hashsalt": "nllx"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("record", type=Path, metavar="FILE.json")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.svg")
    arguments = parser.parse_args()
    draw(load(arguments.record), arguments.output)


if __name__ == "__main__":
    main()

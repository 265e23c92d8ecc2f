"""``python -m demo``: three trainings on real data, each twice from one seed, with torch's loss and with nllx's.

Prints both side by side and draws the loss curves. The exit status is 1 if two curves differ by more than float32
rounding explains, or if a training did not learn.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch

import nllx

from .digits import digits_task
from .language_model import language_model_task
from .picture import draw_curves
from .segmentation import segmentation_task
from .training import Run, make_reproducible, train

# The last bits of the two losses differ, and training carries that difference on and lets it grow. Exchanging torch's
# loss for another order of the same sums moves these curves by a few 1e-6; a wrong gradient moves them by far more.
TOLERANCE = 1e-4
TASKS = {"digits": digits_task, "language-model": language_model_task, "segmentation": segmentation_task}
LEARNED = 0.7  # of the first loss: a training that ends above it has not learned


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description="Train with torch's loss and with nllx's.")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("build/demo/curves.png"), help="where the picture goes")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), help="by default all")
    arguments = parser.parse_args()

    start = time.perf_counter()
    make_reproducible()
    print(f"nllx {nllx.__version__}, torch {torch.__version__}, {describe(arguments.device)}")
    results: dict[str, tuple[Run, Run]] = {}
    for task in (TASKS[name]() for name in arguments.only):
        print(f"\n{task.name}: {task.description}", flush=True)
        runs = []
        for label, loss_function in (("torch", torch.nn.CrossEntropyLoss), ("nllx", nllx.CrossEntropyLoss)):
            run = train(task, loss_function, f"{task.name}, {label}", arguments.device)
            print(
                f"  {label:5} {len(run.losses)} steps in {run.total_time:.1f} s, "
                f"loss {run.losses[0]:.4f} → {run.final_loss:.4f}",
                flush=True,
            )
            runs.append(run)
        results[task.name] = (runs[0], runs[1])

    print()
    print_table(results)
    draw_curves(results, arguments.output)
    print(f"\ncurves drawn in {arguments.output}; {time.perf_counter() - start:.0f} s in all")
    return report_failures(results)


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads"


def largest_difference(reference: Run, run: Run) -> tuple[float, int]:
    """The largest absolute difference of two loss curves (NaN if either has one), and the step where it is."""
    difference = torch.tensor(reference.losses, dtype=torch.float64) - torch.tensor(run.losses, dtype=torch.float64)
    value, step = difference.abs().max(dim=0)
    return value.item(), int(step)


def print_table(results: dict[str, tuple[Run, Run]]) -> None:
    """Print one row per quantity and, for every training, a column for torch's loss and one for nllx's."""
    runs = [run for pair in results.values() for run in pair]
    score_names = dict.fromkeys(name for run in runs for name in run.scores)
    rows = [
        ("training loss, last tenth", [f"{run.final_loss:.5f}" for run in runs]),
        *(
            (f"held-out {name}", [f"{run.scores[name]:.4g}" if name in run.scores else "–" for run in runs])
            for name in score_names
        ),
        ("loss forward, median, ms", [f"{1e3 * median(run.forward_times):.3f}" for run in runs]),
        ("loss backward, median, ms", [f"{1e3 * median(run.backward_times):.3f}" for run in runs]),
        ("loss forward, all steps, s", [f"{sum(run.forward_times):.2f}" for run in runs]),
        ("loss backward, all steps, s", [f"{sum(run.backward_times):.2f}" for run in runs]),
        ("whole training, s", [f"{run.total_time:.1f}" for run in runs]),
        ("peak memory, loss alone, MiB", [f"{run.loss_memory / 2**20:.3f}" for run in runs]),
        ("peak memory, one step, MiB", [f"{run.step_memory / 2**20:.1f}" for run in runs]),
    ]
    print(f"{'':30}" + "".join(f"{name:>22}" for name in results))
    print(f"{'':30}" + "".join(f"{label:>11}" for _ in results for label in ("torch", "nllx")))
    for label, cells in rows:
        print(f"{label:30}" + "".join(f"{cell:>11}" for cell in cells))
    gaps = (largest_difference(*pair) for pair in results.values())
    print(f"{'largest gap of the curves':30}" + "".join(f"{f'{gap:.1e} at step {step}':>22}" for gap, step in gaps))
    print(
        "\nPeak memory is what tensors take beyond those there before: in the forward and backward of the loss, given\n"
        "its logits, and in a whole step of training."
    )


def report_failures(results: dict[str, tuple[Run, Run]]) -> int:
    """Say what is wrong with the trainings, if anything. Returns the exit status."""
    failures = []
    for name, (reference, ours) in results.items():
        gap, step = largest_difference(reference, ours)
        if not gap <= TOLERANCE:  # so written that NaN fails
            failures.append(f"{name}: the curves differ by {gap:.1e} at step {step}, more than {TOLERANCE:.0e}")
        for label, run in (("torch", reference), ("nllx", ours)):
            if not run.final_loss <= LEARNED * run.losses[0]:
                failures.append(f"{name}, {label}: no learning, loss {run.losses[0]:.4f} → {run.final_loss:.4f}")
    for failure in failures:
        print(failure, file=sys.stderr)
    if not failures:
        print(f"all curves agree to {TOLERANCE:.0e} at every step")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

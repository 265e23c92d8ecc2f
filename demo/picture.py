"""The picture of the loss curves."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws into a file; needs no display
from matplotlib.figure import Figure

from .training import Run


def draw_curves(results: dict[str, tuple[Run, Run]], path: Path) -> None:
    """Draw both curves of every training, torch's and nllx's, and below them how far they are apart."""
    figure = Figure(figsize=(5 * len(results), 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(results), sharex="col", height_ratios=(2, 1), squeeze=False)
    for (name, (reference, run)), (curves, gap) in zip(results.items(), axes.T, strict=True):
        curves.plot(reference.losses, color="tab:orange", linewidth=4, alpha=0.5, label="torch.nn.CrossEntropyLoss")
        curves.plot(run.losses, color="black", linewidth=0.8, label="nllx.CrossEntropyLoss")
        curves.set_title(name)
        curves.set_ylabel("loss")
        curves.legend()
        gap.plot([abs(ours - theirs) for ours, theirs in zip(run.losses, reference.losses, strict=True)], color="black")
        gap.set_ylabel("absolute difference")
        gap.set_ylim(bottom=0)
        gap.ticklabel_format(axis="y", scilimits=(0, 0))
        gap.set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)

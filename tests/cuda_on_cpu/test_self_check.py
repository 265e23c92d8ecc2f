"""``python -m nllx`` on a pretended GPU: its table of kernel families through the emulated kernels."""

from __future__ import annotations

import shutil
from pathlib import Path

import elementwise
import launches
import pytest
import torch
from cases import Case
from cases import Problem as CaseProblem
from compilation import CSRC, kernels_library
from cross_entropy_options import OptionsCase, OptionsProblem
from elementwise import ElementwiseCase
from emulator import CudaDevice, Kernels
from gpus import GPUS
from launches import Settings
from row_options import Options, OptionTensors
from softmax_statistics import run_softmax_statistics
from torch import Tensor

from nllx import _C, _families
from nllx.__main__ import main
from nllx._families import ROWS, Answer, Problem, Row

GPU = torch.device("cuda", 0)


def _fewer(row: Row, gpu: dict) -> tuple[Row, dict]:
    """Of the same families with fewer rows, on a GPU of as many fewer multiprocessors."""
    rows, classes, *inner = row.shape
    few = {**gpu, "multiprocessors": 1}
    if row.family == "tile rows, loads ahead":
        return row._replace(shape=(530_000, 2)), gpu
    if "vectors" in row.family and inner:
        return row._replace(shape=(1, classes, 32, 64)), few
    if inner:
        return row._replace(shape=(2 if "shared" not in row.family else 1, classes, *inner)), few
    if row.family.startswith(("tile", "register", "elements", "rows of targets", "options", "statistics")):
        return row._replace(shape=(min(rows, 300 if classes < 5000 else 20), classes)), gpu
    fewer = 1 if rows <= 16 else 2
    return row._replace(shape=(fewer, classes)), {
        **gpu,
        "multiprocessors": max(1, gpu["multiprocessors"] * fewer // rows),
    }


class _PretendedGpu:
    """``python -m nllx --families --small`` where the emulator answers."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, kernels: Kernels, row: Row, name: str, conservative: bool
    ) -> None:
        gpu = {**GPUS[name]._asdict(), "conservative": conservative}
        self.row, self.gpu, self.kernels = *_fewer(row, gpu), kernels
        # Without clusters and copies, as nllx::conservative() leaves a device.
        left = (1, False) if conservative else (self.gpu["cluster_blocks"], self.gpu["async_copies"])
        device = CudaDevice(self.gpu["multiprocessors"], self.gpu["shared_bytes"], *left, conservative)
        self.settings = Settings(device=device)
        for dtype in _families.SMALL[0]:
            for smoothing in (0.0, 0.1):
                expected, fewer = (
                    list(_families.plans(*of))
                    for of in ((row, dtype, smoothing, gpu), (self.row, dtype, smoothing, self.gpu))
                )
                assert fewer == expected
        self.problem = _families.problem
        self.monkeypatch = monkeypatch
        monkeypatch.setattr("nllx.__main__.devices", lambda: [GPU])
        monkeypatch.setattr("nllx.__main__.print_build", lambda: None)
        monkeypatch.setattr(_C, "cuda_device", lambda index: self.gpu, raising=False)
        monkeypatch.setattr(_C, "cuda_plans", lambda: "conservative" if conservative else "default")
        monkeypatch.setattr(_families, "ROWS", [self.row])
        monkeypatch.setattr(_families, "problem", lambda *of: self.problem(*of[:-1], torch.device("cpu")))
        monkeypatch.setattr(_families, "answer", self.answer)

    def answer(self, problem: Problem) -> Answer:
        x, shape = problem.input, tuple(problem.input.shape)
        if problem.op.startswith("mse_loss"):
            layouts = ("contiguous", "contiguous" if problem.target.is_contiguous() else "transposed", "contiguous")
            case = ElementwiseCase(shape, x.dtype, reduction="sum", layouts=layouts, wanted=(True, False))
            loss = elementwise.Problem(self.kernels, case, self.settings)
            loss.input, loss.target = loss.memory.copy(x, 0), loss.memory.copy(problem.target, 0)
            loss.grad_output = loss.memory.copy(problem.gradient.to(case.acc))
            output, total_weight = loss.forward("mse_loss")
            (grad, _) = loss.backward("mse_loss", total_weight)
            assert grad is not None
            return Answer(output, grad)
        if problem.op == "softmax_statistics":
            acc = torch.float64 if x.dtype == torch.float64 else torch.float32
            numbers, _, _, (grad,) = run_softmax_statistics(
                self.kernels, x, problem.target, [*problem.gradient.to(acc)], self.settings
            )
            return Answer(torch.stack(numbers), grad)
        if problem.of_rows is not None:
            return self._answer_with_options(problem, problem.of_rows)
        case = Case(
            "",
            "",
            shape,
            op=problem.op,
            dtype=x.dtype,
            reduction=problem.reduction,
            label_smoothing=problem.label_smoothing,
        )

        def run(gradient: Tensor, **how: bool) -> launches.Result:
            self.monkeypatch.setattr(launches, "grad_output", lambda case, output: gradient)
            settings = Settings(device=self.settings.device, **how)
            return launches.run(self.kernels, CaseProblem(case, x, problem.target), settings)

        apart = run(problem.gradient)
        if problem.op != "cross_entropy":
            return Answer(apart.output, apart.grad)
        together = run(torch.ones(()), together=True, in_place=True)
        return Answer(apart.output, apart.grad, (together.output, together.grad))

    def _answer_with_options(self, problem: Problem, of_rows: tuple[Tensor, Tensor]) -> Answer:
        x, counted = problem.input, problem.target.reshape(-1) != -100
        case = OptionsCase(tuple(x.shape), x.dtype, label_smoothing=problem.label_smoothing)
        softcap, temperature, z_loss = _families.NUMBERS.values()
        options = Options("rows", sharpness=1 / temperature, softcap=softcap, z_loss=z_loss, sample_weight=True)
        loss = OptionsProblem(case)
        loss.x, loss.index, loss.incoming = x, problem.target, problem.gradient.to(case.acc)
        loss.tensors = OptionTensors(options, counted, case.acc)
        loss.tensors.logit_scale, loss.tensors.sample_weight = (t.reshape(-1) for t in of_rows)
        if problem.reduction == "mean":
            loss.total_weight = loss.tensors.sample_weight[counted].sum()
        result = loss.run(self.kernels, self.settings)
        output = result.loss.sum(dtype=torch.float64)
        if loss.total_weight is not None:
            output = output / loss.total_weight
        return Answer(output.to(x.dtype), result.grad, grad_scale=result.grad_scale)

    def main(self) -> int:
        return main(["--families", "--small"])


# Of the tiles of a chunk there have to be as many as there are.
_ROWS = [
    pytest.param(row, marks=[pytest.mark.slow] if "tile rows, loads" in row.family else [], id=str(row[:3]))
    for row in ROWS
]


@pytest.mark.parametrize("row", _ROWS)
@pytest.mark.parametrize(("name", "conservative"), [("sm_90", False), ("sm_90", True), ("sm_80", False)])
def test_passes(
    row: Row,
    name: str,
    conservative: bool,
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _PretendedGpu(monkeypatch, kernels, row, name, conservative).main() == 0
    printed = capsys.readouterr().out
    assert f"{row.op} " in printed
    assert "%" in printed
    assert f"cluster_blocks {GPUS[name].cluster_blocks}" in printed


# Planted mistakes: the file, what stands there, and what instead.
_COPIES = ("elements.cuh", "wait_for_copies(ahead - 1);", "")
_CLUSTER = ("row_state.cuh", "if (to < blocks) *shared_of_rank", "if (to < blocks - 1) *shared_of_rank")


@pytest.mark.mutations
@pytest.mark.parametrize(
    ("source", "mistake", "family", "op"),
    [
        ("log_softmax.cu", _CLUSTER, "block rows, cluster, kept, loads ahead", "log_softmax"),
        ("log_softmax.cu", _COPIES, "block rows, kept, loads ahead", "log_softmax"),
        ("cross_entropy_forward.cu", _CLUSTER, "block rows, cluster, loads ahead", "cross_entropy"),
    ],
)
def test_a_mistake_ends_with_1(
    source: str,
    mistake: tuple[str, str, str],
    family: str,
    op: str,
    kernels: Kernels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """…and with 0 under NLLX_CUDA_PLAN=conservative, which has neither clusters nor asynchronous copies."""
    name, old, new = mistake
    shutil.copytree(CSRC, tmp_path / "csrc")
    file = tmp_path / "csrc" / "cuda" / "kernels" / name
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))
    mutated = Kernels(kernels_library(source, tmp_path / "csrc"))
    row = next(row for row in ROWS if (row.family, row.op) == (family, op))
    assert _PretendedGpu(monkeypatch, mutated, row, "sm_90", False).main() == 1
    assert "DIFFERS" in capsys.readouterr().out
    monkeypatch.undo()
    assert _PretendedGpu(monkeypatch, mutated, row, "sm_90", True).main() == 0

"""tools/gpu_check.sh: without a GPU it says so, and on a pretended one no stage stops the next."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "gpu_check.sh"
TOOLS = ("bash", "cat", "cut", "dirname", "env", "grep", "head", "mkdir", "nproc", "rm", "sed", "sleep", "tail", "tee")
SANITIZERS = ["racecheck", "synccheck", "memcheck"]
FIRST = ["machine", "build", "families", "conservative", "cuda", "graphs"]
STAGES = [*FIRST, *SANITIZERS, "tests", "benchmarks", "counters", "bad-targets"]
# A GPU, a family that hangs once it has said what it knows, and tests that fail. What else it is asked ends well.
PYTHON = r"""
echo "python $*" >>calls
case "$*" in
*is_available*) printf '9.0\tA pretended GPU\n' ;;
*"-c import"*) exit 1 ;;
"-m nllx --families") echo "  cross_entropy 4096 x 10 bfloat16"; [ -n "$NLLX_CUDA_PLAN" ] || exec sleep 60 ;;
*"-k not cuda_graphs"*) echo "1 failed, 3 passed in 2 s"; exit 1 ;;
*) echo "done: $*" ;;
esac"""
WRAPPER = 'echo "{0} $*" >>calls; while [ "$1" != python3 ]; do shift; done; exec "$@"'
# Notes the limit, and keeps a shorter one.
TIMEOUT = f'echo "limit $2" >>calls; shift 2; exec {shutil.which("timeout")} 2 "$@"'

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="a shell script"),
    pytest.mark.skipif(not SCRIPT.exists(), reason="not run from a source tree"),
]


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder of the script, and bin/ as the whole PATH: the shell's tools and stand-ins of what has to do with a GPU."""
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or pytest.skip(f"no {tool}"))
    (tmp_path / "tools").mkdir()
    shutil.copy(SCRIPT, tmp_path / "tools")
    _program(tmp_path, "python3", PYTHON)
    _program(tmp_path, "timeout", TIMEOUT)
    _program(tmp_path, "nvidia-smi", "echo the device; exit 0")
    for name in ("compute-sanitizer", "ncu"):
        _program(tmp_path, name, WRAPPER.format(name))
    return tmp_path


def _program(machine: Path, name: str, script: str) -> None:
    path = machine / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def _run(machine: Path, *stages: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "tools/gpu_check.sh", *stages],
        cwd=machine,
        env={"PATH": str(machine / "bin")},
        capture_output=True,
        text=True,
        timeout=120,
    )


def _summary(machine: Path) -> dict[str, str]:
    _, *lines = (machine / "build/gpu-check/summary.txt").read_text().splitlines()
    return {line.split()[0]: line.split()[1] for line in lines}


def test_without_a_gpu(machine: Path) -> None:
    _program(machine, "python3", "exit 0")
    result = _run(machine)
    assert result.returncode == 1
    assert "python3 sees no NVIDIA GPU" in result.stderr
    assert not (machine / "build").exists()


def test_on_a_pretended_gpu(machine: Path) -> None:
    """A stage that hangs, and one that fails, leave their logs, and the others run, in order."""
    result = _run(machine)
    assert result.returncode == 1, result.stderr
    summary = _summary(machine)
    assert list(summary) == STAGES
    bad = {"families": "TIMED-OUT", "cuda": "FAILED"}
    assert summary == dict.fromkeys(STAGES, "passed") | bad
    logs = machine / "build" / "gpu-check"
    assert (logs / "families.log").read_text() == "  cross_entropy 4096 x 10 bfloat16\n"
    assert "1 failed" in (logs / "cuda.log").read_text()
    assert all((logs / f"{name}.log").stat().st_size > 0 for name in STAGES)

    calls = (machine / "calls").read_text()
    limits = [int(limit) for limit in re.findall(r"^limit (\d+)$", calls, re.MULTILINE)]
    assert len(limits) == len(STAGES)
    assert max(limits) <= 150
    assert limits[STAGES.index("families")] == 60
    tools = re.findall(r"^compute-sanitizer --tool (\w+) --kernel-name kns=nllx ", calls, re.MULTILINE)
    assert tools == SANITIZERS
    assert calls.count("cuda_graphs") == 4  # left out once, and three processes
    assert "--metrics" in calls


def test_what_is_not_there_is_left_out(machine: Path) -> None:
    for name in ("nvidia-smi", "compute-sanitizer", "ncu"):
        (machine / "bin" / name).unlink()
    _run(machine, "machine", "racecheck", "counters", "bad-targets")
    assert _summary(machine) == {
        **dict.fromkeys(["machine", "racecheck", "counters"], "unavailable"),
        "bad-targets": "passed",
    }


def test_nothing_runs_without_a_build(machine: Path) -> None:
    _program(machine, "python3", PYTHON.replace('*"-c import"*)', '*setup.py*) echo broken; exit 1 ;;\n*"-c import"*)'))
    assert _run(machine).returncode == 1
    assert _summary(machine) == {"machine": "passed", "build": "FAILED"}


def test_ten_minutes(machine: Path) -> None:
    """What is left of them bounds a stage, and none begins after them."""
    script = machine / "tools" / "gpu_check.sh"
    script.write_text(script.read_text().replace("total=600", "total=5"))
    _program(machine, "timeout", f'exec {shutil.which("timeout")} "$@"')
    _run(machine, "families", "cuda")
    assert _summary(machine) == {"families": "TIMED-OUT", "cuda": "left-out"}


def test_no_such_stage(machine: Path) -> None:
    result = _run(machine, "everything")
    assert result.returncode == 2
    assert "no stage 'everything'" in result.stderr

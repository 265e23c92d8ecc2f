"""What a run leaves behind: one JSON file with the machine, the versions and a row for each measurement."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, TypedDict

import torch

Summary = dict[str, float]
"""``median``, ``q1``, ``q3`` and ``n``"""


class Row(TypedDict):
    """One provider in one mode on one case.

    ``seconds``: per call. ``bytes``: read and written, by the byte model. ``share``: memory floor over time.
    ``copy_share``: these bytes over the time and the speed of the copy. ``memory``: bytes per second of each probe in the
    same rounds. ``ratio``: this provider's time over that of each other one, whose forward+backward stands for a
    value_and_grad that it lacks. ``error``: largest relative errors against float64, see ``measure.error``.
    ``peak_bytes``: the most that the call adds to resident memory, or to what is allocated on a GPU; None where that was
    not measured.
    """

    case: str
    op: str
    shape: list[int]
    origin: str
    dtype: str
    mode: str
    provider: str
    seconds: Summary
    bytes: int
    gb_per_s: float
    share: float
    copy_share: float  # older records have none
    memory: dict[str, Summary]
    ratio: dict[str, Summary]
    error: dict[str, float]
    peak_bytes: int | None


class Absence(TypedDict):
    """A provider that was not timed, on one case or, where ``case`` and ``dtype`` are empty, on all.

    ``kind``: "absent", "failed" or "wrong".
    """

    case: str
    dtype: str
    provider: str
    kind: str
    reason: str


class Record(TypedDict):
    environment: dict[str, Any]
    memory: dict[str, Summary]
    rows: list[Row]
    absences: list[Absence]
    left_out: list[str]
    """Case and dtype of what was not started, and why; older records have none."""


def _command(*words: str) -> str | None:
    try:
        return subprocess.run(
            words, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def environment(device: torch.device) -> dict[str, Any]:
    """Date, commit, versions and machine of this run."""
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _command("git", "rev-parse", "HEAD") or os.environ.get("NLLX_COMMIT"),
        "modified": bool(_command("git", "status", "--porcelain")),
        "platform": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "nllx": getattr(sys.modules.get("nllx"), "__version__", None),  # of what is timed, installed or not
            "triton": _version("triton"),
            "jax": _version("jax"),
            "cuda": torch.version.cuda,
        },
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        record["device_name"] = torch.cuda.get_device_name(device)
        record["device_capability"] = list(torch.cuda.get_device_capability(device))
        driver = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        record["driver"] = driver.splitlines()[0] if driver else None
    return record


def save(record: Record, path: Path) -> None:
    """Whenever the process is killed, the file is whole: the record before or this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(path)


def load(path: Path) -> Record:
    return json.loads(path.read_text())

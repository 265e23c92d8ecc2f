"""The CPU kernels of every capability that this machine has: the tests above run those of the widest vectors alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from nllx import _C

ROOT = Path(__file__).resolve().parents[2]


def _python(capability: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NLLX_CPU_CAPABILITY": capability}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_capability(capability: str) -> None:
    if capability == _C.cpu_capability():
        return  # every other test
    chosen = _python(capability, "-c", "from nllx import _C; print(_C.cpu_capability())")
    if chosen.returncode:
        assert "this CPU runs" in chosen.stderr
        pytest.skip(chosen.stderr.strip().splitlines()[-1])
    assert chosen.stdout.strip() == capability
    tests = ["semantics/test_values.py::test_value", "semantics/test_gradients.py::test_gradient"]
    tests += ["cpu/test_determinism.py::test_number_of_threads", "cpu/test_exponential.py"]
    run = _python(
        capability,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-k",
        "not cuda",
        *(f"tests/{test}" for test in tests),
    )
    assert run.returncode == 0, run.stdout[-5000:]


@pytest.mark.skipif(
    "NLLX_REQUIRE_QEMU" not in os.environ, reason="NLLX_REQUIRE_QEMU: a minute, and apt install qemu-user"
)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="emulates x86-64 on itself")
@pytest.mark.parametrize(("cpu", "capability"), [("Nehalem", "default"), ("IvyBridge", "default"), ("Haswell", "avx2")])
def test_on_an_emulated_cpu(cpu: str, capability: str) -> None:
    """This very binary on a CPU without AVX, with AVX alone, and without AVX-512: no instruction that it does not have,
    at which qemu ends the process, in comparisons with torch."""
    environment = {name: value for name, value in os.environ.items() if name != "NLLX_CPU_CAPABILITY"}
    command = ["qemu-x86_64", "-cpu", cpu, sys.executable, "-m", "nllx"]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, (run.returncode, run.stderr[-3000:])
    assert f"CPU capability     {capability}," in run.stdout
    assert "self-check         passed" in run.stdout


def test_unknown_capability() -> None:
    run = _python("sse9", "-c", "import nllx")
    assert run.returncode != 0
    assert 'NLLX_CPU_CAPABILITY is "sse9"' in run.stderr

"""The CPU kernels run on torch's threads, and on no other OpenMP runtime's."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and an ELF file")


def test_extension_calls_openmp() -> None:
    """Compiled without -fopenmp, at::parallel_for of torch's headers runs on one thread and says nothing."""
    spec = find_spec("nllx._C")
    assert spec is not None
    assert spec.origin is not None
    with open(spec.origin, "rb") as file:
        content = file.read()
    assert b"GOMP_parallel" in content or b"__kmpc_fork_call" in content


def test_one_openmp_runtime_in_the_process() -> None:
    code = "import nllx; print({l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l or 'libomp' in l})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len(eval(out)) == 1, out

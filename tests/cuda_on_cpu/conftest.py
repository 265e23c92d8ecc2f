"""The libraries, built once."""

from __future__ import annotations

import pytest
from compilation import CSRC, HERE, compiler, kernels_library, library
from launches import Emulator, Kernels


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    """The kernels of ``emulator_kernels.cpp``."""
    if compiler() is None:
        pytest.skip("no g++ on PATH")
    return Emulator(library([(HERE / "emulator_kernels.cpp", CSRC)]))


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """The kernels of csrc/cuda."""
    if compiler() is None:
        pytest.skip("no g++ on PATH")
    return Kernels(kernels_library())

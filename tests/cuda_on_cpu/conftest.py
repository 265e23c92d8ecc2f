"""The libraries, built once, and what holds for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from compilation import CSRC, HERE, compiler, kernels_library, library
from emulator import Emulator, Kernels


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


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The oracle's tensors are small: waiting for other threads of torch takes longer than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

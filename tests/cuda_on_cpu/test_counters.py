"""csrc/cuda/kernels/counters.cpp: where the counters of a stream come from, and whose they are."""

from __future__ import annotations

import ctypes
import itertools

import pytest
from cases import Case, build
from comparison import variant
from emulator import CudaDevice, KernelError, Kernels
from launches import Settings, _Loss

_BYTES = 4 * (1 + 1024)  # kCounters of csrc/cuda/kernels/launches.h


class _Counters:
    def __init__(self, kernels: Kernels) -> None:
        library = kernels.library
        address = ctypes.c_void_p.in_dll(library, "counters_of_stream").value
        assert address is not None
        arguments = (ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
        self._of = ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(address)
        self._log = library.emulator_allocations
        self._log.restype, self._log.argtypes = ctypes.c_char_p, [ctypes.c_bool]
        self.mode = library.emulator_capture_mode
        self.log()

    def of(self, device: int, stream: int) -> int:
        found = ctypes.c_void_p()
        status = self._of(device, stream, ctypes.byref(found))
        if status:
            raise MemoryError(status)
        assert found.value is not None
        return found.value

    def log(self, fail: bool = False) -> list[str]:
        return self._log(fail).decode().splitlines()


@pytest.fixture
def counters(kernels: Kernels) -> _Counters:
    return _Counters(kernels)


def test_memory_of_a_stream_is_its_own_and_the_runtimes(counters: _Counters) -> None:
    """Not torch's allocator's, which may take it from the pool of a graph; asked for once, also while something is captured."""
    first = counters.of(0, 0x1000)
    assert counters.log() == [f"malloc {_BYTES} in mode 2", f"memset on {0x1000}"]
    assert counters.mode() == 0
    assert counters.of(0, 0x1000) == first
    assert counters.log() == []
    places = [first, counters.of(0, 0x2000), counters.of(1, 0x1000), counters.of(0, 0)]
    assert len(counters.log()) == 6
    spans = sorted((place, place + _BYTES) for place in places)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert all(ctypes.string_at(place, _BYTES) == bytes(_BYTES) for place in places)


def test_zero_after_a_launch_that_is_refused(kernels: Kernels) -> None:
    """…of which no block has run. What an error cuts off takes its context along (tests/cuda)."""
    case = variant(Case("", "", (600, 100_000), reduction="sum"))
    no_gpu = CudaDevice(1, 4 << 20)  # whose shared memory holds a row that no block may ask for
    loss = _Loss(kernels, build(case), Settings(together=True, device=no_gpu))
    with pytest.raises(KernelError, match="too much dynamic shared memory"):
        loss.run()
    assert loss.counters is not None
    assert not loss.counters.any()


def test_no_memory(counters: _Counters) -> None:
    """An error once is none for ever, and leaves the thread as it was."""
    counters.log(fail=True)
    with pytest.raises(MemoryError):
        counters.of(0, 0x3000)
    assert counters.mode() == 0
    counters.log(fail=False)
    assert ctypes.string_at(counters.of(0, 0x3000), _BYTES) == bytes(_BYTES)

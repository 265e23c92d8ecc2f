"""The emulator itself: what it computes is what CUDA says, and what is wrong in a kernel shows."""

from __future__ import annotations

import ctypes
import functools

import pytest
import torch
from compilation import ADDRESS_SANITIZER
from emulator import ASCENDING, DESCENDING, RANDOM, Emulator, KernelError, Launch
from memory import Memory, address, bits
from torch import Tensor

ORDERS = (ASCENDING, DESCENDING, RANDOM, RANDOM + 1)


def check_indices(emulator: Emulator, order: int) -> None:
    out = torch.zeros(12, 60, dtype=torch.int32)
    emulator.launched.clear()
    emulator.run(lambda: emulator.library.indices(address(out)), order)
    assert torch.equal(out, (1000 * torch.arange(12)[:, None] + torch.arange(60)).int())
    assert emulator.launched == [Launch("indices_kernel", 2, 60)]


@pytest.mark.parametrize("order", ORDERS)
def test_every_thread_of_every_block_runs_once(emulator: Emulator, order: int) -> None:
    check_indices(emulator, order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("width", [32, 16, 4, 1])
@pytest.mark.parametrize("n", [0, 1, 3, 8])
def test_shuffles(emulator: Emulator, order: int, width: int, n: int) -> None:
    out = torch.zeros(4, 32, dtype=torch.float64)
    emulator.run(lambda: emulator.library.shuffles(width, n, address(out)), order)
    expected = []
    for lane in range(32):
        first = lane // width * width
        up, down = lane - n, lane + n
        expected.append(
            [
                first + n % width,
                lane ^ n if (lane ^ n) < first + width else lane,
                down if down < first + width else lane,
                up if up >= first else lane,
            ]
        )
    assert torch.equal(out.T, torch.tensor(expected).double())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("limit", [0, 1, 32, 40, 64])
def test_votes(emulator: Emulator, order: int, limit: int) -> None:
    out = torch.zeros(64, 6, dtype=torch.int32)
    emulator.run(lambda: emulator.library.votes(limit, address(out)), order)
    for thread, row in enumerate(out.tolist()):
        inside = min(max(limit - thread // 32 * 32, 0), 32)  # of its warp
        ballot = ctypes.c_int32((1 << inside) - 1).value
        assert row == [limit, limit > 0, limit == 64, ballot, inside > 0, inside == 32]


@pytest.mark.parametrize("order", ORDERS)
def test_parts_of_a_warp_meet_apart(emulator: Emulator, order: int) -> None:
    out = torch.zeros(32, dtype=torch.int32)
    emulator.run(lambda: emulator.library.halves(address(out)), order)
    assert out.tolist() == [sum(range(16))] * 16 + [31] * 16


@pytest.mark.parametrize(("order", "first"), [(ASCENDING, 0), (DESCENDING, 99)])
def test_atomics(emulator: Emulator, order: int, first: int) -> None:
    out = torch.zeros(3, dtype=torch.int32)
    emulator.run(lambda: emulator.library.atomics(address(out)), order)
    assert out.tolist() == [sum(range(100)), 99, first + 1]


def _neighbours(emulator: Emulator, order: int, before: bool, after: bool) -> Tensor:
    out = torch.zeros(2, 64)
    barriers = ctypes.c_bool(before), ctypes.c_bool(after)
    emulator.run(lambda: emulator.library.neighbours(*barriers, address(out)), order)
    return out


def test_a_missing_barrier_shows(emulator: Emulator) -> None:
    expected = (torch.arange(64) + 1) % 64 + torch.tensor([[0.0], [100.0]])
    for order in ORDERS:
        assert torch.equal(_neighbours(emulator, order, True, True), expected)
        # Shared memory is NaN before it is written.
        assert _neighbours(emulator, order, False, False).isnan().any()
    # A warp that goes on overwrites what another one is still to read.
    assert not all(torch.equal(_neighbours(emulator, order, True, False), expected) for order in ORDERS)


def _clusters(emulator: Emulator, order: int, blocks: int, begin: bool, end: bool, dynamic: bool) -> Tensor:
    out = torch.zeros(2, blocks, 64, dtype=torch.int32)
    how = ctypes.c_bool(begin), ctypes.c_bool(end), ctypes.c_bool(dynamic)
    emulator.run(lambda: emulator.library.clusters(blocks, *how, address(out)), order)
    return out


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
@pytest.mark.parametrize("dynamic", [False, True])
def test_clusters(emulator: Emulator, blocks: int, dynamic: bool) -> None:
    told = (100 * torch.arange(2 * blocks)[:, None] + torch.arange(64)).int().reshape(2, blocks, 64)
    for order in ORDERS:
        assert torch.equal(_clusters(emulator, order, blocks, True, True, dynamic), told.roll(1, dims=1))
        if blocks == 1:
            continue
        # What another block has is there after both have met; before, it may not even have begun.
        with pytest.raises(KernelError, match="shared_of_rank: the other block may not have begun"):
            _clusters(emulator, order, blocks, False, True, dynamic)
    if blocks > 1:
        with_end = (_clusters(emulator, order, blocks, True, False, dynamic) for order in (ASCENDING, DESCENDING))
        with pytest.raises((KernelError, AssertionError), match=r"shared_of_rank: the other block has ended|told"):
            assert all(torch.equal(out, told.roll(1, dims=1)) for out in with_end), "not what was told"


# The words that lanes want of one bank; 16 lanes at a time want 8 bytes each, and one word goes to all that want it.
@pytest.mark.parametrize(
    ("bytes", "stride", "cycles"),
    [
        *((2, 1, 1), (2, 2, 1), (2, 4, 2), (2, 9, 2), (2, 64, 32)),
        *((4, 1, 1), (4, 2, 2), (4, 3, 1), (4, 12, 4), (4, 32, 32)),
        *((8, 1, 1), (8, 2, 2), (8, 16, 16)),
    ],
)
def test_banks(emulator: Emulator, bytes: int, stride: int, cycles: int) -> None:
    for order in ORDERS:
        emulator.count_banks(True)
        emulator.run(lambda: emulator.library.banks(bytes, stride), order)
        counted = emulator.count_banks(False)
        assert list(counted.values()) == [cycles, cycles]
        assert all(place.startswith("emulator_kernels.cpp:") for place in counted)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("cluster_deadlock", r"and its cluster: 96 threads have returned .*96 threads wait in cluster_wait"),
        ("wait_without_arrival", "cluster_wait: without cluster_arrive"),
        ("two_arrivals", "cluster_arrive: a second time without cluster_wait"),
        ("no_such_rank", "shared_of_rank: the cluster has no block 4"),
        ("parts_of_clusters", "no such grid, block or cluster"),
        ("deadlock", r"24 threads have returned .*32 threads wait in __syncthreads .*8 threads wait in __syncwarp"),
        ("not_in_mask", "__syncwarp: the lane that calls it is not in its mask"),
        ("source_not_in_mask", r"__shfl_xor_sync: the source, lane (1[6-9]|2\d|3[01]), is not in the mask"),
        ("mixed_collectives", "other lanes of its mask are in"),
        ("too_many_threads", "no such grid, block or cluster"),
        ("wild", "segmentation fault"),
        ("shared_of_another_kernel", "beyond_dynamic_shared_kernel: dynamic shared memory without ALLOW_SHARED"),
        ("more_shared_than_ever", "more dynamic shared memory than is asked for"),
    ],
)
def test_what_is_wrong_is_reported(emulator: Emulator, function: str, message: str) -> None:
    out = torch.zeros(64)
    for order in ORDERS:
        with pytest.raises(KernelError, match=message):
            emulator.run(lambda: getattr(emulator.library, function)(address(out)), order)
        check_indices(emulator, order)  # the next launch is whole


@pytest.mark.skipif(
    ADDRESS_SANITIZER, reason="the one sanitizer's report, on a fiber's stack, may end in the other's fault"
)
def test_the_sanitizer_reports(emulator: Emulator) -> None:
    memory = Memory()
    aligned, unaligned = memory.copy(torch.rand(128)), memory.copy(torch.rand(128), shift=1)
    out = memory.empty([128], torch.float32)
    emulator.run(lambda: emulator.library.misaligned(address(aligned), address(out)))
    assert torch.equal(out, aligned)
    with pytest.raises(KernelError, match=r"undefined behaviour .*misaligned.*emulator_kernels.cpp"):
        emulator.run(lambda: emulator.library.misaligned(address(unaligned), address(out)))


def test_guard_zones() -> None:
    memory = Memory()
    source = torch.full((3, 8), torch.nan)[:, 1:6].copy_(torch.rand(3, 5))
    copy = memory.copy(source)
    assert torch.equal(copy, source)
    assert copy.stride() == source.stride()
    assert copy.data_ptr() % 16 == 4
    output = memory.empty([3, 5], torch.bfloat16, [8, 1], shift=3)
    assert output.data_ptr() % 16 == 6
    output.copy_(source)
    memory.check()
    assert torch.equal(output, source.bfloat16())
    between = output.as_strided([1], [1], output.storage_offset() + 5)
    between.zero_()
    with pytest.raises(AssertionError, match="memory beside an output was written"):
        memory.check()
    bits(between).fill_(-1)
    memory.check()
    copy[0, 0] += 1
    with pytest.raises(AssertionError, match="an input was written"):
        memory.check()


def test_reads_past_the_end(emulator: Emulator) -> None:
    """…whose value is not used stop a kernel as well."""
    memory = Memory()
    source, out = memory.copy(torch.rand(124)), memory.empty([128], torch.float32)
    with pytest.raises(KernelError, match=r"segmentation fault in thread 31 of block 0|AddressSanitizer: "):
        emulator.run(lambda: emulator.library.misaligned(address(source), address(out)))


@pytest.mark.skipif(
    not ADDRESS_SANITIZER, reason="the address sanitizer is not in this process (tools/cuda_check.sh on-cpu)"
)
def test_the_address_sanitizer_reports(emulator: Emulator) -> None:
    """A float past the end, before the page that cannot be accessed; shared memory past its end."""
    memory = Memory()
    source, out = memory.copy(torch.rand(127)), memory.empty([128], torch.float32)
    with pytest.raises(KernelError, match="AddressSanitizer: "):
        emulator.run(lambda: emulator.library.misaligned(address(source), address(out)))
    for run in (emulator.library.beyond_shared, emulator.library.beyond_dynamic_shared):
        with pytest.raises(KernelError, match="AddressSanitizer"):
            emulator.run(functools.partial(run, address(torch.zeros(64))))

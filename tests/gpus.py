"""GPUs by the figures that the choice of a kernel depends on: the one table of the tests of plans."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    multiprocessors: int
    shared_bytes: int  # the most that a block may ask for
    cluster_blocks: int = 1  # the most of a cluster
    async_copies: bool = True


# T4, A100, RTX 3090, L4, H100, B200, RTX 5090. Source: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability".
GPUS = {
    "sm_75": Gpu(40, 64 << 10, async_copies=False),
    "sm_80": Gpu(108, 163 << 10),
    "sm_86": Gpu(82, 99 << 10),
    "sm_89": Gpu(58, 99 << 10),
    "sm_90": Gpu(132, 227 << 10, 8),
    "sm_100": Gpu(148, 227 << 10, 8),
    "sm_120": Gpu(170, 99 << 10, 8),
}

"""Measured memory speed: the yardstick that the byte model is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from .byte_model import Speeds
from .timing import l2_bytes, summary

MIB = 1 << 20


def _cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache (of all of them where a machine has several), 0 where it cannot be told."""
    if device.type == "cuda":
        return l2_bytes(device)
    sizes = {}
    for cache in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        kibibytes = (cache / "size").read_text().strip().removesuffix("K")
        sizes[(cache / "shared_cpu_list").read_text()] = int(kibibytes) << 10
    return sum(sizes.values())


class MemoryProbes:
    """Three torch calls on float32 buffers several times larger than the caches, timed in the providers' rounds.

    - ``read``: ``amax``, which has the least arithmetic of torch's reductions (as fast as a hand-written load loop)
    - ``copy``: ``copy_`` from one buffer to another, read and written bytes counted (device to device on CUDA)
    - ``update``: ``mul_`` in place, read and written bytes counted

    A CPU copy first reads the line that it is about to overwrite, unless it uses streaming stores, and these bytes are
    not counted. An update never does. So ``Speeds.read_write`` is the faster of the two: the bound that a kernel with
    streaming stores cannot pass either.
    """

    def __init__(self, device: torch.device) -> None:
        size = max((256 if device.type == "cpu" else 1024) * MIB, 4 * _cache_bytes(device))
        # Random numbers: pages of zeros that were never written may all be one page, which is then read from cache.
        source = torch.randn(size // 4, device=device)
        destination = source.clone()
        self.calls: dict[str, Callable[[], object]] = {
            "read": source.amax,
            "copy": lambda: destination.copy_(source),
            "update": lambda: destination.mul_(1.0),
        }
        self._bytes = {"read": size, "copy": 2 * size, "update": 2 * size}

    def speeds(self, seconds: Mapping[str, float]) -> Speeds:
        """The two speeds that the byte model needs, from the seconds that each probe took in one round."""
        measured = {name: self._bytes[name] / seconds[name] for name in self.calls}
        return Speeds(measured["read"], max(measured["copy"], measured["update"]))

    def copy_speed(self, seconds: Mapping[str, float]) -> float:
        """Bytes per second of the copy, read and written both counted."""
        return self._bytes["copy"] / seconds["copy"]

    def summaries(self, seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
        """Summary of the bytes per second of each probe, from its seconds in every round."""
        return {name: summary([self._bytes[name] / taken for taken in seconds[name]]) for name in self.calls}

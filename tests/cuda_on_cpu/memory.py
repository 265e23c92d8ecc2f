"""Memory for the tensors that a kernel gets, in which access out of bounds shows."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence

import torch
from compilation import ADDRESS_SANITIZER
from torch import Tensor

_libc = ctypes.CDLL(None)
if ADDRESS_SANITIZER:
    _forbid, _allow = _libc.__asan_poison_memory_region, _libc.__asan_unpoison_memory_region
else:

    def _forbid(begin: ctypes.c_void_p, size: ctypes.c_size_t) -> None: ...

    def _allow(begin: ctypes.c_void_p, size: ctypes.c_size_t) -> None: ...


def _window(shape: Sequence[int], stride: Sequence[int]) -> int:
    """The elements from the first to the last of a tensor."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


class Memory:
    """Tensors in memory of their own: what lies around a tensor and between its elements is NaN, or -1, and less than
    16 bytes after its end begins a page that cannot be accessed; with the address sanitizer the bytes before that page cannot
    be accessed either, until ``check``."""

    def __init__(self) -> None:
        self._tensors: list[tuple[Tensor, Tensor, Tensor | None]] = []  # buffer, tensor, bytes that it has to keep

    def _place(
        self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, shift: int
    ) -> tuple[Tensor, Tensor]:
        size, misaligned = _window(shape, stride) * dtype.itemsize, shift * dtype.itemsize % 16
        pages = 1 + math.ceil((size + 16) / mmap.PAGESIZE)
        area = torch.frombuffer(mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE), dtype=torch.uint8)
        buffer, fence = area.split(pages * mmap.PAGESIZE)
        status = _libc.mprotect(address(fence), ctypes.c_size_t(mmap.PAGESIZE), ctypes.c_int(0))
        assert status == 0, "mprotect failed"
        buffer.fill_(0xFF)
        begin = (len(buffer) - size - misaligned) // 16 * 16 + misaligned
        return buffer, buffer[begin : begin + size].view(dtype).as_strided(shape, stride)

    def _close(self, buffer: Tensor, tensor: Tensor) -> None:
        end = tensor.data_ptr() + _window(tensor.shape, tensor.stride()) * tensor.itemsize
        _forbid(address(buffer), ctypes.c_size_t(tensor.data_ptr() // 8 * 8 - buffer.data_ptr()))
        _forbid(ctypes.c_void_p(end), ctypes.c_size_t(buffer.data_ptr() + len(buffer) - end))

    def _open(self) -> None:
        for buffer, _, _ in self._tensors:
            _allow(address(buffer), ctypes.c_size_t(len(buffer)))

    def __del__(self) -> None:
        self._open()

    def copy(self, tensor: Tensor, shift: int | None = None) -> Tensor:
        """A copy that may only be read, with the tensor's strides and what lies between its elements, `shift` elements
        past a 16-byte boundary (by default as the tensor is)."""
        tensor = tensor.resolve_neg()
        if shift is None:
            shift = tensor.data_ptr() % 16 // tensor.itemsize
        buffer, copy = self._place(tensor.shape, tensor.stride(), tensor.dtype, shift)
        everything = [_window(tensor.shape, tensor.stride())], [1]
        copy.as_strided(*everything).copy_(tensor.as_strided(*everything))
        self._tensors.append((buffer, copy, buffer.clone()))
        self._close(buffer, copy)
        return copy

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None, shift: int = 0
    ) -> Tensor:
        """A tensor to write: contiguous, or with stride."""
        if stride is None:
            stride = torch.empty(shape, device="meta").stride()
        buffer, tensor = self._place(shape, stride, dtype, shift)
        self._tensors.append((buffer, tensor, None))
        self._close(buffer, tensor)
        return tensor

    def like(self, tensor: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
        """What an entry of nllx would allocate for a result like tensor: the strides count, the memory is not used."""
        return torch.empty_like(tensor, memory_format=memory_format)

    def check(self) -> None:
        """Nothing was written but what ``empty`` returned."""
        self._open()
        for buffer, tensor, kept in self._tensors:
            if kept is not None:
                assert torch.equal(buffer, kept), "an input was written, or memory beside it"
                continue
            values = tensor.clone()
            bits(tensor).fill_(-1)
            assert (buffer == 0xFF).all(), "memory beside an output was written"
            tensor.copy_(values)


class SparseMemory(Memory):
    """For tensors that are spread over more memory than there is: inputs as they are, outputs of zeros."""

    def copy(self, tensor: Tensor, shift: int | None = None) -> Tensor:
        return tensor

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None, shift: int = 0
    ) -> Tensor:
        return sparse(shape, dtype, stride or torch.empty(shape, device="meta").stride())

    def like(self, tensor: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
        return sparse(tensor.shape, tensor.dtype, tensor.stride())  # as spread, so that the indices of writes are too


def sparse(shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int]) -> Tensor:
    """Zeros, of which only the pages that are used take memory."""
    reserve_nothing = 0x4000  # mmap.MAP_NORESERVE of newer Pythons
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
    area = mmap.mmap(-1, _window(shape, stride) * dtype.itemsize, flags)
    return torch.frombuffer(area, dtype=dtype).as_strided(shape, stride)


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

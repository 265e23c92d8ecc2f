"""Errors that a GPU kernel has met and the host has not raised yet."""

from __future__ import annotations

import torch


def check_errors() -> None:
    """Waits for the GPUs in use and raises what their kernels have met.

    A class index out of range on a GPU does not end the process's CUDA context as in torch: the row gets a NaN loss and a
    zero gradient, nothing outside the tensors is touched, and the next nllx call on any GPU, or this function, raises. With
    the environment variable ``NLLX_SYNC_ERRORS=1`` the call itself raises, at the price of waiting for the GPU each time.
    Does nothing where no GPU is in use.

    Raises:
        IndexError: a class index was out of range; names its position and value.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)
    torch.ops.nllx._check_errors()

"""_checked_target, which the definitions of the losses of classes call: shapes and batching rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fake(target: Tensor, classes: int, ignore_index: int, op: str) -> Tensor:
    return torch.empty(target.shape, dtype=torch.int64, device=target.device)


def batched(info: Any, in_dims: Any, target: Tensor, classes: int, ignore_index: int, op: str) -> tuple[Tensor, Any]:
    return torch.ops.nllx._checked_target(target, classes, ignore_index, op), in_dims[0]


def register(library: torch.library.Library) -> None:
    torch.library.register_fake("nllx::_checked_target", fake)
    torch.library.register_vmap("nllx::_checked_target", batched, lib=library)

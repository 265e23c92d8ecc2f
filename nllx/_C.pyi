from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

class BuildInfo(TypedDict):
    torch: str
    compiler: str
    cuda: str | None
    cuda_architectures: str

class CudaPlan(TypedDict):
    family: str
    threads: int
    threads_per_row: int
    rows_at_once: int
    vector_elements: int
    splits: int
    cluster: int
    shared_bytes: int
    ahead: int
    rows_per_chunk: int
    chunks: int
    reason: str

class CudaDevice(TypedDict):
    multiprocessors: int
    shared_bytes: int
    cluster_blocks: int
    cluster_error: str
    async_copies: bool

def cuda_device(index: int) -> CudaDevice: ...  # in builds with CUDA
def cuda_plan(
    op: str,
    *,
    outer: int,
    classes: int,
    inner: int = 1,
    element_bytes: int = 4,
    planes: bool = False,
    dense: bool = True,
    aligned: bool = True,
    has_terms: bool = False,
    multiprocessors: int = 132,
    shared_bytes: int = ...,
    cluster_blocks: int = 8,
    async_copies: bool = True,
    conservative: bool = False,
) -> CudaPlan: ...
def cuda_plans() -> str: ...
def differentiate_level(
    name: str, arguments: tuple[object, ...], plain: tuple[object, ...], results: tuple[Tensor, ...]
) -> None: ...
def has_tangent(tensor: Tensor) -> bool: ...
def build_info() -> BuildInfo: ...
def cpu_capability() -> str: ...
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    logit_scale: Tensor | None,
    temperature: Tensor | None,
    divisor: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    scale: float,
    sharpness: float,
    softcap: float,
    z_loss: float,
    dtype: torch.dtype | None,
    inplace_backward: bool,
    /,
) -> Tensor: ...
def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    dtype: torch.dtype | None,
    /,
) -> Tensor: ...
def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None, /) -> Tensor: ...
def mse_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, dtype: torch.dtype | None, /
) -> Tensor: ...
def are_plain(input: object, /, *others: object) -> bool: ...
def pack_hooks() -> list[Callable[[Tensor], object]]: ...

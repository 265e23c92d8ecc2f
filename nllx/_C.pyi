from typing import TypedDict

from torch import Tensor

class BuildInfo(TypedDict):
    torch: str
    compiler: str
    cuda: str | None
    cuda_architectures: str

def build_info() -> BuildInfo: ...
def cpu_capability() -> str: ...
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    inplace_backward: bool,
    /,
) -> Tensor: ...
def nll_loss(input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, /) -> Tensor: ...
def log_softmax(input: Tensor, dim: int, /) -> Tensor: ...

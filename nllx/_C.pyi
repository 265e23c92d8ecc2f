from typing import TypedDict

class BuildInfo(TypedDict):
    torch: str
    compiler: str
    cuda: str | None
    cuda_architectures: str

def build_info() -> BuildInfo: ...
def cpu_capability() -> str: ...

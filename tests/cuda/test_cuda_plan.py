"""``_C.cuda_plan``: shapes and architectures to kernels, without a GPU. Its invariants are tested in cuda_on_cpu."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from gpus import GPUS

from nllx import _C

FULL_ROW, PARTS = "register_rows", "block_rows"


@pytest.mark.parametrize(
    ("op", "rows", "classes", "element_bytes", "family"),
    [
        ("forward", 10**6, 10, 2, "tile_rows"),
        ("backward", 10**6, 10, 2, "tile_rows"),
        ("forward", 10**6, 256, 2, FULL_ROW),
        ("forward", 10**5, 1000, 4, FULL_ROW),
        ("value_and_grad", 10**5, 1000, 2, FULL_ROW),
        ("forward", 8192, 8192, 2, PARTS),
        ("forward", 2048, 128256, 4, PARTS),
        ("backward", 2048, 128256, 2, PARTS),
        ("log_softmax", 2048, 32000, 4, PARTS),
    ],
)
@pytest.mark.parametrize("name", GPUS)
def test_family(name: str, op: str, rows: int, classes: int, element_bytes: int, family: str) -> None:
    gpu = GPUS[name]
    plan = _C.cuda_plan(op, outer=rows, classes=classes, element_bytes=element_bytes, **gpu._asdict())
    assert plan["family"] == family
    assert plan["splits"] == 1
    assert plan["shared_bytes"] <= gpu.shared_bytes
    assert plan["reason"]


@pytest.mark.parametrize("name", GPUS)
def test_few_long_rows_fill_the_chip(name: str) -> None:
    gpu = GPUS[name]
    for op in ("forward", "backward"):
        plan = _C.cuda_plan(op, outer=8, classes=262144, **gpu._asdict())
        assert plan["family"] == PARTS
        assert gpu.multiprocessors <= 8 * plan["splits"] <= 2 * gpu.multiprocessors


@pytest.mark.parametrize("name", GPUS)
def test_few_long_rows_by_clusters(name: str) -> None:
    """Where the blocks of a cluster are enough, nothing of device memory is waited for."""
    gpu = GPUS[name]
    plan = _C.cuda_plan("forward", outer=gpu.multiprocessors // 2, classes=262144, **gpu._asdict())
    assert (plan["splits"], plan["cluster"]) == ((4, 1) if gpu.cluster_blocks == 1 else (1, 4))


@pytest.mark.parametrize(
    ("name", "classes", "cluster", "shared_bytes"),
    [
        ("sm_75", 32000, 1, 0),
        ("sm_86", 32000, 1, 0),
        ("sm_90", 32000, 1, 65536),
        ("sm_90", 128256, 4, 65536),
        ("sm_90", 262144, 8, 65536),
        ("sm_100", 262144, 8, 65536),
        ("sm_120", 32000, 4, 16384),
    ],
)
def test_row_on_the_chip(name: str, classes: int, cluster: int, shared_bytes: int) -> None:
    """A row of half elements stays in the shared memory of a block or a cluster; others hold less than half of it."""
    plan = _C.cuda_plan("value_and_grad", outer=8192, classes=classes, element_bytes=2, **GPUS[name]._asdict())
    assert (plan["cluster"], plan["shared_bytes"]) == (cluster, shared_bytes)


def test_planes() -> None:
    wide = {"outer": 16, "classes": 21, "inner": 512 * 512, "planes": True}
    assert _C.cuda_plan("forward", **wide, element_bytes=2)["vector_elements"] == 4
    assert _C.cuda_plan("forward", **wide, element_bytes=2, aligned=False)["vector_elements"] == 1
    assert _C.cuda_plan("forward", outer=1, classes=1000, inner=49, planes=True)["threads_per_row"] == 32


def test_conservative() -> None:
    """As under NLLX_CUDA_PLAN=conservative."""
    plan = _C.cuda_plan("value_and_grad", outer=64, classes=50257, element_bytes=2)
    assert (plan["cluster"], plan["ahead"]) == (4, 3)
    plan = _C.cuda_plan("value_and_grad", outer=64, classes=50257, element_bytes=2, conservative=True)
    assert (plan["cluster"], plan["ahead"], plan["splits"]) == (1, 0, 1)


@pytest.mark.parametrize(("value", "plans"), [(None, "default"), ("", "default"), ("conservative", "conservative")])
def test_plans_of_the_process(value: str | None, plans: str) -> None:
    assert _cuda_plans(value).stdout == f"{plans}\n"


def test_no_such_plans() -> None:
    result = _cuda_plans("careful")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        'RuntimeError: nllx: NLLX_CUDA_PLAN is "careful"; it may be "default" or "conservative"'
    )


def _cuda_plans(value: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: text for name, text in os.environ.items() if name != "NLLX_CUDA_PLAN"}
    if value is not None:
        environment["NLLX_CUDA_PLAN"] = value
    code = "from nllx import _C; print(_C.cuda_plans())"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_no_such_operation() -> None:
    with pytest.raises(ValueError, match="no operation 'sideways' has a plan"):
        _C.cuda_plan("sideways", outer=1, classes=1)

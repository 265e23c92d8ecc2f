"""``_C.cuda_plan``: shapes and architectures to kernels, without a GPU. Its invariants are tested in cuda_on_cpu."""

from __future__ import annotations

import pytest

from nllx import _C

# Multiprocessors, and the shared memory that a block may ask for: T4, A100, RTX 3090, L4, H100, B200, RTX 5090. Source:
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
DEVICES = {
    "sm_75": (40, 64 << 10),
    "sm_80": (108, 163 << 10),
    "sm_86": (82, 99 << 10),
    "sm_89": (58, 99 << 10),
    "sm_90": (132, 227 << 10),
    "sm_100": (148, 227 << 10),
    "sm_120": (170, 99 << 10),
}
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
@pytest.mark.parametrize("name", DEVICES)
def test_family(name: str, op: str, rows: int, classes: int, element_bytes: int, family: str) -> None:
    multiprocessors, shared = DEVICES[name]
    device = {"multiprocessors": multiprocessors, "shared_bytes": shared}
    plan = _C.cuda_plan(op, outer=rows, classes=classes, element_bytes=element_bytes, **device)
    assert plan["family"] == family
    assert plan["splits"] == 1
    assert plan["shared_bytes"] <= shared
    assert plan["reason"]


@pytest.mark.parametrize("name", DEVICES)
def test_few_long_rows_fill_the_chip(name: str) -> None:
    multiprocessors, shared = DEVICES[name]
    for op in ("forward", "backward"):
        plan = _C.cuda_plan(op, outer=8, classes=262144, multiprocessors=multiprocessors, shared_bytes=shared)
        assert plan["family"] == PARTS
        assert multiprocessors <= 8 * plan["splits"] <= 2 * multiprocessors


@pytest.mark.parametrize(("name", "shared_bytes"), [("sm_75", 0), ("sm_86", 0), ("sm_90", 64000)])
def test_row_on_the_chip(name: str, shared_bytes: int) -> None:
    """A row of 32000 half elements stays in an H100's shared memory; smaller ones hold less than half of it."""
    multiprocessors, shared = DEVICES[name]
    device = {"multiprocessors": multiprocessors, "shared_bytes": shared}
    plan = _C.cuda_plan("value_and_grad", outer=8192, classes=32000, element_bytes=2, **device)
    assert plan["shared_bytes"] == shared_bytes


def test_planes() -> None:
    wide = {"outer": 16, "classes": 21, "inner": 512 * 512, "planes": True}
    assert _C.cuda_plan("forward", **wide, element_bytes=2)["vector_elements"] == 4
    assert _C.cuda_plan("forward", **wide, element_bytes=2, aligned=False)["vector_elements"] == 1
    assert _C.cuda_plan("forward", outer=1, classes=1000, inner=49, planes=True)["threads_per_row"] == 32


def test_no_such_operation() -> None:
    with pytest.raises(ValueError, match="no operation 'sideways' has a plan"):
        _C.cuda_plan("sideways", outer=1, classes=1)

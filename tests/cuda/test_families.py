"""``nllx/_families.py``: its table reaches every kernel family that a plan can give, on every GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from gpus import GPUS

from nllx import _families
from nllx.__main__ import main
from nllx._families import DTYPES, ROWS, Row

CLASSES = (1, 3, 10, 32, 33, 100, 512, 1000, 1025, 3000, 5003, 8192, 20_001, 32_000, 50_257, 65_536, 130_000, 262_144)
COUNTS = (1, 3, 8, 16, 24, 40, 64, 100, 150, 352, 4096, 600_000, 2_000_000)
PLANES = [(1, c, n) for c, n in itertools.product((9, 21, 300), (7, 49, 1155, 2**18, 2**20))] + [(300, 21, 49)]


def _families_of(row: Row, gpu: dict) -> set[tuple]:
    return {
        (op, family, dtype.itemsize, smoothing > 0)
        for dtype, smoothing in itertools.product(DTYPES, (0.0, 0.1) if row.op.startswith("cross_entropy") else (0.0,))
        for op, family in _families.plans(row, dtype, smoothing, gpu)
    }


@pytest.mark.parametrize("conservative", [False, True])
@pytest.mark.parametrize("name", GPUS)
def test_every_family_is_reached(name: str, conservative: bool) -> None:
    gpu = {**GPUS[name]._asdict(), "conservative": conservative}
    reached = set().union(*(_families_of(row, gpu) for row in ROWS if row.op in ("cross_entropy", "log_softmax")))
    shapes = [*itertools.product(COUNTS, CLASSES), *PLANES]
    possible = set().union(
        *(_families_of(Row("", op, shape), gpu) for op in ("cross_entropy", "log_softmax") for shape in shapes)
    )
    assert sorted(possible - reached) == []


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_row_reaches_its_family(row: Row) -> None:
    assert any(row.family == found[1] for gpu in GPUS.values() for found in _families_of(row, gpu._asdict()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing that was not checked has passed."""
    assert main(["--families"]) == 1
    assert "nothing was checked" in capsys.readouterr().err


def test_small_rows_reach_what_blocks_share() -> None:
    dtypes, most = _families.SMALL
    small = [row for row in ROWS if torch.Size(row.shape).numel() <= most]
    assert dtypes == DTYPES[:2]
    found = set().union(*(_families_of(row, GPUS["sm_90"]._asdict()) for row in small))
    words = {word for _, family, *_ in found for word in family.split(", ")}
    assert {"tile rows", "register rows", "cluster", "split", "kept", "vectors", "loads ahead"} <= words

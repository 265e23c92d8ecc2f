"""Attacks with an amount: small in every run of the tests, large where NLLX_TORTURE=long (`make torture`)."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nllx import _C

LONG = os.environ.get("NLLX_TORTURE") == "long"
_RECORD = Path(__file__).resolve().parents[2] / "build" / "torture.json"


@pytest.fixture
def amount() -> Callable[[int, int], int]:
    """Of the two amounts the one of this run."""
    return lambda bounded, long: long if LONG else bounded


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Figures of this test, kept in build/torture.json by long runs."""

    def write(**figures: object) -> None:
        print(request.node.name, figures)
        if LONG:
            _RECORD.parent.mkdir(exist_ok=True)
            record = json.loads(_RECORD.read_text()) if _RECORD.exists() else {}
            record["environment"] = {
                "date": datetime.date.today().isoformat(),
                "torch": torch.__version__,
                "capability": _C.cpu_capability(),
                "processors": os.cpu_count(),
            }
            record.setdefault(request.node.name, {}).update(figures)
            _RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")

    return write

"""Devices, and what holds for every test."""

from __future__ import annotations

import itertools
import os

import hypothesis
import pytest
import torch
from cases import Case

from nllx import _C

hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.register_profile("search", deadline=None, max_examples=10_000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


# The problems are small: torch's threads would mostly wait for each other, for milliseconds where the machine has other
# work. test_determinism.py compares numbers of threads.
torch.set_num_threads(1)


def _missing(device: str) -> str | None:
    """Why nothing can run on the device, or None."""
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if _C.build_info()["cuda"] else "nllx was built without CUDA"


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Runs a test on each device; one that is missing is skipped once per test function."""
    return request.param


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sample", type=int, default=1, metavar="N", help="of tests with hundreds of cases, every Nth case"
    )


def _sample(config: pytest.Config, items: list[pytest.Item]) -> None:
    step = config.getoption("sample")
    if step == 1:
        return
    tables: dict[tuple[object, ...], list[pytest.Item]] = {}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if isinstance(parameters.get("case"), Case):
            tables.setdefault((item.path, item.originalname, parameters.get("device")), []).append(item)
    long = (table for table in tables.values() if len(table) >= 100)
    left_out = {*itertools.chain.from_iterable(({*table} - {*table[::step]}) for table in long)}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=[*left_out])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _sample(config, items)
    kept: list[pytest.Item] = []
    skipped: dict[tuple[object, ...], list[pytest.Item]] = {}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        reason = _missing(parameters.get("device", "cpu"))
        if reason is None:
            kept.append(item)
            continue
        group = skipped.setdefault((item.path, item.originalname, reason), [])
        if not group:
            kept.append(item)
        group.append(item)
    for (_, _, reason), group in skipped.items():
        group[0].add_marker(pytest.mark.skip(reason=f"{reason}: {len(group)} cases not run"))
    items[:] = kept

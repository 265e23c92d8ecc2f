"""Libraries that are not installed for the other tests: collected only where the folder is named (`make integrations`)."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

# Nothing is downloaded: models are built from their configurations.
os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", NO_ALBUMENTATIONS_UPDATE="1"
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if any("integrations" in argument for argument in config.args) else True


@pytest.fixture(autouse=True)
def _their_warnings() -> None:
    """Deprecations inside of the libraries are theirs."""
    warnings.simplefilter("ignore")

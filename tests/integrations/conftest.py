"""Libraries that are not installed for the other tests: collected only where the folder is named (`make integrations`)."""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path

import pytest

# Nothing is downloaded: models are built from their configurations.
os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", NO_ALBUMENTATIONS_UPDATE="1"
)


# What has to be there where the tests are not to be skipped: `make integrations`, and so CI.
if os.environ.get("NLLX_REQUIRE_INTEGRATIONS") == "1":
    _libraries = "transformers accelerate lightning torchmetrics timm segmentation_models_pytorch onnxscript"
    for _name in _libraries.split():
        importlib.import_module(_name)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    here = Path(__file__).resolve().parent
    named = (Path(config.invocation_params.dir, argument.partition("::")[0]).resolve() for argument in config.args)
    return None if any(path == here or here in path.parents for path in named) else True


@pytest.fixture(autouse=True)
def _their_warnings() -> None:
    """Deprecations inside of the libraries are theirs."""
    warnings.simplefilter("ignore")

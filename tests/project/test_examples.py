"""The examples run, learn what they are to learn (each asserts it), and show a curve and a table."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != "show.py")


_LIBRARIES = {"hugging_face": "transformers"}  # installed by `make examples` and `make integrations`


@pytest.mark.slow
@pytest.mark.parametrize("path", _EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path) -> None:
    library = _LIBRARIES.get(path.stem)
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: make integrations")
    result = subprocess.run(
        [sys.executable, path],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "─" in result.stdout
    assert "▁" in result.stdout
    assert len(path.read_text().splitlines()) < 120


def test_every_example_is_in_the_documentation() -> None:
    page = (ROOT / "docs/start.md").read_text()
    for path in _EXAMPLES:
        assert f"(../examples/{path.name})" in page
        assert f"python examples/{path.name}" in path.read_text()

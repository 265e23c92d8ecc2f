"""The code of the documentation runs, and links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import json
import re
from pathlib import Path

import pytest

import nllx

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "tests/README.md", ROOT / "benchmarks/README.md"]
_BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
]


@pytest.mark.parametrize("block", _BLOCKS)
def test_code_blocks_run(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What a block prints is what the comment behind its ``print`` says, up to the first colon outside of brackets."""
    nllx.patch_report(reset=True)
    try:
        exec(compile(block, "documentation", "exec"), {"__name__": "documentation"})
    finally:
        nllx.unpatch()
    promised = re.findall(r"^print\(.*\)  # (.*?\}|.*?)(?:: .*)?$", block, re.MULTILINE)
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("nllx.convert: ")]
    assert printed == promised


_WITH_EXAMPLES = [page for page in PAGES if "```pycon\n" in page.read_text()]


@pytest.mark.parametrize("page", _WITH_EXAMPLES, ids=lambda page: page.name)
def test_interactive_examples(page: Path) -> None:
    """All of a page in one session, from top to bottom."""
    blocks = re.findall(r"^```pycon\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page.name, str(page), 0)
    assert len(test.examples) > 10
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    assert results.failed == 0


def test_figures_are_those_of_the_records() -> None:
    """Tables of ratios behind a comment that names the record and the providers, forward and forward + backward."""
    found = re.findall(
        r"<!-- figures: (\S+) (.*?) -->\n\n\|.*\n\|.*\n((?:\|.*\n)+)", (ROOT / "docs/start.md").read_text()
    )
    assert len(found) == 2
    for path, providers, table in found:
        rows = json.loads((ROOT / path).read_text())["rows"]
        dtype = rows[0]["dtype"]
        ratios = {
            (r["case"], r["mode"], r["provider"]): r["ratio"]["nllx"]
            for r in rows
            if r["dtype"] == dtype and "nllx" in r["ratio"]
        }
        for line in table.splitlines():
            case, *cells = (cell.strip(" `") for cell in line.strip("|").split("|"))
            modes = ("forward", "forward+backward")
            assert cells == [
                f"{ratios[case, mode, provider]['median']:.1f} ×" for mode in modes for provider in providers.split()
            ], case


@pytest.mark.parametrize("name", ["debugging", "functional", "modules", "patching"])
def test_doctests(name: str) -> None:
    module = importlib.import_module(f"nllx.{name}")
    nllx.patch_report(reset=True)
    import torch

    results = doctest.testmod(module, extraglobs={"nllx": nllx, "torch": torch})
    assert results.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, target


def test_differences_name_tests_that_exist() -> None:
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").glob("*.py"))
    named = re.findall(r"`((?:test_|Test)\w+)`", (ROOT / "docs/differences.md").read_text())
    assert len(named) > 20
    for name in named:
        assert re.search(rf"(def|class) {name}\b", tests), name

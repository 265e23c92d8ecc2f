"""The code of the documentation runs, and links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import json
import re
from pathlib import Path

import pytest

import nllx

ROOT = Path(__file__).resolve().parents[2]
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


# The rows of the tables of figures: what they are called, and their case in the record.
_CPU_ROWS = {
    "language model, 1024 × 50257": "lm-1024x50257",
    "language model, 2048 × 32000": "lm-2048x32000",
    "ImageNet, 256 × 1000": "imagenet-256x1000",
    "ImageNet, large batch, 4096 × 1000": "imagenet-4096x1000",
    "many small rows, 65536 × 10": "rows-65536x10",
    "many small rows, 262144 × 100": "rows-262144x100",
    "tiny, 32 × 10": "tiny-32x10",
    "segmentation, 8 × 21 × 512 × 512, weights, ignored pixels": "planes-8x21x512x512",
    "the same, channels-last": "planes-8x21x512x512-channels-last",
    "label smoothing, 1024 × 50257": "smoothing-1024x50257",
    "probability targets, 1024 × 1000": "probabilities-1024x1000",
    "NLLLoss, 4096 × 1000": "nll-4096x1000",
    "LogSoftmax, 2048 × 32000": "log-softmax-2048x32000",
}
_GPU_ROWS = {
    "8389 × 32000": "rows-8389x32000",
    "2093 × 128256": "rows-2093x128256",
    "268436 × 1000": "rows-268436x1000",
    "26843546 × 10": "rows-26843546x10",
    "planes, 4 × 150 × 512 × 512": "planes-4x150x512x512",
    "8 × 262144": "rows-8x262144",
    "tiny, 32 × 10": "tiny-32x10",
}
_FORWARD, _BACKWARD, _BOTH = "forward", "backward", "forward+backward"
_COMPILE = "torch.compile"
# Page, start of the table's head, record, rows, and what the columns with ratios hold.
_TABLES = [
    (
        "README.md",
        "| | forward: nllx",
        "cpu-2-cores-avx2",
        _CPU_ROWS,
        {3: (_FORWARD, "torch"), 4: (_FORWARD, _COMPILE), 7: (_BOTH, "torch"), 8: (_BOTH, _COMPILE)},
    ),
    (
        "README.md",
        "| bfloat16 logits",
        "cuda-h200",
        _GPU_ROWS,
        {3: (_FORWARD, "torch"), 4: (_FORWARD, _COMPILE), 7: (_BACKWARD, "torch"), 8: (_BACKWARD, _COMPILE)},
    ),
    (
        "docs/start.md",
        "| case | torch, forward | torch.compile",
        "cpu-2-cores-avx2",
        _CPU_ROWS,
        {1: (_FORWARD, "torch"), 2: (_FORWARD, _COMPILE), 3: (_BOTH, "torch"), 4: (_BOTH, _COMPILE)},
    ),
    (
        "docs/start.md",
        "| case | torch, forward | torch, forward",
        "cuda-h200",
        _GPU_ROWS,
        {1: (_FORWARD, "torch"), 2: (_BOTH, "torch")},
    ),
]


@pytest.mark.parametrize(("page", "head", "record", "names", "columns"), _TABLES, ids=lambda value: str(value)[:20])
def test_figures_are_those_of_the_records(
    page: str, head: str, record: str, names: dict[str, str], columns: dict[int, tuple[str, str]]
) -> None:
    rows = json.loads((ROOT / f"benchmarks/results/{record}.json").read_text())["rows"]
    of_first_dtype = [row for row in rows if row["dtype"] == rows[0]["dtype"] and "nllx" in row["ratio"]]
    ratios = {(row["case"], row["mode"], row["provider"]): row["ratio"]["nllx"]["median"] for row in of_first_dtype}
    table = (ROOT / page).read_text().partition(head)[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) >= 7
    for line in table:
        cells = [cell.strip(" ").replace("`", "") for cell in line.strip("|").split("|")]
        for number, (mode, provider) in columns.items():
            ratio = ratios.get((names[cells[0]], mode, provider))
            expected = "–" if ratio is None else f"{ratio:.1f} ×" if ratio < 9.95 else f"{ratio:.0f} ×"
            assert cells[number] == expected, (cells[0], mode, provider)


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
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    named = re.findall(r"`((?:test_|Test)\w+)`", (ROOT / "docs/differences.md").read_text())
    assert len(named) > 20
    for name in named:
        assert re.search(rf"(def|class) {name}\b", tests), name

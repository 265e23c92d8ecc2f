"""The code of the documentation runs, and links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

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
_IN_THE_PICTURE = [
    "language model, 1024 × 50257",
    "ImageNet, large batch, 4096 × 1000",
    "many small rows, 262144 × 100",
    "segmentation, 8 × 21 × 512 × 512, weights, ignored pixels",
]
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
# Page, start of the table's head, record, rows, and of what mode and provider each column has the time, the ratio to nllx's
# time, or the memory in multiples of the logits.
_TABLES = [
    (
        "README.md",
        "| | nllx takes",
        "cpu-2-cores-avx2",
        _CPU_ROWS,
        [
            *((_BOTH, "nllx", "time"), (_BOTH, "torch", "ratio"), (_BOTH, _COMPILE, "ratio")),
            *((_BOTH, "nllx", "memory"), (_BOTH, "torch", "memory"), (_BOTH, _COMPILE, "memory")),
        ],
    ),
    (
        "benchmarks/README.md",
        "| | forward: nllx",
        "cpu-2-cores-avx2",
        _CPU_ROWS,
        [
            *((_FORWARD, "nllx", "time"), None, (_FORWARD, "torch", "ratio"), (_FORWARD, _COMPILE, "ratio")),
            *((_BOTH, "nllx", "time"), None, (_BOTH, "torch", "ratio"), (_BOTH, _COMPILE, "ratio")),
        ],
    ),
    (
        "benchmarks/README.md",
        "| bfloat16 logits",
        "cuda-h200",
        _GPU_ROWS,
        [
            *((_FORWARD, "nllx", "time"), None, (_FORWARD, "torch", "ratio"), (_FORWARD, _COMPILE, "ratio")),
            *((_BACKWARD, "nllx", "time"), None, (_BACKWARD, "torch", "ratio"), (_BACKWARD, _COMPILE, "ratio")),
            (_BOTH, "torch", "ratio"),
        ],
    ),
]


def _rows_of(record: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What was measured of the first dtype, by case, mode and provider."""
    rows = json.loads((ROOT / f"benchmarks/results/{record}.json").read_text())["rows"]
    return {(row["case"], row["mode"], row["provider"]): row for row in rows if row["dtype"] == rows[0]["dtype"]}


def _two_digits(value: float, unit: str) -> str:
    return f"{value:.1f}{unit}" if value < 9.95 else f"{value:.0f}{unit}"


def _figure(row: dict[str, Any] | None, kind: str) -> str:
    if row is None or (kind == "memory" and row["peak_bytes"] is None):
        return "–"
    if kind == "memory":
        return _two_digits(row["peak_bytes"] / (4 * math.prod(row["shape"])), "")  # float32
    if kind == "ratio":
        return _two_digits(row["ratio"]["nllx"]["median"], " ×")
    seconds = row["seconds"]["median"]
    return _two_digits(seconds * 1e3, " ms") if seconds >= 0.995e-3 else _two_digits(seconds * 1e6, " µs")


@pytest.mark.parametrize(("page", "head", "record", "names", "columns"), _TABLES, ids=lambda value: str(value)[:20])
def test_figures_are_those_of_the_records(
    page: str, head: str, record: str, names: dict[str, str], columns: list[tuple[str, str, str] | None]
) -> None:
    rows = _rows_of(record)
    table = (ROOT / page).read_text().partition(head)[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) >= 6
    for line in table:
        name, *cells = [cell.strip(" ").replace("`", "") for cell in line.strip("|").split("|")]
        for column, cell in zip(columns, cells, strict=True):
            if column is not None:
                mode, provider, kind = column
                assert cell == _figure(rows.get((names[name], mode, provider)), kind), (name, column)


def test_figures_of_the_picture_are_those_of_the_record() -> None:
    """matplotlib leaves each text as a comment beside its outlines."""
    picture = (ROOT / "benchmarks/results/cpu-2-cores-avx2-front.svg").read_text()
    rows = _rows_of("cpu-2-cores-avx2")
    of_nllx, of_torch = (
        [rows[_CPU_ROWS[name], _BOTH, provider] for name in _IN_THE_PICTURE] for provider in ("nllx", "torch")
    )
    expected = [_two_digits(row["ratio"]["nllx"]["median"], " × less") for row in of_torch]
    expected += [
        _two_digits(torch["peak_bytes"] / nllx["peak_bytes"], " × less")
        for nllx, torch in zip(of_nllx, of_torch, strict=True)
    ]
    assert re.findall(r"<!-- (.* less) -->", picture) == expected


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

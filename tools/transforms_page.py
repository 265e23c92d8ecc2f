"""docs/transforms.md from what the tests of transforms recorded.

    python -m pytest tests/transforms/test_transforms.py --junit-xml=build/transforms.xml
    python tools/transforms_page.py build/transforms.xml

Each file is of one version of torch, whose section it replaces. ``--check`` writes nothing and fails where the page says
something else.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import xml.etree.ElementTree
from pathlib import Path

from wrap_markdown import wrap

PAGE = Path(__file__).resolve().parent.parent / "docs" / "transforms.md"
TOP = """# What torch does to a loss, and what comes out

Each cell is a set of tests: a transform of a loss of nllx gave, by value, what the same transform of torch's loss gave
(`tests/transforms/test_transforms.py`; the transforms: `tests/transforms.py`). *ok* is that for every layout: rows,
transposed rows, planes, channels last and one sample, with class weights, ignored targets and label smoothing, under all
three reductions; transforms that compile are run on rows and planes, and the two that build machine code (every mode of
`compile`, AOTInductor) on rows, against torch's loss in eager mode. Where torch's own loss raises, nllx is compared with
the same loss in another layout or written out in torch's operations, and a note tells what torch says.

This page is made from the results of the tests (`tools/transforms_page.py`), and CI compares them with it.
"""
Outcomes = dict[tuple[str, str], list[str]]  # (transform, op): what its tests recorded


def read(path: Path) -> tuple[str, Outcomes]:
    """The version of torch that ran the tests, and their outcomes in the order of the tables."""
    tests: list[dict[str, str]] = []
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        properties = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
        if "transform" in properties and "outcome" not in properties:
            sys.exit(f"{path}: {case.get('name')} did not pass")
        if "transform" in properties:
            tests.append(properties)
    outcomes: Outcomes = {}
    for test in sorted(tests, key=lambda test: ast.literal_eval(test["place"])):
        outcomes.setdefault((test["transform"], test["op"]), []).append(test["outcome"])
    versions = {".".join(test["torch"].split(".")[:2]) for test in tests}
    if len(versions) != 1:
        sys.exit(f"{path}: tests of transforms under one version of torch are wanted, not under {sorted(versions)}")
    return versions.pop(), outcomes


def section(outcomes: Outcomes) -> str:
    transforms = list(dict.fromkeys(transform for transform, _ in outcomes))
    ops = list(dict.fromkeys(op for _, op in outcomes))
    notes: list[str] = []

    def cell(results: list[str]) -> str:
        marks = []
        for note in dict.fromkeys(result for result in results if result != "ok"):
            if note not in notes:
                notes.append(note)
            marks.append(f"[{notes.index(note) + 1}]")
        return " ".join((["ok"] if any(result.startswith("ok") for result in results) else []) + marks)

    lines = ["| transform | " + " | ".join(f"`{op}`" if "," not in op else op for op in ops) + " |"]
    lines += ["|---" * (len(ops) + 1) + "|"]
    for transform in transforms:
        lines.append(f"| {transform} | " + " | ".join(cell(outcomes[transform, op]) for op in ops) + " |")
    lines += [""] + [f"{i}. {note.removeprefix('ok; ')}" for i, note in enumerate(notes, 1)]
    return wrap("\n".join(lines).strip() + "\n")


def sections(page: str) -> dict[str, str]:
    found = re.findall(r"^## torch (\S+)\n\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return {version: text.strip() + "\n" for version, text in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JUnit XML of tests/transforms/test_transforms.py")
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    arguments = parser.parse_args()
    there = sections(PAGE.read_text()) if PAGE.exists() else {}
    measured = {version: section(outcomes) for version, outcomes in map(read, arguments.results)}
    if arguments.check:
        for version, text in measured.items():
            if there.get(version) != text:
                sys.exit(f"{PAGE} says of torch {version} what the tests do not:\n\n{text}")
        print(f"{PAGE} is as the tests of torch {', '.join(measured)} have it")
        return
    there |= measured
    order = sorted(there, key=lambda version: [int(part) for part in version.split(".")], reverse=True)
    PAGE.write_text("\n".join([TOP, *(f"## torch {version}\n\n{there[version]}" for version in order)]))


if __name__ == "__main__":
    main()

"""Wraps the prose of Markdown files at 128 columns: ``python tools/wrap_markdown.py [--check] FILE...``.

Only paragraphs and items that have a longer line change. Tables, headings, code, and what is a single word to Markdown
(code spans, formulas, addresses) stay as they are.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

WIDTH = 128
# A code span or a formula with what clings to it, or a word.
_WORD = re.compile(r"(?:`[^`]*`|\$[^$\s](?:[^$]*[^$\s])?\$|\S)+")
# What begins an item, a heading or a table where it begins a line.
_ITEM = re.compile(r" *(?:[-*+]|\d+[.)]) +")
_APART = re.compile(r" *(?:\||#|>|!\[|:?-{3}|={3})")


def _fill(lines: list[str]) -> list[str]:
    """The lines of one paragraph or item, with the indentation that they have."""
    if all(len(line) <= WIDTH for line in lines):
        return lines
    item = _ITEM.match(lines[0])
    first = item.group() if item else re.match(" *", lines[0]).group()
    words: list[str] = []
    for word in _WORD.findall(" ".join(lines)[len(first) :]):
        # A sign that would begin an item, a heading or a table stays behind the word before it.
        if words and (_ITEM.match(word + " ") or _APART.match(word)):
            words[-1] += " " + word
        else:
            words.append(word)
    filled, line = [], first
    for word in words:
        if len(line) + len(word) > WIDTH and line.strip():
            filled.append(line.rstrip())
            line = " " * len(first)
        line += word + " "
    return [*filled, line.rstrip()]


def wrap(text: str) -> str:
    wrapped: list[str] = []
    paragraph: list[str] = []
    fence = ""
    for line in [*text.splitlines(), ""]:
        mark = re.match(r" *(`{3,})", line)
        if (mark and not fence) or fence or not line.strip() or _ITEM.match(line) or _APART.match(line):
            wrapped += _fill(paragraph)
            paragraph = []
        if mark:
            fence = "" if fence else mark.group(1)
        if mark or fence or not line.strip() or _APART.match(line):
            wrapped.append(line)
        else:
            paragraph.append(line)
    return "\n".join(wrapped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="name the files that would change, and write nothing")
    arguments = parser.parse_args()
    changed = [path for path in arguments.files if wrap(path.read_text()) != path.read_text()]
    if arguments.check:
        sys.exit(
            f"longer lines than {WIDTH} columns, for `make format`: {', '.join(map(str, changed))}" if changed else 0
        )
    for path in changed:
        path.write_text(wrap(path.read_text()))


if __name__ == "__main__":
    main()

"""Sphinx: `make docs`, or `sphinx-build -W docs build/docs` where the extension is built."""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import docutils.nodes
import latex2mathml.converter

import nllx

project = "nllx"
release = version = nllx.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "nllx"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["code.css"]

# $…$ is mathematics, as it is where the pages are shown without Sphinx; links lead to the headings of other pages.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_custom_sections = ["Cost"]
autodoc_typehints = "none"  # the descriptions say what the arguments are
autodoc_member_order = "bysource"


_ROOT = Path(__file__).resolve().parent.parent


def _link(match: re.Match[str], folder: Path) -> str:
    """A link as the site has it: pages to pages, both READMEs to theirs, other files as downloads, folders as their names."""
    text, path, anchor = match.groups()
    file = (folder / path).resolve()
    pages = {_ROOT / "README.md": "index.md", _ROOT / "benchmarks" / "README.md": "benchmarks.md"}
    if file in pages:
        return f"[{text}]({pages[file]}{anchor or ''})"
    if file.parent == _ROOT / "docs":
        return f"[{text}]({file.name}{anchor or ''})"
    if file.is_dir():
        return f"`{file.relative_to(_ROOT)}`"
    return f"{{download}}`{text} <../{file.relative_to(_ROOT)}>`"


def _fix_links(app: object, name: str, source: list[str]) -> None:
    folder = _ROOT / "docs"
    if name == "benchmarks":
        folder = _ROOT / "benchmarks"
        source[0] = re.sub(r"!\[([^]]*)\]\(", r"![\1](../benchmarks/", (folder / "README.md").read_text())
    source[0] = re.sub(r"(?<!!)\[([^]]+)\]\(([^):#]+)(#[^)]*)?\)", lambda match: _link(match, folder), source[0])


def _mathml(display: str) -> Any:
    """Formulas as MathML, which browsers show without a script from elsewhere."""

    def visit(translator: Any, node: Any) -> None:
        text = node.astext().replace(r"\operatorname", r"\mathrm").replace(r"\log ", r"\log\, ")
        translator.body.append(latex2mathml.converter.convert(text, display=display))
        raise docutils.nodes.SkipNode

    return visit, None


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", _mathml("inline"), _mathml("block"))
    app.connect("source-read", _fix_links)

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


def _link_files(app: object, name: str, source: list[str]) -> None:
    """Markdown outside of docs/ has no page of its own here: links to it become downloads, as those to other files are."""
    source[0] = re.sub(r"\[([^]]+)\]\((\.\./[^)#]+\.md)(?:#[^)]*)?\)", r"{download}`\1 <\2>`", source[0])


def _mathml(display: str) -> Any:
    """Formulas as MathML, which browsers show without a script from elsewhere."""

    def visit(translator: Any, node: Any) -> None:
        text = node.astext().replace(r"\operatorname", r"\mathrm").replace(r"\log ", r"\log\, ")
        translator.body.append(latex2mathml.converter.convert(text, display=display))
        raise docutils.nodes.SkipNode

    return visit, None


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", _mathml("inline"), _mathml("block"))
    app.connect("source-read", _link_files)

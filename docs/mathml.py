"""Sphinx extension: formulas as MathML, converted from LaTeX when the pages are built.

Browsers show MathML themselves, so a page needs neither a script nor a network for its formulas.
The font for them, ``static/stix-two-math.woff2``, comes with the pages: it is STIX Two Math 2.11
(Open Font License, ``static/stix-two-math-OFL.txt``), cut down to the signs of formulas.
"""

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

CONVERTER = LatexToMathML()
LOGGER = logging.getLogger(__name__)


def to_mathml(node: nodes.math | nodes.math_block) -> str:
    """The formula of a node; a warning and nothing where it is not valid LaTeX."""
    display = isinstance(node, nodes.math_block)
    try:
        return CONVERTER.convert_with_local_state(node.astext(), displaystyle=display)
    except LatexError as error:
        LOGGER.warning("formula %r: %s", node.astext(), error, location=node)
        return ""


def visit_math(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(f'<span class="math">{to_mathml(node)}</span>')
    raise nodes.SkipNode


def visit_math_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{to_mathml(node)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

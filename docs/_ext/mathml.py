r"""Formulas as MathML, which browsers show by themselves: no script, no fonts to fetch, no LaTeX.

A number that is given with ``\tag{...}`` stands at the right of the formula.
"""

import re

from docutils.nodes import SkipNode
from latex2mathml.converter import convert


def _markup(tex, display):
    return convert(tex.strip(), display=display)


def visit_math(self, node):
    """Write a formula of a line."""
    self.body.append(_markup(node.astext(), "inline"))
    raise SkipNode


def visit_math_block(self, node):
    """Write a formula of its own, with its number."""
    tags = re.findall(r"\\tag\{(.*?)\}", node.astext())
    anchors = "".join(f'<span id="{name}"></span>' for name in node["ids"])
    number = "".join(f'<span class="number">({tag})</span>' for tag in tags)
    formula = _markup(re.sub(r"\\tag\{.*?\}", "", node.astext()), "block")
    self.body.append(f'{anchors}<div class="formula">{formula}{number}</div>\n')
    raise SkipNode


def setup(app):
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""How the documentation is built: ``sphinx-build -W --keep-going -b html docs build/docs``. Needs no network."""

import re
import sys
from pathlib import Path

from sphinx.domains.python import PyObject

import lightning_ssesam

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "lightning-ssesam"
author = "lightning-ssesam developers"
copyright = f"{author}. Apache License 2.0"
version = release = lightning_ssesam.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "mathml"]
exclude_patterns = ["_ext", "pictures.py"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Shape"]
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
default_role = "code"

html_theme = "furo"
html_title = f"lightning-ssesam {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"top_of_page_buttons": []}
pygments_style = "friendly"
pygments_dark_style = "monokai"


def link_pages(app, what, name, obj, options, lines):
    """Turn the pages that docstrings name, ``docs/method.md``, into links."""
    lines[:] = [re.sub(r"\bdocs/(\w+)\.md\b", r":doc:`/\1`", line) for line in lines]


def skip_foreign(app, what, name, obj, skip, options):
    """Leave out what a class inherits from torch or Lightning, which document it."""
    of = getattr(obj.fget if isinstance(obj, property) else obj, "__module__", None)
    return True if of is not None and not of.startswith("lightning_ssesam") else None


def show_public_bases(app, name, obj, options, bases):
    """Replace private bases by theirs."""
    while any(base.__name__[0] == "_" for base in bases):
        bases[:] = [better for base in bases for better in (base.__bases__ if base.__name__[0] == "_" else [base])]


def setup(app):
    """Called by Sphinx."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("autodoc-process-docstring", link_pages)
    app.connect("autodoc-skip-member", skip_foreign)
    app.connect("autodoc-process-bases", show_public_bases)

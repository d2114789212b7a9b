"""Sphinx configuration; `make docs` builds the site into docs/_build/html."""

import sharpkit

project = "sharpkit"
author = "The sharpkit developers"
project_copyright = "2026, The sharpkit developers"
version = release = sharpkit.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
autosummary_generate = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
html_theme = "furo"
html_title = "sharpkit"
exclude_patterns = ["_build"]
suppress_warnings = ["myst.xref_missing"]  # links from the pages to files of the repository
default_role = "code"


def setup(app):
    """Absolute values in docstrings, such as |w|, are not substitutions."""

    def escape_bars(app, what, name, obj, options, lines):
        lines[:] = [
            line if line.lstrip().startswith((">>>", "...")) else line.replace("|", r"\|")
            for line in lines
        ]

    app.connect("autodoc-process-docstring", escape_bars)

"""Sphinx configuration; `make docs` builds the site into docs/_build/html.

The build executes every code cell of the pages; an error in one fails it.
"""

import os
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from jupyter_client.manager import KernelManager

import sharpkit

sys.path.insert(0, str(Path(__file__).parent))
os.environ["SHARPKIT_DOCS"] = str(Path(__file__).parent)  # cells run in another folder
from formulas import typeset

# the pages' cells run in kernels of their own, which inherit this
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two pages are built at a time
os.environ["TQDM_DISABLE"] = "1"  # a bar would be a line for every step
KernelManager.transport_encryption.default_value = "auto"  # else every kernel warns

project = "sharpkit"
author = "The sharpkit developers"
project_copyright = "2026, The sharpkit developers"
version = release = sharpkit.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300  # seconds per cell; for machines that are busy
nb_merge_streams = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
autosummary_generate = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
html_theme = "furo"
html_title = "sharpkit"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"  # which browsers draw by themselves, also without a network
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]
suppress_warnings = ["myst.xref_missing"]  # links from the pages to files of the repository
default_role = "code"


def setup(app):
    """Mathematics without JavaScript, and docstrings with absolute values."""

    def write_inline(writer, node):
        writer.body.append(tex2mathml(node.astext()))
        raise nodes.SkipNode

    def write_block(writer, node):
        writer.body.append(f"<div>{tex2mathml(node.astext(), as_block=True)}</div>")
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (write_inline, None), (write_block, None))

    def escape_bars(app, what, name, obj, options, lines):
        """Absolute values such as |w| are not substitutions."""
        lines[:] = [
            line if line.lstrip().startswith((">>>", "...")) else line.replace("|", r"\|")
            for line in lines
        ]

    def formulas(app, what, name, obj, options, lines):
        lines[:] = typeset(lines)

    app.connect("autodoc-process-docstring", formulas, priority=600)  # after the bars
    app.connect("autodoc-process-docstring", escape_bars)

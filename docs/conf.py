"""The documentation site: Sphinx, the furo theme, Markdown and notebooks through myst-nb."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent

project = "riemvae"
author = "The riemvae developers"
copyright = "the riemvae developers"
version = release = metadata.version("riemvae")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "myst_nb",
]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

# The tests execute the notebooks; the site shows them as they are.
nb_execution_mode = "off"

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "imported-members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes in a docstring do not compete with the documented members

html_theme = "furo"
html_title = "riemvae"
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

# Sphinx reads below this folder only, and the notebooks live beside it.
shutil.rmtree(HERE / "tutorials", ignore_errors=True)
(HERE / "tutorials").mkdir()
for notebook in sorted((HERE.parent / "tutorials").glob("*.ipynb")):
    shutil.copy(notebook, HERE / "tutorials" / notebook.name)

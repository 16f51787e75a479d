"""How the site is built: `pip install '.[docs]' && sphinx-build -W docs docs/_build`.

Pages are MyST Markdown; those with a `kernelspec` are run while the site is built (myst-nb), so
that their outputs and figures are what the code prints. An error in a cell stops the build.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jaxreml

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "jaxreml"
author = "the jaxreml developers"
project_copyright = "2026, the jaxreml developers"
version = release = jaxreml.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "kernels",
    "reference",
]
exclude_patterns = ["_build", "_templates"]
nitpicky = False

# Pages
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

# Docstrings
default_role = "py:obj"  # `fit` in a docstring leads to it, where there is such a name
autodoc_typehints = "none"  # docstrings say what arguments are
autodoc_member_order = "bysource"
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]  # several names in one line
napoleon_use_rtype = False

# Looks
html_theme = "furo"
html_title = "jaxreml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

"""Sphinx configuration. Nothing here needs a network; ``make docs`` builds into docs/_build/html.

Before the build, ``reference.py`` writes what is generated from the contracts into docs/_generated.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from reference import write_reference  # noqa: E402

import semroute  # noqa: E402

write_reference(HERE / "_generated")

project = "semroute"
author = "the semroute authors"
version = release = semroute.__version__
project_copyright = author

extensions = [
    "mathml",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["_build", "_generated"]
smartquotes = False  # it would make one dash of the two before an option

nb_execution_mode = "off"  # notebooks hold what they showed; tests/test_notebooks.py runs them

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # as in the source, not their repr
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 96  # a longer one has a parameter on each line
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"semroute {release}"
html_copy_source = False
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_theme_options = {"navigation_with_keys": True}

"""How Sphinx builds the pages: ``make docs``.

The source folder is the root of the clone, so that links between README.md, docs/ and projects/ are the same in the
built pages as on GitHub. Everything that the pages need lies in the site; ``self_contained`` makes sure of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_extensions")]

from convmask import __version__  # noqa: E402  (found by the path above)

project = "ConvMask"
author = "the authors of ConvMask"
version = release = __version__
html_title = f"ConvMask {__version__}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "importable", "navigation", "self_contained"]

root_doc = "docs/index"
include_patterns = ["README.md", "docs/*.md", "docs/methods/*.md", "docs/reference/*.rst", "projects/*/README.md"]
exclude_patterns = [".*", "build", "dist", "output", "tests", "csrc", "convmask", "**/__pycache__"]

# Pages are plain Markdown, as GitHub reads it: headings have GitHub's anchors, nothing is extended.
myst_heading_anchors = 4
highlight_language = "none"

html_theme = "furo"
html_show_sphinx = False
html_copy_source = False
# furo's footer has an icon for each repository named here; there is none, and so no request.
html_theme_options = {"footer_icons": []}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = False

# Of some signatures Sphinx takes nested generic types apart at their commas, and finds no class of that name.
nitpick_ignore_regex = [("py:class", r"collections\.abc\.\w+\[.*")]

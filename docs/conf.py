"""How the documentation is built.

    sphinx-build -W --keep-going -n docs build/docs

Nothing is fetched, neither while it is built nor while it is read.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lobs_native

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "lobs_native"
author = "The lobs_native developers"
copyright = author
version = release = lobs_native.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "numpydoc",
    "sphinx_design",
    "sphinx_copybutton",
    "command_help",
    "dataclass_fields",
    "mathml",
    "runtimes_table",
]
exclude_patterns = ["_extensions", "figures"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "substitution"]
myst_heading_anchors = 3
myst_substitutions = {"version": version}

autodoc_typehints = "none"  # the docstrings say more, and numpydoc shows them
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

# Types that are written in signatures and stand in no page of ours.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|typing|collections|pathlib|os|np|numpy)\..*"),
    (r"py:.*", r"(Tensor|Any|Optimizer|Module|Path|module)"),
    (r"py:.*", r"Collected(\..*)?"),  # what drop-in replacements share inside
    (r"py:.*", r"lobs_native\.(files|rundir|calibration|network|solvers|huggingface)\..*"),
]

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"lobs_native {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#a84300",
        "color-brand-content": "#a84300",
    },
    "dark_css_variables": {
        "color-brand-primary": "#ff9d5c",
        "color-brand-content": "#ff9d5c",
    },
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

"""Configuration of the documentation: `make docs` builds it into build/docs."""

import sys
from pathlib import Path

import mgt_fast

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "mgt-fast"
author = copyright = "The mgt-fast developers"
version = release = mgt_fast.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "docstrings",
    "generated",
    "mathml",
    "repository",
]
exclude_patterns = ["_ext", "_static", "slurm"]
nitpicky = True
# Nothing outside the project has an inventory here: builds need no network.
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|numpy|os|pathlib|pyarrow|pydantic|rich|torch)\..*"),
    (r"py:exc", r"[\w ]+"),  # docstrings name errors without their module
    (r"py:class", r"mgt_fast\.train\.config\.Config"),  # a type variable
]
show_warning_types = True

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = True

default_role = "code"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 90
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False
viewcode_line_numbers = True
highlight_language = "none"
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"mgt-fast {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f5fa8", "color-brand-content": "#1f5fa8"},
    "dark_css_variables": {"color-brand-primary": "#7fb2ee", "color-brand-content": "#7fb2ee"},
}

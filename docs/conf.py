"""Settings of the documentation site: make docs."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))

project = "adaround_ext"
version = release = re.search(
    r'^version = "(.+)"', (HERE.parent / "pyproject.toml").read_text(), re.M
).group(1)

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "command_help",
    "outside_pages",
]
exclude_patterns = ["extensions"]
html_static_path = ["static"]
html_css_files = ["site.css"]

# Markdown as GitHub reads it: $ and $$ are math, links go to the headings' names.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes are listed where the class is, not each on its own
highlight_language = "text"  # of what names no language
maximum_signature_line_length = 100  # longer ones have a line for each argument
# Names in annotations that have no page: other projects' and private ones.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|dist|collections|os|pathlib|typing)\..*"),
    ("py:.*", r"adaround_ext\.(layers|export\.quantized_layers)\..*"),  # private here
    ("py:.*", r"Granularity|Start|Errors|Data|Targets"),
    ("py:.*", r"Tensor|Any|Literal|Mapping|Sequence|Iterable|Callable|Path|Figure|PreTrained\w+"),
]

html_theme = "furo"
html_title = f"adaround_ext {version}"
html_copy_source = False
html_show_copyright = False

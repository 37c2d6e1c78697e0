"""How the site is built: pages in Markdown, the reference from the docstrings, the gallery from the examples.

Build it with ``sphinx-build -W --keep-going docs docs/_build/html`` in the root of the repository.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import tieopt

# For gallery_arguments, also in the processes that run the examples.
sys.path.insert(0, str(Path(__file__).parent))

project = "tieopt"
author = "The tieopt developers"
copyright = author  # noqa: A001
version = release = tieopt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "examples", "gallery/GALLERY_HEADER.rst"]
nitpicky = True
# Their documentation is elsewhere.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|matplotlib|hypothesis|os|numpy)\..*"),
    # Names that annotations import.
    ("py:class", "Axes|Figure|Optimizer|Reduction|SearchStrategy|SubFigure|Tensor"),
    # What an annotation says is all that there is to say of them.
    ("py:class", r"tieopt\.ties\.tie\.(Part|SupportsArray)"),
]

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
autodoc_preserve_defaults = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"tieopt {version}"
html_static_path = ["_static"]
html_css_files = ["tieopt.css"]
html_favicon = "_static/tieopt.svg"
html_theme_options = {"light_logo": "tieopt.svg", "dark_logo": "tieopt.svg"}
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "reset_argv": "gallery_arguments.arguments",
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "within_subsection_order": "ExampleTitleSortKey",
    "abort_on_example_error": True,
    "remove_config_comments": True,
    "download_all_examples": False,
    "write_computation_times": False,
    "thumbnail_size": (640, 360),
    # As many at a time as there are cores here and in continuous integration: each has one thread.
    "parallel": 2,
}

logger = logging.getLogger(__name__)

# The modules of which everything public has to stand in the reference.
PUBLIC_MODULES = ("tieopt", "tieopt.export", "tieopt.patterns", "tieopt.plot", "tieopt.testing")


def adapt_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Has a page, which can be read where it lies in the repository, be one of this site."""
    text = source[0].replace("](../README.md)", "](/index.md)")
    # The empty line at the end of a snippet is for doctest.
    text = re.sub(r"(^```pycon\n.*?\n)\n(?=```$)", r"\1", text, flags=re.MULTILINE | re.DOTALL)
    # Examples have pages in the gallery, where their figures were drawn by this build.
    text = re.sub(r"\]\((?:\.\./)*examples/(plot_\w+)\.py\)", r"](/gallery/\1.rst)", text)
    if app.config.plot_gallery != "0":
        text = re.sub(r"\]\((?:\.\./)*images/(\w+)\.png\)", r"](/gallery/images/sphx_glr_plot_\1_001.png)", text)
        # An example draws at its end what a reader wants to see first.
        if page.startswith("gallery/plot_"):
            figure = f".. image:: /{page.replace('/', '/images/sphx_glr_')}_001.png\n   :alt: What the example draws.\n"
            text = re.sub(r"(?<=\n)(=+\n)", rf"\1\n{figure}", text, count=1)
    source[0] = text


def public_names(module: ModuleType) -> Iterator[str]:
    """What a module offers, and the methods and properties of its classes."""
    for name in module.__all__:
        yield name
        thing = getattr(module, name)
        members = vars(thing).items() if inspect.isclass(thing) else ()
        kinds = (FunctionType, classmethod, staticmethod, property)
        yield from (f"{name}.{member}" for member, value in members if member[0] != "_" and isinstance(value, kinds))


def check_reference(app: Sphinx, env: BuildEnvironment) -> None:
    """Warns of public names that are not in the reference, as those without a docstring; warnings fail the build."""
    documented = env.domains.python_domain.objects
    for module in map(import_module, PUBLIC_MODULES):
        for name in public_names(module):
            if f"{module.__name__}.{name}" not in documented:
                logger.warning("%s.%s is public, and has no place in the reference", module.__name__, name)


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("source-read", adapt_page)
    app.connect("env-check-consistency", check_reference)

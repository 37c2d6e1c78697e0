"""Build the site: pages in Markdown, the reference from the docstrings, the gallery from the examples.

Run ``sphinx-build -W --keep-going docs docs/_build/html`` in the root of the repository.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType

from docutils import nodes
from math_core import LatexToMathML
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.search.en import SearchEnglish
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

import tieopt

# The processes that run the examples import gallery_arguments, too.
sys.path.insert(0, str(Path(__file__).parent))

project = "tieopt"
author = "The tieopt developers"
copyright = author  # noqa: A001
version = release = tieopt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "examples", "gallery/GALLERY_HEADER.rst"]
nitpicky = True
# Targets that this site does not document.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|matplotlib|hypothesis|os|numpy)\..*"),
    # Names that annotations use without their module.
    ("py:class", "Axes|Figure|Groups|Module|Optimizer|Part|ProcessGroup"),
    ("py:class", "Reduction|SearchStrategy|SubFigure|SupportsArray|Tensor"),
    # Private names, which their annotations explain.
    ("py:class", r"tieopt\.ties\.part\.(Part|SupportsArray)"),
]

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
autodoc_preserve_defaults = True
napoleon_use_rtype = False

html_math_renderer = "mathml"
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
    # Each example uses one thread, and continuous integration has two cores.
    "parallel": 2,
}

logger = logging.getLogger(__name__)

# Every public name of these modules must be in the reference.
PUBLIC_MODULES = ("tieopt", "tieopt.export", "tieopt.patterns", "tieopt.plot", "tieopt.testing")


def adapt_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Adapt a page, which is written to be read in the repository, to this site."""
    text = source[0].replace("](../README.md)", "](/index.md)")
    # Doctest needs the empty line at the end of a snippet; readers do not.
    text = re.sub(r"(^```pycon\n.*?\n)\n(?=```$)", r"\1", text, flags=re.MULTILINE | re.DOTALL)
    # Link to the gallery, which has the figures that this build has drawn.
    text = re.sub(r"\]\((?:\.\./)*examples/(plot_\w+)\.py\)", r"](/gallery/\1.rst)", text)
    if app.config.plot_gallery != "0":
        text = re.sub(r"\]\((?:\.\./)*images/(\w+)\.png\)", r"](/gallery/images/sphx_glr_plot_\1_001.png)", text)
        # Show the figure first, which an example draws last.
        if page.startswith("gallery/plot_"):
            figure = f".. image:: /{page.replace('/', '/images/sphx_glr_')}_001.png\n   :alt: Figure of the example.\n"
            text = re.sub(r"(?<=\n)(=+\n)", rf"\1\n{figure}", text, count=1)
    source[0] = text


def write_formula(page: HTML5Translator, formula: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, which browsers show without a script and without a network."""
    block = isinstance(formula, nodes.math_block)
    mathml = LatexToMathML(fancy_error=False).convert_with_local_state(formula.astext(), displaystyle=block)
    page.body.append(f'<div class="math">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


class BothSpellings(SearchEnglish):
    """Index words in their British and their American spelling: initialisation and initialization find the same."""

    def split(self, text: str) -> list[str]:
        """Return the words of a text, and those of the other spelling."""
        ending = re.compile(r"(?<=i)[sz](?=(ations?|e[drs]?|ing)$)")
        words = super().split(text)
        other = (ending.sub(lambda letter: "z" if letter[0] == "s" else "s", word) for word in words)
        return [*words, *(spelling for word, spelling in zip(words, other, strict=True) if spelling != word)]


def public_names(module: ModuleType) -> Iterator[str]:
    """Yield the public names of a module, and the methods and properties of its classes."""
    for name in module.__all__:
        yield name
        thing = getattr(module, name)
        members = vars(thing).items() if inspect.isclass(thing) else ()
        kinds = (FunctionType, classmethod, staticmethod, property)
        yield from (f"{name}.{member}" for member, value in members if member[0] != "_" and isinstance(value, kinds))


def check_reference(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn about public names that the reference lacks, such as names without a docstring; warnings fail the build."""
    documented = env.domains.python_domain.objects
    for module in map(import_module, PUBLIC_MODULES):
        for name in public_names(module):
            if f"{module.__name__}.{name}" not in documented:
                logger.warning("%s.%s is public, but missing in the reference", module.__name__, name)


def setup(app: Sphinx) -> None:
    """Connect the functions above; Sphinx calls this."""
    app.connect("source-read", adapt_page)
    app.connect("env-check-consistency", check_reference)
    app.add_search_language(BothSpellings)
    renderers = (write_formula, None)
    app.add_html_math_renderer("mathml", inline_renderers=renderers, block_renderers=renderers)

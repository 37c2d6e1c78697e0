"""What the gallery calls examples with: their default seeds, or as many as ``EXAMPLE_SEEDS`` in the environment says.

A module, so that Sphinx can keep with its pages which function that is.
"""

import os
from pathlib import Path
from typing import Any


def arguments(gallery_conf: dict[str, Any], script_vars: dict[str, Any]) -> list[str]:
    """The arguments of an example; some have no seeds."""
    seeds = os.environ.get("EXAMPLE_SEEDS")
    takes_seeds = "--seeds" in Path(script_vars["src_file"]).read_text(encoding="utf-8")
    return ["--seeds", seeds] if seeds and takes_seeds else []

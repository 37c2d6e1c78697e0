"""Which pages are not run: those whose package is not installed."""

from importlib.util import find_spec

PACKAGES = {
    "accelerate.md": "accelerate",
    "ignite.md": "ignite",
    "lightning.md": "lightning",
    "skorch.md": "skorch",
    "swa.md": "torch",
    "transformers.md": "transformers",
}

collect_ignore = [page for page, package in PACKAGES.items() if find_spec(package) is None]

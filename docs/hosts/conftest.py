"""The pages whose package is not installed are left out."""

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

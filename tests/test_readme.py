"""What the pages say: snippets run, the commands are those of continuous integration, links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
# Not what the site is built to, which a checkout may have.
PAGES = [README, ROOT / "CHANGELOG.md", *sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)]


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The fragments that the headings of a page can be linked by."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_snippet_runs() -> None:
    (snippet,) = blocks(README, "python")
    exec(compile(snippet, README, "exec"), {"__name__": "__main__"})  # noqa: S102


def test_the_commands_are_the_ones_that_ci_runs() -> None:
    (block,) = blocks(README, "sh")
    assert block in blocks(DOCS / "install.md", "sh")
    commands = block.splitlines()
    assert len(commands) == 2
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r'^bash -c "(.*)"$', ci, re.MULTILINE) == commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, fragment = link.partition("#")
        if path.startswith("gallery/"):  # made when the site is built, which fails if it is not there
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page.name} links to {link}"
        assert not fragment or fragment in anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES[2:], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_in_the_documentation_is_run(page: Path) -> None:
    """Doctest sees only prompts, and takes a closing fence for output."""
    assert not blocks(page, "python"), "write ```pycon, with prompts"
    for block in blocks(page, "pycon"):
        assert block.startswith(">>> ")
        assert block.endswith("\n\n"), f"end with an empty line:\n{block}"

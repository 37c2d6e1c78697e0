"""The page of evidence shows what its scripts print; those that take seconds are run."""

import runpy
from pathlib import Path

import pytest
import torch
from test_readme import blocks

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence"


@pytest.mark.parametrize("script", ["gradient_norm"])
def test_a_script_prints_what_the_page_shows(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    runpy.run_path(str(EVIDENCE / f"{script}.py"), run_name="__main__")
    torch.set_num_threads(threads)
    assert capsys.readouterr().out in blocks(EVIDENCE.with_suffix(".md"), "text")

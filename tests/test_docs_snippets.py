"""Every Python block of the README and of the documentation pages runs.

Blocks of the README stand alone. Those of a page go on from each other, as a reader would type them. A block
whose first line is ``# not run`` is skipped.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if BLOCK.search(path.read_text("utf-8")))


def blocks(path: Path) -> list[str]:
    """The blocks, each moved down to its line in the page, so that a traceback names it."""
    text = path.read_text("utf-8")
    found = [(text.count("\n", 0, m.start(1)), m.group(1)) for m in BLOCK.finditer(text)]
    return ["\n" * line + code for line, code in found if not code.startswith("# not run")]


def run(code: str, path: Path, names: dict) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="k̂ > 0.7")
        exec(compile(code, str(path), "exec"), names)


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a block may write files
    torch.manual_seed(0)
    yield
    plt.close("all")


@pytest.mark.parametrize("number", range(3))
def test_example_of_the_readme_runs_alone(number):
    examples = blocks(ROOT / "README.md")
    assert len(examples) == 3
    run(examples[number], ROOT / "README.md", {"__name__": "readme"})


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_blocks_of_a_page_run_in_order(path):
    names: dict = {"__name__": path.stem}
    for code in blocks(path):
        run(code, path, names)


def test_pages_with_examples_are_found():
    assert {"guides", "training", "likelihood", "sampling", "zoo", "files"} <= {path.stem for path in PAGES}

"""The documents keep the rules of prose that a program can check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_PROSE = re.compile(
    r"^```.*?^```"
    r"|<!-- (?:\[\[\[cog.*?\[\[\[end\]\]\]|benchmarks: written.*?benchmarks: end) -->"
    r"|^(?:\||    | +`tests/).*?$",
    re.MULTILINE | re.DOTALL,
)
"""Code, generated parts, tables, indented lines and names of tests."""

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_lines_of_prose_are_short(document):
    """A line of prose has at most 100 characters."""
    lines = WITHOUT_PROSE.sub("", document.read_text()).splitlines()
    assert [line for line in lines if len(line) > 100] == []

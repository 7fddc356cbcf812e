"""The documents say what is so: named tests exist, every error is explained, every word is defined."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from milepost import errors

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@cache
def functions_of(file):
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_guarantee_names_tests_that_exist():
    """Promises are numbered from 1 on, each names a test, and each named test exists."""
    text = (DOCS / "guarantees.md").read_text()
    numbers = [int(number) for number in re.findall(r"^(\d+)\. \*\*", text, re.MULTILINE)]
    assert numbers == [*range(1, len(numbers) + 1)]
    promises = re.split(r"^\d+\. ", text, flags=re.MULTILINE)[1:]
    assert len(promises) == len(numbers)
    for promise in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", promise)
        assert named, promise
        for file, name in named:
            assert name in functions_of(file), (file, name)


def test_every_error_is_explained():
    """docs/errors.md has a row for each error, with its built-in, and draws the tree of the module."""
    text = (DOCS / "errors.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w*) *\|", text, re.MULTILINE))
    kinds = {
        name: getattr(errors, name) for name in errors.__all__ if isinstance(getattr(errors, name), type)
    }
    assert rows.keys() == kinds.keys() - {"MilepostError"}
    for name, builtin in rows.items():
        if builtin:
            assert builtin in {base.__name__ for base in kinds[name].__mro__}, name
    drawn = (line for line in errors.__doc__.splitlines() if line.startswith("    "))
    names = [re.match(r"[ │├└─]*(\w+)", line)[1] for line in drawn]
    tree = text.partition("As a tree:")[2]
    assert [line.strip(" │├└─") for line in tree.splitlines() if line.startswith("    ")] == names


def test_every_word_is_defined():
    """docs/glossary.md defines each word of the design, in the order of events or of the alphabet."""
    words = re.findall(r"^- \*\*([\w ]+)\*\*: ", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    assert words[:4] == ["staged", "sealed", "written", "committed"]
    things = words[4:]
    core = ["arena", "attempt", "image", "index", "layout", "manifest", "mark", "plan", "record", "snapshot"]
    assert things[: len(core)] == core
    assert things[len(core) :] == sorted(things[len(core) :])


def test_links_between_documents_lead_somewhere():
    """Every relative link in the documents leads to a file."""
    for document in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), (document.name, target)

"""What is found in files written for the purpose, in each language, and nothing besides."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import SAMPLE

import gazetteer
from gazetteer.model import FileFacts
from gazetteer.read import grammars
from gazetteer.read.analyze import analyze
from gazetteer.read.scan import scan

EXPECTED = Path(__file__).parent / "golden" / "expected.txt"


def lines_of(facts: FileFacts) -> list[str]:
    """Write facts as lines that a person can compare with the file."""
    out = [f"== {facts.path} {facts.language} {facts.status}", f"overview {facts.overview!r}"]
    out += [
        f"{s.kind} {s.qualname}:{s.line}-{s.end_line} [{s.label}] {s.signature} bases={','.join(s.bases)} deco={','.join(s.decorators)} doc={s.doc}"
        for s in facts.symbols
    ]
    out += [f"import {i.module} {i.name} :{i.line} {i.style}".rstrip() for i in facts.imports]
    out += [f"heading {level} {title} :{line}" for level, title, line in facts.headings]
    out += [f"identifier {name} :{line}" for name, line in facts.identifiers]
    out += [f"finding {f.rule} :{f.line}" for f in facts.findings]
    return out


def all_lines() -> str:
    """Return the facts of the whole sample."""
    return "\n".join(line for found in scan(SAMPLE).files for line in lines_of(analyze(found))) + "\n"


def test_every_language_gives_exactly_what_the_sample_defines() -> None:
    """Symbols, imports, headings and findings of the sample are those of the reviewed list."""
    assert all_lines() == EXPECTED.read_text("utf-8")


def test_the_sample_has_every_language() -> None:
    """No language of the registry goes untested, TSX apart, which shares TypeScript's query."""
    found = {analyze(file).language for file in scan(SAMPLE).files}
    assert found >= set(grammars.languages()) - {"tsx"}


@pytest.mark.parametrize(
    "word",
    [
        "NotAClass",
        "not_a_function",
        "InAString",
        "notAFunction",
        "nothing_at_all",
        "not_a_key",
        "not_a_target",
        "Commented",
        "also_in_a_string",
        "not_included",
    ],
)
def test_words_in_comments_and_strings_are_no_symbols(word: str) -> None:
    """Definitions that stand only in comments and strings are found nowhere."""
    for file in scan(SAMPLE).files:
        facts = analyze(file)
        names = (
            {s.name for s in facts.symbols}
            | {i.name for i in facts.imports}
            | {i.module.strip('"') for i in facts.imports}
        )
        assert not any(word in name for name in names), file.path


def section(page: str, title: str, level: int = 3) -> list[str]:
    """Return the list items of one section."""
    match = re.search(rf"^{'#' * level} {re.escape(title)}\n\n(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
    return [line for line in match.group(1).splitlines() if line.startswith("- ")] if match else []


def test_the_keyword_page_of_a_test_lists_its_class_methods_and_imports(tmp_path: Path) -> None:
    """One class, six methods, exactly the imported names, each with the line where it stands."""
    gazetteer.build(SAMPLE, tmp_path / "out", jobs=1)
    page = (tmp_path / "out" / "test_builder.py_kw.md").read_text("utf-8")
    source = (SAMPLE / "test_builder.py").read_text("utf-8").splitlines()

    def named(title: str) -> list[str]:
        found = []
        for item in section(page, title):
            name = re.match(r"- \*\*`([^`]+)`\*\*", item)
            line = re.search(r"test_builder\.py#L(\d+)\)$", item)
            assert name and line, item
            assert name.group(1).rpartition(".")[2] in source[int(line.group(1)) - 1], item
            found.append(name.group(1))
        return found

    assert named("Classes") == ["TestMakeCheckpointer"]
    assert named("Functions") == []
    assert named("Methods") == [
        "setUp",
        "tearDown",
        "test_make_sync_checkpointer",
        "test_make_sync_checkpointer_with_config_first",
        "test_make_sync_checkpointer_with_custom_config",
        "test_make_async_checkpointer",
    ]
    assert named("Imports") == [
        "os",
        "shutil",
        "tempfile",
        "torch",
        "BarrierConfig",
        "make_async_checkpointer",
        "make_sync_checkpointer",
        "AsyncCheckpointer",
        "SyncCheckpointer",
        "CheckpointerConfig",
        "CheckpointStagerConfig",
        "RankInfo",
        "TestCase",
        "run_tests",
    ]
    from_there = [
        item for item in section(page, "Imports") if "from `torch.distributed.checkpoint._experimental." in item
    ]
    assert len(from_there) == 8
    assert "Classs" not in page


def test_a_test_page_says_what_its_file_is(tmp_path: Path) -> None:
    """The docs page quotes the docstring, names the bases and leaves the empty sections out."""
    gazetteer.build(SAMPLE, tmp_path / "out", jobs=1)
    page = (tmp_path / "out" / "test_builder.py_docs.md").read_text("utf-8")
    assert "Tests for the builder: import this, class That and def those are words in a docstring." in page
    assert "bases `TestCase`" in page
    assert "## Security & Safety" not in page
    assert "## Performance Considerations" not in page

"""Reading files: languages, symbols, imports, findings, text, and the processes that do it."""

from __future__ import annotations

import os
import signal

import pytest

from gazetteer.errors import LanguageError
from gazetteer.model import FileFacts
from gazetteer.read import grammars
from gazetteer.read.extract import extract
from gazetteer.read.text import comment_text, decode, first_line, sentence, split_commas, split_scope, tidy
from gazetteer.read.workers import Workers


def facts(source: str, language: str = "python", path: str = "x") -> FileFacts:
    return extract(path, source.encode(), language, size=len(source))


def found(source: str, language: str = "python") -> list[tuple[str, int]]:
    return [(f.rule, f.line) for f in facts(source, language).findings]


def test_every_language_loads_and_every_rule_is_used() -> None:
    """Each query fits its grammar; no rule is there for nothing."""
    used: set[str] = set()
    for name, language in grammars.languages().items():
        for inline in (False, True):
            if not inline or language.inline_query:
                query = grammars.grammar(name, inline=inline).query
                used |= {
                    query.capture_name(i)[5:]
                    for i in range(query.capture_count)
                    if query.capture_name(i).startswith("find.")
                }
    assert used == set(grammars.rules())


def test_a_capture_without_a_rule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A query that names an unknown rule fails with the name of the rule."""
    monkeypatch.setattr(grammars, "_data", lambda name: "(module) @find.nonsense" if name == "bad.scm" else "")
    grammars.rules.cache_clear()
    try:
        with pytest.raises(LanguageError, match="nonsense"):
            grammars._load("tree_sitter_python:language", ("bad.scm",))
    finally:
        grammars.rules.cache_clear()


@pytest.mark.parametrize(
    ("name", "head", "language"),
    [
        ("a.py", b"", "python"),
        ("A.CPP", b"", "cpp"),
        ("x.cmake.in", b"", "cmake"),
        ("run", b"#!/usr/bin/env python3.11\n", "python"),
        ("run", b"#!/bin/sh -e\n", "bash"),
        ("run", b"#!/usr/bin/env -S node --x\n", "javascript"),
        ("CMakeLists.txt", b"", "cmake"),
        ("notes.txt", b"", ""),
        ("x", b"#!", ""),
    ],
)
def test_languages_are_told_by_name_and_first_line(name: str, head: bytes, language: str) -> None:
    """Extensions count without regard to case, then whole names, then the program after ``#!``."""
    assert grammars.detect(name, head) == language


def test_security_findings_come_from_the_tree() -> None:
    """Calls are found with their lines; the same words in comments, strings and other names are not."""
    source = '# eval("x") pickle.load(f) shell=True\n"""eval(x)"""\ndef evaluate(eval_): pass\nX = "pickle.load(f)"\n'
    assert found(source) == []
    assert found(
        "import pickle, subprocess\neval('1')\npickle.load(f)\nsubprocess.run(x, shell=True)\nsubprocess.run(x, shell=False)\n"
    ) == [
        ("eval", 2),
        ("unpickle", 3),
        ("shell", 4),
    ]


def test_input_and_output_two_loops_deep_counts_one_loop_does_not() -> None:
    """The header of a loop is evaluated once and is no round of it; an inner function starts anew."""
    assert found("for a in b:\n    open(a)\n") == []
    assert found("for a in b:\n    for line in open(a):\n        pass\n") == []
    assert found("for a in b:\n    for c in a:\n        open(c)\n") == [("io-in-loops", 3)]
    assert found("for a in b:\n    for c in a:\n        def f():\n            open(c)\n") == []


def test_blocking_calls_count_in_async_code_only() -> None:
    """A sleep in a coroutine is found; in a plain function inside it, or awaited, it is not."""
    assert found("import time\ndef f():\n    time.sleep(1)\n") == []
    assert ("blocking-async", 2) in found("async def f():\n    time.sleep(1)\n")
    assert ("blocking-async", 3) not in found("async def f():\n    def g():\n        time.sleep(1)\n")
    assert ("blocking-async", 2) not in found("async def f():\n    await asyncio.sleep(1)\n")


def test_a_name_imported_from_a_module_is_no_import_of_that_name() -> None:
    """``from a import x`` imports ``x`` from ``a``; there is no import of a module ``x``."""
    items = [
        (i.module, i.name)
        for i in facts("from a import x\nfrom . import y as z\nimport b.c as d\nfrom e import *\n").imports
    ]
    assert items == [("a", "x"), (".", "y"), ("b.c", ""), ("e", "*")]


def test_constants_decorators_and_nested_names() -> None:
    """Capitals at module and class level are constants; nested definitions carry their owners' names."""
    source = "LIMIT = 1\nsmall = 2\nclass A:\n    B = 1\n    @property\n    def c(self):\n        '''Doc. More.'''\n        LOCAL = 1\n        def d(): pass\n"
    assert [(s.kind.value, s.qualname, s.line) for s in facts(source).symbols] == [
        ("constant", "LIMIT", 1),
        ("class", "A", 3),
        ("constant", "A.B", 4),
        ("method", "A.c", 6),
        ("function", "A.c.d", 9),
    ]
    assert facts(source).symbols[3].decorators == ("@property",)
    assert facts(source).symbols[3].doc == "Doc. More."


def test_small_functions_on_text() -> None:
    """Comment marks go, sentences end, lists split at their own commas, encodings are told."""
    assert comment_text("/** One.\n * Two.\n */") == "One.\nTwo."
    assert comment_text("#!/bin/sh\n# Words.") == "Words."
    assert first_line("\n----\n Title \n") == "Title"
    assert sentence("One two. Three.\n\nFour.") == "One two."
    assert split_commas("(A[B, C], d=e(f, g))") == ["A[B, C]", "d=e(f, g)"]
    assert split_scope("a<b::c>::d") == ("a<b::c>", "d")
    assert split_scope("Money::operator std::string") == ("Money", "operator std::string")
    assert tidy("def f( a, b, ) -> c") == "def f(a, b) -> c"
    assert decode(b"\xef\xbb\xbfx") == ("x", "utf-8-sig")
    assert decode(b"# -*- coding: cp1252 -*-\n\x80") == ("# -*- coding: cp1252 -*-\n€", "cp1252")
    assert decode(b"\0\1") is None


def _die_or_double(number: int) -> int:
    if number == 170:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


def test_a_task_that_kills_its_process_costs_only_itself() -> None:
    """The others have their results, in order; the one that crashed has its stand-in."""
    with Workers(2) as workers:
        results = list(workers.run(_die_or_double, list(range(300)), lambda number: -number))
    assert results == [-170 if n == 170 else 2 * n for n in range(300)]


def test_only_bases_are_bases() -> None:
    """Keywords such as ``metaclass=`` and comments between bases are none."""
    source = (
        b"class A(  # why: x, y\n    B[int, str], c.D,\n    *E, metaclass=M, kw_only=True): pass\nclass Z(): pass\n"
    )
    assert [s.bases for s in extract("a.py", source, "python", size=0).symbols] == [("B[int, str]", "c.D", "*E"), ()]

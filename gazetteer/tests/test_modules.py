"""The parts on their own: languages, imports, findings, processes, drawing, names of pages."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from conftest import Maker
from hypothesis import given
from hypothesis import strategies as st

import gazetteer
from gazetteer import errors
from gazetteer.errors import GazetteerError, LanguageError
from gazetteer.markdown import Page
from gazetteer.model import FileFacts
from gazetteer.paths import docs_page, folder_page, href, kw_page
from gazetteer.read import grammars
from gazetteer.read.extract import extract
from gazetteer.read.text import comment_text, decode, first_line, sentence, split_commas, split_scope, tidy
from gazetteer.read.workers import Workers
from gazetteer.site.drawing import draw, read_mermaid


def facts(source: str, language: str = "python", path: str = "x") -> FileFacts:
    return extract(path, source.encode(), language, size=len(source))


def found(source: str, language: str = "python") -> list[tuple[str, int]]:
    return [(f.rule, f.line) for f in facts(source, language).findings]


def test_the_front_door_is_what_all_names() -> None:
    """``__all__`` is sorted and each name in it can be imported."""
    assert sorted(gazetteer.__all__) == gazetteer.__all__
    assert all(hasattr(gazetteer, name) for name in gazetteer.__all__)


def test_every_error_is_in_the_tree_and_is_a_built_in_as_well() -> None:
    """Each leaf can be caught as GazetteerError and as what a caller would expect."""
    for name in errors.__all__:
        cls = getattr(errors, name)
        assert issubclass(cls, GazetteerError)
        if cls is not GazetteerError:
            assert len(cls.__bases__) == 2


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
            grammars._load("tree_sitter_python:language", "bad.scm")
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


RESOLVED = {
    "pkg/__init__.py": "from .a import f\n",
    "pkg/a.py": "from . import b\nfrom .sub.c import g\nimport pkg.b\nimport numpy, yaml, os\n",
    "pkg/b.py": "",
    "pkg/sub/__init__.py": "",
    "pkg/sub/c.py": "from ..b import x\nfrom ...nowhere import y\n",
    "src/lib/util.h": "",
    "src/main.cpp": '#include <lib/util.h>\n#include "lib/util.h"\n#include <vector>\n',
    "tests/test_a.py": "from pkg.a import f\n",
    "scripts/go.py": "import helper\n",
    "scripts/helper.py": "",
}


def test_imports_become_files_or_distributions(make: Maker, tmp_path: Path) -> None:
    """Relative, absolute and sibling imports resolve; outside ones name their distribution."""
    import json

    gazetteer.build(make(RESOLVED), tmp_path / "out", json_index=True)
    files = {f["path"]: f for f in json.loads((tmp_path / "out" / "index.json").read_text("utf-8"))["files"]}

    def imports(path: str) -> list[tuple[str, tuple[str, ...] | str]]:
        return [
            (f"{i['module']} {i['name']}".strip(), tuple(i["files"]) or i["distribution"])
            for i in files[path]["imports"]
        ]

    assert imports("pkg/__init__.py") == [(".a f", ("pkg/a.py",))]
    assert imports("pkg/a.py") == [
        (". b", ("pkg/b.py",)),
        (".sub.c g", ("pkg/sub/c.py",)),
        ("pkg.b", ("pkg/b.py",)),
        ("numpy", "numpy"),
        ("os", "Python standard library"),
        ("yaml", "PyYAML"),
    ]
    assert imports("pkg/sub/c.py")[0] == ("..b x", ("pkg/b.py",))
    assert imports("pkg/sub/c.py")[1][1] == ""
    assert [i[1] for i in imports("src/main.cpp")] == [("src/lib/util.h",), ("src/lib/util.h",), "system headers"]
    assert imports("scripts/go.py") == [("helper", ("scripts/helper.py",))]
    assert files["pkg/a.py"]["tests"] == ["tests/test_a.py"]
    assert files["pkg/a.py"]["imported_by"] == ["pkg/__init__.py", "tests/test_a.py"]


def test_a_name_that_several_files_have_means_the_one_beside_or_none(make: Maker, tmp_path: Path) -> None:
    """Two test folders with a ``conftest`` each use their own; from elsewhere the name means neither."""
    names = ("a/conftest.py", "b/conftest.py", "a/test_a.py", "b/test_b.py", "c/test_c.py")
    root = make({name: "import conftest\n" if "test_" in name else "" for name in names})
    gazetteer.build(root, tmp_path / "out")

    def uses(name: str) -> str:
        return (tmp_path / "out" / f"{name}_docs.md").read_text("utf-8").split("## Dependencies")[1].split("###")[1]

    assert "`a/conftest.py`" in uses("a/test_a.py")
    assert "`b/conftest.py`" in uses("b/test_b.py")
    assert "External" in uses("c/test_c.py") and "/conftest.py" not in uses("c/test_c.py")


def test_layers_and_cycles(make: Maker, tmp_path: Path) -> None:
    """What imports nothing is layer 0; files that import each other share a layer and are named."""
    root = make(
        {
            "base.py": "",
            "one.py": "import base, two\n",
            "two.py": "import one\n",
            "top.py": "import one\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import cli\n",
            "cli.py": "import top\n",
        }
    )
    gazetteer.build(root, tmp_path / "out")

    def page(name: str) -> str:
        return (tmp_path / "out" / f"{name}_docs.md").read_text("utf-8")

    assert "Layer 0 of the import graph" in page("base.py")
    assert "Layer 1 of the import graph" in page("one.py") and "import cycle with [`two.py`]" in page("one.py")
    assert (
        "Layer 2 of the import graph" in page("top.py")
        and "import cycle" not in page("top.py")
        and "for types" in page("top.py")
    )
    assert "### Import Cycles" in (tmp_path / "out" / "comprehensive_book.md").read_text("utf-8")


def test_how_tests_are_run_is_read_from_the_repository(make: Maker, tmp_path: Path) -> None:
    """The page of what is tested names the command and the file that says so."""
    root = make(
        {
            "Makefile": "all:\n\ntest: all\n\tpytest\n",
            "thing.py": "class Gadget: pass\n",
            "tests/test_thing.py": "from thing import *\nGadget()\n",
        }
    )
    gazetteer.build(root, tmp_path / "out")
    page = (tmp_path / "out" / "thing.py_docs.md").read_text("utf-8").split("## Testing & Usage")[1]
    assert "imports it; names `Gadget`" in page
    assert "`make test` (from [`Makefile`](../repo/Makefile#L3))" in page


def test_empty_sections_are_left_out() -> None:
    """A heading that nothing follows is not there, nor one whose parts are all empty."""
    page = Page("T")
    page.heading(2, "Empty")
    page.heading(2, "Outer")
    page.heading(3, "Also empty")
    page.heading(3, "Full")
    page.items(["x"])
    page.heading(2, "Last")
    assert page.render() == "# T\n\n## Outer\n\n### Full\n\n- x\n"
    assert page.sections == ["Outer"]


parts = st.text(st.sampled_from("a~.md_x#"), min_size=1, max_size=8).filter(lambda s: s.strip(".") != "")


@given(st.sets(st.lists(parts, min_size=1, max_size=3).map("/".join), min_size=2, max_size=6))
def test_no_two_places_share_a_page(paths: set[str]) -> None:
    """Pages of different files and folders never meet, nor does a page meet a folder."""
    pages = [page(path) for path in paths for page in (docs_page, kw_page)]
    folders = {"/".join(path.split("/")[:n]) for path in paths for n in range(len(path.split("/")))}
    pages += [folder_page(folder, name) for folder in folders for name in ("index.md", "doc.md", "sub.md")]
    assert len(set(pages)) == len(pages)
    used = {"/".join(page.split("/")[:n]) for page in pages for n in range(1, len(page.split("/")))}
    assert not used & set(pages)


def test_links_are_relative_and_quoted() -> None:
    """A link leads from page to page whatever the names hold."""
    assert href("a/b.md", "a/c d#.md", "x") == "c%20d%23.md#x"
    assert href("a/b.md", "e/f.md") == "../e/f.md"
    assert href("index.md", "e/f.md") == "e/f.md"


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


def test_a_drawing_escapes_its_labels_and_draws_cycles() -> None:
    """Labels cannot get out of the drawing; an edge back is drawn as one."""
    nodes, edges = read_mermaid('graph LR\n  n0["a#60;b#62;"]\n  n1["b"]\n  n0 --> n1\n  n1 -->|3| n0\n')
    assert nodes == {"n0": "a<b>", "n1": "b"} and edges == {("n0", "n1"): 1, ("n1", "n0"): 3}
    svg = draw(nodes, edges, {"n0": "x.html", "n1": '"><script>'})
    assert "<b>" not in svg and "<script>" not in svg and "&lt;b&gt;" in svg
    assert svg.count('class="back"') == 1


def test_only_bases_are_bases() -> None:
    """Keywords such as ``metaclass=`` and comments between bases are none."""
    source = (
        b"class A(  # why: x, y\n    B[int, str], c.D,\n    *E, metaclass=M, kw_only=True): pass\nclass Z(): pass\n"
    )
    assert [s.bases for s in extract("a.py", source, "python", size=0).symbols] == [("B[int, str]", "c.D", "*E"), ()]


def test_a_test_names_only_what_it_reaches(make: Maker, tmp_path: Path) -> None:
    """The same word in a test of something else, or of another module's function, is no use of a symbol."""
    root = make(
        {
            "pkg/__init__.py": "from pkg.deep import Deep, gather\n",
            "pkg/deep.py": "class Deep: pass\ndef gather(): pass\ndef outer():\n  def inner(): pass\n",
            "tests/test_pkg.py": "import gc, pkg\npkg.Deep()\ngc.gather()\ninner = 1\n",
            "tests/test_by_name.py": "from pkg import gather\ngather()\n",
            "tests/test_other.py": "Deep = gather = 1\n",
            "store.h": "int store_open(void);\n",
            "store.c": "int store_close(void) { return 0; }\n",
            "tests/test_store.c": '#include "../store.h"\nint main(void) { return store_close(); }\n',
            "go/a.go": "package a\nfunc Opening() {}\n",
            "go/a_test.go": "package a\nfunc TestOpening() { Opening() }\n",
        }
    )
    out = tmp_path / "out"
    gazetteer.build(root, out)

    def tests(page: str) -> list[str]:
        return [line for line in (out / page).read_text().splitlines() if " names " in line]

    assert tests("pkg/deep.py_docs.md") == [
        "- [`tests/test_by_name.py`](../tests/test_by_name.py_docs.md) names `gather`",
        "- [`tests/test_pkg.py`](../tests/test_pkg.py_docs.md) names `Deep`",
    ]
    assert tests("store.c_docs.md") == ["- [`tests/test_store.c`](tests/test_store.c_docs.md) names `store_close`"]
    assert tests("go/a.go_docs.md") == ["- [`go/a_test.go`](a_test.go_docs.md) names `Opening`"]

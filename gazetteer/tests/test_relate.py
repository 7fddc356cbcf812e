"""What the whole repository says about a file: what imports mean, layers, cycles, tests."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import Maker

import gazetteer

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

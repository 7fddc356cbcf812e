"""A build as a whole: the same bytes, only what changed, nothing dropped, nothing half-done."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import SAMPLE, Maker, git, tree

import gazetteer
from gazetteer.cache import fingerprint
from gazetteer.errors import OutputError, RepositoryError, UsageError


def test_two_builds_give_the_same_bytes_whatever_the_number_of_processes(tmp_path: Path) -> None:
    """One process and two write the same pages."""
    many = tmp_path / "repo"
    shutil.copytree(SAMPLE, many)
    for number in range(200):  # enough to start the processes
        (many / f"m{number}.py").write_text(f"import m{(number * 7) % 200}\ndef f{number}(): pass\n")
    gazetteer.build(many, tmp_path / "one" / "out", jobs=1)
    gazetteer.build(many, tmp_path / "two" / "out", jobs=2)
    assert tree(tmp_path / "one" / "out") == tree(tmp_path / "two" / "out")


def test_a_second_build_writes_nothing(tmp_path: Path) -> None:
    """With nothing changed, nothing is parsed and no page is touched."""
    out = tmp_path / "out"
    gazetteer.build(SAMPLE, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.md")}
    summary = gazetteer.build(SAMPLE, out)
    assert (summary.parsed, summary.written, summary.removed) == (0, 0, 0)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.md")} == before


def test_only_what_changed_is_parsed_and_the_result_is_that_of_a_fresh_build(make: Maker, tmp_path: Path) -> None:
    """An incremental build ends with the same bytes as a build from nothing."""
    root = make({"a.py": "import b\n", "b.py": "def one(): pass\n", "c.py": "'''Alone.'''\n"})
    out = tmp_path / "out"
    gazetteer.build(root, out)
    (root / "b.py").write_text("def two(): pass\n")
    summary = gazetteer.build(root, out)
    assert summary.parsed == 1
    gazetteer.build(root, tmp_path / "fresh")
    assert tree(out) == tree(tmp_path / "fresh")


def test_a_rename_removes_the_stale_pages(make: Maker, tmp_path: Path) -> None:
    """Pages and folders of what is gone are gone."""
    root = make({"pkg/old.py": "x = 1\n", "keep.py": ""})
    out = tmp_path / "out"
    gazetteer.build(root, out)
    assert (out / "pkg" / "old.py_docs.md").exists()
    (root / "new.py").write_bytes((root / "pkg" / "old.py").read_bytes())
    shutil.rmtree(root / "pkg")
    summary = gazetteer.build(root, out)
    assert summary.removed == 5
    assert not (out / "pkg").exists()
    assert (out / "new.py_docs.md").exists()


def test_an_output_inside_the_repository_is_never_documented(make: Maker) -> None:
    """However often it is built, and into however many folders, no page is about a page."""
    root = make({"a.py": "x = 1\n"})
    for out in (root / "docs", root / "docs", root / "other"):
        gazetteer.build(root, out)
    assert not list(root.rglob("*_docs.md_docs.md"))
    first = tree(root / "other")
    gazetteer.build(root, root / "other")
    assert tree(root / "other") == first
    assert gazetteer.check(root / "other").broken == []


def test_a_page_that_someone_damaged_is_written_again(make: Maker, tmp_path: Path) -> None:
    """A deleted page and a changed page come back, although no source changed."""
    root = make({"a.py": "x = 1\n"})
    out = tmp_path / "out"
    gazetteer.build(root, out)
    before = tree(out)
    (out / "a.py_docs.md").unlink()
    (out / "index.md").write_text("something else")
    gazetteer.build(root, out)
    assert tree(out) == before


def test_a_damaged_state_costs_time_and_nothing_else(make: Maker, tmp_path: Path) -> None:
    """A state that cannot be read counts as none."""
    root = make({"a.py": "x = 1\n"})
    out = tmp_path / "out"
    gazetteer.build(root, out)
    before = tree(out)
    for name in ("state", "facts"):
        (out / ".gazetteer" / name).write_bytes(b"\xc1 not msgpack")
        gazetteer.build(root, out)
        assert tree(out) == before


def test_an_interrupt_leaves_whole_pages_and_the_next_build_goes_on(make: Maker, tmp_path: Path) -> None:
    """Stopped at every step of the writing, the output is usable, and ends as if never stopped."""
    root = make({f"m{n}.py": f'"""Module {n}."""\ndef f(): pass\n' for n in range(70)})
    gazetteer.build(root, tmp_path / "fresh")
    want = tree(tmp_path / "fresh")
    out = tmp_path / "out"
    stops = 0
    for phase in ("Reading", "Parsing", "Writing", "Folders"):

        def stop(now: str, done: int, _total: int, phase: str = phase) -> None:
            if now == phase and done:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            gazetteer.build(root, out, jobs=1, progress=stop)
        stops += 1
        for name, data in tree(out).items():
            assert data == want[name], name
    assert stops == 4
    summary = gazetteer.build(root, out, jobs=1)
    assert summary.parsed == 0  # what the interrupted builds had parsed was kept
    assert tree(out) == want


def test_what_cannot_be_parsed_gets_a_page_that_says_so(make: Maker, tmp_path: Path) -> None:
    """Binary, huge, broken, generated, unknown, empty and Latin-1 files all have pages."""
    root = make(
        {
            "binary.py": b"x = 1\0\xff",
            "huge.py": b"x = 1\n" * 800_000,
            "broken.py": "def f(:\n  pass\nclass Whole:\n    pass\n",
            "made.py": "# @generated by a tool. DO NOT EDIT.\nx = 1\n",
            "talks.py": 'TEXT = "@generated by a tool. DO NOT EDIT."\n',
            "unknown.xyz": "some words\n",
            "empty.py": "",
            "latin.py": "# caf\xe9\nNAME = 1\n".encode("latin-1"),
            "wide.py": "NAME = 'é'\n".encode("utf-16"),
            "minified.js": "var a=1;" * 10_000,
        }
    )
    out = tmp_path / "out"
    summary = gazetteer.build(root, out)
    assert summary.files == 10
    assert summary.statuses == {"binary": 1, "huge": 1, "partial": 1, "generated": 2, "text": 1}

    def page(name: str) -> str:
        return (out / f"{name}_docs.md").read_text("utf-8")

    assert "binary file" in page("binary.py")
    assert "not parsed" in page("huge.py")
    assert "first at line 1" in page("broken.py") and "Whole" in page("broken.py")
    assert "a program wrote it" in page("made.py")
    assert "a program wrote it" not in page("talks.py")
    assert "some words" in page("unknown.xyz")
    assert "Empty." in page("empty.py")
    assert "latin-1" in page("latin.py") and "café" in page("latin.py") and "NAME" in page("latin.py")
    assert "utf-16" in page("wide.py") and "NAME" in page("wide.py")
    assert "as programs write them" in page("minified.js")
    assert gazetteer.check(out).broken == []


def test_odd_names_and_link_loops_are_safe(make: Maker, tmp_path: Path) -> None:
    """Names with spaces, marks, dots and new lines, links that loop, folders named like pages."""
    names = [
        "a b#c.py",
        "100%.py",
        "[x](y).py",
        "`tick`.py",
        "quo\"te'.py",
        "new\nline.py",
        "ünïcode.py",
        "-dash.py",
        "a&b<c>.py",
        "x" * 250,
        "{{ x }}.py",
        "d?e.py",
    ]
    root = make({name: f"def named(): '''In {index}.'''\n" for index, name in enumerate(names)})
    for name in ("page_docs.md/inner.py", "page/x.py", "index.md/y.py", ".gazetteer~/z.py", "_site/w.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x = 1\n")
    (root / "page").rename(root / "pages")
    (root / "page").write_text("a file whose page is named like a folder\n")
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "dangling").symlink_to("nowhere")
    with open(os.fsencode(root) + b"/bytes\xff.py", "wb") as stream:
        stream.write(b"def f(): pass\n")
    out = tmp_path / "out"
    summary = gazetteer.build(root, out)
    assert summary.files == len(names) + 5 + 1 + 2 + 1
    assert summary.statuses["link"] == 2
    report = gazetteer.check(out)
    assert report.broken == []
    assert report.links > 100
    assert len(list(out.rglob("*_kw.md"))) == summary.files


def test_gitignore_counts_at_every_level_and_what_is_left_out_is_named(make: Maker, tmp_path: Path) -> None:
    """Nested files, negations and folders work as in git; the index lists what was left out."""
    root = make(
        {
            ".gitignore": "*.log\nbuild/\n!keep.log\n",
            "a.log": "",
            "keep.log": "",
            "build/x.py": "",
            "sub/.gitignore": "!b.log\nlocal.py\n",
            "sub/b.log": "",
            "sub/c.log": "",
            "sub/local.py": "",
            "local.py": "",
        }
    )
    summary = gazetteer.build(root, tmp_path / "out")
    documented = sorted(str(p.relative_to(tmp_path / "out"))[:-8] for p in (tmp_path / "out").rglob("*_docs.md"))
    assert documented == [".gitignore", "keep.log", "local.py", "sub/.gitignore", "sub/b.log"]
    index = (tmp_path / "out" / "index.md").read_text("utf-8")
    assert summary.excluded == 4
    for name in ("a.log", "build/", "sub/c.log", "sub/local.py"):
        assert f"`{name}`" in index


def test_the_index_for_other_tools_holds_every_symbol(tmp_path: Path) -> None:
    """``index.json`` names each file's pages, which exist, and each symbol's line."""
    out = tmp_path / "out"
    summary = gazetteer.build(SAMPLE, out, json_index=True)
    index = json.loads((out / "index.json").read_text("utf-8"))
    assert index["version"] == 1
    assert sum(len(f["symbols"]) for f in index["files"]) == summary.symbols
    assert all((out / f["docs"]).exists() and (out / f["keywords"]).exists() for f in index["files"])
    garden = next(f for f in index["files"] if f["path"].endswith("Garden.java"))
    assert {
        "module": "com.example.Plant",
        "name": "",
        "line": 5,
        "files": ["com/example/Plant.java"],
        "distribution": "",
    } in garden["imports"]
    gazetteer.build(SAMPLE, out)
    assert not (out / "index.json").exists()


def test_history_gives_the_last_commit_and_the_files_that_change_together(make: Maker, tmp_path: Path) -> None:
    """Two commits that touch both files relate them; the newest is shown."""
    root = make({"a.py": "A = 1\n", "b.py": "B = 1\n", "c.py": "C = 1\n"})
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "First")
    (root / "a.py").write_text("A = 2\n")
    (root / "b.py").write_text("B = 2\n")
    git(root, "commit", "-q", "-a", "-m", "Second <b>*bold*</b>")
    gazetteer.build(root, tmp_path / "out")
    page = (tmp_path / "out" / "a.py_docs.md").read_text("utf-8")
    assert git(root, "rev-parse", "HEAD")[:12] in page
    assert r"Second \<b\>\*bold\*\</b\>" in page
    by_commits = page.split("### By Commits")[1].split("##")[0]
    assert "b.py" in by_commits and "2 commits touch both" in by_commits and "c.py" not in by_commits


def test_a_commit_alone_renews_the_metadata(make: Maker, tmp_path: Path) -> None:
    """When only the history moves on, the pages that show it do as well."""
    root = make({"a.py": "A = 1\n"})
    git(root, "init", "-q")
    gazetteer.build(root, tmp_path / "out")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "Now known")
    summary = gazetteer.build(root, tmp_path / "out")
    assert summary.parsed == 0
    assert "Now known" in (tmp_path / "out" / "a.py_docs.md").read_text("utf-8")


def test_folders_of_others_are_not_written_into(make: Maker, tmp_path: Path) -> None:
    """A folder that holds something else, the repository and what is around it are refused."""
    root = make({"a.py": ""})
    other = tmp_path / "other"
    other.mkdir()
    (other / "index.md").write_text("mine")
    with pytest.raises(OutputError, match="not made by Gazetteer"):
        gazetteer.build(root, other)
    assert (other / "index.md").read_text() == "mine"
    for out in (root, tmp_path):
        with pytest.raises(UsageError, match="Name another one"):
            gazetteer.build(root, out)
    with pytest.raises(RepositoryError, match="not a folder"):
        gazetteer.build(tmp_path / "missing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_version_builds_everything_anew(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of another Gazetteer is not trusted, and its pages are still cleaned up."""
    root = make({"a.py": "x = 1\n", "b.py": "y = 1\n"})
    out = tmp_path / "out"
    gazetteer.build(root, out)
    (root / "b.py").unlink()
    monkeypatch.setattr("gazetteer.cache._fingerprint", [fingerprint()[::-1]])
    summary = gazetteer.build(root, out)
    assert summary.parsed == 1
    assert not (out / "b.py_docs.md").exists()


def test_a_folder_without_an_introduction_still_has_a_role(make: Maker, tmp_path: Path) -> None:
    """Its place in the import graph is told: layers, who outside uses it, what it uses."""
    root = make(
        {"core/a.py": "", "core/b.py": "import a\n", "app/main.py": "from core.b import x\nfrom core.a import y\n"}
    )
    gazetteer.build(root, tmp_path / "out")
    role = (tmp_path / "out" / "core" / "doc.md").read_text("utf-8").split("## Role")[1].split("##")[0]
    assert "layers 0 to 1 of the import graph" in role
    assert "1 file outside imports from it" in role
    assert "it imports from 0 files outside" in role

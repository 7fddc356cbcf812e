"""The commands as a user runs them: what goes where, and which code they end with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SAMPLE

import gazetteer


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the program."""
    command = [sys.executable, "-c", "from gazetteer.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "100"})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Build the sample."""
    gazetteer.build(SAMPLE, tmp_path / "out", jobs=1)
    return tmp_path / "out"


def test_build_says_what_it_did_on_stderr(tmp_path: Path) -> None:
    """Messages go to stderr, nothing to stdout; with --json the summary does, and the index is written."""
    done = run("build", SAMPLE, "-o", tmp_path / "out")
    assert (done.returncode, done.stdout) == (0, "")
    assert "25 files in 7 folders" in done.stderr
    done = run("build", SAMPLE, "-o", tmp_path / "out", "--json", "-q")
    assert done.stderr == ""
    assert json.loads(done.stdout)["files"] == 25
    assert (tmp_path / "out" / "index.json").exists()


def test_search_puts_the_best_first_and_fails_when_there_is_nothing() -> None:
    """Exact names come first; a term that fits nothing ends with 1."""
    done = run("search", SAMPLE, "ledger")
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].startswith("src/lib.rs:15: class pub struct Ledger<T>")
    rows = json.loads(run("search", SAMPLE, "Queue.Push", "--kind", "method", "--json").stdout)
    assert [(r["path"], r["line"]) for r in rows] == [("queue.go", 36)]
    done = run("search", SAMPLE, "no_such_thing")
    assert (done.returncode, done.stdout) == (1, "")


def test_check_names_every_kind_of_broken_link(out: Path) -> None:
    """A missing page, anchor, line and a link out are named, and the code is 1."""
    assert run("check", out).returncode == 0
    page = out / "store.c_docs.md"
    lost = "[a](gone.md) [b](index.md#nowhere) [c](../../nowhere.c#L1) [d](https://example.com) ![e](gone.png)\n"
    source = os.path.relpath(SAMPLE / "common.sh", out)
    page.write_text(page.read_text("utf-8") + f"\n{lost}\n[f]({source}#L99) [g]({source}#L2)\n")
    done = run("check", out)
    assert done.returncode == 1
    named = {line.split(": ")[1]: line.split(": ")[2] for line in done.stdout.splitlines()}
    assert named == {
        "gone.md": "no such file",
        "index.md#nowhere": "no such anchor",
        "../../nowhere.c#L1": "no such file",
        "https://example.com": "leads out of the repository",
        "gone.png": "no such file",
        f"{source}#L99": "the file has 2 lines",
    }
    assert len(json.loads(run("check", out, "--json").stdout)["broken"]) == 6


def test_wrong_use_ends_with_2_and_says_what_to_do(tmp_path: Path) -> None:
    """Errors are one line on stderr, without a traceback."""
    for arguments, words in (
        (("build", tmp_path / "missing", "-o", tmp_path / "out"), "Name the root of a repository"),
        (("build", SAMPLE, "-o", SAMPLE), "Name another one"),
        (("check", tmp_path), "Build it first"),
        (("serve", tmp_path), "Build it with"),
    ):
        done = run(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and words in done.stderr and "Traceback" not in done.stderr
    for arguments in (
        ("search", SAMPLE, "ledger", "--kind", "nonsense"),
        ("search", SAMPLE, ""),
        ("build", SAMPLE, "-o", "/proc/nowhere"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert "rror: " in done.stderr and "Traceback" not in done.stderr


def test_version_needs_no_command() -> None:
    """``--version`` alone is an answer, not wrong use."""
    done = run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("gazetteer ")


def test_an_interrupt_is_told(tmp_path: Path) -> None:
    """Ctrl-C ends a build with 130 and says what is there."""
    code = "import signal, gazetteer.cli as c; c.build_pages = lambda *_, **__: signal.raise_signal(2); c.main()"
    command = [sys.executable, "-c", "import signal; signal.signal(2, signal.default_int_handler); " + code]
    done = subprocess.run(
        [*command, "build", SAMPLE, "-o", tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith("Interrupted. Every page is whole")


def test_the_manual_is_what_the_program_says() -> None:
    """docs/cli.md holds the help of every command as it is now; `make docs` writes it."""
    root = Path(__file__).parents[1]
    sys.path.insert(0, str(root / "tools"))
    from write_cli_docs import page

    assert (root / "docs" / "cli.md").read_text("utf-8") == page()

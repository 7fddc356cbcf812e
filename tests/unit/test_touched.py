"""Which steps of the gate may be skipped: tools/touched.sh."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "touched.sh"

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def run(folder, *command, **variables):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "CI_"))}
    env |= {"GIT_CEILING_DIRECTORIES": str(folder.parent), "GIT_CONFIG_GLOBAL": os.devnull, **variables}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def commit(folder, name, days_ago):
    (folder / name / "file").write_text(f"{days_ago}\n")
    run(folder, "git", "add", ".")
    who = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
    date = f"@{int(time.time()) - days_ago * 86_400} +0000"
    run(folder, "git", *who, "commit", "-qm", name, GIT_COMMITTER_DATE=date)
    return run(folder, "git", "rev-parse", "HEAD").stdout.strip()


def skips(folder, *paths, **variables):
    done = run(folder, "bash", str(SCRIPT), "test-it", *paths, **variables)
    assert done.returncode == ("skipped" in done.stdout)
    return done.returncode == 1


@pytest.fixture
def repository(tmp_path):
    """A repository in which `old` was last changed ten days ago, and `new` is changed now."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    run(tmp_path, "git", "init", "-q")
    first = commit(tmp_path, "old", 10)
    commit(tmp_path, "new", 0)
    return tmp_path, first


def test_a_step_runs_when_what_it_tests_changed(repository):
    """A recent commit, one since CI_BASE, an edit or a new file makes the step run; else it is skipped."""
    folder, first = repository
    assert skips(folder, "old")
    assert not skips(folder, "old", "new")
    assert skips(folder, "old", CI_BASE=first)
    assert not skips(folder, "new", CI_BASE=first)
    assert skips(folder, "new", CI_BASE="HEAD")
    (folder / "old" / "another").write_text("")
    assert not skips(folder, "old")
    assert not skips(folder, "old", CI_BASE="HEAD")


def test_a_step_runs_when_git_cannot_tell(repository, tmp_path_factory):
    """Without a repository, with an unknown CI_BASE, or with a path that is not there, the step runs."""
    folder, _ = repository
    assert not skips(folder, "old", CI_BASE="unknown")
    assert not skips(folder, "old", "misspelt")
    bare = tmp_path_factory.mktemp("bare")
    (bare / "old").mkdir()
    assert not skips(bare, "old")

"""What git knows: each file's last commit, and which files change together."""

from __future__ import annotations

import subprocess
from collections import Counter
from itertools import combinations
from typing import TYPE_CHECKING

from gazetteer.model import Commit, History

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["head_of", "read_history"]

_COMMITS_MAX = 20_000
_TOGETHER_COMMITS = 5_000
_TOGETHER_FILES_MAX = 40
_TOGETHER_MIN = 2


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "-c", "core.quotePath=false", *arguments],
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.decode("utf-8", "backslashreplace")


def head_of(root: Path) -> str:
    """Return the id of the checked-out commit, or ``""`` when there is none."""
    return _git(root, "rev-parse", "--verify", "--quiet", "HEAD").strip()


def read_history(root: Path, head: str) -> History:
    """Read the newest 20,000 commits that touch the folder; an empty history without git."""
    if not head:
        return History()
    log = _git(
        root,
        "log",
        f"--max-count={_COMMITS_MAX}",
        "--no-merges",
        "--relative",
        "--name-only",
        "-z",
        "--format=%x01%H%x02%cs%x02%s%x02",
        head,
        "--",
        ".",
    )
    last: dict[str, Commit] = {}
    pairs: Counter[tuple[str, str]] = Counter()
    for index, entry in enumerate(log.split("\x01")[1:]):
        commit_id, date, subject, names = entry.split("\x02", 3)
        commit = Commit(commit_id, date, subject)
        paths = sorted({name.strip("\n") for name in names.split("\0")} - {""})
        for path in paths:
            last.setdefault(path, commit)
        if index < _TOGETHER_COMMITS and 1 < len(paths) <= _TOGETHER_FILES_MAX:
            pairs.update(combinations(paths, 2))
    together: dict[str, list[tuple[str, int]]] = {}
    for (one, other), count in pairs.items():
        if count >= _TOGETHER_MIN:
            together.setdefault(one, []).append((other, count))
            together.setdefault(other, []).append((one, count))
    return History(
        head,
        last,
        {path: tuple(sorted(found, key=lambda f: (-f[1], f[0]))) for path, found in together.items()},
    )

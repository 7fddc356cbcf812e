"""``milepost rm``."""

from __future__ import annotations

import sys

import typer

from milepost.cli.output import OK, USAGE, Session, size
from milepost.commit import absolute_path
from milepost.commit.by_rename.discard import check_discardable, discard
from milepost.errors import CheckpointNotFoundError
from milepost.health.listing import entry_at
from milepost.storage import default_storage


def run(session: Session, checkpoints: list[str], *, yes: bool) -> int:
    """Remove checkpoints, after all of them have been checked and the user agrees; return the exit code."""
    storage = default_storage()
    paths = list(dict.fromkeys(absolute_path(path, CheckpointNotFoundError) for path in checkpoints))
    for path in paths:
        check_discardable(storage, path)
    if not yes:
        for path in paths:
            entry = entry_at(storage, path)
            step = f"step {entry.step}, " if entry is not None and entry.step is not None else ""
            session.message(path, ": ", step, size(entry.size_bytes) if entry is not None else "damaged")
        if not _can_ask():
            session.message("error: nothing was removed, as nobody can be asked: to remove them add --yes")
            return USAGE
        if not typer.confirm("Remove these for good?", err=True):
            session.message("nothing was removed")
            return OK
    for path in paths:
        discard(storage, path)
        session.line(("removed", "bold"), " ", path)
    return OK


def _can_ask() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()

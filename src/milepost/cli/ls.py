"""``milepost ls``."""

from __future__ import annotations

import difflib
import os
from dataclasses import asdict
from pathlib import Path

from milepost.cli.output import DAMAGED, FAILED, OK, USAGE, Session, moment, size
from milepost.errors import CheckpointNotFoundError
from milepost.health.listing import entry_at, scan
from milepost.storage import default_storage

_STYLES = {"committed": "green", "partial": "yellow", "damaged": "bold red", "unreadable": "red"}


def run(session: Session, folder: str, *, exact: bool, as_json: bool) -> int:
    """List the checkpoints in a folder; return the exit code, which partial ones do not change.

    The path of a checkpoint is wrong usage: "no checkpoints in it" would be true and misleading.
    """
    storage = default_storage()
    try:
        entries = scan(storage, folder)
    except CheckpointNotFoundError as error:
        if os.path.isfile(folder):
            raise CheckpointNotFoundError(f"this is a file, and not a folder: {folder}") from None
        error.hint = error.hint or _near(folder)
        raise
    path = os.path.abspath(folder)
    if not entries and (own := entry_at(storage, path)) is not None:
        what = "part of a checkpoint" if own.state == "partial" else "a checkpoint itself"
        command = "show" if own.state == "committed" else "doctor"
        session.message(f"error: this is {what}, and not a folder of checkpoints: {path}")
        above = os.path.dirname(path)
        session.message(f"hint: `milepost {command} {path}` tells about it; `milepost ls {above}` lists it")
        return USAGE
    if as_json:
        session.json([asdict(entry) for entry in entries])
    elif not entries:
        session.message("no checkpoints in ", folder)
    else:
        rows: list[list[str | tuple[str, str]]] = [
            [
                entry.name,
                "" if entry.step is None else str(entry.step),
                size(entry.size_bytes, exact=exact),
                (entry.state, _STYLES[entry.state]),
                moment(entry.time),
                entry.problem or "",
            ]
            for entry in entries
        ]
        session.table(("name", "step", "size", "state", "saved", ""), rows)
    states = {entry.state for entry in entries}
    return DAMAGED if "damaged" in states else FAILED if "unreadable" in states else OK


def _near(folder: str) -> str | None:
    """The folder that may have been meant."""
    path = Path(folder).absolute()
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return f"the folder above does not exist either: {path.parent}"
    near = difflib.get_close_matches(path.name, names, n=3)
    return f"did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else None

"""Recovery after a death: publish the attempts that are complete, remove the rest.

Any number of processes may do both at once, beside live savers. A folder is touched only if its content says
that it is the attempt in its name, and if nobody holds the lock on its ``attempt.json``.
"""

# Paths are str, here as in the storage package.
from __future__ import annotations

import logging
import os
from contextlib import suppress

from milepost.commit.by_rename.claim import is_abandoned, new_note, take_over
from milepost.commit.by_rename.folders import Hidden, names_of, opened, published_manifest, siblings
from milepost.commit.by_rename.publish import publish, retire
from milepost.commit.by_rename.removal import remove_tree, sweep
from milepost.commit.contents import read_manifest
from milepost.commit.judge import Verdict, classify, is_overtaken, is_whole
from milepost.commit.marks import read_shards
from milepost.errors import (
    EntryExistsError,
    EntryNotFoundError,
    LoadError,
    MilepostError,
    StorageError,
    TargetError,
)
from milepost.format.index import Mark, decode_mark
from milepost.format.limits import MAX_INDEX_BYTES, MAX_INT
from milepost.format.manifest import Manifest, encode_manifest
from milepost.format.names import (
    MANIFEST_NAME,
    NOTE_NAME,
    SHARDS_NAME,
    index_name,
    is_aborted,
    is_note_aside,
)
from milepost.storage import Folder, Storage
from milepost.storage.writing import publish_bytes

__all__ = ["clean_up", "commit_manifest", "roll_forward", "tidy"]

_logger = logging.getLogger(__name__)


def roll_forward(storage: Storage, path: str) -> list[str]:
    """Publish the newest attempt at `path` that is complete but was not published.

    An attempt stays as it is while somebody works on it, and never replaces a newer checkpoint. If nothing is
    at the path and there is no such attempt, a replaced checkpoint that is whole returns there.

    Returns:
        The hidden folders that were moved into place (one at most).
    """
    path = os.path.abspath(path)
    found: dict[str, list[tuple[tuple[int, float], str, Hidden]]] = {"complete": [], "replaced": []}
    for hidden in siblings(storage, path):
        with opened(storage, hidden.path) as folder:
            if folder is None:
                continue
            verdict = classify(folder, hidden.attempt, deep=True)
            whole = verdict.state == "complete"
            with suppress(StorageError):
                whole = whole or (verdict.state == "replaced" and is_whole(folder, verdict))
            if whole:
                assert verdict.manifest is not None
                found[verdict.state].append((verdict.manifest.order, hidden.attempt, hidden))
    if found["complete"]:
        hidden = max(found["complete"], key=lambda one: one[:2])[2]
        return [hidden.path] if _finish(storage, path, hidden) else []
    if found["replaced"] and storage.stat(path) is None:
        hidden = max(found["replaced"], key=lambda one: one[:2])[2]
        with suppress(EntryExistsError, EntryNotFoundError):
            storage.rename(hidden.path, path, "create")
            storage.sync_folder(os.path.dirname(path))
            return [hidden.path]
    return []


def _finish(storage: Storage, path: str, hidden: Hidden) -> bool:
    """Commit and publish a complete attempt whose owners are gone."""
    lock = take_over(storage, hidden, new_note(path, hidden.attempt))
    if lock is None:
        return False
    try:
        with opened(storage, hidden.path) as folder:
            if folder is None:
                return False
            verdict = classify(folder, hidden.attempt, deep=True)
            manifest = verdict.manifest
            if verdict.state != "complete" or manifest is None:
                return False
            if is_overtaken(manifest, published_manifest(storage, path)):
                return False
            shards = read_shards(folder, manifest) if manifest.shards else None
            if not commit_manifest(storage, hidden.path, manifest, shards):
                # A killed process may have made the manifest without making its name durable: do so first.
                storage.sync_folder(hidden.path)
        publish(storage, path, manifest)
    except (TargetError, LoadError) as error:
        _logger.warning("a complete checkpoint waits beside this path: %s", error)
        return False
    finally:
        lock.release()
    _logger.info("published the complete attempt %s at %s", hidden.attempt, path)
    return True


def commit_manifest(storage: Storage, folder: str, manifest: Manifest, shards: bytes | None) -> bool:
    """Create the shard map (if there is one) and the manifest, and make all names in the folder durable.

    This is the commit.

    Returns:
        False if there is one already. Its creator makes its name durable.
    """
    storage.make_public(folder)
    if shards is not None:
        # Every rank makes the same bytes of the same marks: those that are there are as good.
        with suppress(EntryExistsError):
            publish_bytes(storage, os.path.join(folder, SHARDS_NAME), shards, "create")
    try:
        publish_bytes(storage, os.path.join(folder, MANIFEST_NAME), encode_manifest(manifest), "create")
    except EntryExistsError:
        return False
    storage.sync_folder(folder)
    return True


def next_sequence(storage: Storage, path: str) -> int:
    """The number of the next save: one above every number seen at the path and beside it."""
    highest = 0
    for place in (path, *(hidden.path for hidden in siblings(storage, path))):
        with suppress(LoadError), opened(storage, place) as folder:
            if folder is None:
                continue
            found: Manifest | Mark | None = read_manifest(folder)
            if found is None:
                with suppress(EntryNotFoundError):
                    found = decode_mark(folder.read(index_name(0), MAX_INDEX_BYTES), place)
            highest = max(highest, found.sequence if found else 0)
    return min(highest + 1, MAX_INT)


def tidy(storage: Storage, path: str, *, keep: str) -> None:
    """Finish or remove what earlier attempts left. A failure is logged and does not stop the new save."""
    try:
        roll_forward(storage, path)
        clean_up(storage, path, keep=keep)
    except MilepostError as error:
        _logger.warning("could not finish or clear what an earlier save left: %s", error)


def clean_up(storage: Storage, path: str, *, keep: str | None = None) -> list[str]:
    """Remove what dead attempts at `path` left: parts, replaced checkpoints, temporary files.

    A complete attempt is removed only if a newer checkpoint is published. Failures are logged.

    Args:
        storage: Where.
        path: The checkpoint.
        keep: An attempt that stays. Parts of other attempts of its start stay as well, because slower ranks
            may still come. So do those of every start of which somebody works on an attempt here. They go
            when a later attempt of that start is committed, or when nobody of that start works here.

    Returns:
        The hidden folders that were removed.
    """
    path = os.path.abspath(path)
    removed = []
    beside = siblings(storage, path)
    live = _live_starts(storage, beside, keep)
    for hidden in beside:
        try:
            if hidden.attempt != keep and _clear(storage, path, hidden, live):
                removed.append(hidden.path)
        except MilepostError as error:
            _logger.warning("could not clear what an earlier save left: %s", error)
    try:
        sweep(storage, path)
    except StorageError as error:
        _logger.warning("could not clear what an earlier save left: %s", error)
    return removed


def _numbered(attempt: str) -> tuple[str, int]:
    """The start of an attempt and its number in it; "" for an attempt of a single rank."""
    start, _, number = attempt.rpartition("-")
    return (start, int(number)) if number.isdecimal() else ("", 0)


def _live_starts(storage: Storage, beside: list[Hidden], keep: str | None) -> set[str]:
    """The starts whose ranks may still come: that of `keep`, and those that somebody works for here."""
    starts = {_numbered(keep or "")[0]}
    for hidden in beside:
        start = _numbered(hidden.attempt)[0]
        if start not in starts and storage.stat(os.path.join(hidden.path, NOTE_NAME)) is not None:
            starts |= set() if is_abandoned(storage, hidden) else {start}
    return starts - {""}


def _is_awaited(storage: Storage, path: str, attempt: str, live: set[str]) -> bool:
    """Whether ranks of this attempt may still come: its start lives, and has committed no later one."""
    start, number = _numbered(attempt)
    published = published_manifest(storage, path)
    committed = _numbered(published.attempt) if published else ("", 0)
    return start in live and (committed[0] != start or committed[1] < number)


def _clear(storage: Storage, path: str, hidden: Hidden, live: set[str]) -> bool:
    with opened(storage, hidden.path) as folder:
        verdict = _leftover(storage, path, hidden, folder)
    if verdict is None:
        return False
    awaited = verdict.state == "part" and _is_awaited(storage, path, hidden.attempt, live)
    if awaited and not is_aborted(verdict.names):
        return False
    if verdict.state == "unborn":
        return _remove_unborn(storage, hidden.path)
    if verdict.state in ("replaced", "remains"):
        return retire(storage, path, hidden.path, None)
    lock = take_over(storage, hidden, new_note(path, hidden.attempt))
    if lock is None:
        return False
    try:
        with opened(storage, hidden.path) as folder:
            again = _leftover(storage, path, hidden, folder)
            if folder is None or again is None or again.state != verdict.state:
                return False
            has_manifest = folder.stat(MANIFEST_NAME) is not None
        if has_manifest:
            # It may be the former checkpoint of a job that reused its start id: keep the user's files.
            return retire(storage, path, hidden.path, None)
        # Ranks that come late must still see the abort marks.
        remove_tree(storage, hidden.path, lock, word=awaited)
    finally:
        lock.release()
    return not awaited


def _leftover(storage: Storage, path: str, hidden: Hidden, folder: Folder | None) -> Verdict | None:
    """The verdict on a folder that may be cleared; None if the folder stays, or is gone."""
    if folder is None:
        return None
    verdict = classify(folder, hidden.attempt, deep=False)
    published = None if verdict.state == "unborn" else published_manifest(storage, path)
    return verdict if verdict.is_leftover(published) else None


def _remove_unborn(storage: Storage, path: str) -> bool:
    """Remove a folder that died before it had an attempt.json. A live one makes itself again."""
    for name in filter(is_note_aside, names_of(storage, path) or ()):
        inner = os.path.join(path, name)
        with suppress(EntryNotFoundError):
            lock = storage.lock(inner, exclusive=True)
            if lock is None:
                return False
            try:
                storage.remove(inner)
            finally:
                lock.release()
    try:
        storage.remove(path)
    except StorageError:  # somebody has begun in it
        return False
    return True

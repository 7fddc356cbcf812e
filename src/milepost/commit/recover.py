"""What attempts that died have left behind: finishing those that are whole, removing the rest.

Both are safe beside live savers and may run any number of times, in any number of processes at once. Nothing
is touched for its name alone: a folder must say itself that it is the attempt in its name, and nobody may
hold the lock on its ``attempt.json``.
"""

# Paths are str, here as in the storage package.
from __future__ import annotations

import logging
import os
from contextlib import suppress

from milepost.commit.claim import encode_note, is_abandoned, take_over
from milepost.commit.folders import (
    Hidden,
    belongs,
    list_names,
    names_of,
    opened,
    published_manifest,
    read_beacons,
    read_manifest,
    read_note,
    siblings,
)
from milepost.commit.marks import checked_manifest, read_shards
from milepost.commit.publish import publish, retire
from milepost.commit.removal import remove_tree, sweep
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
    ranks_in,
)
from milepost.storage import Folder, Storage
from milepost.storage.writing import publish_bytes

__all__ = ["clean_up", "commit_manifest", "roll_forward", "tidy"]

_logger = logging.getLogger(__name__)


def roll_forward(storage: Storage, path: str) -> list[str]:
    """Publish the newest attempt at `path` that is complete but was left unpublished.

    It is left alone while somebody works on it, and never put over a newer checkpoint. Where the path is
    empty and there is no such attempt, a replaced checkpoint that is still whole returns to its place.

    Returns:
        The hidden folders that were moved into place (one at most).
    """
    path = os.path.abspath(path)
    whole: list[tuple[tuple[int, float], str, Hidden]] = []
    replaced: list[tuple[tuple[int, float], str, Hidden]] = []
    for hidden in siblings(storage, path):
        with opened(storage, hidden.path) as folder:
            if folder is None:
                continue
            names = list_names(folder)
            manifest = checked_manifest(folder, hidden.attempt, names, deep=True)
            if manifest is not None:
                whole.append((manifest.order, hidden.attempt, hidden))
                continue
            with suppress(LoadError, StorageError):
                manifest = read_manifest(folder)
                if manifest is not None and manifest.attempt != hidden.attempt:
                    manifest = checked_manifest(folder, manifest.attempt, names, deep=True)
                    if manifest is not None:
                        replaced.append((manifest.order, hidden.attempt, hidden))
    if whole:
        hidden = max(whole, key=lambda found: found[:2])[2]
        return [hidden.path] if _finish(storage, path, hidden) else []
    if replaced and storage.stat(path) is None:
        hidden = max(replaced, key=lambda found: found[:2])[2]
        with suppress(EntryExistsError, EntryNotFoundError):
            storage.rename(hidden.path, path, "create")
            storage.sync_folder(os.path.dirname(path))
            return [hidden.path]
    return []


def _finish(storage: Storage, path: str, hidden: Hidden) -> bool:
    """Commit and publish a complete attempt whose owners are gone."""
    lock = take_over(storage, hidden, encode_note(path, hidden.attempt))
    if lock is None:
        return False
    try:
        with opened(storage, hidden.path) as folder:
            if folder is None:
                return False
            manifest = checked_manifest(folder, hidden.attempt, list_names(folder), deep=True)
            if manifest is None or is_overtaken(manifest, published_manifest(storage, path)):
                return False
            shards = read_shards(folder, manifest) if manifest.shards else None
            if not commit_manifest(storage, hidden.path, manifest, shards):
                # The names may be no more than what a killed process saw: they must be durable first.
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
        False if there is one already; its names are then as durable as its creator made them.
    """
    storage.make_public(folder)
    if shards is not None:
        # Whoever assembles the same marks makes the same bytes: what is there already is as good.
        with suppress(EntryExistsError):
            publish_bytes(storage, os.path.join(folder, SHARDS_NAME), shards, "create")
    try:
        publish_bytes(storage, os.path.join(folder, MANIFEST_NAME), encode_manifest(manifest), "create")
    except EntryExistsError:
        return False
    storage.sync_folder(folder)
    return True


def is_overtaken(whole: Manifest, published: Manifest | None) -> bool:
    """Whether a checkpoint that waits beside a path is of no use, as one as new as it is there.

    Of two savers that knew nothing of each other the one whose checkpoint is published comes later.
    """
    return published is not None and published.order >= whole.order


def next_sequence(storage: Storage, path: str) -> int:
    """The number of a save that comes now: one above all that can be seen of saves to this path."""
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
    """Finish or remove what earlier attempts left; a failure of that does not stop a new save."""
    try:
        roll_forward(storage, path)
        clean_up(storage, path, keep=keep)
    except MilepostError as error:
        _logger.warning("could not finish or clear what an earlier save left: %s", error)


def clean_up(storage: Storage, path: str, *, keep: str | None = None) -> list[str]:
    """Remove what dead attempts at `path` left: partials, what was replaced, passing files.

    A complete attempt is only removed when a newer checkpoint is published. What fails is logged.

    Args:
        storage: Where.
        path: The checkpoint.
        keep: An attempt that is left alone. Parts of the other attempts of its start stay as well, as those
            of any start of which somebody works on an attempt here: slower ranks may still come. They go
            when a later attempt of that start is committed, or when the whole start is dead.

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
    """The start that an attempt belongs to, and which of its attempts it is; "" for the only rank's."""
    start, _, number = attempt.rpartition("-")
    return (start, int(number)) if number.isdecimal() else ("", 0)


def _live_starts(storage: Storage, beside: list[Hidden], keep: str | None) -> set[str]:
    """The starts of which ranks may still come: that of `keep`, and any of which somebody works here."""
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
        if folder is None:
            return False
        judge = _judge(storage, path, hidden, folder)
        aborted = is_aborted(list_names(folder))
    awaited = judge == "part" and _is_awaited(storage, path, hidden.attempt, live)
    if judge is None or (awaited and not aborted):
        return False
    if judge == "unborn":
        return _remove_unborn(storage, hidden.path)
    if judge == "replaced":
        return retire(storage, path, hidden.path, None)
    lock = take_over(storage, hidden, encode_note(path, hidden.attempt))
    if lock is None:
        return False
    try:
        with opened(storage, hidden.path) as folder:
            if folder is None or _judge(storage, path, hidden, folder) != judge:
                return False
            has_manifest = folder.stat(MANIFEST_NAME) is not None
        if has_manifest:
            # It may be the former checkpoint of a job that reused its start id: the user's files move along.
            return retire(storage, path, hidden.path, None)
        # Ranks that come late must still hear of the failure.
        remove_tree(storage, hidden.path, lock, word=awaited)
    finally:
        lock.release()
    return not awaited


def _judge(storage: Storage, path: str, hidden: Hidden, folder: Folder) -> str | None:
    """What a hidden folder is: "unborn", "replaced", "overtaken", a "part", or None: to be left alone."""
    names = list_names(folder)
    if all(is_note_aside(name) for name in names):
        return "unborn"
    try:
        manifest = read_manifest(folder)
    except LoadError:
        return None
    published = published_manifest(storage, path)
    if manifest is not None and manifest.attempt != hidden.attempt:
        return "replaced" if published is not None else None
    if not _says_so(folder, hidden, names):
        plain = manifest is None and NOTE_NAME not in names
        return "replaced" if plain and published is not None and published.attempt == hidden.attempt else None
    # A manifest alone is a commit, too: what it lists may only seem to be missing.
    whole = manifest or checked_manifest(folder, hidden.attempt, names, deep=False)
    if whole is None:
        return "part"
    return "overtaken" if is_overtaken(whole, published) else None


def _says_so(folder: Folder, hidden: Hidden, names: list[str]) -> bool:
    """Whether the folder's content says that it is this attempt at this path.

    ``attempt.json`` is not fsynced: after a power cut a beacon or a mark may have to speak for it.
    """
    note = read_note(folder)
    if note is not None:
        return belongs(note, folder, hidden.attempt)
    if any(beacon.attempt == hidden.attempt for beacon in read_beacons(folder, names).values()):
        return True
    for rank in sorted(ranks_in(names))[:1]:
        with suppress(LoadError, StorageError):
            mark = decode_mark(folder.read(index_name(rank), MAX_INDEX_BYTES), folder.path)
            return mark.attempt == hidden.attempt
    return False


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

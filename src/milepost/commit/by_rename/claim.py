"""Every process in an attempt's folder holds a shared lock on its ``attempt.json``.

The lock ends with the process. A process that gets it exclusively knows that all others are gone.
"""

from __future__ import annotations

# Paths are str, here as in the storage package.
import os
import socket
import time
from contextlib import suppress

import msgspec

from milepost.commit.by_rename.folders import Hidden, opened, siblings
from milepost.commit.contents import MAX_SMALL_BYTES, Note, list_names, read_note
from milepost.commit.waiting import Clock
from milepost.errors import (
    CommitError,
    CorruptCheckpointError,
    EntryExistsError,
    EntryNotFoundError,
    StorageError,
)
from milepost.format.names import NOTE_NAME, is_note_aside, shown, stem_of
from milepost.storage import Lock, Storage
from milepost.storage.writing import publish_bytes, write_bytes

__all__ = [
    "claim",
    "is_abandoned",
    "make_parents",
    "new_note",
    "refuse_other_starts",
    "take_over",
    "unchanged_seconds",
]

NETWORK_PATIENCE_SECONDS = 24 * 3600.0
"""On a network file system a lock may not show. An attempt is dead there when unchanged for so long."""
CLAIM_SECONDS = 60.0
"""How long a claim waits while another process clears a folder of this name."""


class _NoLock:
    """Replaces the lock where the age of a folder decides."""

    def release(self) -> None:
        pass


def new_note(
    path: str, attempt: str, *, world_size: int = 0, process: str = "", private: bool = False
) -> Note:
    """The ``attempt.json`` of this process."""
    name = os.path.basename(path)
    return Note(
        name=shown(name),
        stem=shown(stem_of(name)),
        attempt=attempt,
        world_size=world_size,
        process=process,
        private=private,
        host=socket.gethostname(),
        pid=os.getpid(),
        time=time.time(),
    )


def make_parents(storage: Storage, path: str) -> None:
    """Create the folders above a path, durably."""
    missing = []
    above = os.path.dirname(path)
    while storage.stat(above) is None and os.path.dirname(above) != above:
        missing.append(above)
        above = os.path.dirname(above)
    for folder in reversed(missing):
        with suppress(EntryExistsError):
            storage.make_folder(folder)
        storage.sync_folder(os.path.dirname(folder))


def claim(storage: Storage, folder: str, note: Note, clock: Clock) -> Lock:
    """Make an attempt's folder, or enter the one that another rank made, and lock its ``attempt.json``.

    Raises:
        CommitError: Another process clears the folder and does not finish.
        StorageError: The folder cannot be made.
    """
    deadline = clock.monotonic() + CLAIM_SECONDS
    while clock.monotonic() <= deadline:
        with suppress(EntryExistsError):
            storage.make_folder(folder, private=True)
        try:
            lock = _lock_note(storage, folder, note)
        except EntryNotFoundError:  # another saver removed the folder, as it was empty: again
            continue
        except StorageError:
            with suppress(StorageError):
                storage.remove(folder)  # if nobody else has begun in it
            raise
        if lock is not None:
            return lock
        clock.sleep(0.01)
    raise CommitError(f"the folder of this attempt is being cleared, without an end: {folder}", path=folder)


def _lock_note(storage: Storage, folder: str, note: Note) -> Lock | None:
    path = os.path.join(folder, NOTE_NAME)
    if storage.stat(path) is None:
        # Locked before it has its name: there is no moment in which it looks abandoned.
        ours = os.path.join(folder, _note_aside())
        write_bytes(storage, ours, msgspec.json.encode(note), sync=False)
        lock = None
        try:
            lock = storage.lock(ours)
            storage.rename(ours, path, "create")
            ours = path
            # And by its name: where a rename is a link and an unlink, NFS and FUSE keep the open file aside.
            return storage.lock(path)
        except StorageError as error:
            with suppress(StorageError):
                storage.remove(ours)
            if not isinstance(error, EntryExistsError):
                raise
        finally:
            if lock is not None:
                lock.release()
    before = _read_note(storage, folder)
    lock = storage.lock(path)
    if lock is not None and (before is None or _read_note(storage, folder) != before):
        lock.release()  # of a file that is gone
        return None
    return lock


def _read_note(storage: Storage, folder: str) -> bytes | None:
    with opened(storage, folder) as found:
        if found is not None:
            with suppress(EntryNotFoundError, CorruptCheckpointError):
                return found.read(NOTE_NAME, MAX_SMALL_BYTES)
    return None


def is_abandoned(storage: Storage, hidden: Hidden) -> bool:
    """Whether nobody works on this attempt any more."""
    lock = take_over(storage, hidden, None)
    if lock is not None:
        lock.release()
    return lock is not None


def take_over(storage: Storage, hidden: Hidden, note: Note | None) -> Lock | None:
    """The exclusive lock of an attempt whose owners are gone, or None.

    Args:
        storage: Where.
        hidden: Its folder.
        note: What to write into an ``attempt.json`` that a power cut has taken.
    """
    path = os.path.join(hidden.path, NOTE_NAME)
    try:
        if storage.is_network(hidden.path):
            old = unchanged_seconds(storage, hidden.path) > NETWORK_PATIENCE_SECONDS
            return _NoLock() if old else None
        if note is not None and storage.stat(path) is None:
            publish_bytes(storage, path, msgspec.json.encode(note), "create", sync=False)
        return storage.lock(path, exclusive=True)
    except (EntryExistsError, EntryNotFoundError):
        return None


def unchanged_seconds(storage: Storage, path: str) -> float:
    """For how many seconds no file in a folder has changed, by the clock of the file system.

    0 if that is unknown: the folder is gone, or a listed file is not seen.
    """
    probe = _note_aside()
    with opened(storage, path) as folder:
        if folder is None:
            return 0.0
        names = list_names(folder)
        # Other processes leave such probes for a moment: they count only if nothing else is there.
        found = [folder.stat(name) for name in [n for n in names if not is_note_aside(n)] or names]
        write_bytes(storage, os.path.join(path, probe), b"", sync=False)
        try:
            now = folder.stat(probe)
        finally:
            storage.remove(os.path.join(path, probe))
    times = [stat.modified_seconds for stat in (now, *found) if stat is not None]
    return times[0] - max(times[1:], default=0.0) if len(times) == len(found) + 1 else 0.0


def _note_aside() -> str:
    return f".{NOTE_NAME}.{os.urandom(8).hex()}.tmp"


def refuse_other_starts(storage: Storage, path: str, ours: Note) -> None:
    """Refuse ranks that can never commit together, because each process has its own attempt id.

    Args:
        storage: Where.
        path: The checkpoint.
        ours: The ``attempt.json`` of this process.

    Raises:
        CommitError: Another process saves to this path as one of several ranks, under an id that it made.
    """
    for hidden in siblings(storage, path):
        with opened(storage, hidden.path) as folder:
            note = None if folder is None else read_note(folder)
        if note is None or not note.private or note.process == ours.process:
            continue
        if note.world_size != ours.world_size or is_abandoned(storage, hidden):
            continue
        raise CommitError(
            f"another process (pid {note.pid} on {note.host}) saves to this path as one of "
            f"{ours.world_size} ranks too, but has no start id in common with this one: {path}",
            hint="give MILEPOST_START_ID or CheckpointWriterConfig.start_id a value that all ranks share "
            "and that is new at every start; or use a barrier, or the default process group",
        )

"""The seam's side of file systems: `begin` makes an `Attempt` that works in a hidden folder."""

from __future__ import annotations

# Paths are str, here as in the storage package.
import os
from contextlib import AbstractContextManager, suppress

from milepost.commit.attempt import Attempt
from milepost.commit.by_rename.attachments import collect
from milepost.commit.by_rename.claim import claim, make_parents, new_note, refuse_other_starts
from milepost.commit.by_rename.folders import names_of, opened, published_manifest
from milepost.commit.by_rename.publish import is_pending, publish
from milepost.commit.by_rename.recover import commit_manifest, next_sequence, roll_forward, tidy
from milepost.commit.by_rename.removal import remove_tree
from milepost.commit.contents import Note, list_names, read_beacons
from milepost.commit.ids import process_id
from milepost.commit.waiting import Clock, raise_if_aborted
from milepost.errors import CommitError, EntryNotFoundError
from milepost.format.index import FileDigest
from milepost.format.manifest import Manifest
from milepost.format.names import MANIFEST_NAME, beacon_name, join_hidden
from milepost.storage import Folder, Lock, NewFile, RenameMode, Storage
from milepost.storage.writing import publish_bytes
from milepost.utils import OwnedByProcess

__all__ = ["RenamePlace", "begin", "is_undecided", "sees_rank"]


def begin(
    storage: Storage,
    path: str,
    *,
    attempt: str,
    rank: int,
    world_size: int,
    process: str | None = None,
    private: bool = False,
    clock: Clock | None = None,
) -> Attempt:
    """Join an attempt: on return its hidden folder is there, and nobody takes it for dead.

    Rank 0 first finishes or removes what earlier attempts left. With the id of an attempt that this process
    began before, it takes up the work of a lost writer: see `Attempt.marked` and `Attempt.committed`.

    Args:
        storage: Where.
        path: The checkpoint, which `check_target` has passed.
        attempt: See `attempt_id`.
        rank: This rank.
        world_size: How many ranks there are.
        process: Random id of the process that the save belongs to; a writer child gives its trainer's.
        private: The id is known to this process alone, so other processes' ranks cannot join.
        clock: For tests.

    Raises:
        StorageError: The folder could not be made.
        AbortedError: Another rank has failed already.
        CommitError: The attempt belongs to another start of the job, or to other ranks.
    """
    path, clock, process = os.path.abspath(path), clock or Clock(), process or process_id()
    note = new_note(path, attempt, world_size=world_size, process=process, private=private)
    place = RenamePlace(storage, path, note, clock)
    return Attempt.begin(place, attempt, rank=rank, world_size=world_size, process=process, clock=clock)


class RenamePlace(OwnedByProcess):
    """A `Place` on a file system: a hidden folder beside the path, held by a lock, published by a rename."""

    def __init__(self, storage: Storage, path: str, note: Note, clock: Clock) -> None:
        self.path, self.folder = path, join_hidden(path, note.attempt)
        self._storage, self._note, self._attempt, self._clock = storage, note, note.attempt, clock
        self._lock: Lock | None = None
        self._root: Folder | None = None

    def prepare(self, *, tidy: bool) -> None:
        """See `Place`."""
        make_parents(self._storage, self.path)
        if tidy:
            self.tidy()
        if self._note.private and self._note.world_size > 1:
            refuse_other_starts(self._storage, self.path, self._note)

    def enter(self) -> None:
        """See `Place`."""
        self._lock = claim(self._storage, self.folder, self._note, self._clock)
        self._root = self._storage.open_folder(self.folder)

    @property
    def entered(self) -> bool:
        """See `Place`."""
        return self._lock is not None and self.is_owned

    def leave(self) -> None:
        """See `Place`."""
        lock, self._lock = self._lock, None
        root, self._root = self._root, None
        if not self.is_owned:
            return
        if lock is not None:
            lock.release()
        if root is not None:
            root.close()

    def inside(self) -> Folder:
        """See `Place`."""
        if self._root is None:
            raise CommitError("this attempt has ended", path=self.path)
        return self._root

    def names(self) -> list[str]:
        """See `Place`."""
        return names_of(self._storage, self.folder) or []

    def put(self, name: str, data: bytes, *, replace: bool = False, sync: bool = False) -> None:
        """See `Place`."""
        mode: RenameMode = "replace" if replace else "create"
        publish_bytes(self._storage, os.path.join(self.folder, name), data, mode, sync=sync)

    def create_data(self, name: str) -> NewFile:
        """See `Place`."""
        return self._storage.create(os.path.join(self.folder, name), direct=True)

    def discard(self, name: str) -> None:
        """See `Place`."""
        self._storage.remove(os.path.join(self.folder, name))

    def attachments(self, world_size: int) -> list[FileDigest]:
        """See `Place`."""
        return collect(self._storage, self.inside(), self.folder, world_size)

    def remove(self) -> None:
        """See `Place`."""
        if self._lock is not None:
            remove_tree(self._storage, self.folder, self._lock)

    def next_sequence(self) -> int:
        """See `Place`."""
        return next_sequence(self._storage, self.path)

    def commit(self, manifest: Manifest, shards: bytes | None) -> bool:
        """See `Place`."""
        try:
            return commit_manifest(self._storage, self.folder, manifest, shards)
        except EntryNotFoundError:  # another rank has published the folder just now
            return False

    def settle(self) -> None:
        """See `Place`."""
        with suppress(EntryNotFoundError):  # else published, so that its names are durable
            self._storage.sync_folder(self.folder)

    def publish(self, manifest: Manifest) -> None:
        """See `Place`."""
        publish(self._storage, self.path, manifest)

    def tidy(self) -> None:
        """See `Place`."""
        tidy(self._storage, self.path, keep=self._attempt)

    def finish(self) -> None:
        """See `Place`."""
        if self._storage.stat(self.folder) is not None:
            roll_forward(self._storage, self.path)

    def at_path(self) -> AbstractContextManager[Folder | None]:
        """See `Place`."""
        return opened(self._storage, self.path)

    def committed(self) -> Manifest | None:
        """See `Place`."""
        for place in (self.folder, self.path):
            found = published_manifest(self._storage, place)
            if found is not None and found.attempt == self._attempt:
                return found
        return None

    def is_pending(self) -> bool:
        """See `Place`."""
        return is_pending(self._storage, self.path, self._attempt)


def sees_rank(storage: Storage, path: str, attempt: str, rank: int, process: str) -> bool:
    """Whether an attempt's folder, opened anew, shows what a process has written there as that rank."""
    with opened(storage, join_hidden(path, attempt)) as folder:
        beacon = read_beacons(folder, [beacon_name(rank)]).get(rank) if folder else None
    return beacon is not None and beacon.process == process


def is_undecided(storage: Storage, path: str, attempt: str) -> bool:
    """Whether an attempt that has written its part may still be committed, or fail.

    Raises:
        AbortedError: Another rank has failed.
    """
    with opened(storage, join_hidden(path, attempt)) as folder:
        names = list_names(folder) if folder else []
        if folder:
            raise_if_aborted(folder, names)
        return bool(names) and MANIFEST_NAME not in names

"""One rank's own part in one try at one path: its place in the hidden folder, its mark, its end."""

from __future__ import annotations

# Paths are str, here as in the storage package.
import logging
import os
from contextlib import suppress
from typing import Self

from milepost.commit.attachments import collect
from milepost.commit.claim import (
    Clock,
    claim,
    encode_note,
    make_parents,
    refuse_other_starts,
    same_rank_error,
)
from milepost.commit.folders import list_names, names_of, opened, published_manifest, read_beacons
from milepost.commit.ids import process_id
from milepost.commit.recover import next_sequence, roll_forward, tidy
from milepost.commit.removal import remove_tree
from milepost.commit.waiting import raise_if_aborted, unseen_error
from milepost.commit.word import Word
from milepost.errors import (
    CommitError,
    EntryExistsError,
    EntryNotFoundError,
    LoadError,
    MilepostError,
    error_context,
)
from milepost.format.index import FileDigest, decode_mark
from milepost.format.limits import MAX_INDEX_BYTES
from milepost.format.names import (
    ABORTED_NAME,
    MANIFEST_NAME,
    beacon_name,
    data_name,
    index_name,
    join_hidden,
    ranks_in,
)
from milepost.storage import Folder, Lock, Storage
from milepost.storage.writing import publish_bytes
from milepost.utils import OwnedByProcess

__all__ = ["Part"]

_logger = logging.getLogger(__name__)


class Part(OwnedByProcess):
    """What an `Attempt` is for this rank alone. For one thread at a time, in the process that made it.

    Attributes:
        path: The absolute path of the checkpoint.
        id: The attempt's id, the same for all ranks.
        rank: This rank.
        world_size: How many ranks there are.
        process: The random id of the process that the save belongs to.
        folder: The hidden folder in which the checkpoint is made.
        marked: This rank has arrived: its mark is there (perhaps made by a writer that was lost since).
        committed: The checkpoint is committed, by this rank or another; at the latest `close` publishes it.
        hidden: It is committed, as the other ranks said, but this rank's view of the folder does not show it.
    """

    def __init__(
        self,
        storage: Storage,
        path: str,
        *,
        attempt: str,
        rank: int,
        world_size: int,
        process: str,
        clock: Clock,
    ) -> None:
        self.path, self.id, self.process = path, attempt, process
        self.rank, self.world_size = rank, world_size
        self.folder = join_hidden(path, attempt)
        self.marked = self.committed = self.hidden = False
        self._identity = ""
        self._storage, self._clock = storage, clock
        self._lock: Lock | None = None
        self._root: Folder | None = None
        self._seen, self._doubtful = 0, False
        self._word = Word(storage, self.folder, attempt, rank, process, clock)

    @property
    def data_path(self) -> str:
        """Where this rank's data file goes."""
        return os.path.join(self.folder, data_name(self.rank))

    # ------------------------------------------------------------------ begin

    @classmethod
    def begin(
        cls,
        storage: Storage,
        path: str,
        *,
        attempt: str,
        rank: int,
        world_size: int,
        process: str | None = None,
        private: bool = False,
        clock: Clock | None = None,
    ) -> Self:
        """Join the attempt: on return its hidden folder is there, and nobody takes it for dead.

        What earlier attempts left is finished or removed first (by rank 0). With the id of an attempt
        that this process began before, a lost writer's work is taken up: see `marked` and `committed`.

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
        self = cls(
            storage,
            os.path.abspath(path),
            attempt=attempt,
            rank=rank,
            world_size=world_size,
            process=process or process_id(),
            clock=clock or Clock(),
        )
        with error_context(path=self.path, rank=rank, phase="begin"):
            try:
                self._begin(private=private)
            except BaseException:
                self.close()
                raise
        return self

    def _begin(self, *, private: bool) -> None:
        storage = self._storage
        make_parents(storage, self.path)
        if self.rank == 0:
            tidy(storage, self.path, keep=self.id)
        if private and self.world_size > 1:
            refuse_other_starts(storage, self.path, world_size=self.world_size, process=self.process)
        if self._is_published():
            self.marked = self.committed = True
            return
        note = encode_note(
            self.path, self.id, world_size=self.world_size, process=self.process, private=private
        )
        self._lock = claim(storage, self.folder, note, self._clock)
        self._root = storage.open_folder(self.folder)
        # No listing here: it would take each rank as long as there are ranks.
        if self._has(index_name(self.rank)):
            self._recognise_mark(self._root, list_names(self._root))
        self.committed = self._has(MANIFEST_NAME)
        self._stop_if_aborted()
        self._claim_rank()
        if self._has(data_name(self.rank)) and not self.marked:
            storage.remove(self.data_path)  # of a writer that was lost
        self.progress("begin")

    def _is_published(self) -> bool:
        """Whether this very attempt is published already: its writer was lost after the commit."""
        published = None
        with suppress(LoadError):  # a damaged one is not replaced, but the others must hear of it
            published = published_manifest(self._storage, self.path)
        if published is None:
            return False
        self._seen = published.sequence
        if published.attempt != self.id:
            return False
        with opened(self._storage, self.path) as folder:
            if folder is not None:
                self._recognise_mark(folder, [MANIFEST_NAME])
        return True

    def _recognise_mark(self, folder: Folder, names: list[str]) -> None:
        """Take up the mark that a lost writer of this process made; refuse another process's."""
        name = index_name(self.rank)
        mark = decode_mark(folder.read(name, MAX_INDEX_BYTES), os.path.join(folder.path, name))
        self.marked = mark.process == self.process
        if self.marked:
            return
        error = same_rank_error(self.path, self.id, self.rank)
        if MANIFEST_NAME not in names and not ranks_in(names) >= set(range(self.world_size)):
            self.abort(error)
        raise error

    def _claim_rank(self) -> None:
        """Leave this rank's first beacon: of two processes that are the same rank one is refused."""
        try:
            self._word.begin()
        except EntryExistsError:
            known = read_beacons(self._folder(), [beacon_name(self.rank)]).get(self.rank)
            if known is None or known.process == self.process or self.marked:
                return
            error = same_rank_error(self.path, self.id, self.rank)
            self.abort(error)
            raise error from None

    # ------------------------------------------------------------------ this rank

    def progress(self, phase: str, bytes_done: int = 0) -> None:
        """Tell the others what this rank does, a few times a second at most. Never raises."""
        if self._root is not None:
            self._word.progress(phase, bytes_done)

    def attachments(self) -> list[FileDigest]:
        """The files that hooks have put into the folder, at any depth, durable and hashed.

        Raises:
            CommitError: A hook added something that a checkpoint cannot hold, or uses one of our names.
        """
        with error_context(path=self.path, rank=self.rank, phase="pre_commit"):
            return collect(self._storage, self._folder(), self.folder, self.world_size)

    def sequence(self) -> int:
        """What orders the saves to this path, for the mark. Rank 0's counts, and only it looks."""
        return next_sequence(self._storage, self.path) if self.rank == 0 else 0

    def mark(self, index_bytes: bytes) -> None:
        """Write this rank's index: on return it has arrived, and everything it wrote is durable.

        The caller has filled in the mark but for its files: process, rank, step, time, `sequence` and so on.

        Raises:
            AbortedError: Another rank has failed.
            CommitError: There is a mark of this rank by another process.
        """
        with error_context(path=self.path, rank=self.rank, phase="mark"):
            self._stop_if_aborted()
            try:
                path = os.path.join(self.folder, index_name(self.rank))
                publish_bytes(self._storage, path, index_bytes, "create")
                self.marked = True
            except EntryExistsError:
                self._recognise_mark(self._folder(), self._names())

    # ------------------------------------------------------------------ the end

    def abort(self, error: BaseException) -> None:
        """Say that this rank failed, so that the others stop at once; the only rank removes its folder.

        Never raises, and does nothing once the checkpoint is committed.
        """
        if self.committed or self._lock is None or not self.is_owned:
            return
        try:
            if self.world_size == 1:
                self._remove()
                return
            if self._has(MANIFEST_NAME):
                return
            self._word.failed(error)
        except MilepostError as failure:
            _logger.warning("could not clear a save that failed, or tell the other ranks: %s", failure)

    def _remove(self) -> None:
        """Remove the only rank's folder, unless it is committed, or has not shown what is in it."""
        names = names_of(self._storage, self.folder) or []
        self._check_view(names)
        if self._doubtful:
            _logger.warning("a save that was not seen to commit is left: %s", self.folder)
        elif self._lock is not None and MANIFEST_NAME not in names:
            remove_tree(self._storage, self.folder, self._lock)

    def close(self) -> None:
        """Leave the attempt; idempotent, never raises. The only rank leaves nothing behind that is not whole.

        The last rank to leave publishes what was committed by a rank that died before it could.
        """
        joined = self.is_owned and self._lock is not None
        try:
            if joined and self.world_size == 1 and not self.committed and not self.marked:
                self._remove()
            self._release()
            if joined and self.committed and self._storage.stat(self.folder) is not None:
                roll_forward(self._storage, self.path)
        except MilepostError as error:
            _logger.warning("could not clear or publish a save at its end: %s", error)
        finally:
            self._release()

    def _release(self) -> None:
        lock, self._lock = self._lock, None
        root, self._root = self._root, None
        if not self.is_owned:
            return
        if lock is not None:
            lock.release()
        if root is not None:
            root.close()

    def _folder(self) -> Folder:
        """The attempt's folder, wherever it has been moved since."""
        if self._root is None:
            raise CommitError("this attempt has ended", path=self.path, rank=self.rank)
        return self._root

    def _names(self) -> list[str]:
        return list_names(self._folder())

    def _check_view(self, names: list[str]) -> None:
        if self.marked and index_name(self.rank) not in names:
            self._doubtful = True
            raise unseen_error(self.folder)

    def _stop_if_aborted(self) -> None:
        if self._has(ABORTED_NAME):
            raise_if_aborted(self._folder(), self._names())

    def _has(self, name: str) -> bool:
        with suppress(EntryNotFoundError):
            return self._folder().stat(name) is not None
        return False

"""`Attempt`: one rank's part in one try at one path, from the first beacon to the commit."""

from __future__ import annotations

# Paths are str, here as in the storage package.
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from milepost.commit.contents import read_manifest
from milepost.commit.marks import assemble
from milepost.commit.place import Place
from milepost.commit.presence import Presence
from milepost.commit.view import View
from milepost.commit.waiting import Clock, News, Wait, raise_if_aborted, wait_for_commit, wait_for_marks
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
from milepost.format.manifest import Manifest
from milepost.format.names import ARRIVED_NAME, MANIFEST_NAME, data_name, index_name, ranks_in
from milepost.storage import Folder, NewFile

__all__ = ["Attempt", "same_rank_error"]

_logger = logging.getLogger(__name__)


class Attempt(View):
    """One rank's part in one try at one path, and what it does for all ranks.

    For one thread at a time, in the process that made it. `milepost.commit.begin` makes one. Its other
    attributes are those of `View`.

    Attributes:
        process: The random id of the process that the save belongs to.
        clock: Where time comes from.
    """

    def __init__(
        self, place: Place, attempt: str, *, rank: int, world_size: int, process: str, clock: Clock
    ) -> None:
        super().__init__(place, attempt, rank, world_size)
        self.process, self.clock = process, clock
        self._presence = Presence(place, attempt, rank, process, clock)

    @property
    def data_path(self) -> str:
        """Where this rank's data file goes."""
        return os.path.join(self.folder, data_name(self.rank))

    # ------------------------------------------------------------------ begin

    @classmethod
    def begin(
        cls, place: Place, attempt: str, *, rank: int, world_size: int, process: str, clock: Clock
    ) -> Self:
        """Join the attempt at a place; see `milepost.commit.begin`, which also makes the place."""
        self = cls(place, attempt, rank=rank, world_size=world_size, process=process, clock=clock)
        with error_context(path=self.path, rank=rank, phase="begin"):
            try:
                self._begin()
            except BaseException:
                self.close()
                raise
        return self

    def _begin(self) -> None:
        self._place.prepare(tidy=self.rank == 0)
        if self._is_published():
            self.marked = self.committed = True
            return
        self._place.enter()
        # No listing here: it would take each rank as long as there are ranks.
        if self.has(index_name(self.rank)):
            self._recognise_mark(self.inside(), self.names())
        self.committed = self.has(MANIFEST_NAME)
        self.stop_if_aborted()
        if not self._presence.begin() and not self.marked:
            error = same_rank_error(self.path, self.id, self.rank)
            self.abort(error)
            raise error
        if self.has(data_name(self.rank)) and not self.marked:
            self._place.discard(data_name(self.rank))  # of a writer that was lost
        self.progress("begin")

    def _is_published(self) -> bool:
        """Whether this very attempt is published already: its writer was lost after the commit."""
        with self._place.at_path() as folder:
            published = None
            with suppress(LoadError):  # a damaged one is not replaced, but the others must hear of it
                published = None if folder is None else read_manifest(folder)
            if folder is None or published is None:
                return False
            self._seen = published.sequence
            if published.attempt != self.id:
                return False
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

    # ------------------------------------------------------------------ this rank

    def progress(self, phase: str, bytes_done: int = 0) -> None:
        """Tell the others what this rank does, a few times a second at most. Never raises."""
        if self._place.entered:
            self._presence.progress(phase, bytes_done)

    def create_data(self) -> NewFile:
        """Create this rank's data file."""
        return self._place.create_data(data_name(self.rank))

    def attachments(self) -> list[FileDigest]:
        """The files that hooks have put into the folder, at any depth, durable and hashed.

        Raises:
            CommitError: A hook added something that a checkpoint cannot hold, or uses one of our names.
        """
        with error_context(path=self.path, rank=self.rank, phase="pre_commit"):
            return self._place.attachments(self.world_size)

    def sequence(self) -> int:
        """What orders the saves to this path, for the mark. Rank 0's counts, and only it looks."""
        return self._place.next_sequence() if self.rank == 0 else 0

    def mark(self, index_bytes: bytes) -> None:
        """Write this rank's index: on return it has arrived, and everything it wrote is durable.

        The caller has filled in the mark, except its files: process, rank, step, time, `sequence` and so on.

        Raises:
            AbortedError: Another rank has failed.
            CommitError: There is a mark of this rank by another process.
        """
        with error_context(path=self.path, rank=self.rank, phase="mark"):
            self.stop_if_aborted()
            try:
                self._place.put(index_name(self.rank), index_bytes, sync=True)
                self.marked = True
            except EntryExistsError:
                self._recognise_mark(self.inside(), self.names())

    # ------------------------------------------------------------------ all ranks

    def complete(self) -> bool:
        """Commit and publish, if every rank has arrived and none has failed; else do nothing.

        Any number of ranks may call it, any number of times. Afterwards `committed` tells.

        Returns:
            Whether this call made the manifest. Then the checkpoint is published and durable.

        Raises:
            AbortedError: Another rank has failed.
            CommitError: The ranks' marks contradict each other.
            CorruptCheckpointError: A mark is damaged.
            TargetError: Committed, but something that may not be replaced is at the path now.
        """
        if self.committed:
            return False
        with error_context(path=self.path, rank=self.rank, phase="commit"):
            names = self.names()
            if self.sees_commit(names):
                return False
            raise_if_aborted(self.inside(), names)
            self.check_view(names)
            if not ranks_in(names) >= set(range(self.world_size)):
                return False
            assembled = self._assembled(ranks_in(names))
            created = assembled is not None and self._place.commit(*assembled)
            if assembled is not None and created:
                self.committed = True
                self._place.publish(assembled[0])
                if self.world_size > 1:  # all ranks have passed the earlier attempts of this start
                    self._place.tidy()
            elif not self.sees_commit():
                raise CommitError(f"the folder of this attempt is gone: {self.folder}")
            return created

    def _assembled(self, ranks: set[int]) -> tuple[Manifest, bytes | None] | None:
        """The manifest and the shard map; None if another rank has committed meanwhile."""
        try:
            assembled = assemble(self.inside(), self.id, ranks, live=True)
            if assembled is None:
                raise CommitError(
                    f"a file of this checkpoint has gone while it was saved: {self.folder}",
                    hint="does another program clear this folder?",
                )
        except (CommitError, LoadError) as error:
            if self.sees_commit():
                return None
            self.abort(error)
            raise
        return assembled

    def say_arrived(self) -> None:
        """Tell the others that all ranks have arrived."""
        with suppress(EntryExistsError, EntryNotFoundError):
            self._place.put(ARRIVED_NAME, b"{}")

    def wait_for_marks(
        self, timeout_seconds: float, poll_seconds: float = 0.5, news: Callable[[], News] | None = None
    ) -> None:
        """Returns when every rank has arrived.

        Rank 0 lists the marks and then says so; the others look only for its word, and list for
        themselves only when its beacon stands still.

        Args:
            timeout_seconds: How long to wait.
            poll_seconds: The longest pause between two looks; the first ones are shorter.
            news: What a meeting of the ranks knows, which counts as well as what the folder shows.

        Raises:
            AbortedError: A rank has failed; raised at once.
            CommitTimeoutError: Ranks are missing; it names them and what they did last.
        """
        with error_context(path=self.path, rank=self.rank, phase="wait_for_marks"):
            wait_for_marks(self, Wait(self, "wait_for_marks", timeout_seconds, poll_seconds, news))

    def wait_for_commit(
        self, timeout_seconds: float, poll_seconds: float = 0.5, news: Callable[[], News] | None = None
    ) -> None:
        """Returns when it is committed, by whomever, and mostly published; commits when rank 0 stands still.

        Args:
            timeout_seconds: How long to wait.
            poll_seconds: The longest pause between two looks.
            news: As for `wait_for_marks`.

        Raises:
            AbortedError: A rank has failed before the commit; raised at once.
            CommitTimeoutError: It was not committed in time.
        """
        if self._place.entered:  # else it was at its path from the beginning
            with error_context(path=self.path, rank=self.rank, phase="wait_for_commit"):
                wait_for_commit(self, Wait(self, "wait_for_commit", timeout_seconds, poll_seconds, news))

    # ------------------------------------------------------------------ the end

    def abort(self, error: BaseException) -> None:
        """Say that this rank failed, so that the others stop at once; the only rank removes its folder.

        Never raises, and does nothing once the checkpoint is committed.
        """
        if self.committed or not self._place.entered:
            return
        try:
            if self.world_size == 1:
                self._remove()
            elif not self.has(MANIFEST_NAME):
                self._presence.failed(error)
        except MilepostError as failure:
            _logger.warning("could not clear a save that failed, or tell the other ranks: %s", failure)

    def _remove(self) -> None:
        """Remove the only rank's folder, unless it is committed, or has not shown what is in it."""
        names = self._place.names()
        self.check_view(names)
        if self._doubtful:
            _logger.warning("a save that was not seen to commit is left: %s", self.folder)
        elif MANIFEST_NAME not in names:
            self._place.remove()

    def close(self) -> None:
        """Leave the attempt; idempotent, never raises. The only rank leaves nothing behind that is not whole.

        The last rank to leave publishes what was committed by a rank that died before it could.
        """
        joined = self._place.entered
        try:
            if joined and self.world_size == 1 and not self.committed and not self.marked:
                self._remove()
            self._release()
            if joined and self.committed:
                self._place.finish()
        except MilepostError as error:
            _logger.warning("could not clear or publish a save at its end: %s", error)
        finally:
            self._release()

    def _release(self) -> None:
        self._place.leave()


def same_rank_error(path: str, attempt: str, rank: int) -> CommitError:
    """The error for two processes that are the same rank of one attempt."""
    return CommitError(
        f"rank {rank} has already saved, or begun to save, to this path with the attempt id {attempt}, in "
        f"another process: it was started twice, or the start id of this job is not new: {path}",
        hint="start each rank once; MILEPOST_START_ID or CheckpointWriterConfig.start_id must be new at "
        "every start of the job",
    )

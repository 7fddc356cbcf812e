"""One try at one path, from the hidden folder to the commit."""

# Paths are str, here as in the storage package.
# ruff: noqa: PTH100, PTH118, PTH119, PTH120
from __future__ import annotations

import hashlib
import logging
import os
import secrets
import threading
import time as _time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import msgspec

from milepost.commit.hidden import (
    ABORTED_NAME,
    ARRIVED_NAME,
    NOTE_NAME,
    AbortMark,
    Beacon,
    abort_name,
    assemble,
    beacon_name,
    data_rank,
    file_digest,
    index_rank,
    is_aborted,
    is_own,
    join_hidden,
    list_names,
    numbers,
    ranks_in,
    read_abort_marks,
    read_beacons,
    read_note,
    siblings,
)
from milepost.commit.publish import publish, published_manifest, remove_tree
from milepost.commit.recover import clean_up, commit_manifest, encode_note, is_abandoned, roll_forward
from milepost.errors import (
    AbortedError,
    CommitError,
    CommitTimeoutError,
    CorruptCheckpointError,
    EntryExistsError,
    EntryNotFoundError,
    LoadError,
    MilepostError,
    StorageError,
)
from milepost.manifest import (
    MANIFEST_NAME,
    MAX_INDEX_BYTES,
    FileDigest,
    data_name,
    decode_mark,
    index_name,
)
from milepost.storage import Folder, Lock, Storage
from milepost.storage.writing import publish_bytes, write_bytes

__all__ = ["Attempt", "Clock", "attempt_id", "environment_start_id", "new_attempt_id", "process_id"]

_logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------- ids

_lock = threading.Lock()
_process_id = secrets.token_hex(8)
_private_start_id = secrets.token_hex(8)
_counts: dict[tuple[str, int], int] = {}


def _renew_ids() -> None:
    global _lock, _process_id, _private_start_id  # noqa: PLW0603 - they belong to the process, as its pid does
    _lock = threading.Lock()
    _process_id, _private_start_id = secrets.token_hex(8), secrets.token_hex(8)
    _counts.clear()


os.register_at_fork(after_in_child=_renew_ids)


def process_id() -> str:
    """This process's random id; a forked child has its own."""
    return _process_id


def new_attempt_id() -> str:
    """A random attempt id, for the only rank."""
    return secrets.token_hex(8)


def environment_start_id() -> str | None:
    """The start id that the environment gives: MILEPOST_START_ID and the launchers' restart counts."""
    start = os.environ.get("MILEPOST_START_ID")
    if not start:
        return None
    counts = [os.environ.get(name) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    return "-".join([start, *(count for count in counts if count)])


def attempt_id(path: str, rank: int, world_size: int, start_id: str | None = None) -> str:
    """The id of this rank's next attempt at `path`; all ranks of a save get the same one.

    Args:
        path: The checkpoint; a relative path means the folder at the time of this call.
        rank: This rank.
        world_size: The number of ranks; a single one always gets a random id.
        start_id: What all ranks of this start of the job, and nobody else, have in common. Without it
            the environment's is taken, else one of this process alone.
    """
    if world_size == 1:
        return new_attempt_id()
    path = os.path.abspath(path)
    start = start_id or environment_start_id() or _private_start_id
    if len(start) > 48 or not all(c.isascii() and (c.isalnum() or c in "-_") for c in start):
        start = hashlib.sha256(start.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    with _lock:
        number = _counts[path, rank] = _counts.get((path, rank), 0) + 1
    return f"{start}-{number}"


@dataclass(frozen=True)
class Clock:
    """Where an attempt gets its time from."""

    time: Callable[[], float] = _time.time
    monotonic: Callable[[], float] = _time.monotonic
    sleep: Callable[[float], None] = _time.sleep


_BEACON_SECONDS = 0.25
_HEARTBEAT_SECONDS = 5.0
_STALL_SECONDS = 30.0
_JOIN_SECONDS = 60.0


class Attempt:
    """One rank's part in one try at one path.

    Made by `begin`; used by one thread at a time, in the process that made it. `close` ends it.

    Attributes:
        path: The absolute path of the checkpoint.
        id: The attempt's id, the same for all ranks.
        rank: This rank.
        world_size: How many ranks there are.
        process: The random id of the process that the attempt belongs to.
        folder: The hidden folder in which the checkpoint is made.
        marked: This rank has arrived: its mark is there (also one made before a lost writer was replaced).
        committed: The checkpoint is committed, by this rank or another.
    """

    def __init__(
        self,
        storage: Storage,
        path: str,
        attempt: str,
        rank: int,
        world_size: int,
        process: str,
        clock: Clock,
    ) -> None:
        self.path = path
        self.id = attempt
        self.rank = rank
        self.world_size = world_size
        self.process = process
        self.folder = join_hidden(path, attempt)
        self.marked = False
        self.committed = False
        self._storage = storage
        self._clock = clock
        self._owner = os.getpid()
        self._lock: Lock | None = None
        self._opened: Folder | None = None
        self._phase = "begin"
        self._last_beacon = float("-inf")

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
            path: The checkpoint, checked by `check_target`.
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
        path = os.path.abspath(path)
        self = cls(
            storage,
            path,
            attempt=attempt,
            rank=rank,
            world_size=world_size,
            process=process or process_id(),
            clock=clock or Clock(),
        )
        try:
            self._begin(private=private)
        except BaseException:
            self._release()
            raise
        return self

    def _begin(self, *, private: bool) -> None:
        storage = self._storage
        make_parents(storage, self.path)
        if self.rank == 0:
            try:
                roll_forward(storage, self.path)
            except StorageError as error:
                _logger.warning("could not finish an earlier save: %s", error)
            clean_up(storage, self.path, keep=self.id)
        if self.world_size > 1 and private:
            self._refuse_other_starts()
        if self._was_published():
            self.marked = self.committed = True
            return
        self._join(private=private)
        self._opened = storage.open_folder(self.folder)
        names = list_names(self._opened)
        if index_name(self.rank) in names:
            self._recognise_mark(names)
        if MANIFEST_NAME in names:
            self.committed = True
            return
        self._raise_if_aborted(names)
        if not self.marked and data_name(self.rank) in names:
            storage.remove(self.data_path)  # a lost writer's
        self.progress("begin")

    def _was_published(self) -> bool:
        """Whether this very attempt is published: its writer was lost after the commit."""
        published = published_manifest(self._storage, self.path)
        if published is None or published.attempt != self.id:
            return False
        folder = self._storage.open_folder(self.path)
        try:
            self._check_process(folder, whole=True)
        finally:
            folder.close()
        return True

    def _join(self, *, private: bool) -> None:
        """Make the folder, or enter the one that another rank made, and lock its attempt.json."""
        deadline = self._clock.monotonic() + _JOIN_SECONDS
        while self._lock is None:
            with suppress(EntryExistsError):
                self._storage.make_folder(self.folder, private=True)
            with suppress(EntryNotFoundError):  # another saver removed the folder, as it was empty: again
                self._lock = self._lock_note(private=private)
                continue
            if self._clock.monotonic() > deadline:
                raise CommitError(
                    f"the folder of this attempt is being cleared, without an end: {self.folder}",
                    path=self.path,
                    rank=self.rank,
                    phase="begin",
                )

    def _lock_note(self, *, private: bool) -> Lock | None:
        storage, note_path = self._storage, os.path.join(self.folder, NOTE_NAME)
        if storage.stat(note_path) is None:
            # Locked before it has its name: there is no moment in which it looks abandoned.
            aside = os.path.join(self.folder, f".{NOTE_NAME}.{secrets.token_hex(8)}.tmp")
            note = encode_note(
                self.path, self.id, world_size=self.world_size, process=self.process, private=private
            )
            write_bytes(storage, aside, note, sync=False)
            lock = storage.lock(aside)
            try:
                storage.rename(aside, note_path, "create")
                return lock
            except EntryExistsError:
                storage.remove(aside)
            if lock is not None:
                lock.release()
        before = self._read_note()
        lock = storage.lock(note_path)
        if lock is None:
            self._clock.sleep(0.01)  # somebody is looking whether we live, or clears the folder
            return None
        if before is None or self._read_note() != before:
            lock.release()  # that was the note of a folder which is gone
            return None
        return lock

    def _read_note(self) -> bytes | None:
        folder = self._storage.open_folder(self.folder)
        try:
            return folder.read(NOTE_NAME, 1 << 20)
        except (EntryNotFoundError, CorruptCheckpointError):
            return None
        finally:
            folder.close()

    def _refuse_other_starts(self) -> None:
        """With several ranks and no common start id, ranks of other processes would wait for ever."""
        for hidden in siblings(self._storage, self.path):
            if hidden.attempt == self.id:
                continue
            try:
                folder = self._storage.open_folder(hidden.path)
            except StorageError:
                continue
            try:
                note = read_note(folder)
            finally:
                folder.close()
            if note is None or not note.private or note.world_size != self.world_size:
                continue
            if note.process == self.process or is_abandoned(self._storage, self.path, hidden):
                continue
            raise CommitError(
                f"another process (pid {note.pid} on {note.host}) saves to this path as one of "
                f"{self.world_size} ranks too, but they have no start id in common: {self.path}",
                path=self.path,
                rank=self.rank,
                phase="begin",
                hint="set MILEPOST_START_ID to a value that is the same on all ranks and new at every start of "
                "the job, or CheckpointWriterConfig.start_id; or use a barrier or the default process group",
            )

    def _recognise_mark(self, names: list[str]) -> None:
        assert self._opened is not None
        ranks = ranks_in(names)
        whole = MANIFEST_NAME in names or ranks >= set(range(self.world_size))
        self._check_process(self._opened, whole=whole)
        self.marked = True

    def _check_process(self, folder: Folder, *, whole: bool) -> None:
        """Refuse a mark of this rank that another process made."""
        name = index_name(self.rank)
        mark = decode_mark(folder.read(name, MAX_INDEX_BYTES), os.path.join(folder.path, name))
        if mark.process == self.process:
            return
        error = CommitError(
            f"rank {self.rank} has already saved to this path with the attempt id {self.id}, "
            "in another process: the start id of this job is not new",
            path=self.path,
            rank=self.rank,
            phase="begin",
            hint="MILEPOST_START_ID or CheckpointWriterConfig.start_id must be new at every start of the job",
        )
        if not whole:
            self.abort(error)
        raise error

    # ------------------------------------------------------------------ work

    def progress(self, phase: str, bytes_done: int = 0) -> None:
        """Tell the others what this rank does, a few times a second at most. Never raises."""
        now = self._clock.monotonic()
        if self._opened is None or (phase == self._phase and now - self._last_beacon < _BEACON_SECONDS):
            return
        self._phase, self._last_beacon = phase, now
        beacon = Beacon(
            rank=self.rank,
            attempt=self.id,
            phase=phase,
            bytes_done=bytes_done,
            time=self._clock.time(),
            process=self.process,
        )
        target = os.path.join(self.folder, beacon_name(self.rank))
        with suppress(StorageError):
            publish_bytes(self._storage, target, msgspec.json.encode(beacon), "replace", sync=False)

    def attachments(self) -> list[FileDigest]:
        """The files that hooks have put into the folder, at any depth, durable and hashed.

        Raises:
            CommitError: A hook added something that a checkpoint cannot hold, or uses one of our names.
        """
        found: list[FileDigest] = []
        self._attach("", found)
        return found

    def _attach(self, prefix: str, found: list[FileDigest]) -> None:
        assert self._opened is not None
        inner = self._storage.open_folder(os.path.join(self.folder, prefix)) if prefix else self._opened
        try:
            names = list_names(inner)
        finally:
            if prefix:
                inner.close()
        added = False
        for name in names:
            if not prefix and self._is_ours(name):
                continue
            relative = prefix + name
            stat = self._opened.stat(relative)
            if stat is None:
                continue  # a passing file of another rank's hook
            if stat.kind == "folder":
                self._attach(f"{relative}/", found)
            elif stat.kind == "file" and _is_storable(relative):
                added = True
                with suppress(EntryNotFoundError):  # as above
                    sync_file(self._storage, self._opened, os.path.join(self.folder, relative), relative)
                    found.append(file_digest(self._opened, relative))
            else:
                what = (
                    "a symbolic link"
                    if stat.kind == "symlink"
                    else "a device"
                    if stat.kind == "other"
                    else ""
                )
                raise CommitError(
                    f"pre_commit added {relative!r}, which is {what or 'no valid name'}: only files and folders "
                    "can become a part of a checkpoint",
                    path=self.path,
                    rank=self.rank,
                    phase="pre_commit",
                    hint="copy the file itself into the folder",
                )
            added = True
        if added and prefix:
            self._storage.sync_folder(os.path.join(self.folder, prefix))

    def _is_ours(self, name: str) -> bool:
        rank = data_rank(name)
        rank = index_rank(name) if rank is None else rank
        if rank is not None and rank >= self.world_size:
            raise CommitError(
                f"pre_commit added {name!r}, a name that Milepost uses for its own files",
                path=self.path,
                rank=self.rank,
                phase="pre_commit",
                hint="give the file another name",
            )
        return rank is not None or is_own(name)

    def mark(self, index_bytes: bytes) -> None:
        """Write this rank's index: on return it has arrived, and everything it wrote is durable.

        The caller has filled in the index's process, attempt, rank, world_size, step, agreement and time.

        Raises:
            AbortedError: Another rank has failed.
            CommitError: There is a mark of this rank by another process.
        """
        names = self._names()
        self._raise_if_aborted(names)
        if index_name(self.rank) not in names:
            with suppress(EntryExistsError):
                path = os.path.join(self.folder, index_name(self.rank))
                publish_bytes(self._storage, path, index_bytes, "create")
                self.marked = True
                return
        self._recognise_mark(self._names())

    # ------------------------------------------------------------------ together

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
        names = self._names()
        if self._see_commit(names):
            return False
        self._raise_if_aborted(names)
        ranks = ranks_in(names)
        if not ranks >= set(range(self.world_size)):
            return False
        assert self._opened is not None
        try:
            manifest = assemble(self._opened, self.id, ranks, live=True)
        except (CommitError, LoadError) as error:
            self.abort(error)
            raise error.located(path=self.path, rank=self.rank, phase="commit") from None
        if manifest is None:
            if self._see_commit(self._names()):
                return False
            gone = CommitError(
                f"a file of this checkpoint has gone while it was saved: {self.folder}",
                path=self.path,
                rank=self.rank,
                phase="commit",
                hint="does another program clear this folder?",
            )
            self.abort(gone)
            raise gone
        try:
            created = commit_manifest(self._storage, self.folder, manifest)
        except EntryNotFoundError:
            if self._see_commit(self._names()):  # published by another rank just now
                return False
            raise
        if not created:
            self._see_commit(self._names())
            return False
        self.committed = True
        publish(self._storage, self.path, self.id)
        return True

    def _see_commit(self, names: list[str]) -> bool:
        """Whether another rank has committed; if so that is durable on return."""
        gone = self.marked and not names  # published, replaced by a later save and cleared since
        if MANIFEST_NAME not in names and not gone:
            return False
        with suppress(EntryNotFoundError):  # published: its names are durable
            self._storage.sync_folder(self.folder)
        self.committed = True
        return True

    def wait_for_marks(self, timeout_seconds: float, poll_seconds: float = 0.5) -> None:
        """Returns when every rank has arrived.

        Rank 0 lists the marks; the others look only for its word, and list for themselves only when
        its beacon stands still.

        Args:
            timeout_seconds: How long to wait.
            poll_seconds: The longest pause between two looks; the first ones are shorter.

        Raises:
            AbortedError: A rank has failed; raised at once.
            CommitTimeoutError: Ranks are missing; it names them and what they did last.
        """
        wait = _Wait(self, timeout_seconds, poll_seconds, "wait_for_marks")
        while True:
            if self.rank == 0 or wait.leader_stands_still():
                names = self._names()
                if self._arrived(names):
                    break
                self._raise_if_aborted(names)
            elif self._stat(ARRIVED_NAME) or self._stat(MANIFEST_NAME):
                return
            elif self._stat(ABORTED_NAME):
                self._raise_if_aborted(self._names())
            wait.pause()
        with suppress(EntryExistsError, EntryNotFoundError):
            publish_bytes(self._storage, os.path.join(self.folder, ARRIVED_NAME), b"{}", "create", sync=False)

    def _arrived(self, names: list[str]) -> bool:
        return MANIFEST_NAME in names or not names or ranks_in(names) >= set(range(self.world_size))

    def wait_for_commit(self, timeout_seconds: float, poll_seconds: float = 0.5) -> None:
        """Returns when the checkpoint is committed, by whomever; does it itself when rank 0 stands still.

        Args:
            timeout_seconds: How long to wait.
            poll_seconds: The longest pause between two looks.

        Raises:
            AbortedError: A rank has failed before the commit; raised at once.
            CommitTimeoutError: It was not committed in time.
        """
        wait = _Wait(self, timeout_seconds, poll_seconds, "wait_for_commit")
        while not self.committed:
            if self._stat(MANIFEST_NAME) or not self._stat(index_name(self.rank)):
                if self._see_commit(self._names()):
                    return
            elif self._stat(ABORTED_NAME):
                self._raise_if_aborted(self._names())
            if wait.leader_stands_still():
                self.complete()
            wait.pause(unless=self.committed)

    def _raise_if_aborted(self, names: list[str]) -> None:
        if not is_aborted(names) or MANIFEST_NAME in names:
            return
        assert self._opened is not None
        marks = read_abort_marks(self._opened, names)
        if not marks:
            raise AbortedError("another rank failed", path=self.path, rank=self.rank, phase=self._phase)
        first = min(marks.values(), key=lambda mark: mark.time)
        also = sorted(set(marks) - {first.rank})
        raise AbortedError(
            f"rank {first.rank} failed"
            + (f" in {first.phase}" if first.phase else "")
            + f" with {first.type}: {first.message}"
            + (f" (ranks {numbers(also)} failed too)" if also else ""),
            path=self.path,
            rank=first.rank,
            phase=first.phase,
            hint="look at that rank's log; the next save starts a new attempt",
        )

    # ------------------------------------------------------------------ the end

    def abort(self, error: BaseException) -> None:
        """Say that this rank failed, so that the others stop at once; the only rank removes its folder.

        Never raises, and does nothing once the checkpoint is committed.
        """
        if self.committed or self._owner != os.getpid():
            return
        try:
            if self.world_size == 1:
                remove_tree(self._storage, self.folder)
                return
            if self._stat(MANIFEST_NAME):
                return
            mark = AbortMark(
                rank=self.rank,
                type=type(error).__name__,
                message=str(error)[:10_000].encode("utf-8", "backslashreplace").decode(),
                phase=getattr(error, "phase", None) or self._phase,
                time=self._clock.time(),
            )
            for name in (abort_name(self.rank), ABORTED_NAME):
                with suppress(EntryExistsError):
                    path = os.path.join(self.folder, name)
                    publish_bytes(self._storage, path, msgspec.json.encode(mark), "create", sync=False)
        except MilepostError as failure:
            _logger.warning("could not leave a word that this rank failed: %s", failure)

    def close(self) -> None:
        """Leave the attempt; idempotent. An uncommitted one of the only rank leaves nothing behind.

        The last rank to leave publishes what was committed by a rank that died before it could.
        """
        if self._owner != os.getpid() or self._lock is None:
            self._release()
            return
        try:
            if self.world_size == 1 and not self.committed:
                remove_tree(self._storage, self.folder)
        except MilepostError as error:
            _logger.warning("could not remove an unfinished save: %s", error)
        self._release()
        if self.committed:
            with suppress(StorageError):
                if self._storage.stat(self.folder) is not None:
                    roll_forward(self._storage, self.path)

    def _release(self) -> None:
        lock, self._lock = self._lock, None
        folder, self._opened = self._opened, None
        if self._owner != os.getpid():
            return
        if lock is not None:
            lock.release()
        if folder is not None:
            folder.close()

    def _names(self) -> list[str]:
        """What is in the attempt's folder, wherever that has been moved."""
        return list_names(self._opened) if self._opened is not None else []

    def _stat(self, name: str) -> bool:
        with suppress(EntryNotFoundError):
            return self._opened is not None and self._opened.stat(name) is not None
        return False


class _Wait:
    """The pauses and the deadline of one wait, and the watch on rank 0."""

    def __init__(self, attempt: Attempt, timeout_seconds: float, poll_seconds: float, phase: str) -> None:
        self._attempt = attempt
        self._clock = attempt._clock  # noqa: SLF001 - a part of Attempt
        self._timeout = timeout_seconds
        self._deadline = self._clock.monotonic() + timeout_seconds
        self._longest = poll_seconds
        self._pause = min(0.005, poll_seconds)
        self._phase = phase
        self._heard: bytes | None = None
        self._heard_at = self._clock.monotonic()
        self._spoke_at = float("-inf")

    def leader_stands_still(self) -> bool:
        """Whether rank 0 has given no sign of life for a while."""
        if self._attempt.rank == 0:
            return True
        now = self._clock.monotonic()
        folder = self._attempt._opened  # noqa: SLF001 - as above
        word = b""
        if folder is not None:
            with suppress(EntryNotFoundError, CorruptCheckpointError):
                word = folder.read(beacon_name(0), 1 << 20)
        if word != self._heard:
            self._heard, self._heard_at = word, now
        return now - self._heard_at > _STALL_SECONDS

    def pause(self, *, unless: bool = False) -> None:
        """Sleep, or raise when the time is over."""
        if unless:
            return
        now = self._clock.monotonic()
        if now >= self._deadline:
            raise self._error()
        if now - self._spoke_at >= _HEARTBEAT_SECONDS:
            self._attempt.progress(self._phase)
            self._spoke_at = now
        self._clock.sleep(min(self._pause, max(self._deadline - now, 0.0)))
        self._pause = min(self._pause * 1.5, self._longest)

    def _error(self) -> CommitTimeoutError:
        attempt = self._attempt
        names = attempt._names()  # noqa: SLF001 - as above
        missing = sorted(set(range(attempt.world_size)) - ranks_in(names))
        folder = attempt._opened  # noqa: SLF001 - as above
        beacons = read_beacons(folder, names) if folder is not None else {}
        said = [
            f"rank {rank}: " + (f"{beacons[rank].phase}, {beacons[rank].bytes_done} bytes" if rank in beacons else
                                "never began")
            for rank in missing[:10]
        ]  # fmt: skip
        what = (
            f"ranks {numbers(missing)} did not arrive within {self._timeout:g} s ({'; '.join(said)})"
            if missing
            else f"all ranks arrived, but nobody committed within {self._timeout:g} s"
        )
        return CommitTimeoutError(
            what,
            path=attempt.path,
            rank=attempt.rank,
            phase=self._phase,
            hint="look at these ranks' logs; write_barrier_timeout_secs allows more time",
        )


# ---------------------------------------------------------------------------- files


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


def _is_storable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return "\\" not in name and len(name) <= 4096


def sync_file(storage: Storage, folder: Folder, path: str, name: str) -> None:
    """Make the bytes of an existing file durable."""
    sync: Callable[[str], None] | None = getattr(storage, "sync_file", None)
    if sync is not None:
        sync(path)
        return
    file = folder.open(name)
    try:
        data = bytearray(file.size)
        file.read_into(0, [memoryview(data)])
    finally:
        file.close()
    publish_bytes(storage, path, bytes(data), "replace")

"""The phases of one save: a `Snapshot` becomes one rank's part of a committed checkpoint.

`save_snapshot` runs them, in the trainer or in any other process.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import msgspec

from milepost._version import __version__
from milepost.commit.attempt import Attempt
from milepost.commit.by_rename.place import begin
from milepost.commit.waiting import Meeting, Outcome
from milepost.errors import AbortedError, CommitError, PostCommitError, error_context
from milepost.format.image import IDENTITY_ENTRY, PICKLE_ENTRY, Image
from milepost.format.index import DataFile, Index, Records, encode_index
from milepost.format.names import data_name
from milepost.format.shards import SHARDS_FEATURE
from milepost.format.snapshot import Snapshot
from milepost.format.tree import encode_tree
from milepost.storage import NewFile, Storage
from milepost.storage.writing import WRITE_BYTES, Ring, write_memory, write_stream
from milepost.utils import beside

__all__ = [
    "Copied",
    "InPlace",
    "SaveOptions",
    "partial_directory",
    "save_snapshot",
    "telling_others",
]

logger = logging.getLogger(__name__)

_partial: ContextVar[str] = ContextVar("milepost_partial_directory")


def partial_directory() -> str:
    """The folder with the files of the checkpoint that is being saved, for use in ``pre_commit``.

    Files that a hook adds there become attachments: the manifest lists them, and they are verified and
    published with the checkpoint.

    Raises:
        RuntimeError: Called outside of ``pre_commit``.
    """
    try:
        return _partial.get()
    except LookupError:
        raise RuntimeError("partial_directory() works only inside a hook's pre_commit") from None


Progress = Callable[[int], None]


class Copied(msgspec.Struct):
    """The bytes of a snapshot's records, where a function copies them, block by block.

    Attributes:
        copy: Copies a piece of a record: ``copy(record, position, bytes, address)``.
        ring: Memory for the blocks.
        crcs: Computes the CRCs of the snapshot's shares; it runs while the disk is at work.
    """

    copy: Callable[[int, int, int, int], None]
    ring: Ring
    crcs: Callable[[], list[list[int]]] | None = None

    def write(self, file: NewFile, image: Image, report: Progress) -> None:
        """Write the data file."""
        block_bytes = self.ring.block_bytes

        def fill(view: memoryview, offset: int) -> None:
            image.fill(view, offset, block_bytes, self.copy)

        write_stream(file, image.size, fill, self.ring, report)


class InPlace(msgspec.Struct):
    """The bytes of a snapshot's records, where memory holds them at their places in the file.

    Attributes:
        memory: Returns that memory, page-aligned and at least as large as it is asked for.
    """

    memory: Callable[[int], memoryview]
    crcs: None = None

    def write(self, file: NewFile, image: Image, report: Progress) -> None:
        """Write the data file."""

        def fill(view: memoryview, offset: int) -> None:
            image.fill(view, offset, WRITE_BYTES, lambda *_: None)

        write_memory(file, self.memory(image.size), fill, report)


class Hook(Protocol):
    """The methods of `WriterHook` that this module calls."""

    def pre_commit(self, path: str, **kwargs: Any) -> None:
        """Called when this rank's data file is durable."""

    def post_commit(self, path: str, **kwargs: Any) -> None:
        """Called when the checkpoint is committed."""


class SaveOptions(msgspec.Struct):
    """How a save is carried out. What all saves of a writer have in common comes first.

    Attributes:
        storage: Where the checkpoint is stored.
        rank: This rank.
        world_size: How many ranks save together.
        timeout_seconds: How long to wait for other ranks.
        attempt: The attempt's id.
        private: Only this process knows the attempt's id.
        target: The checkpoint's absolute path. None if the path that hooks get may be resolved here.
        process: Random id of the process that the save belongs to. None if that is this process.
        barrier: Called once when all ranks have arrived; None if there is no barrier.
        meeting: Where the ranks meet without a barrier; None if they do not.
        hook: The user's commit hook.
        report: Called with the phase, the bytes written and the size of the file, as they change.
    """

    storage: Storage
    rank: int
    world_size: int
    timeout_seconds: float
    attempt: str = ""
    private: bool = False
    target: str | None = None
    process: str | None = None
    barrier: Callable[[], None] | None = None
    meeting: Meeting | None = None
    hook: Hook | None = None
    report: Callable[[str, int, int], None] = lambda *_: None


def save_snapshot(
    path: str,
    snapshot: Snapshot,
    records: Copied | InPlace,
    options: SaveOptions,
    arguments: dict[str, Any],
) -> Outcome:
    """Save one rank's part, and commit the checkpoint as soon as the parts of all ranks are there.

    On return this rank's part is durable. With one rank, with a barrier or a meeting, and on the rank that
    completes the set, the checkpoint is committed and visible at `path`. If this raises, nothing new is
    visible at `path`, what was there still is, and other ranks are told. `PostCommitError` is the exception:
    the checkpoint is committed.

    Args:
        path: The checkpoint's folder, as the user gave it. Hooks get it unchanged.
        snapshot: What to save.
        records: The bytes of the snapshot's records.
        options: How.
        arguments: All keyword arguments of the save, for the hooks.
    """
    alone = options.world_size == 1
    with error_context(path=path, rank=options.rank, alone=alone), _attempt(path, options) as attempt:
        save = _Save(attempt, path, options, arguments)
        if not attempt.marked:  # else a writer that was lost has done these three steps
            index = save.write_data(snapshot, records)
            save.pre_commit()
            save.mark(index)
        save.meet()
        outcome = save.commit()
    save.post_commit()
    return outcome


class _Save:
    """One rank's save. Its methods are the steps of a rank, numbered as in ARCHITECTURE.md."""

    def __init__(self, attempt: Attempt, path: str, options: SaveOptions, arguments: dict[str, Any]) -> None:
        self._attempt, self._path, self._options, self._arguments = attempt, path, options, arguments
        self._news = None if options.meeting is None else options.meeting.poll
        self._waits = options.barrier is not None or options.meeting is not None
        self._committed_before = attempt.committed
        self._committer = False

    def write_data(self, snapshot: Snapshot, records: Copied | InPlace) -> Index:
        """Step 1: write the data file. It is durable on return; the index describes it."""
        with self._phase("write"):
            return _write_data(self._attempt, snapshot, records, self._options)

    def pre_commit(self) -> None:
        """Step 2: run the hook's ``pre_commit``."""
        if self._options.hook is not None:
            with self._phase("pre_commit"):
                token = _partial.set(self._attempt.folder)
                try:
                    self._options.hook.pre_commit(self._path, **self._arguments)
                finally:
                    _partial.reset(token)

    def mark(self, index: Index) -> None:
        """Steps 2 and 3: make attachments of the files that the hook added; write the index, the mark."""
        with self._phase("commit"):
            if self._options.hook is not None:  # else this would list the files of all ranks for nothing
                index.attachments = self._attempt.attachments()
            index.sequence = self._attempt.sequence()
            self._attempt.mark(encode_index(index))

    def meet(self) -> None:
        """Step 4: wait for the other ranks, where they meet or have a barrier."""
        attempt, options = self._attempt, self._options
        if options.barrier is not None:
            with self._phase("barrier"):
                # A writer that was lost may have committed, or a later save when it tidied up.
                if not attempt.committed:
                    attempt.wait_for_marks(options.timeout_seconds)
                self._execute(options.barrier)
        elif options.meeting is not None:
            with self._phase("meet"):
                options.meeting.arrive()
                if options.rank == 0 and not attempt.committed:
                    attempt.wait_for_marks(options.timeout_seconds, news=self._news)

    def _execute(self, barrier: Callable[[], None]) -> None:
        try:
            barrier()
        except Exception as error:
            if self._attempt.sees_commit():
                logger.warning("the barrier failed (%s), but %s is committed", error, self._path)
            elif isinstance(error, CommitError):
                raise
            else:
                raise CommitError(
                    f"the barrier failed: {type(error).__name__}: {error}",
                    hint="find out why the barrier failed, then save again",
                ) from error

    def commit(self) -> Outcome:
        """Steps 5 to 8: commit, publish and clear, or wait until another rank has; say so at the meeting."""
        attempt, options = self._attempt, self._options
        with self._phase("commit"):
            # Where ranks wait, rank 0 reads all the marks. The others step in only if it stands still.
            self._committer = (not self._waits or options.rank == 0) and attempt.complete()
            if self._waits and not self._committer:
                attempt.wait_for_commit(options.timeout_seconds, news=self._news)
        identity = "" if options.meeting is None else attempt.identity()
        outcome = Outcome(attempt.committed, identity, attempt.hidden)
        if options.meeting is not None:
            options.meeting.end(outcome)
        return outcome

    def post_commit(self) -> None:
        """Step 8: run the hook's ``post_commit``, once for each checkpoint."""
        hook = self._options.hook
        if hook is None or not (self._committed_before or self._committer or self._waits):
            return
        if self._committed_before:
            logger.warning(
                "a writer was lost after it committed %s: post_commit is not called again", self._path
            )
            return
        try:
            hook.post_commit(self._path, **self._arguments)
        except Exception as error:
            raise PostCommitError(
                f"post_commit raised {type(error).__name__}: {error}; the checkpoint is committed",
                path=self._path,
                rank=self._options.rank,
                phase="post_commit",
                hint="the checkpoint loads; do by hand what the hook was to do, do not save again for it",
            ) from error

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._attempt.progress(name)
        self._options.report(name, 0, 0)
        with error_context(phase=name):
            yield


@contextmanager
def telling_others(path: str, options: SaveOptions) -> Iterator[None]:
    """If the body raises before this rank has begun its attempt, leave an abort mark for the other ranks.

    There is no abort mark if this rank's part is whole, as after the loss of a writer: other ranks may still
    commit it.
    """
    try:
        yield
    except BaseException as error:
        if options.world_size > 1:
            try:
                with _attempt(path, options) as attempt:
                    if not attempt.marked:
                        attempt.abort(error)
            except AbortedError:
                pass  # another rank has failed too: all know
            except BaseException as told:  # noqa: BLE001 - the first error is raised below
                logger.warning("could not tell the other ranks of a failure: %s", told)
        raise


@contextmanager
def _attempt(path: str, options: SaveOptions) -> Iterator[Attempt]:
    """Begin an attempt. Abort it if the body raises; close it in any case."""
    attempt = begin(
        options.storage,
        options.target or path,
        attempt=options.attempt,
        rank=options.rank,
        world_size=options.world_size,
        private=options.private,
        process=options.process,
    )
    try:
        yield attempt
    except BaseException as error:
        attempt.abort(error)
        raise
    finally:
        attempt.close()


def _write_data(
    attempt: Attempt, snapshot: Snapshot, records: Copied | InPlace, options: SaveOptions
) -> Index:
    """Write the data file; it is durable on return. The index describes it."""
    tree = encode_tree(snapshot.tree)
    identity = {"format": "milepost", "version": [1, 0], "attempt": options.attempt, "rank": options.rank}
    image = Image(
        snapshot.plan.layout,
        [
            *((f"objects/{number}", data) for number, data in enumerate(snapshot.objects)),
            (PICKLE_ENTRY, snapshot.pickle()),
            ("byteorder", b"little"),
            ("version", b"3\n"),
            (IDENTITY_ENTRY, msgspec.json.encode(identity)),
        ],
    )
    written = 0

    def report(count: int) -> None:
        nonlocal written
        written += count
        attempt.progress("write", written)
        options.report("write", written, image.size)

    shares, labels = snapshot.shares, snapshot.labels
    with beside(records.crcs) as crcs:
        file = attempt.create_data()
        try:
            records.write(file, image, report)
        except BaseException:
            file.discard()
            raise
        file.finish(image.size)
    index = Index(
        attempt=options.attempt,
        process=attempt.process,
        rank=options.rank,
        world_size=options.world_size,
        time=time.time(),
        files=[DataFile(data_name(options.rank), image.size, image.file_crc)],
        writer=_writer_facts() | labels.writer,
        records=_records(snapshot, image),
        tensors=snapshot.plan.tensors,
        tree=tree,
        step=labels.step,
        metadata=labels.metadata,
    )
    if shares is not None:
        index.requires = [SHARDS_FEATURE]
        index.agreement = shares.agreement
        index.shards = shares.decoded()
        index.shards.crcs = shares.crcs if crcs[0] is None else crcs[0]
    return index


def _records(snapshot: Snapshot, image: Image) -> Records:
    layout, objects = snapshot.plan.layout, snapshot.objects
    crcs = list(image.chunk_crcs)
    for number in range(len(objects)):
        crcs += image.entry_crcs(number)
    count = len(layout.lengths) + len(objects)
    return Records(
        file=[0] * count,
        offset=[*layout.offsets, *image.entry_offsets[: len(objects)]],
        length=[*layout.lengths, *map(len, objects)],
        encoding=["raw"] * count,
        crcs=crcs,
    )


def _writer_facts() -> dict[str, str]:
    return {
        "milepost": __version__,
        "python": sys.version.split()[0],
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
    }

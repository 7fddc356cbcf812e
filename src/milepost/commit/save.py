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
    """The folder where the files of the checkpoint being saved are, for use in ``pre_commit``.

    Files that a hook adds there become attachments: the manifest lists them, and they are verified and
    published with the checkpoint.

    Raises:
        RuntimeError: Called outside of ``pre_commit``.
    """
    try:
        return _partial.get()
    except LookupError:
        raise RuntimeError("partial_directory() is only known during a hook's pre_commit") from None


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
    """What `WriterHook` offers, as this module uses it."""

    def pre_commit(self, path: str, **kwargs: Any) -> None:
        """Called when this rank's data are durable."""

    def post_commit(self, path: str, **kwargs: Any) -> None:
        """Called when the checkpoint is committed."""


class SaveOptions(msgspec.Struct):
    """How a save is carried out. What all saves of a writer have in common comes first.

    Attributes:
        storage: Where to.
        rank: This rank.
        world_size: How many ranks save together.
        timeout_seconds: How long to wait for other ranks.
        attempt: The attempt's id.
        private: The attempt's id is known to this process alone.
        target: The checkpoint's absolute path, where the path that hooks get is not to be resolved here.
        process: Random id of the process that the save belongs to, if it is not this one.
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
    """Save one rank's part and commit the checkpoint as soon as all ranks' parts are there.

    Returns when this rank's part is durable; with one rank, with a barrier or a meeting, and on the rank
    that completes the set, when the checkpoint is committed and visible at `path`. If it raises, nothing new
    is visible at `path`, what was there still is, and (with several ranks) the others are told. The one
    exception is `PostCommitError`: the checkpoint is committed.

    Args:
        path: The checkpoint's folder, as the user gave it; hooks get it like that.
        snapshot: What to save.
        records: The bytes of the snapshot's records.
        options: How.
        arguments: All keyword arguments of the save, for the hooks.
    """
    hook, meeting = options.hook, options.meeting
    waits = options.barrier is not None or meeting is not None
    news = meeting.poll if meeting is not None else None
    with error_context(path=path, rank=options.rank), _attempt(path, options) as attempt:
        committed_before = attempt.committed
        if not attempt.marked:
            with _phase(attempt, "write", options):
                index = _write_data(attempt, snapshot, records, options)
            if hook is not None:
                with _phase(attempt, "pre_commit", options), _directory(attempt.folder):
                    hook.pre_commit(path, **arguments)
            with _phase(attempt, "commit", options):
                if hook is not None:  # or else a listing of what all ranks have put there, for nothing
                    index.attachments = attempt.attachments()
                index.sequence = attempt.sequence()
                attempt.mark(encode_index(index))
        if options.barrier is not None:
            with _phase(attempt, "barrier", options):
                if not attempt.committed:  # as a writer that was lost, or the next one's tidying, may have
                    attempt.wait_for_marks(options.timeout_seconds)
                try:
                    options.barrier()
                except Exception as error:
                    if attempt.sees_commit():
                        logger.warning("the barrier failed (%s), but %s is committed", error, path)
                    elif isinstance(error, CommitError):
                        raise
                    else:
                        raise CommitError(
                            f"the barrier failed: {type(error).__name__}: {error}",
                            hint="find out why the barrier failed, then save again",
                        ) from error
        elif meeting is not None:
            with _phase(attempt, "meet", options):
                meeting.arrive()
                if options.rank == 0 and not attempt.committed:
                    attempt.wait_for_marks(options.timeout_seconds, news=news)
        with _phase(attempt, "commit", options):
            # Where ranks wait, rank 0 reads all the marks; the others step in only if it stands still.
            committer = (not waits or options.rank == 0) and attempt.complete()
            if waits and not committer:
                attempt.wait_for_commit(options.timeout_seconds, news=news)
        outcome = Outcome(attempt.committed, attempt.identity() if meeting else "", attempt.hidden)
        if meeting is not None:
            meeting.end(outcome)
    if committed_before:
        if hook is not None:
            logger.warning("a writer was lost after it committed %s: post_commit is not called again", path)
    elif hook is not None and (committer or waits):
        try:
            hook.post_commit(path, **arguments)
        except Exception as error:
            raise PostCommitError(
                f"post_commit raised {type(error).__name__}: {error}; the checkpoint is committed",
                path=path,
                rank=options.rank,
                phase="post_commit",
                hint="the checkpoint loads; do by hand what the hook was to do, do not save again for it",
            ) from error
    return outcome


@contextmanager
def telling_others(path: str, options: SaveOptions) -> Iterator[None]:
    """If something fails before this rank has begun its attempt, leave an abort mark for the other ranks.

    Not if its part is whole, as that of a writer that was lost later may be: the others may still commit it.
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
                pass  # then they know already
            except BaseException as told:  # noqa: BLE001 - the first error is raised below
                logger.warning("could not tell the other ranks of a failure: %s", told)
        raise


@contextmanager
def _attempt(path: str, options: SaveOptions) -> Iterator[Attempt]:
    """An attempt that is aborted if anything in the context raises, and closed in any case."""
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


@contextmanager
def _phase(attempt: Attempt, name: str, options: SaveOptions) -> Iterator[None]:
    attempt.progress(name)
    options.report(name, 0, 0)
    with error_context(phase=name):
        yield


@contextmanager
def _directory(folder: str) -> Iterator[None]:
    token = _partial.set(folder)
    try:
        yield
    finally:
        _partial.reset(token)


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

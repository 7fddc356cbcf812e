"""The writer: saves one rank's state dict and commits the checkpoint."""

from __future__ import annotations

import abc
import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch

from milepost.barriers import Barrier, barrier_store
from milepost.commit import absolute_path, check_target, given_path
from milepost.commit.save import Copied, SaveOptions, partial_directory, save_snapshot, telling_others
from milepost.config import CheckpointWriterConfig
from milepost.errors import ClosedError, CommitError, PostCommitError, error_context
from milepost.format.names import data_name
from milepost.format.snapshot import Labels
from milepost.ranks.save_meeting import Ranks
from milepost.state.encode import StateEncoder
from milepost.storage import Storage, default_storage
from milepost.storage.writing import Ring
from milepost.telemetry import Event, Observer, notify
from milepost.types import STATE_DICT, RankInfo, StrPath
from milepost.utils import gc_paused

__all__ = ["CheckpointWriter", "CheckpointWriterConfig", "WriterHook", "partial_directory"]

logger = logging.getLogger(__name__)

_LAST_WORD_SECONDS = 5
"""How long a store may take to hear how a save ended, before others have to see it in the folder."""


class WriterHook(abc.ABC):
    """Your code around the commit of a checkpoint."""

    @abc.abstractmethod
    def pre_commit(self, path: str, **kwargs: Any) -> None:
        """Called when this rank's file is durable, before the checkpoint is visible.

        If it raises, the checkpoint does not appear. `partial_directory` tells where the files are; what
        is added there becomes part of the checkpoint. A retry of the save may call it again.

        Args:
            path: The checkpoint's path as it was given to ``save``.
            kwargs: All keyword arguments of ``save``.
        """

    @abc.abstractmethod
    def post_commit(self, path: str, **kwargs: Any) -> None:
        """Called once the checkpoint is committed and visible at `path`; arguments as for `pre_commit`.

        With several ranks and no barrier, only the rank that commits calls it.
        """


class CheckpointWriter:
    """Writes this rank's part of each checkpoint. Thread-safe: writes follow one another.

    Args:
        config: Options.
        rank_info: Which rank this is, of how many.
        barrier: Any object with ``execute_barrier()``, called once in each write, when all ranks' files
            are durable. Without one, a rank out of several does its own part and returns; the rank that
            completes the set commits it.
        commit_hook: Called around the commit.
        storage: Where checkpoints live; the local file system by default.
        meets: Meet the other ranks at the store of the default process group, where there is no barrier.
        observers: Get an event for each write that is not known to be committed.
    """

    def __init__(
        self,
        config: CheckpointWriterConfig,
        rank_info: RankInfo,
        barrier: Barrier | None = None,
        commit_hook: WriterHook | None = None,
        *,
        storage: Storage | None = None,
        meets: bool = False,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._rank_info = rank_info
        self._storage = default_storage() if storage is None else storage
        self._encoder = StateEncoder(rank_info, config.replicated)
        self._ring = Ring()
        self._lock = threading.RLock()  # a hook may write, too
        self._closed = False
        self._observers = list(observers)
        self._has_hook = commit_hook is not None
        options = SaveOptions(
            self._storage,
            rank_info.global_rank,
            rank_info.global_world_size,
            config.write_barrier_timeout_secs,
            barrier=None if barrier is None else barrier.execute_barrier,
            hook=commit_hook,
        )
        meets = meets and barrier is None
        self._ranks = Ranks(options, config.start_id, store=barrier_store(barrier), meets=meets)

    @property
    def takes_keywords(self) -> bool:
        """Whether a hook or a subclass may read the keyword arguments of `write` that Milepost does not."""
        return self._has_hook or type(self) is not CheckpointWriter

    def write(self, path: StrPath, state_dict: STATE_DICT, **kwargs: Any) -> None:
        """Write a state dict to ``<path>/checkpoint_<rank>.pt`` and commit the checkpoint.

        On return this rank's part is durable; with one rank, or with a barrier, the whole checkpoint is
        committed: it is complete, verified by checksums, survives a power cut and is visible at `path`,
        where it has replaced an older checkpoint in one step. If it raises, `path` is as it was.

        Args:
            path: A folder that does not exist, is empty, or holds a checkpoint to replace. A relative
                path means the folder at the time of the call.
            state_dict: What to save. It is read during the call only.
            kwargs: Passed to the hooks; any are accepted. ``step`` (an integer) and ``metadata`` (plain
                values) are also recorded in the checkpoint.

        Raises:
            StateError: The state dict, step or metadata cannot be saved; nothing was written.
            TargetError: The path may not be written to or replaced; nothing was touched.
            StorageError: An operation of the file system failed, such as on a full disk.
            CommitError: Another rank failed or did not come; or `PostCommitError`, see there; or it is found
                only now that an earlier write has failed on another rank: this one was written all the same.
            ClosedError: The writer was closed.
        """
        path = given_path(path)
        earlier = self._ranks.failures()
        if not self.carry_out(path, state_dict, kwargs):
            logger.info("%s: this rank's part is written, not known to be committed", path)
            step = kwargs.get("step")
            notify(self._observers, Event("written", path, step if isinstance(step, int) else None))
        _raise_first(earlier, f"{path} was written after that")

    def carry_out(self, path: str, state_dict: STATE_DICT, arguments: dict[str, Any]) -> bool:
        """Do what `write` does; whether the checkpoint is known to be committed."""
        info = self._rank_info
        alone = info.global_world_size == 1
        with self._lock, error_context(path=path, rank=info.global_rank, alone=alone):
            if self._closed:
                raise ClosedError("the writer is closed", hint="make a new one")
            target = absolute_path(path)
            options, meeting = self._ranks.next(target)
            try:
                # From here on this save counts: if this rank fails, the others are told.
                with telling_others(path, options):
                    check_target(self._storage, target)
                    labels = Labels.of(arguments, {"torch": str(torch.__version__)})
                    with gc_paused():
                        parts = self._encoder.take_apart(state_dict)
                parts.snapshot.labels = labels
                crcs = parts.crcs if parts.division is not None else None
                records = Copied(parts.copier(), self._ring, crcs)
                outcome = save_snapshot(path, parts.snapshot, records, options, arguments)
            except BaseException as error:
                if meeting is not None and not isinstance(error, PostCommitError):
                    meeting.close(None, error)
                raise
            finally:
                if meeting is not None:
                    meeting.join(_LAST_WORD_SECONDS)
            if not outcome.committed:
                self._ranks.wrote(target, options.attempt)
        logger.debug("wrote %s of %s", data_name(info.global_rank), path)
        return outcome.committed

    def close(self) -> None:
        """Release the writer's memory. Waits for a write that is under way; idempotent.

        Raises:
            AbortedError: What was written before has failed on another rank since.
        """
        with self._lock:
            self._closed = True
            self._ring.close()
        _raise_first(self._ranks.failures(), "nothing was written after that")


def _raise_first(failures: list[CommitError], note: str) -> None:
    """Raise what is found only now to have failed; there is more about it in the note."""
    for error in failures[1:]:
        logger.error("%s was not committed: %s", error.path, error)
    if failures:
        failures[0].add_note(f"This is the end of an earlier save, which had been written here; {note}.")
        raise failures[0]

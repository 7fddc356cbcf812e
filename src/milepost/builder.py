"""The only place that picks parts and wires them together."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist

from milepost.barriers import barrier_store, create_barrier_from_config
from milepost.checkpoint_process import CheckpointProcess, LeanWriter
from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter, WriterHook
from milepost.checkpointer import AsyncCheckpointer, SyncCheckpointer
from milepost.config import CheckpointerConfig, CheckpointWriterConfig, validate
from milepost.errors import ConfigError
from milepost.ranks.start import start_at
from milepost.staging import DefaultStager
from milepost.state.encode import StateEncoder
from milepost.types import RankInfo

__all__ = [
    "default_subprocess_init_fn",
    "default_writer_init_fn",
    "make_async_checkpointer",
    "make_sync_checkpointer",
]

logger = logging.getLogger(__name__)


def make_sync_checkpointer(
    config: CheckpointerConfig | None = None,
    rank_info: RankInfo | None = None,
    commit_hook: WriterHook | None = None,
) -> SyncCheckpointer:
    """A checkpointer whose ``save`` returns when the checkpoint is durable.

    Args:
        config: Options of all parts; the defaults work anywhere.
        rank_info: This rank; by default that of the default process group, else rank 0 of 1.
        commit_hook: Called around the commit of each checkpoint.

    Raises:
        ConfigError: An option is not right, or the barrier cannot be made; says which and why.
    """
    config = CheckpointerConfig() if config is None else config
    validate(config)
    _check_hook(commit_hook)
    rank_info = _checked_rank(rank_info)
    barrier = create_barrier_from_config(config.barrier_config)
    meets = _meets(config, rank_info)
    observers = config.async_config.observers
    writer = CheckpointWriter(
        config.writer_config, rank_info, barrier, commit_hook, meets=meets, observers=observers
    )
    return SyncCheckpointer(writer, _reader(config, rank_info, barrier))


def default_subprocess_init_fn(*args: Any) -> None:
    """What the checkpoint process calls first unless you say otherwise: nothing."""


def default_writer_init_fn(rank_info: RankInfo) -> CheckpointWriter:
    """The writer that the checkpoint process uses unless you say otherwise."""
    return CheckpointWriter(CheckpointWriterConfig(), rank_info)


def make_async_checkpointer(
    config: CheckpointerConfig | None = None,
    rank_info: RankInfo | None = None,
    subprocess_init_fn: Callable[..., Any] = default_subprocess_init_fn,
    subprocess_init_args: tuple[Any, ...] = (),
    checkpoint_writer_init_fn: Callable[..., Any] = default_writer_init_fn,
    checkpoint_writer_init_args: dict[str, Any] | None = None,
    *,
    commit_hook: WriterHook | None = None,
) -> AsyncCheckpointer:
    """A checkpointer whose ``save`` returns as soon as the state is copied.

    Args:
        config: Options of all parts; the defaults work anywhere.
        rank_info: This rank; by default that of the default process group, else rank 0 of 1.
        subprocess_init_fn: Called in the checkpoint process first, with `subprocess_init_args`.
        subprocess_init_args: Its arguments.
        checkpoint_writer_init_fn: Called there with `checkpoint_writer_init_args` by keyword, and
            ``rank_info``; returns the writer to use instead of Milepost's own.
        checkpoint_writer_init_args: Its arguments.
        commit_hook: Called around the commit of each checkpoint, in the checkpoint process.

    Raises:
        ConfigError: An option is not right, or the barrier cannot be made; says which and why.
        UnavailableError: ``use_non_blocking_copy=True`` without an accelerator.
    """
    config = CheckpointerConfig() if config is None else config
    validate(config)
    _check_hook(commit_hook)
    rank_info = _checked_rank(rank_info)
    _check_async(config, rank_info)
    own = (
        subprocess_init_fn is default_subprocess_init_fn
        and checkpoint_writer_init_fn is default_writer_init_fn
        and not checkpoint_writer_init_args
    )
    meets = _meets(config, rank_info, own=own)
    barrier = create_barrier_from_config(config.barrier_config) if own else None
    reader = _reader(config, rank_info, barrier)
    checkpointers: list[weakref.ref[AsyncCheckpointer]] = []

    def on_progress(target: str, phase: str, done: int, size: int) -> None:
        checkpointer = checkpointers[0]() if checkpointers else None
        if checkpointer is not None:
            checkpointer.on_progress(target, phase, done, size)

    encoder = partial(StateEncoder, rank_info, config.writer_config.replicated)
    make_process = partial(
        CheckpointProcess, rank_info, config.process_config, on_progress=on_progress, encoder=encoder
    )
    fallback: CheckpointWriter | None = None
    if own:
        process = make_process(lean=LeanWriter(config.writer_config, barrier, commit_hook, meets=meets))
        fallback = CheckpointWriter(config.writer_config, rank_info, barrier, commit_hook, meets=meets)
    else:
        if commit_hook is not None or config.barrier_config.barrier_type is not None:
            logger.warning(
                "a writer of your own gets its own arguments only: no barrier_config and no commit_hook"
            )
        process = make_process(
            subprocess_init_fn=subprocess_init_fn,
            subprocess_init_args=subprocess_init_args,
            checkpoint_writer_init_fn=checkpoint_writer_init_fn,
            checkpoint_writer_init_args=checkpoint_writer_init_args,
        )
    stager = DefaultStager(config.staging_config, encoder=encoder())
    checkpointer = AsyncCheckpointer(stager, process, reader, config=config.async_config, fallback=fallback)
    checkpointers.append(weakref.ref(checkpointer))
    return checkpointer


def _check_async(config: CheckpointerConfig, rank_info: RankInfo) -> None:
    """Refuse options that background saves cannot honour."""
    if config.async_config.when_busy == "skip" and rank_info.global_world_size > 1:
        raise ConfigError('async_config.when_busy="skip" with several ranks would skip different saves')
    if config.barrier_config.barrier_type == "dist_barrier":
        raise ConfigError(
            "dist_barrier cannot be used with an async checkpointer: it would use the training's process "
            "group from another thread",
            hint='use barrier_type="tcp_store", or no barrier',
        )


def _reader(config: CheckpointerConfig, rank_info: RankInfo, barrier: object) -> CheckpointReader:
    """A reader whose ranks agree at the barrier's store, where there is one."""
    return CheckpointReader(
        rank_info,
        store=barrier_store(barrier),
        timeout_seconds=config.writer_config.write_barrier_timeout_secs,
    )


def _checked_rank(rank_info: RankInfo | None) -> RankInfo:
    if rank_info is None:
        if dist.is_available() and dist.is_initialized():
            return RankInfo(dist.get_rank(), dist.get_world_size())
        own, world = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
        if own.isdecimal() and world.isdecimal() and int(world) > 1:
            # As rank 0 of 1, which this would be otherwise, all of them would save over each other.
            raise ConfigError(
                f"the environment says that this is rank {own} of {world}, but there is no process group",
                rank=int(own),
                hint="call torch.distributed.init_process_group before this, or pass "
                f"rank_info=RankInfo({own}, {world}); for a rank that saves alone, pass RankInfo(0, 1)",
            )
        return RankInfo(0, 1)
    if not (hasattr(rank_info, "global_rank") and hasattr(rank_info, "global_world_size")):
        raise ConfigError(
            f"rank_info must be a RankInfo, not a {type(rank_info).__name__}: {rank_info!r}",
            hint="rank_info=RankInfo(global_rank, global_world_size), such as RankInfo(0, 1)",
        )
    rank, size = rank_info.global_rank, rank_info.global_world_size
    if type(rank) is not int or type(size) is not int or not 0 <= rank < size:
        raise ConfigError(f"rank_info must have 0 <= global_rank < global_world_size, not {rank_info!r}")
    return rank_info


def _meets(config: CheckpointerConfig, rank_info: RankInfo, *, own: bool = True) -> bool:
    """Whether saves meet at the store of the default process group, as far as it depends on the options.

    Raises:
        ConfigError: They would, but the group has other ranks.
    """
    rank, size = rank_info.global_rank, rank_info.global_world_size
    if size == 1 or (own and config.barrier_config.barrier_type is not None):
        return False
    meets = own and config.meeting == "auto"
    if meets and dist.is_available() and dist.is_initialized():
        found = (dist.get_rank(), dist.get_world_size())
        if found != (rank, size):
            raise ConfigError(
                f"{rank_info!r} is not what the default process group says: rank {found[0]} of {found[1]}",
                hint="for one rank alone RankInfo(0, 1); for a group of some ranks a barrier_config; to have "
                'each rank write its part and nobody wait, meeting="none"',
            )
    if not meets or start_at(None, rank, size) is None:
        logger.warning(
            "the ranks of this job do not meet when they save%s: a save that is over is written, not known "
            "to be committed",
            "" if not meets else ", as there is no default process group with a store",
        )
    return meets


def _check_hook(hook: object) -> None:
    for name in ("pre_commit", "post_commit"):
        if hook is not None and not callable(getattr(hook, name, None)):
            raise ConfigError(
                f"commit_hook must have the methods pre_commit and post_commit, and {hook!r} has no {name}",
                hint="derive it from milepost.checkpoint_writer.WriterHook",
            )

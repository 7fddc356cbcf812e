"""The only place that picks parts and wires them together."""

from __future__ import annotations

import torch.distributed as dist

from milepost.barriers import create_barrier_from_config
from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter, WriterHook
from milepost.checkpointer import SyncCheckpointer
from milepost.config import CheckpointerConfig, validate
from milepost.errors import ConfigError
from milepost.types import RankInfo

__all__ = ["make_sync_checkpointer"]


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
        ConfigError: An option is not right; names it.
        ValueError: The barrier's type is unknown.
    """
    config = CheckpointerConfig() if config is None else config
    validate(config)
    rank_info = _checked_rank(rank_info)
    writer = CheckpointWriter(
        config.writer_config,
        rank_info,
        create_barrier_from_config(config.barrier_config),
        commit_hook,
    )
    return SyncCheckpointer(writer, CheckpointReader(rank_info))


def _checked_rank(rank_info: RankInfo | None) -> RankInfo:
    if rank_info is None:
        if dist.is_available() and dist.is_initialized():
            return RankInfo(dist.get_rank(), dist.get_world_size())
        return RankInfo(0, 1)
    rank, size = rank_info.global_rank, rank_info.global_world_size
    if type(rank) is not int or type(size) is not int or not 0 <= rank < size:
        raise ConfigError(f"rank_info must have 0 <= global_rank < global_world_size, not {rank_info!r}")
    return rank_info

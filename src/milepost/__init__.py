"""Checkpoints for PyTorch training: atomic, verified, as fast as the disk.

    import milepost

    checkpointer = milepost.make_sync_checkpointer()
    checkpointer.save("run/step-100", {"model": model.state_dict()}, step=100)
    state = checkpointer.load("run/step-100")

Names are imported when they are first used: ``import milepost`` alone loads neither torch nor numpy.
"""

from __future__ import annotations

import sys

if sys.platform == "win32":
    raise ImportError(
        "Milepost does not run on Windows: its crash-safe commit needs POSIX renames and folder fsync. "
        "Use Linux, the Windows Subsystem for Linux, or macOS."
    )
if sys.byteorder != "little":
    raise ImportError("Milepost needs a little-endian host: its files hold tensors as they are in memory.")

from milepost._version import __version__

TYPE_CHECKING = False  # importing `typing` takes longer than all else here

if TYPE_CHECKING:
    from milepost.barriers import Barrier, BarrierConfig, TCPStoreBarrier, create_barrier_from_config
    from milepost.builder import make_async_checkpointer, make_sync_checkpointer
    from milepost.checkpoint_reader import CheckpointReader
    from milepost.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig, WriterHook
    from milepost.checkpointer import AsyncCheckpointer, Checkpointer, SyncCheckpointer
    from milepost.config import AsyncConfig, CheckpointerConfig
    from milepost.errors import (
        CheckpointNotFoundError,
        CommitError,
        ConfigError,
        CorruptCheckpointError,
        IncompleteCheckpointError,
        LoadError,
        MilepostError,
        MismatchError,
        StateError,
        StorageError,
        TargetError,
    )
    from milepost.staging import CheckpointStager, CheckpointStagerConfig, DefaultStager
    from milepost.types import STATE_DICT, RankInfo
    from milepost.utils import wrap_future

__all__ = [
    "STATE_DICT",
    "AsyncCheckpointer",
    "AsyncConfig",
    "Barrier",
    "BarrierConfig",
    "CheckpointNotFoundError",
    "CheckpointReader",
    "CheckpointStager",
    "CheckpointStagerConfig",
    "CheckpointWriter",
    "CheckpointWriterConfig",
    "Checkpointer",
    "CheckpointerConfig",
    "CommitError",
    "ConfigError",
    "CorruptCheckpointError",
    "DefaultStager",
    "IncompleteCheckpointError",
    "LoadError",
    "MilepostError",
    "MismatchError",
    "RankInfo",
    "StateError",
    "StorageError",
    "SyncCheckpointer",
    "TCPStoreBarrier",
    "TargetError",
    "WriterHook",
    "__version__",
    "create_barrier_from_config",
    "make_async_checkpointer",
    "make_sync_checkpointer",
    "wrap_future",
]

_HOMES = {
    "barriers": {"Barrier", "TCPStoreBarrier", "create_barrier_from_config"},
    "builder": {"make_async_checkpointer", "make_sync_checkpointer"},
    "checkpoint_reader": {"CheckpointReader"},
    "checkpoint_writer": {"CheckpointWriter", "WriterHook"},
    "checkpointer": {"AsyncCheckpointer", "Checkpointer", "SyncCheckpointer"},
    "config": {name for name in __all__ if name.endswith("Config")},
    "staging": {"CheckpointStager", "DefaultStager"},
    "types": {"STATE_DICT", "RankInfo"},
    "utils": {"wrap_future"},
}
"""The names that each module defines; those of no module here are errors."""

if not TYPE_CHECKING:  # type checkers would take any name for one of this module

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'milepost' has no attribute {name!r}")
        import importlib  # noqa: PLC0415 - beside its only use

        home = next((module for module, names in _HOMES.items() if name in names), "errors")
        value = getattr(importlib.import_module(f"milepost.{home}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

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
    from typing import Any

    from milepost.builder import make_async_checkpointer, make_sync_checkpointer
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
    from milepost.types import RankInfo

__all__ = [
    "AsyncConfig",
    "CheckpointNotFoundError",
    "CheckpointerConfig",
    "CommitError",
    "ConfigError",
    "CorruptCheckpointError",
    "IncompleteCheckpointError",
    "LoadError",
    "MilepostError",
    "MismatchError",
    "RankInfo",
    "StateError",
    "StorageError",
    "TargetError",
    "__version__",
    "make_async_checkpointer",
    "make_sync_checkpointer",
]

_HOMES = {
    "AsyncConfig": "config",
    "CheckpointerConfig": "config",
    "RankInfo": "types",
    "make_async_checkpointer": "builder",
    "make_sync_checkpointer": "builder",
}
"""The module that defines each exported name; the errors are all in `errors`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'milepost' has no attribute {name!r}")
    import importlib  # noqa: PLC0415 - beside its only use

    value = getattr(importlib.import_module(f"milepost.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

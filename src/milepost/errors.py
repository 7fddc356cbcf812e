"""Every error that Milepost raises, in one tree.

    MilepostError
    ├── ConfigError (ValueError)                   an option does not make sense
    │   ├── UnavailableError (AssertionError)      … as this process lacks what it needs
    │   └── UnknownArgumentError (TypeError)       … as no such argument exists
    ├── ClosedError (RuntimeError)                 used after close()
    ├── RemoteError (RuntimeError)                 something else, raised in the checkpoint process
    │   └── LostWriterError                        the checkpoint process ended unexpectedly
    ├── LowMemoryError (MemoryError)               staging would not fit into memory
    ├── StateError (ValueError)                    this state dict cannot be saved
    │   └── UnsupportedTypeError (TypeError)       … because of the type of a key or value
    ├── StorageError (OSError)                     an operation of the file system failed
    │   ├── EntryNotFoundError (FileNotFoundError)     … as the file or folder is not there
    │   └── EntryExistsError (FileExistsError)         … as there is one already
    ├── TargetError (OSError)                      a save may not write to, or replace, this path
    ├── CommitError (RuntimeError)                 the ranks did not agree to commit
    │   ├── AbortedError                           another rank failed and said so
    │   ├── CommitTimeoutError (TimeoutError)      a rank did not arrive in time
    │   └── PostCommitError                        committed, but post_commit raised
    └── LoadError
        ├── CheckpointNotFoundError (FileNotFoundError)
        ├── IncompleteCheckpointError (RuntimeError)   a save that never committed
        ├── CorruptCheckpointError (RuntimeError)      damaged, or not ours
        ├── UnsupportedFormatError (RuntimeError)      written by a later Milepost
        ├── MismatchError (RuntimeError)               does not fit the template, or keys are missing
        └── PeerLoadError (RuntimeError)               another rank could not load, so this one does not

A leaf also inherits the built-in that a caller would catch. Each error carries the facts it knows as
attributes: ``path``, ``rank``, ``key`` and ``phase`` (None where unknown), and a ``hint``: the way out.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

__all__ = [
    "AbortedError",
    "CheckpointNotFoundError",
    "ClosedError",
    "CommitError",
    "CommitTimeoutError",
    "ConfigError",
    "CorruptCheckpointError",
    "EntryExistsError",
    "EntryNotFoundError",
    "IncompleteCheckpointError",
    "LoadError",
    "LostWriterError",
    "LowMemoryError",
    "MilepostError",
    "MismatchError",
    "PeerLoadError",
    "PostCommitError",
    "RemoteError",
    "StateError",
    "StorageError",
    "TargetError",
    "UnavailableError",
    "UnknownArgumentError",
    "UnsupportedFormatError",
    "UnsupportedTypeError",
    "error_context",
    "text_of",
]


class MilepostError(Exception):
    """Base of all errors of this library.

    Args:
        message: What happened, with what was expected and what was found.
        path: The file or folder concerned.
        rank: The global rank concerned.
        key: The key of the state dict concerned, as a path such as ``model.0.weight``.
        phase: The phase of the save or load in which it happened.
        hint: What the user can do about it.

    Attributes:
        targets_modified: Tensors of a load's template had been written to when it happened.
        alone: The job has one rank only: its number is left out of the text.
    """

    targets_modified: bool = False
    alone: bool | None = None

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        rank: int | None = None,
        key: str | None = None,
        phase: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.rank = rank
        self.key = key
        self.phase = phase
        self.hint = hint

    def __str__(self) -> str:
        """The message, then each fact that it does not already name, then the hint."""
        facts = [
            f"{name} {value}"
            for name, value in (
                ("path", self.path),
                ("key", self.key),
                ("rank", self.rank),
                ("phase", self.phase),
            )
            if value is not None and (name in {"key", "rank"} or str(value) not in self.message)
            if not (self.alone and (name == "rank" or (name, value) == ("phase", "load")))
        ]
        text = f"{self.message} ({', '.join(facts)})" if facts else self.message
        return f"{text}\nhint: {self.hint}" if self.hint else text

    @property
    def brief(self) -> str:
        """The message and the key, for those who know the rest."""
        return self.message if self.key is None else f"{self.message} (key {self.key})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by class, message and attributes, so that errors cross process boundaries whole."""
        attributes = dict(self.__dict__)
        if isinstance(self, OSError):
            attributes["errno"] = self.errno
        return (_restore, (type(self), self.message, attributes))

    def located(self, **facts: Any) -> Self:
        """Fill in those of path, rank, key, phase and alone that are not known yet; returns self."""
        for name, value in facts.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        return self


def _restore(cls: type[MilepostError], message: str, attributes: dict[str, Any]) -> MilepostError:
    error = cls(message)
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


class ConfigError(MilepostError, ValueError):
    """An option, or a combination of options, does not make sense."""


class UnavailableError(ConfigError, AssertionError):
    """An option needs a process group or an accelerator, and this process has none."""


class UnknownArgumentError(ConfigError, TypeError):
    """`save` or `load` was called with a keyword argument that nobody uses; nothing was done."""


class ClosedError(MilepostError, RuntimeError):
    """The object was used after ``close()``."""


class RemoteError(MilepostError, RuntimeError):
    """An error of the checkpoint process; its traceback there is in the notes."""


class LostWriterError(RemoteError):
    """The checkpoint process ended unexpectedly; the staged state is intact and can be written again."""


class LowMemoryError(MilepostError, MemoryError):
    """Staging this state would not fit into the memory that is left; nothing was allocated."""


class StateError(MilepostError, ValueError):
    """This state dict cannot be saved; nothing was written."""


class UnsupportedTypeError(StateError, TypeError):
    """A key or value has a type that could not be read back safely; nothing was written."""


class StorageError(MilepostError, OSError):
    """An operation of the file system failed.

    Attributes:
        errno: The error number of the cause, as in ``OSError``.
        operation: What was tried: ``"create"``, ``"write"``, ``"fsync"``, ``"rename"`` …
    """

    def __init__(
        self, message: str, *, errno: int | None = None, operation: str | None = None, **facts: Any
    ) -> None:
        super().__init__(message, **facts)
        self.errno = errno
        self.operation = operation

    @classmethod
    def wrap(cls, error: OSError, operation: str, path: str) -> StorageError:
        """The StorageError (or the leaf below it) for an OSError that `operation` raised on `path`."""
        leaf = cls
        if isinstance(error, FileNotFoundError):
            leaf = EntryNotFoundError
        elif isinstance(error, FileExistsError):
            leaf = EntryExistsError
        return leaf(
            f"{operation} failed: {error.strerror or error}: {path}",
            errno=error.errno,
            operation=operation,
            path=path,
            hint=_HINTS.get(error.errno or 0),
        )


class EntryNotFoundError(StorageError, FileNotFoundError):
    """The file or folder of the operation is not there."""


class EntryExistsError(StorageError, FileExistsError):
    """There is a file or folder of that name already."""


_HINTS = {
    errno.ENOSPC: "free space on this file system, or save somewhere else",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or save to another file system",
    errno.EDQUOT: "the disk quota is used up: free space, or save somewhere else",
    errno.EACCES: "check the permissions of the folder",
    errno.EROFS: "the file system is mounted read-only: save somewhere else",
    errno.EXDEV: "the checkpoint there came with a container image (a lower layer): save to another path",
    errno.EIO: "the device reports an error: check the disk before you trust it again",
}


class TargetError(MilepostError, OSError):
    """The path is not one that a save may write to or replace; nothing was touched."""


class CommitError(MilepostError, RuntimeError):
    """The ranks of a save did not agree to commit; the checkpoint does not appear."""


class AbortedError(CommitError):
    """Another rank of the same save failed; its error is in the message."""


class CommitTimeoutError(CommitError, TimeoutError):
    """A rank did not arrive within ``write_barrier_timeout_secs``."""


class PostCommitError(CommitError):
    """``post_commit`` raised. The checkpoint *is* committed and loads."""


class LoadError(MilepostError):
    """A checkpoint could not be loaded."""


class CheckpointNotFoundError(LoadError, FileNotFoundError):
    """There is no checkpoint at this path."""


class IncompleteCheckpointError(LoadError, RuntimeError):
    """The folder holds a part of a save that never committed."""


class CorruptCheckpointError(LoadError, RuntimeError):
    """A file of the checkpoint is damaged, missing, or not what the manifest says.

    ``targets_modified`` tells whether tensors of the template were already written to.
    """

    def __init__(self, message: str, *, targets_modified: bool = False, **facts: Any) -> None:
        super().__init__(message, **facts)
        self.targets_modified = targets_modified


class UnsupportedFormatError(LoadError, RuntimeError):
    """The checkpoint needs a feature or a format version that this Milepost does not know."""


class MismatchError(LoadError, RuntimeError):
    """The checkpoint does not fit the template, or keys are missing in a strict load."""


class PeerLoadError(LoadError, RuntimeError):
    """Another rank could not load, or did not come, so that this rank does not load either.

    ``targets_modified`` tells whether tensors of this rank's template were already written to.
    """


@contextmanager
def error_context(**facts: Any) -> Iterator[None]:
    """Add facts to any MilepostError that passes, where it lacks them: as `MilepostError.located`."""
    try:
        yield
    except MilepostError as error:
        error.located(**facts)
        raise


def text_of(error: BaseException) -> str:
    """The error's message, even if the class of a user's error cannot give its own."""
    try:
        return error.message if isinstance(error, MilepostError) else str(error)
    except Exception as another:  # noqa: BLE001 - __str__ may raise anything
        return f"(its text could not be had: {type(another).__name__})"

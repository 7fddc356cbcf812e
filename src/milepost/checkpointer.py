"""The checkpointers: what a training loop holds, with save, load and close."""

from __future__ import annotations

import abc
from concurrent.futures import Future
from typing import Any, Self

from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter
from milepost.errors import ClosedError, MismatchError
from milepost.types import STATE_DICT

__all__ = ["Checkpointer", "SyncCheckpointer"]


class Checkpointer(abc.ABC):
    """Saves and loads training state."""

    @abc.abstractmethod
    def save(self, path: str, state_dict: STATE_DICT, **kwargs: Any) -> Any:
        """Save a state dict as the checkpoint at `path`; what holds on return is up to the subclass."""

    @abc.abstractmethod
    def load(
        self,
        path: str,
        state_dict: STATE_DICT | None = None,
        *,
        default_map_location: Any = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> STATE_DICT:
        """Load the checkpoint at `path`, into `state_dict` if one is given."""

    @abc.abstractmethod
    def close(self) -> None:
        """Finish what was accepted and release everything."""


class SyncCheckpointer(Checkpointer):
    """Saves while the caller waits. Usable as a context manager.

    Args:
        writer: Writes this rank's part.
        reader: Reads it.
    """

    def __init__(self, writer: CheckpointWriter, reader: CheckpointReader) -> None:
        self._writer = writer
        self._reader = reader
        self._closed = False

    def __enter__(self) -> Self:
        """The checkpointer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def save(self, path: str, state_dict: STATE_DICT, **kwargs: Any) -> None:
        """Save a state dict; see `CheckpointWriter.write` for arguments, guarantees and errors.

        On return the checkpoint is durable and, unless other ranks are still to come and no barrier is
        configured, committed. If it raises, `path` is as it was.
        """
        self._check_open()
        result: object = self._writer.write(path, state_dict, **kwargs)  # type: ignore[func-returns-value]
        if isinstance(result, Future):  # a writer of the user's own may work in the background
            result.result()

    def load(
        self,
        path: str,
        state_dict: STATE_DICT | None = None,
        *,
        default_map_location: Any = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> STATE_DICT:
        """Load what this rank saved at `path`; see `CheckpointReader.read` for guarantees and errors.

        Args:
            path: The checkpoint's folder.
            state_dict: A template, whose tensors are filled in place; None to get all that was saved.
            default_map_location: Where new tensors go, as ``map_location`` of ``torch.load``.
            strict: Refuse, before anything is changed, keys of the template that were not saved.
            kwargs: Passed to the reader: ``verify`` = True, False or "first".

        Returns:
            The template, filled; or the state dict that was saved.

        Raises:
            MismatchError: Does not fit, or (if strict) "… missing keys …"; nothing was changed.
        """
        self._check_open()
        return load_with(
            self._reader, path, state_dict, map_location=default_map_location, strict=strict, options=kwargs
        )

    def close(self) -> None:
        """Release the writer; idempotent. Later calls raise `ClosedError`."""
        self._closed = True
        self._writer.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the checkpointer is closed", hint="make a new one")


def load_with(
    reader: CheckpointReader,
    path: str,
    state_dict: STATE_DICT | None,
    *,
    map_location: Any,
    strict: bool,
    options: dict[str, Any],
) -> STATE_DICT:
    """Load through a reader, ours or one that only has ``read``.

    Ours refuses missing keys before it changes anything; from any other they are known only afterwards.
    """
    if strict and type(reader).read is CheckpointReader.read:
        options = {**options, "strict": True}
    loaded, missing = reader.read(path, state_dict, map_location=map_location, **options)
    if strict and missing:
        raise MismatchError(f"the checkpoint has missing keys: {', '.join(missing)}", path=path)
    return loaded

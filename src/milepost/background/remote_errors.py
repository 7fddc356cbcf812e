"""Errors of another process: they cross as facts, and become errors again."""

from __future__ import annotations

import builtins
import traceback
from typing import Any

import msgspec

from milepost import errors
from milepost.errors import MilepostError, RemoteError, text_of

__all__ = ["Failure", "describe_error", "printable", "rebuild_error"]

_MAX_TEXT_BYTES = 16_000
_MAX_FACT_BYTES = 8_000
_MAX_TRACE_BYTES = 32_000


class Failure(msgspec.Struct, tag=True):
    """An error as facts.

    Attributes:
        module: Module of its class.
        name: Name of its class.
        message: Its text.
        facts: The attributes of a MilepostError.
        trace: The traceback as text.
    """

    module: str
    name: str
    message: str
    facts: dict[str, Any] = {}
    trace: str = ""


def describe_error(error: BaseException) -> Failure:
    """An error as facts that can cross to another process."""
    facts = {
        name: printable(value, _MAX_FACT_BYTES) if isinstance(value, str) else value
        for name, value in (vars(error) if isinstance(error, MilepostError) else {}).items()
        if name != "message" and isinstance(value, str | int | bool | None)
    }
    if isinstance(error, OSError) and error.errno is not None:
        facts["errno"] = error.errno
    kind = type(error)
    return Failure(
        printable(str(kind.__module__), _MAX_FACT_BYTES),
        printable(kind.__qualname__, _MAX_FACT_BYTES),
        printable(text_of(error)),
        facts,
        printable("".join(traceback.format_exception(error)), _MAX_TRACE_BYTES, end=True),
    )


def printable(text: str, limit: int = _MAX_TEXT_BYTES, *, end: bool = False) -> str:
    """Truncate text to `limit` bytes; keep the end instead of the start if `end` is true."""
    data = text.encode("utf-8", "backslashreplace")
    if len(data) > limit:
        data = b"... " + data[-limit:] if end else data[:limit] + b" ..."
    return data.decode("utf-8", "ignore")


def rebuild_error(failure: Failure) -> Exception:
    """The error again: of its own class where that is Milepost's or built in, and a `RemoteError` always.

    The traceback of the other process rides along as a note.
    """
    module: Any = {"milepost.errors": errors, "builtins": builtins}.get(failure.module)
    kind = getattr(module, failure.name, None)
    error: Exception
    message = failure.message
    if isinstance(kind, type) and issubclass(kind, MilepostError):
        both: Any = kind
        if issubclass(RemoteError, kind):
            both = RemoteError
        elif not issubclass(kind, RemoteError):
            both = type(kind.__name__, (kind, RemoteError), {"__module__": kind.__module__})
        remote: MilepostError = both(message)
        for name, value in failure.facts.items():
            setattr(remote, name, value)
        error = remote
    else:
        bases: tuple[type, ...] = (RemoteError,)
        if isinstance(kind, type) and issubclass(kind, Exception):
            bases = (RemoteError, kind)
        else:
            message = f"{failure.module}.{failure.name}: {message}"
        try:
            error = type(failure.name, bases, {"__module__": failure.module})(message)
        except TypeError:
            error = RemoteError(f"{failure.name}: {message}")
        if isinstance(error, OSError):
            error.errno = failure.facts.get("errno")
    error.add_note(f"in the checkpoint process:\n{failure.trace}")
    return error

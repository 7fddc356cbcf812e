"""How the commands print, and how they end."""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["DAMAGED", "EPILOG", "FAILED", "INTERRUPTED", "NOT_FOUND", "OK", "Session", "plain", "reported"]

OK, DAMAGED, USAGE, NOT_FOUND, FAILED, INTERRUPTED, UNREAD = 0, 1, 2, 3, 4, 130, 141
EPILOG = (
    "Exit codes: 0 no problem found; 1 a checkpoint is damaged or incomplete; 2 wrong usage; 3 the "
    "checkpoint or folder does not exist; 4 it could not be read, or a later version wrote it; "
    "130 interrupted; 141 the reader of the output has closed it."
)
_ESCAPE_BELOW_BMP, _ESCAPE_BELOW_BYTE = 0x10000, 0x100


def plain(text: str, limit: int | None = None) -> str:
    """Text that is safe to print: what is no visible character is shown by its number, escaped."""
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    if code < _ESCAPE_BELOW_BYTE:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < _ESCAPE_BELOW_BMP else f"\\U{code:08x}"


def size(count: int, *, exact: bool = False) -> str:
    """A number of bytes for people."""
    number = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if exact or abs(number) < 1024 or unit == "TiB":
            break
        number /= 1024
    return str(count) if exact else f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


def moment(seconds: float) -> str:
    """A time for people, in UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return f"time {seconds!r}"


def jsonable(value: Any) -> Any:
    """A value as JSON can hold it: numbers that it lacks, bytes and keys that are no text become text."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 63 else hex(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, bytes):
        return b64encode(value).decode()
    if isinstance(value, dict):
        return {
            key if isinstance(key, str) else str(jsonable(key)): jsonable(item) for key, item in value.items()
        }
    if isinstance(value, list | tuple | set):
        return [jsonable(item) for item in value]
    return repr(value)


class Session:
    """The two consoles and the exit code of one command."""

    def __init__(self) -> None:
        self.exit_code = OK
        self.out = _console(sys.stdout)
        self.err = _console(sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            sys.stdout.flush()  # while an error of it can still be reported
            raise typer.Exit(self.exit_code)

    def line(self, *parts: str | tuple[str, str]) -> None:
        """Print a line of data; a part may be a (text, style) pair. Long lines are never broken."""
        self.out.print(_text(parts), soft_wrap=True)

    def message(self, *parts: str | tuple[str, str]) -> None:
        """Print a line for people, on stderr."""
        self.err.print(_text(parts), soft_wrap=True)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str | tuple[str, str]]]) -> None:
        """Print rows in columns, as wide as they need to be."""
        from rich.cells import cell_len

        lines = [
            [_text([(name, "bold")]) for name in header],
            *([_text([cell]) for cell in row] for row in rows),
        ]
        widths = [max(cell_len(cell.plain) for cell in column) for column in zip(*lines, strict=True)]
        for line in lines:
            for cell, width in zip(line[:-1], widths, strict=False):
                cell.append(" " * (width - cell_len(cell.plain) + 2))
            first = line[0]
            for cell in line[1:]:
                first.append_text(cell)
            first.rstrip()
            self.out.print(first, soft_wrap=True)

    @staticmethod
    def json(value: Any) -> None:
        """Print a value as JSON."""
        print(json.dumps(jsonable(value), indent=2, allow_nan=False), flush=True)


def _text(parts: Sequence[str | tuple[str, str]]) -> Text:
    from rich.text import Text

    text = Text()
    for part in parts:
        words, style = part if isinstance(part, tuple) else (part, "")
        text.append(plain(words), style)
    return text


def _console(stream: Any) -> Console:
    from rich.console import Console

    return Console(file=stream, highlight=False, markup=False, emoji=False)


@contextmanager
def reported(*paths: str, debug: bool = False, as_json: bool = False) -> Iterator[None]:
    """End the program with a clear line and the right exit code if anything is raised.

    With `as_json` an error is told on stdout, too. An empty path, as of a variable that is not set, is wrong:
    it would stand for the current folder.
    """
    if "" in paths:
        raise typer.BadParameter("a path is empty: for the current folder, pass a dot")
    try:
        yield
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED)
    except Exception as error:
        from milepost.errors import MilepostError

        if not isinstance(error, MilepostError | OSError):
            raise
        if debug:
            traceback.print_exc()
        if as_json:
            Session.json({"path": paths[0], "ok": False, "error": getattr(error, "message", str(error))})
        _end(f"error: {explain(error)}", exit_code_of(error))


def explain(error: Exception) -> str:
    """The message of an error, safe to print, with its hint on a line of its own."""
    return "\n".join(plain(line) for line in str(error).splitlines())


def exit_code_of(error: Exception) -> int:
    """The exit code that tells what an error was."""
    from milepost import errors

    if isinstance(error, FileNotFoundError):
        return NOT_FOUND
    if isinstance(error, errors.IncompleteCheckpointError | errors.CorruptCheckpointError):
        return DAMAGED
    return FAILED


def _end(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(code)

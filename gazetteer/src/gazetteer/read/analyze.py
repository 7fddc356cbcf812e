"""One file from disk to facts. Whatever the file is, there are facts that say what it is."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gazetteer.model import FileFacts, Status
from gazetteer.read import grammars
from gazetteer.read.extract import extract
from gazetteer.read.text import decode

if TYPE_CHECKING:
    from gazetteer.read.scan import Found

__all__ = ["HUGE_BYTES", "analyze", "is_test", "read_text"]

HUGE_BYTES = 4 * 1024 * 1024
_LONG_LINE = 50_000
_TEST_FOLDERS = {"test", "tests", "__tests__", "spec", "unittests"}
_TEST_NAME = re.compile(
    r"(?:^test_|^test-|_test$|-test$|\.test$|\.spec$|_spec$|^tests?$|^conftest$|Tests?$|^Test[A-Z])"
)


def is_test(path: str) -> bool:
    """Tell whether a file is a test by the usual names: its folder's, or its own."""
    *folders, name = path.split("/")
    stem = name.rsplit(".", 1)[0]
    return bool(_TEST_FOLDERS.intersection(folders)) or bool(_TEST_NAME.search(stem))


def _head(found: Found) -> bytes:
    with open(found.real, "rb", buffering=0) as stream:
        return stream.read(8192)


def _unread(found: Found, status: Status, note: str, language: str = "") -> FileFacts:
    return FileFacts(
        path=found.path, size=found.size, lines=0, language=language, status=status, note=note, encoding=""
    )


def read_text(found: Found) -> str:
    """Return a file's text for its page; ``""`` where :func:`analyze` found none."""
    if found.link or found.special or found.size > HUGE_BYTES:
        return ""
    try:
        decoded = decode(Path(found.real).read_bytes())
    except OSError:
        return ""
    return decoded[0] if decoded else ""


def analyze(found: Found) -> FileFacts:
    """Read and parse one file.

    Args:
        found: The file, as the scan saw it.

    Returns:
        Its facts. Never raises for what a file holds or for what the system refuses: the status
        and the note say it.
    """
    if found.link:
        return _unread(found, Status.LINK, f"A symbolic link to {found.link}; it is not followed.")
    if found.special:
        return _unread(found, Status.UNREADABLE, "A socket, a pipe or a device; it is not opened.")
    name = found.path.rpartition("/")[2]
    try:
        if found.size > HUGE_BYTES:
            return _huge(found, name)
        data = Path(found.real).read_bytes()
    except OSError as error:
        return _unread(found, Status.UNREADABLE, f"The system refused to read it: {os.strerror(error.errno or 0)}.")
    decoded = decode(data)
    if decoded is None:
        return _unread(found, Status.BINARY, "A binary file; only its size is known.")
    text, encoding = decoded
    return _text_facts(found, name, text, encoding, len(data))


def _huge(found: Found, name: str) -> FileFacts:
    head = _head(found)
    if b"\0" in head:
        return _unread(found, Status.BINARY, "A binary file; only its size is known.")
    language = grammars.detect(name, head)
    return _unread(found, Status.HUGE, f"Larger than {HUGE_BYTES // 1024 // 1024} MiB; it is not parsed.", language)


def _text_facts(found: Found, name: str, text: str, encoding: str, size: int) -> FileFacts:
    source = text.encode("utf-8", "replace")
    language = grammars.detect(name, source[:256])
    lines = source.count(b"\n") + (not source.endswith(b"\n") and bool(source))
    note = "Not UTF-8; read as Latin-1." if encoding == "latin-1" else ""
    if not language:
        return FileFacts(found.path, size, lines, "", Status.TEXT, note=note, encoding=encoding)
    if lines and max(map(len, source.split(b"\n"))) > _LONG_LINE:
        return FileFacts(
            found.path,
            size,
            lines,
            language,
            Status.GENERATED,
            note=f"Has lines of more than {_LONG_LINE:,} characters, as programs write them; it is not parsed.",
            encoding=encoding,
        )
    facts = extract(found.path, source, language, size=size, with_names=is_test(found.path))
    if encoding == "utf-8":
        return facts
    return _with(facts, encoding, f"{facts.note} {note}".strip())


def _with(facts: FileFacts, encoding: str, note: str) -> FileFacts:
    fields = {name: getattr(facts, name) for name in facts.__struct_fields__}
    return FileFacts(**{**fields, "encoding": encoding, "note": note})

r"""What Gazetteer knows about files: plain records, the same in memory, in the cache and in the index.

All records are frozen. Lines count from 1, as editors do. Paths are relative to the repository's
root, with ``/`` between the parts; bytes of a name that are not UTF-8 appear as ``\xNN``.

The records of one file hold only words, numbers and tuples of them. They are never part of a
reference cycle, so the garbage collector skips them (``gc=False``). This saves time when there
are hundreds of thousands.
"""

from __future__ import annotations

import enum

import msgspec

__all__ = [
    "Commit",
    "FileFacts",
    "Finding",
    "History",
    "Import",
    "Kind",
    "Status",
    "Symbol",
]


class Kind(enum.StrEnum):
    """The four kinds of symbol that get a section of their own on a keyword page."""

    CLASS = "class"
    FUNCTION = "function"
    METHOD = "method"
    CONSTANT = "constant"


class Status(enum.StrEnum):
    """How far a file could be read."""

    PARSED = "parsed"  # a syntax tree without errors
    PARTIAL = "partial"  # a syntax tree with errors: what could be read is listed
    TEXT = "text"  # text in no language that Gazetteer knows
    GENERATED = "generated"  # says of itself that a program wrote it
    HUGE = "huge"  # too large to parse
    BINARY = "binary"
    LINK = "link"  # a symbolic link: described, not followed
    UNREADABLE = "unreadable"  # the system refused
    FAILED = "failed"  # the parser crashed on it


class Symbol(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One definition.

    Attributes:
        kind: Class, function, method or constant.
        name: The bare name.
        qualname: The name with what encloses it, such as ``Outer.inner``.
        line: Line of the definition itself, after its decorators.
        end_line: Its last line.
        label: The language's own word where it says more than the kind: struct, macro, key.
        signature: The definition's head on one line, without its body.
        bases: Base classes as written.
        decorators: Decorators, annotations and attributes as written.
        doc: First line of its docstring or of the comment above it; empty when there is none.
    """

    kind: Kind
    name: str
    qualname: str
    line: int
    end_line: int
    label: str = ""
    signature: str = ""
    bases: tuple[str, ...] = ()
    decorators: tuple[str, ...] = ()
    doc: str = ""


class Import(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One imported name.

    Attributes:
        module: What is imported from, as written.
        name: The name taken from it; empty when the module itself is imported.
        line: Where.
        style: How to resolve it, where one language has several ways (``system`` includes, ...),
            or ``typing`` when it is there for type checkers alone.
    """

    module: str
    name: str
    line: int
    style: str = ""


class Finding(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One place where a rule of ``rules.toml`` matched the syntax tree."""

    rule: str
    line: int


class FileFacts(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """All that one file says about itself, read without looking at any other file.

    Attributes:
        path: The file.
        size: Bytes.
        lines: Number of lines; 0 for binary files.
        language: Name of the language in the registry; empty when unknown.
        status: How far it could be read.
        note: One sentence when ``status`` needs explaining.
        encoding: The encoding it was read in.
        overview: Module docstring or leading comment, as written.
        overview_line: Where that starts.
        symbols: Definitions in order of line.
        imports: Imports in order of line.
        headings: Prose only: (level, text, line).
        identifiers: Prose only: names set as code, with the line where each first appears.
        findings: Matches of rules, in order of line.
        names: Test files only: every identifier used, sorted.
        package: The package the file says it belongs to (Go, Java).
    """

    path: str
    size: int
    lines: int
    language: str
    status: Status
    note: str = ""
    encoding: str = "utf-8"
    overview: str = ""
    overview_line: int = 0
    symbols: tuple[Symbol, ...] = ()
    imports: tuple[Import, ...] = ()
    headings: tuple[tuple[int, str, int], ...] = ()
    identifiers: tuple[tuple[str, int], ...] = ()
    findings: tuple[Finding, ...] = ()
    names: tuple[str, ...] = ()
    package: str = ""


class Commit(msgspec.Struct, frozen=True, array_like=True):
    """One commit, as much of it as pages show."""

    id: str
    date: str
    subject: str


class History(msgspec.Struct, frozen=True, array_like=True):
    """The history of a repository's files.

    Attributes:
        head: The commit that was checked out; empty without git.
        last: Path to its newest commit.
        together: Path to the paths that changed in the same commits, with how often (twice at least).
    """

    head: str = ""
    last: dict[str, Commit] = {}
    together: dict[str, tuple[tuple[str, int], ...]] = {}

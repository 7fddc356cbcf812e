"""Finding symbols and files by name in a repository."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gazetteer.model import FileFacts

__all__ = ["Hit", "search"]


@dataclass(frozen=True)
class Hit:
    """One place that a search found.

    Attributes:
        path: The file.
        line: The line of the definition; 1 for a file found by its name.
        kind: What it is: class, function, ..., heading or file.
        name: Its qualified name.
        signature: Its head, where it has one.
        doc: Its first line of documentation.
    """

    path: str
    line: int
    kind: str
    name: str
    signature: str = ""
    doc: str = ""


def _rank(name: str, qualname: str, term: str) -> int:
    """Return how well a name fits, 0 best, or -1."""
    if term in (name, qualname):
        return 0
    wanted, lower = term.lower(), name.lower()
    if wanted in (lower, qualname.lower()):
        return 1
    if lower.startswith(wanted):
        return 2
    return 3 if wanted in lower or (("." in term or "::" in term) and wanted in qualname.lower()) else -1


def search(facts: Mapping[str, FileFacts], term: str, *, kind: str = "", limit: int = 0) -> list[Hit]:
    """Return what fits a term, best first.

    Exact names come before names that differ in case, then names that begin with the term, then
    names that hold it; among equals, shorter names, then the order of paths and lines.

    Args:
        facts: Facts by path.
        term: A name or a part of one; with a separator, of a qualified name.
        kind: Only this kind.
        limit: At most so many; 0 means all.
    """
    found: list[tuple[int, int, str, int, Hit]] = []

    def add(name: str, hit: Hit) -> None:
        rank = _rank(name, hit.name, term)
        if rank >= 0 and kind in ("", hit.kind):
            found.append((rank, len(name), hit.path, hit.line, hit))

    for path, fact in facts.items():
        add(path.rpartition("/")[2], Hit(path, 1, "file", path))
        for symbol in fact.symbols:
            add(symbol.name, Hit(path, symbol.line, symbol.kind.value, symbol.qualname, symbol.signature, symbol.doc))
        for _, title, line in fact.headings:
            add(title, Hit(path, line, "heading", title))
    found.sort(key=lambda item: item[:4])
    hits = [item[4] for item in found]
    return hits[:limit] if limit else hits

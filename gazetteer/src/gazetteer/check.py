"""Does every link lead somewhere? Read with a Markdown and an HTML parser that built none of it."""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes, urlsplit

import msgspec
from markdown_it import MarkdownIt

from gazetteer.errors import OutputError
from gazetteer.paths import SITE, STATE
from gazetteer.read.collect import nothing
from gazetteer.read.workers import Workers, default_jobs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from markdown_it.token import Token

    from gazetteer.read.collect import Progress

__all__ = ["Broken", "Report", "check"]

_LINE = re.compile(r"L([1-9][0-9]*)\Z")
_SLUG_DROP = re.compile(r"[^\w\- ]")


class Broken(msgspec.Struct, frozen=True):
    """A link that leads nowhere: the page it is on, the link, and what is missing."""

    page: str
    link: str
    why: str


@dataclass
class Report:
    """What a check found.

    Attributes:
        pages: Pages read.
        links: Different links followed, page by page.
        broken: Those that lead nowhere, in order of page.
    """

    pages: int = 0
    links: int = 0
    broken: list[Broken] = field(default_factory=list)


class _Read(msgspec.Struct, frozen=True):
    """The links that a page has, and the anchors that it offers."""

    name: str
    links: tuple[str, ...]
    anchors: frozenset[str]


def _markdown() -> MarkdownIt:
    return MarkdownIt("commonmark").enable("table")


_parsers: list[MarkdownIt] = []


def _read_markdown(path: Path, name: str) -> _Read:
    if not _parsers:
        _parsers.append(_markdown())
    tokens = _parsers[0].parse(path.read_text("utf-8"))
    links: set[str] = set()
    anchors: set[str] = set()
    seen: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if token.type != "inline":
            continue
        links.update(_targets(token.children or ()))
        if tokens[index - 1].type == "heading_open":
            words = "".join(child.content for child in token.children or () if child.type in ("text", "code_inline"))
            slug = _SLUG_DROP.sub("", words.strip().lower()).replace(" ", "-")
            count = seen.get(slug, 0)
            seen[slug] = count + 1
            anchors.add(f"{slug}-{count}" if count else slug)
    return _Read(name, tuple(sorted(links)), frozenset(anchors))


def _targets(tokens: Iterable[Token]) -> Iterable[str]:
    for token in tokens:
        if token.type == "link_open":
            yield str(token.attrs["href"])
        elif token.type == "image":
            yield str(token.attrs["src"])


class _Html(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.links: set[str] = set()
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if not value:
                continue
            if key == "id":
                self.anchors.add(value)
            elif (key == "href" and tag in ("a", "link")) or (key == "src" and tag in ("script", "img")):
                self.links.add(value)


def _read_html(path: Path, name: str) -> _Read:
    parser = _Html()
    parser.feed(path.read_text("utf-8"))
    parser.close()
    return _Read(name, tuple(sorted(parser.links)), frozenset(parser.anchors))


def _read(task: tuple[str, str]) -> _Read:
    root, name = task
    path = Path(root, name)
    return _read_html(path, name) if name.endswith(".html") else _read_markdown(path, name)


def _unreadable(task: tuple[str, str]) -> _Read:
    return _Read(task[1], (), frozenset())


def _pages(out: Path) -> list[str]:
    found: list[str] = []
    for folder, folders, files in os.walk(out):
        here = os.path.relpath(folder, out)
        prefix = "" if here == "." else here + "/"
        if not prefix:
            folders[:] = [name for name in folders if name != STATE]
        in_site = (prefix + "/").startswith(SITE + "/")
        if prefix == SITE + "/":
            folders[:] = [name for name in folders if not name.startswith("_pagefind")]
        wanted = ".html" if in_site else ".md"
        found += [prefix + name for name in files if name.endswith(wanted)]
    return sorted(found)


class _Checker:
    def __init__(self, out: Path, anchors: dict[str, frozenset[str]]) -> None:
        self._out = out
        self._anchors = anchors
        self._lines: dict[str, int] = {}

    def why(self, page: str, link: str) -> str:
        """Return what is missing at a link's target, or ``""``."""
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            return "leads out of the repository"
        target = page
        if parts.path:
            joined = os.path.join(os.fsencode(posixpath.dirname(page)), unquote_to_bytes(parts.path))
            target = os.fsdecode(posixpath.normpath(joined))
        anchor = os.fsdecode(unquote_to_bytes(parts.fragment))
        known = self._anchors.get(target)
        if known is not None:
            return "" if not anchor or anchor in known else "no such anchor"
        path = self._out / target
        if not os.path.lexists(path) or (path.is_dir() and not path.is_symlink()):
            return "no such file"
        if not anchor:
            return ""
        line = _LINE.match(anchor)
        if not line or not path.is_file():
            return "no such anchor"
        count = self._count(path)
        return "" if int(line.group(1)) <= count else f"the file has {count} lines"

    def _count(self, path: Path) -> int:
        key = str(path)
        if key not in self._lines:
            data = path.read_bytes()
            if data.startswith((b"\xff\xfe", b"\xfe\xff")):
                data = data.decode("utf-16", "replace").encode()
            self._lines[key] = data.count(b"\n") + (not data.endswith(b"\n") and bool(data))
        return self._lines[key]


def check(out: Path | str, *, jobs: int = 0, progress: Progress = nothing) -> Report:
    """Follow every link of an output folder: of its Markdown and, when there is one, of its site.

    Args:
        out: The output folder.
        jobs: Processes to use; 0 means one per processor.
        progress: Told how far it is.

    Returns:
        A report. A link into a page needs its anchor to be there; a link to ``#L12`` of a source
        file needs the file to have twelve lines.

    Raises:
        OutputError: The folder is not an output of Gazetteer.
    """
    root = Path(out)
    if not (root / STATE).is_dir():
        msg = f"{out}: is not an output of Gazetteer. Build it first."
        raise OutputError(msg)
    names = _pages(root)
    read: list[_Read] = []
    pool: Workers[tuple[str, str]] = Workers(jobs or default_jobs())
    with pool as workers:
        tasks = [(str(root), name) for name in names]
        for number, page in enumerate(workers.run(_read, tasks, _unreadable), 1):
            read.append(page)
            if not number & 63 or number == len(tasks):
                progress("Checking", number, len(tasks))
    checker = _Checker(root, {page.name: page.anchors for page in read})
    report = Report(pages=len(read))
    for page in read:
        for link in page.links:
            report.links += 1
            why = checker.why(page.name, link)
            if why:
                report.broken.append(Broken(page.name, link, why))
    return report

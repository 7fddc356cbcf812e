"""Where pages lie and how one links to another.

Page names are an injective function of paths: two places never share a page. Folder names that
could meet a page's or Gazetteer's own name get a ``~``; names too long for a page's ending, and
names with control characters, are cut or cleaned and get a digest.
"""

from __future__ import annotations

import functools
import hashlib
import posixpath
import re
from urllib.parse import quote

__all__ = [
    "BOOK",
    "INDEX_JSON",
    "KEYWORDS",
    "SITE",
    "STATE",
    "Places",
    "docs_page",
    "folder_page",
    "href",
    "kw_page",
    "parent",
    "source_page",
]

STATE = ".gazetteer"
SITE = "_site"
KEYWORDS = "keywords.md"
BOOK = "comprehensive_book.md"
INDEX_JSON = "index.json"

_NAME_BYTES_MAX = 235
_SOURCE_NAME_MAX = 200
_RESERVED = {STATE, SITE, INDEX_JSON, "_source", "_symbols", "_assets", "_pagefind"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_RAW = re.compile(r"\\x([0-9a-f]{2})")


def parent(path: str) -> str:
    """Return the folder of a path, ``""`` for the root."""
    return path.rpartition("/")[0]


def _digest(name: str) -> str:
    return hashlib.blake2b(name.encode("utf-8"), digest_size=8).hexdigest()


@functools.lru_cache(maxsize=65536)
def _folder(path: str) -> str:
    if not path:
        return ""
    head, _, name = path.rpartition("/")
    if _CONTROL.search(name):
        name = f"{_CONTROL.sub('_', name)}~{_digest(name)}~"
    elif name.endswith((".md", "~")) or name in _RESERVED:
        name += "~"
    return posixpath.join(_folder(head), name)


@functools.lru_cache(maxsize=65536)
def _page(path: str, ending: str) -> str:
    head, _, name = path.rpartition("/")
    raw = _CONTROL.sub("_", name).encode("utf-8")
    if len(raw) > _NAME_BYTES_MAX or _CONTROL.search(name):
        name = raw[: _NAME_BYTES_MAX - 20].decode("utf-8", "ignore") + "~" + _digest(name)
    return posixpath.join(_folder(head), name + ending)


def docs_page(path: str) -> str:
    """Return the page that documents a file."""
    return _page(path, "_docs.md")


def kw_page(path: str) -> str:
    """Return the keyword page of a file."""
    return _page(path, "_kw.md")


def folder_page(path: str, name: str) -> str:
    """Return the page ``name`` (``index.md``, ``doc.md``, ``sub.md``) of a folder."""
    return posixpath.join(_folder(path), name)


@functools.lru_cache(maxsize=65536)
def _quoted(path: str) -> str:
    return quote(path, safe="/~._-+@=,")


def href(page: str, target: str, anchor: str = "") -> str:
    """Return the link from one page to another, both relative to the output folder."""
    base = parent(page)
    if parent(target) == base:
        link = _quoted(target.rpartition("/")[2])
    else:
        link = _relative(base, parent(target)) + _quoted(target.rpartition("/")[2])
    return f"{link}#{anchor}" if anchor else link


@functools.lru_cache(maxsize=262144)
def _relative(base: str, folder: str) -> str:
    up = posixpath.relpath("/" + folder, "/" + base)
    return _quoted(up) + "/" if up != "." else ""


class Places:
    """Links from pages to the files of the repository.

    Args:
        base: Relative path from the output folder to the repository's root.
    """

    def __init__(self, base: str) -> None:
        self._base = _quoted(base)

    def source(self, page: str, path: str, line: int = 0) -> str:
        """Return the link from a page to a file of the repository, at a line if one is given."""
        link = f"{'../' * page.count('/')}{self._base}/{_on_disk(path)}"
        return f"{link}#L{line}" if line else link


@functools.lru_cache(maxsize=65536)
def _on_disk(path: str) -> str:
    if "\\x" not in path:
        return _quoted(path)
    return "".join(f"%{part.upper()}" if index % 2 else _quoted(part) for index, part in enumerate(_RAW.split(path)))


def source_page(path: str) -> str:
    """Return the name that the site gives to the page of a file's source.

    It is the link to the source with ``~`` for ``%``, so that nothing in it needs quoting. The
    layout ``render-link.html`` makes the same of a link.
    """
    parts = _on_disk(path).replace("~", "~7E").replace("%", "~").split("/")
    short = (
        hashlib.md5(p.encode(), usedforsecurity=False).hexdigest() if len(p) > _SOURCE_NAME_MAX else p for p in parts
    )
    return posixpath.join("_source", *short) + ".md"

"""Where pages lie and how one links to another.

Page names are an injective function of paths: two places never share a page. Folder names that
could meet a page's or Gazetteer's own name get a ``~``; file names too long for a page's ending
are cut and get a digest instead of the rest.
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
_RAW = re.compile(r"\\x([0-9a-f]{2})")


def parent(path: str) -> str:
    """Return the folder of a path, ``""`` for the root."""
    return path.rpartition("/")[0]


@functools.lru_cache(maxsize=65536)
def _folder(path: str) -> str:
    if not path:
        return ""
    head, _, name = path.rpartition("/")
    if name.endswith((".md", "~")) or name in _RESERVED:
        name += "~"
    return posixpath.join(_folder(head), name)


@functools.lru_cache(maxsize=65536)
def _page(path: str, ending: str) -> str:
    head, _, name = path.rpartition("/")
    raw = name.encode("utf-8")
    if len(raw) > _NAME_BYTES_MAX:
        digest = hashlib.blake2b(raw, digest_size=8).hexdigest()
        name = raw[: _NAME_BYTES_MAX - 20].decode("utf-8", "ignore") + "~" + digest
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
    """Return the name that the site gives to the page of a file's source."""
    folder = parent(path)
    name = _on_disk(path.rpartition("/")[2])
    if len(name) > _SOURCE_NAME_MAX:
        name = hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()
    else:
        name = path.rpartition("/")[2]
    return posixpath.join("_source", folder, name + ".md")

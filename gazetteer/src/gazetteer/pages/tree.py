"""The folders of a repository with what lies under each: what the folder pages are made from."""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from gazetteer.model import Kind
from gazetteer.paths import parent

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gazetteer.model import FileFacts, Symbol
    from gazetteer.relate.relations import Relations

__all__ = ["Tree"]


class Tree:
    """Folders, their contents, and the import graph between them.

    Args:
        facts: Facts by path, in order of path.
        relations: The import graph.
        purposes: One line of Markdown for each file.
    """

    def __init__(self, facts: Mapping[str, FileFacts], relations: Relations, purposes: Mapping[str, str]) -> None:
        self.facts = facts
        self.relations = relations
        self.purposes = purposes
        self._paths = list(facts)
        self._rank_symbols()
        self.files: dict[str, list[str]] = defaultdict(list)
        self.folders: dict[str, list[str]] = defaultdict(list)
        self.below: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self.files[""] = []
        self.uses: Counter[tuple[str, str]] = Counter()
        for context in relations.contexts.values():
            for item in context.dependencies:
                if item.name and len(item.targets) == 1 and not context.test:
                    self.uses[item.targets[0], item.name] += 1
        for path, fact in facts.items():
            folder = parent(path)
            self._add_folder(folder)
            self.files[folder].append(path)
            while True:
                self.below[folder] += 1
                self.lines[folder] += fact.lines
                if not folder:
                    break
                folder = parent(folder)

    def _add_folder(self, folder: str) -> None:
        while folder and folder not in self.files:
            self.files[folder] = []
            self.folders[parent(folder)].append(folder)
            folder = parent(folder)

    @property
    def all_folders(self) -> list[str]:
        """Every folder, the root (``""``) first."""
        return sorted(self.files)

    def subtree(self, folder: str) -> list[str]:
        """Return every file under a folder, in order of path."""
        if not folder:
            return self._paths
        # Paths with a common beginning lie together in their order.
        first = bisect.bisect_left(self._paths, folder + "/")
        return self._paths[first : bisect.bisect_left(self._paths, folder + "0", first)]

    def fan_in(self, path: str) -> int:
        """Return how many files import a file."""
        return len(self.relations.imported_by[path])

    def most_used(self, paths: Iterable[str]) -> list[tuple[int, Symbol, str]]:
        """Return documented top-level classes and functions of some files, most imported first."""
        found = []
        for path in paths:
            if self.relations.contexts[path].test:
                continue
            for symbol in self.facts[path].symbols:
                if (
                    symbol.doc
                    and symbol.kind in (Kind.CLASS, Kind.FUNCTION)
                    and symbol.name == symbol.qualname
                    and symbol.name[0] != "_"
                ):
                    found.append((self.uses[path, symbol.name], symbol, path))
        found.sort(key=lambda item: (-item[0], -self.fan_in(item[2]), item[2], item[1].line))
        return found

    def lead(self, folder: str) -> str:
        """Return the file that introduces a folder: its README or package file, or ``""``."""
        names = {path.rpartition("/")[2].lower(): path for path in self.files[folder]}
        for name in (
            "readme.md",
            "readme.rst",
            "readme.txt",
            "readme",
            "__init__.py",
            "mod.rs",
            "lib.rs",
            "doc.go",
            "package-info.java",
            "index.ts",
            "index.js",
        ):
            path = names.get(name)
            if path and (self.facts[path].overview or self.facts[path].headings):
                return path
        return ""

    def purpose(self, folder: str) -> str:
        """Return one line of Markdown on a folder: what its README or package file says, or counts."""
        lead = self.lead(folder)
        if lead:
            return self.purposes[lead]
        files = self.below[folder]
        return f"{files:,} {'file' if files == 1 else 'files'}, {self.lines[folder]:,} lines"

    def edges(self, folder: str) -> Counter[tuple[str, str]]:
        """Return the imports between the direct children of a folder, with how many there are."""
        prefix = folder + "/" if folder else ""
        found: Counter[tuple[str, str]] = Counter()
        for path in self.subtree(folder):
            one = self._child(path, prefix)
            for target in self.relations.imports[path]:
                if target.startswith(prefix):
                    other = self._child(target, prefix)
                    if other != one:
                        found[one, other] += 1
        return found

    @staticmethod
    def _child(path: str, prefix: str) -> str:
        rest = path[len(prefix) :]
        first, slash, _ = rest.partition("/")
        return prefix + first + slash

    def symbols(self, folder: str) -> list[tuple[Symbol, str]]:
        """Return every symbol under a folder with its file, sorted by name without regard to case."""
        ranks: list[int] = []
        for path in self.subtree(folder):
            ranks += self._ranks[path]
        ranks.sort()
        return [self._symbols[rank] for rank in ranks]

    def _rank_symbols(self) -> None:
        """Sort all symbols once; a folder's are then put in order by their numbers."""
        self._symbols = [(s, path) for path, fact in self.facts.items() for s in fact.symbols]
        self._symbols.sort(key=lambda pair: (pair[0].name.lower(), pair[0].name, pair[1], pair[0].line))
        self._ranks: dict[str, list[int]] = {path: [] for path in self.facts}
        for rank, (_, path) in enumerate(self._symbols):
            self._ranks[path].append(rank)

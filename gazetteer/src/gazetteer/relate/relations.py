"""What only the whole repository knows about a file: who uses it, which tests, which layer."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import msgspec
import networkx as nx

from gazetteer.model import Commit, FileFacts, History, Kind
from gazetteer.paths import parent
from gazetteer.read import grammars
from gazetteer.read.analyze import is_test

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gazetteer.relate.resolve import Resolver

__all__ = ["Context", "Dependency", "Relations", "relate"]

_NAME_LENGTH_MIN = 4


class Dependency(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One import with what it was found to mean.

    Attributes:
        line: Where.
        module: As written.
        name: The name taken from it, or empty.
        targets: Files of the repository.
        distribution: What provides it otherwise.
        typing: Whether it is there for type checkers alone.
    """

    line: int
    module: str
    name: str
    targets: tuple[str, ...]
    distribution: str
    typing: bool = False


class Context(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What the rest of the repository says about one file.

    Attributes:
        dependencies: Its imports, resolved.
        imported_by: Files that import it.
        linked_from: Documents that link to it.
        tests: Tests that import it or name what it defines, with how.
        layer: Longest way down the import graph; 0 imports nothing of the repository. Imports for
            type checkers count neither here nor in ``cycle``.
        layers: Number of layers.
        cycle: Other files that it imports and that import it, directly or not.
        together: Files that commits change with it, and how often.
        commit: Its last commit.
        module: Dotted name, for Python.
        test: Whether it is a test.
        runs: How this repository runs its tests: command, file and line that say so.
    """

    dependencies: tuple[Dependency, ...] = ()
    imported_by: tuple[str, ...] = ()
    linked_from: tuple[str, ...] = ()
    tests: tuple[tuple[str, str], ...] = ()
    layer: int = 0
    layers: int = 0
    cycle: tuple[str, ...] = ()
    together: tuple[tuple[str, int], ...] = ()
    commit: Commit | None = None
    module: str = ""
    test: bool = False
    runs: tuple[tuple[str, str, int], ...] = ()

    @property
    def imports(self) -> tuple[str, ...]:
        """Files of the repository that it imports, sorted."""
        return tuple(sorted({t for d in self.dependencies for t in d.targets}))


class Relations(msgspec.Struct, frozen=True):
    """The import graph and every file's context. Links from documents are no imports."""

    contexts: dict[str, Context]
    imports: dict[str, tuple[str, ...]]
    imported_by: dict[str, tuple[str, ...]]


def _twins(one: str, other: str) -> bool:
    """Tell whether two files differ in their extensions alone, wherever they lie."""
    (stem, _, ending), (other_stem, _, other_ending) = (p.rpartition("/")[2].partition(".") for p in (one, other))
    return stem == other_stem and ending != other_ending


def _layers(imports: Mapping[str, tuple[str, ...]]) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
    graph = nx.DiGraph()
    graph.add_nodes_from(imports)
    graph.add_edges_from((path, target) for path, targets in imports.items() for target in targets)
    layers: dict[str, int] = {}
    cycles: dict[str, tuple[str, ...]] = {}
    # networkx yields components so that those a component points to come before it.
    for component in nx.strongly_connected_components(graph):
        below = [layers[t] for path in component for t in imports[path] if t not in component]
        layer = max(below, default=-1) + 1
        for path in component:
            layers[path] = layer
        if len(component) > 1:
            members = tuple(sorted(component))
            cycles.update(dict.fromkeys(members, members))
    return layers, cycles


def _reached(path: str, imports: Mapping[str, tuple[str, ...]]) -> set[str]:
    reached = {path}
    pending = [path]
    while pending:
        new = set(imports[pending.pop()]) - reached
        reached |= new
        pending += new
    return reached


def _tests_naming(
    facts: Mapping[str, FileFacts], imports: Mapping[str, tuple[str, ...]]
) -> dict[str, list[tuple[str, str]]]:
    """Map each file to the tests that name a symbol which only it defines.

    The name alone proves nothing: the test must import the file, or one of the same stem (a header
    and its source), or be of its package (as in Go). What a test only reaches through others counts
    when it imports the symbol by name, or when the symbol is a class.
    """
    owner: dict[str, tuple[str, Kind]] = {}
    nobody = ("", Kind.FUNCTION)
    for path, fact in facts.items():
        functions = {symbol.qualname for symbol in fact.symbols if symbol.kind in (Kind.FUNCTION, Kind.METHOD)}
        for symbol in fact.symbols:
            if symbol.qualname.rpartition(".")[0] in functions:
                continue  # local to a function: no test can name it
            if symbol.kind in (Kind.CLASS, Kind.FUNCTION) and len(symbol.name) >= _NAME_LENGTH_MIN:
                known = owner.get(symbol.name, (path, symbol.kind))
                owner[symbol.name] = known if known[0] == path else nobody
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path, fact in facts.items():
        named: dict[str, list[str]] = defaultdict(list)
        reached = _reached(path, imports) if fact.names else set()
        by_name = {item.name for item in fact.imports}
        for name in fact.names:
            target, kind = owner.get(name, nobody)
            if not target or target == path:
                continue
            near = any(target == other or _twins(target, other) for other in imports[path])
            near = near or (
                bool(fact.package) and (parent(target), facts[target].package) == (parent(path), fact.package)
            )
            if near or (target in reached and (kind is Kind.CLASS or name in by_name)):
                named[target].append(name)
        for target, names in named.items():
            found[target].append((path, ",".join(names)))
    return found


def relate(
    facts: Mapping[str, FileFacts],
    resolver: Resolver,
    history: History,
    runs: tuple[tuple[str, str, int], ...],
) -> Relations:
    """Build every file's context.

    Args:
        facts: Facts by path, in order of path.
        resolver: Resolves their imports.
        history: What git knows.
        runs: How the repository runs its tests.

    Returns:
        Contexts that depend on nothing but the arguments.
    """
    dependencies: dict[str, tuple[Dependency, ...]] = {}
    imports: dict[str, tuple[str, ...]] = {}
    running: dict[str, tuple[str, ...]] = {}
    backwards: dict[str, list[str]] = defaultdict(list)
    links: dict[str, list[str]] = defaultdict(list)
    for path, fact in facts.items():
        found = []
        for item in fact.imports:
            targets = resolver.targets(path, item)
            outside = "" if targets else resolver.distribution(path, item)
            found.append(Dependency(item.line, item.module, item.name, targets, outside, item.style == "typing"))
        dependencies[path] = tuple(found)
        imports[path] = tuple(sorted({t for d in found for t in d.targets}))
        running[path] = tuple(sorted({t for d in found for t in d.targets if not d.typing}))
        prose = grammars.languages()[fact.language].prose if fact.language else True
        for target in imports[path]:
            (links if prose else backwards)[target].append(path)
        if prose:
            imports[path] = running[path] = ()
    imported_by = {path: tuple(backwards.get(path, ())) for path in facts}
    layers, cycles = _layers(running)
    count = max(layers.values(), default=-1) + 1
    naming = _tests_naming(facts, imports)
    contexts: dict[str, Context] = {}
    for path, fact in facts.items():
        language = grammars.languages().get(fact.language)
        code = language is not None and not language.prose and not language.data
        tests = {other: "imports it" for other in imported_by[path] if is_test(other)}
        for other, names in naming.get(path, ()):
            tests[other] = f"{tests[other]}; names {names}" if other in tests else f"names {names}"
        linked = bool(imports[path] or imported_by[path])
        together = tuple(t for t in history.together.get(path, ()) if t[0] in facts)
        contexts[path] = Context(
            dependencies=dependencies[path],
            imported_by=imported_by[path],
            linked_from=tuple(links.get(path, ())),
            tests=tuple(sorted(tests.items())),
            layer=layers[path] if linked else 0,
            layers=count if linked else 0,
            cycle=tuple(p for p in cycles.get(path, ()) if p != path),
            together=together,
            commit=history.last.get(path),
            module=resolver.module_name(path),
            test=is_test(path) and code,
            runs=runs if code else (),
        )
    return Relations(contexts, imports, imported_by)

"""The three pages of a folder: ``index.md``, ``doc.md`` and ``sub.md``."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING

from gazetteer.markdown import Page, code, fence, link, words
from gazetteer.model import Kind
from gazetteer.pages.file_docs import plural
from gazetteer.paths import BOOK, KEYWORDS, Places, docs_page, folder_page, href, kw_page, parent
from gazetteer.read import grammars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gazetteer.model import Symbol
    from gazetteer.pages.tree import Tree

__all__ = ["description", "index", "keyword_lines", "mermaid", "subtree_keywords"]

_GRAPH_NODES_MAX = 24
_CONCEPTS = 15
_CONCEPTS_OF_A_FILE = 4
_IMPORTANT = 20


def _title(folder: str, name: str) -> str:
    return code(folder + "/") if folder else code(name)


def index(tree: Tree, folder: str, name: str, extra: Sequence[tuple[str, list[str]]] = ()) -> Page:
    """Build ``index.md``: what lies in a folder, with links.

    Args:
        tree: The repository.
        folder: The folder.
        name: The repository's name, shown for the root.
        extra: Further sections, for the root: title and list.
    """
    own = folder_page(folder, "index.md")
    page = Page(f"Index: {_title(folder, name)}")
    page.add(f"{tree.purpose(folder)}\n" if tree.lead(folder) else "")
    rows = [
        link("Description", href(own, folder_page(folder, "doc.md"))),
        link("Keywords", href(own, folder_page(folder, "sub.md"))),
    ]
    if folder:
        rows.append(link("Folder above", href(own, folder_page(parent(folder), "index.md"))))
    page.add(" · ".join(rows))
    for title, lines in extra:
        page.heading(2, title)
        page.items(lines)
    page.heading(2, "Folders")
    page.items(
        [
            f"{link(code(sub.rpartition('/')[2] + '/'), href(own, folder_page(sub, 'index.md')))}: {tree.purpose(sub)}"
            for sub in sorted(tree.folders[folder])
        ]
    )
    page.heading(2, "Files")
    page.items(
        [
            f"{link(code(path.rpartition('/')[2]), href(own, docs_page(path)))} ({link('keywords', href(own, kw_page(path)))})"
            + (f": {tree.purposes[path]}" if tree.purposes[path] else "")
            for path in tree.files[folder]
        ]
    )
    return page


def mermaid(tree: Tree, folder: str) -> tuple[str, int]:
    """Return a Mermaid graph of the imports between a folder's children, and how many it leaves out.

    Of many children the best connected are drawn.
    """
    edges = tree.edges(folder)
    if not edges:
        return "", 0
    weight: Counter[str] = Counter()
    for (one, other), count in edges.items():
        weight[one] += count
        weight[other] += count
    ranked = sorted(weight, key=lambda n: (-weight[n], n))
    chosen = sorted(ranked[:_GRAPH_NODES_MAX])
    ids = {node: f"n{i}" for i, node in enumerate(chosen)}
    lines = ["graph LR"]
    prefix = len(folder) + 1 if folder else 0
    lines += [f'  {ids[node]}["{_label(node[prefix:])}"]' for node in chosen]
    for (one, other), count in sorted(edges.items()):
        if one in ids and other in ids:
            lines.append(f"  {ids[one]} -->{f'|{count}|' if count > 1 else ''} {ids[other]}")
    return fence("\n".join(lines), "mermaid"), len(ranked) - len(chosen)


def _label(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-/ +@" else f"#{ord(c)};" for c in name)


def description(tree: Tree, folder: str, name: str) -> Page:
    """Build ``doc.md``: what a folder is for and how its parts hang together."""
    own = folder_page(folder, "doc.md")
    page = Page(f"Folder: {_title(folder, name)}")
    lead = tree.lead(folder)
    page.heading(2, "Role")
    if lead:
        page.add(f"{tree.purposes[lead]} (from {link(code(lead.rpartition('/')[2]), href(own, docs_page(lead)))})")
        overview = tree.facts[lead].overview
        if overview and len(overview.splitlines()) > 1:
            page.add(fence(overview, "text"))
    page.add(_standing(tree, folder))
    page.heading(2, "Contents")
    page.items(_contents(tree, folder))
    page.heading(2, "Key Concepts")
    page.items(_concepts(tree, folder, own))
    page.heading(2, "Architecture")
    graph, left = mermaid(tree, folder)
    page.add(graph)
    if left:
        page.add(
            f"The graph shows the best connected; {left:,} more with fewer imports {'is' if left == 1 else 'are'} in the {link('index', href(own, folder_page(folder, 'index.md')))}."
        )
    page.heading(2, "Important Files")
    used = [(tree.fan_in(p), p) for p in tree.subtree(folder) if tree.fan_in(p)]
    ranked = sorted(used, key=lambda pair: (-pair[0], pair[1]))
    page.items(
        [
            f"{link(code(p[len(folder) + 1 if folder else 0 :]), href(own, docs_page(p)))}: imported by {plural(n, 'file')}. {tree.purposes[p]}".rstrip()
            for n, p in ranked[:_IMPORTANT]
        ]
    )
    if len(ranked) > _IMPORTANT:
        page.add(f"These are the {_IMPORTANT} most imported of {len(ranked):,}.")
    page.heading(2, "Workflow")
    page.items(_workflow(tree, folder, own))
    page.heading(2, "Cross-References")
    page.items(_references(tree, folder, own))
    return page


def _standing(tree: Tree, folder: str) -> str:
    """Say where a folder's files stand in the import graph, and who outside uses them."""
    subtree = tree.subtree(folder)
    inside = set(subtree)
    relations = tree.relations
    layers = [relations.contexts[p].layer for p in subtree if relations.contexts[p].layers]
    if not layers:
        return ""
    low, high = min(layers), max(layers)
    stands = f"layer {low}" if low == high else f"layers {low} to {high}"
    words = f"Its files stand in {stands} of the import graph"
    if folder:
        users = {p for path in subtree for p in relations.imported_by[path]} - inside
        needs = {p for path in subtree for p in relations.imports[path]} - inside
        verb = "imports" if len(users) == 1 else "import"
        words += f"; {plural(len(users), 'file')} outside {verb} from it, it imports from {plural(len(needs), 'file')} outside"
    return words + "."


def _contents(tree: Tree, folder: str) -> list[str]:
    subtree = tree.subtree(folder)
    languages = Counter(tree.facts[p].language for p in subtree)
    known = grammars.languages()
    counted = ", ".join(
        f"{n:,} {known[lang].title if lang else 'other'}"
        for lang, n in sorted(languages.items(), key=lambda pair: (-pair[1], pair[0]))
    )
    kinds = Counter(s.kind for p in subtree for s in tree.facts[p].symbols)
    rows = [f"{plural(len(subtree), 'file')} with {tree.lines[folder]:,} lines: {counted}"]
    if kinds:
        rows.append(
            ", ".join(
                plural(kinds[kind], one, many)
                for kind, one, many in (
                    (Kind.CLASS, "class", "classes"),
                    (Kind.FUNCTION, "function", ""),
                    (Kind.METHOD, "method", ""),
                    (Kind.CONSTANT, "constant", ""),
                )
                if kinds[kind]
            )
        )
    return rows


def _concepts(tree: Tree, folder: str, own: str) -> list[str]:
    """List the documented classes and functions that are imported most, at most four of a file."""
    taken: Counter[str] = Counter()
    rows: list[str] = []
    for _, symbol, path in tree.most_used(tree.subtree(folder)):
        taken[path] += 1
        if taken[path] <= _CONCEPTS_OF_A_FILE and len(rows) < _CONCEPTS:
            rows.append(f"{link(code(symbol.name), href(own, docs_page(path)))}: {words(symbol.doc)}")
    return rows


def _workflow(tree: Tree, folder: str, own: str) -> list[str]:
    """Say where control enters a folder, and how its tests run."""
    rows: list[str] = []
    prefix = folder + "/" if folder else ""
    for path in tree.subtree(folder):
        if any(f.rule == "main-guard" for f in tree.facts[path].findings):
            rows.append(f"Run as a program: {link(code(path[len(prefix) :]), href(own, docs_page(path)))}")
    users: Counter[str] = Counter()
    needs: Counter[str] = Counter()
    for path in tree.subtree(folder):
        users.update(parent(p) for p in tree.relations.imported_by[path] if not p.startswith(prefix))
        needs.update(parent(p) for p in tree.relations.imports[path] if not p.startswith(prefix))
    if folder:
        for title, found in (("Used by", users), ("Uses", needs)):
            rows += [
                f"{title} {link(code(f + '/' if f else '(root)'), href(own, folder_page(f, 'doc.md')))} ({plural(n, 'import')})"
                for f, n in sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))
            ]
    runs = {
        run
        for path in tree.files[folder]
        for run in tree.relations.contexts[path].runs
        if tree.relations.contexts[path].test
    }
    rows += [f"Tests run with {code(command)}" for command, _, _ in sorted(runs)]
    return rows


def _references(tree: Tree, folder: str, own: str) -> list[str]:
    rows = [
        link("Index", href(own, folder_page(folder, "index.md"))),
        link("Keywords of the subtree", href(own, folder_page(folder, "sub.md"))),
    ]
    if folder:
        rows.append(
            f"Folder above: {link(code(parent(folder) or '(root)'), href(own, folder_page(parent(folder), 'doc.md')))}"
        )
    rows += [
        f"Folder below: {link(code(sub.rpartition('/')[2] + '/'), href(own, folder_page(sub, 'doc.md')))}"
        for sub in sorted(tree.folders[folder])
    ]
    rows.append(f"{link('All keywords', href(own, KEYWORDS))}, {link('the book', href(own, BOOK))}")
    return rows


def _letter(name: str) -> str:
    first = name.lstrip("_.")[:1].upper()
    return first if first.isascii() and first.isalpha() else "Other"


def keyword_lines(
    own: str, symbols: Sequence[tuple[Symbol, str]], places: Places, strip: int
) -> list[tuple[str, list[str]]]:
    """Return the lines of an A to Z index: each name once, with every place that defines it."""
    letters: dict[str, list[str]] = {}
    shown: dict[str, tuple[str, str]] = {}
    for name, group in groupby(symbols, key=lambda pair: pair[0].name):
        spots = []
        for symbol, path in group:
            if path not in shown:
                shown[path] = (code(path[strip:])[:-1], places.source(own, path))
            label, target = shown[path]
            if label.startswith("``"):  # a name with backticks: the line stands outside
                spots.append(
                    f"{symbol.label or symbol.kind.value} [{label}`]({target}#L{symbol.line}) line {symbol.line}"
                )
            else:
                spots.append(f"{symbol.label or symbol.kind.value} [{label}:{symbol.line}`]({target}#L{symbol.line})")
        letters.setdefault(_letter(name), []).append(f"**{code(name)}**: {', '.join(spots)}")
    return sorted(letters.items(), key=lambda pair: (pair[0] == "Other", pair[0]))


def subtree_keywords(tree: Tree, folder: str, name: str, places: Places) -> Page:
    """Build ``sub.md``: every symbol under a folder, from A to Z."""
    own = folder_page(folder, "sub.md")
    page = Page(f"Keywords: {_title(folder, name)}")
    page.add(
        f"{link('Index', href(own, folder_page(folder, 'index.md')))} · {link('Description', href(own, folder_page(folder, 'doc.md')))}"
    )
    for letter, lines in keyword_lines(own, tree.symbols(folder), places, len(folder) + 1 if folder else 0):
        page.heading(2, letter)
        page.items(lines)
    page.heading(2, "Files")
    page.items([link(code(p[len(folder) + 1 if folder else 0 :]), href(own, kw_page(p))) for p in tree.subtree(folder)])
    return page

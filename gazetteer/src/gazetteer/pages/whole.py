"""The pages on the whole repository: all keywords, the book, and what the root index adds."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from gazetteer.markdown import Page, code, fence, link, text, words
from gazetteer.model import Kind, Status
from gazetteer.pages.file_docs import plural
from gazetteer.pages.folder import keyword_lines, mermaid
from gazetteer.pages.readme import readable
from gazetteer.paths import BOOK, KEYWORDS, Places, docs_page, folder_page, href, parent
from gazetteer.read import grammars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gazetteer.pages.tree import Tree

__all__ = ["all_keywords", "book", "packages", "root_sections"]

_GLOSSARY = 60
_FOLDERS_OF_A_LAYER = 6


def all_keywords(tree: Tree, name: str, places: Places) -> Page:
    """Build ``keywords.md``: every symbol with every place that defines it."""
    page = Page(f"Keywords of {code(name)}")
    letters = keyword_lines(KEYWORDS, tree.symbols(""), places, 0)
    page.add(
        f"{link('Index', 'index.md')} · " + " · ".join(link(letter, f"#{letter.lower()}") for letter, _ in letters)
    )
    for letter, lines in letters:
        page.heading(2, letter)
        page.items(lines)
    return page


def packages(tree: Tree) -> list[str]:
    """Return the folders that hold code of their own, not only documents and data."""
    known = grammars.languages()

    def is_code(path: str) -> bool:
        language = known.get(tree.facts[path].language)
        return bool(language and not language.prose and not language.data and tree.facts[path].symbols)

    return [folder for folder in tree.all_folders if any(map(is_code, tree.files[folder]))]


def _figures(tree: Tree, excluded: Sequence[tuple[str, str]]) -> list[str]:
    facts = tree.facts.values()
    kinds = Counter(s.kind for f in facts for s in f.symbols)
    known = grammars.languages()
    languages = Counter(f.language for f in facts)
    rows = [
        f"{plural(len(tree.facts), 'file')} in {plural(len(tree.files), 'folder')}, {tree.lines['']:,} lines, {sum(f.size for f in facts):,} bytes",
        ", ".join(
            f"{n:,} {known[lang].title if lang else 'other'}"
            for lang, n in sorted(languages.items(), key=lambda pair: (-pair[1], pair[0]))
        ),
        f"{kinds[Kind.CLASS]:,} classes, {kinds[Kind.FUNCTION]:,} functions, {kinds[Kind.METHOD]:,} methods, {kinds[Kind.CONSTANT]:,} constants",
        f"{sum(len(v) for v in tree.relations.imports.values()):,} imports between files of the repository",
    ]
    statuses = Counter(f.status for f in facts)
    rows += [
        f"{plural(statuses[s], 'file')}: {words}"
        for s, words in (
            (Status.PARTIAL, "parsed with errors"),
            (Status.GENERATED, "generated"),
            (Status.BINARY, "binary"),
            (Status.HUGE, "too large to parse"),
            (Status.LINK, "symbolic link"),
            (Status.UNREADABLE, "not readable"),
            (Status.FAILED, "crashed the parser"),
        )
        if statuses[s]
    ]
    if excluded:
        reasons = Counter(reason for _, reason in excluded)
        rows.append("Left out: " + ", ".join(f"{n:,} by {text(r)}" for r, n in sorted(reasons.items())))
    return rows


def root_sections(tree: Tree, excluded: Sequence[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Return what the root's index has beyond other folders': global pages, packages, figures."""
    return [
        (
            "Global Pages",
            [
                f"{link('The book', BOOK)}: overview, architecture, a chapter per package",
                f"{link('Keywords', KEYWORDS)}: every symbol from A to Z",
            ],
        ),
        (
            "Packages",
            [
                f"{link(code(p + '/' if p else '(root)'), href('index.md', folder_page(p, 'doc.md')))}: {tree.purpose(p)}"
                for p in packages(tree)
            ],
        ),
        ("Figures", _figures(tree, excluded)),
        ("Left Out", [f"{code(path)}: {text(reason)}" for path, reason in excluded]),
    ]


def book(tree: Tree, name: str, readme: str) -> Page:
    """Build ``comprehensive_book.md``: a book on the repository that reads in order.

    Args:
        tree: The repository.
        name: Its name.
        readme: The text of its README, in Markdown; empty when there is none.
    """
    page = Page(f"The Book of {code(name)}")
    chapters = packages(tree)
    page.heading(2, "Overview")
    lead = tree.lead("")
    if readme:
        page.add(readable(readme))
        page.add(f"From {link(code(lead), href(BOOK, docs_page(lead)))}.")
    elif lead:
        page.add(tree.purposes[lead])
    page.items([f"{plural(len(tree.facts), 'file')}, {tree.lines['']:,} lines, {plural(len(chapters), 'package')}"])
    page.heading(2, "Architecture")
    _architecture(page, tree)
    for number, folder in enumerate(_reading_order(tree, chapters), 1):
        _chapter(page, tree, folder, number)
    page.heading(2, "Appendix: File Reference")
    page.items(
        [
            f"{link(code(p), href(BOOK, docs_page(p)))}" + (f": {tree.purposes[p]}" if tree.purposes[p] else "")
            for p in tree.facts
        ]
    )
    page.heading(2, "Appendix: Glossary")
    page.items(_glossary(tree))
    return page


def _architecture(page: Page, tree: Tree) -> None:
    graph, _ = mermaid(tree, "")
    page.add(graph)
    by_layer: dict[int, list[str]] = {}
    for path, context in tree.relations.contexts.items():
        if context.layers and not context.test:
            by_layer.setdefault(context.layer, []).append(path)
    if by_layer:
        page.add(
            "Each file stands one layer above the highest file that it imports; layer 0 imports nothing of the repository."
        )
    rows = []
    for layer in sorted(by_layer):
        folders = Counter(parent(p) for p in by_layer[layer])
        shown = ", ".join(
            f"{code(f + '/' if f else '(root)')} {n:,}"
            for f, n in sorted(folders.items(), key=lambda pair: (-pair[1], pair[0]))[:_FOLDERS_OF_A_LAYER]
        )
        left = len(folders) - _FOLDERS_OF_A_LAYER
        more = f" and {plural(left, 'more folder')}" if left > 0 else ""
        rows.append(f"Layer {layer}: {plural(len(by_layer[layer]), 'file')} ({shown}{more})")
    page.items(rows)
    cycles = {
        context.cycle and tuple(sorted((*context.cycle, p))) for p, context in tree.relations.contexts.items()
    } - {()}
    page.heading(3, "Import Cycles")
    page.items(
        [f"{len(c)} files: {', '.join(link(code(p), href(BOOK, docs_page(p))) for p in c)}" for c in sorted(cycles)]
    )


def _reading_order(tree: Tree, chapters: Sequence[str]) -> list[str]:
    """Order packages from what is built on to what builds on it, tests last."""

    def key(folder: str) -> tuple[bool, float, str]:
        contexts = [tree.relations.contexts[p] for p in tree.files[folder]]
        tests = all(c.test for c in contexts if c.module or c.test)
        layers = [c.layer for c in contexts]
        return tests and any(c.test for c in contexts), sum(layers) / len(layers), folder

    return sorted(chapters, key=key)


def _chapter(page: Page, tree: Tree, folder: str, number: int) -> None:
    page.heading(2, f"Chapter {number}: {code(folder + '/' if folder else '(root)')}")
    page.add(
        f"{tree.purpose(folder)} ({link('index', href(BOOK, folder_page(folder, 'index.md')))}, {link('description', href(BOOK, folder_page(folder, 'doc.md')))})"
    )
    lead = tree.lead(folder)
    if lead and len(tree.facts[lead].overview.splitlines()) > 1:
        page.add(fence(tree.facts[lead].overview, "text"))
    rows = []
    for path in tree.files[folder]:
        fact = tree.facts[path]
        top = [
            code(s.name)
            for s in fact.symbols
            if s.kind in (Kind.CLASS, Kind.FUNCTION) and s.name == s.qualname and not s.name.startswith("_")
        ]
        row = f"{link(code(path.rpartition('/')[2]), href(BOOK, docs_page(path)))}"
        row += f": {tree.purposes[path]}" if tree.purposes[path] else ""
        if top and fact.overview:
            row += f" Defines {', '.join(top)}."
        rows.append(row)
    page.items(rows)


def _glossary(tree: Tree) -> list[str]:
    """List the symbols that most files import by name, with what they say of themselves."""
    rows = []
    for count, symbol, path in tree.most_used(tree.facts)[:_GLOSSARY]:
        where = link(code(path), href(BOOK, docs_page(path)))
        imported = f", imported {plural(count, 'time')}" if count else ""
        rows.append(
            f"**{code(symbol.name)}**, {symbol.label or symbol.kind.value} in {where}{imported}: {words(symbol.doc)}"
        )
    return sorted(rows, key=str.lower)

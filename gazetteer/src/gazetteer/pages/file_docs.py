"""The page of one file: what it is, what it holds, what leads to it and what it needs."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from gazetteer.markdown import Page, code, fence, link, text, words
from gazetteer.model import FileFacts, Kind, Status, Symbol
from gazetteer.paths import BOOK, Places, docs_page, folder_page, href, kw_page, parent
from gazetteer.read import grammars
from gazetteer.read.text import plain_sentence, sentence

if TYPE_CHECKING:
    from gazetteer.relate.relations import Context

__all__ = ["docs", "purpose"]

_SOURCE_LIMIT = 64 * 1024
_CYCLE_LISTED = 20
_NEIGHBOURS_LISTED = 40
_SECTIONS = {
    "idiom": "Code Patterns & Idioms",
    "performance": "Performance Considerations",
    "security": "Security & Safety",
}
_KIND_WORDS = {
    Kind.CLASS: ("class", "classes"),
    Kind.FUNCTION: ("function", "functions"),
    Kind.METHOD: ("method", "methods"),
    Kind.CONSTANT: ("constant", "constants"),
}


def plural(count: int, one: str, many: str = "") -> str:
    """Return ``1 file``, ``1,234 files``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def purpose(fact: FileFacts) -> str:
    """Return one sentence on what a file is for, as Markdown.

    It is the file's own first sentence or first heading; where there is none, what was counted in
    it. It is never guessed from a name.
    """
    language = grammars.languages().get(fact.language)
    own = plain_sentence(fact.overview) if language and language.prose else sentence(fact.overview)
    if own:
        return words(own)
    if fact.headings:
        return text(fact.headings[0][1])
    return _counted(fact)


def _counted(fact: FileFacts) -> str:
    names = {kind: [s.name for s in fact.symbols if s.kind is kind and "." not in s.qualname] for kind in Kind}
    parts = []
    for kind in (Kind.CLASS, Kind.FUNCTION, Kind.METHOD, Kind.CONSTANT):
        count = sum(1 for s in fact.symbols if s.kind is kind)
        if not count:
            continue
        label = {s.label for s in fact.symbols if s.kind is kind}
        named = _KIND_WORDS[kind]
        if len(label) == 1 and "" not in label:
            word = label.pop()
            named = (word, word + ("es" if word.endswith("s") else "s"))
        shown = names[kind] if 0 < len(names[kind]) <= 3 and len(names[kind]) == count else []
        tail = " (" + ", ".join(code(n) for n in shown) + ")" if shown else ""
        parts.append(plural(count, *named) + tail)
    if parts:
        return "Defines " + ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1] + "."
    if fact.imports and fact.language:
        return f"Defines nothing of its own; takes in {plural(len(fact.imports), 'name')} from elsewhere."
    if fact.note:
        return text(fact.note)
    return "Empty." if not fact.size else ""


def _metadata(page: Page, fact: FileFacts, context: Context) -> None:
    page.heading(2, "File Metadata")
    language = grammars.languages().get(fact.language)
    name = fact.path.rpartition("/")[2]
    extension = "." + name.rpartition(".")[2] if "." in name.lstrip(".") else ""
    kind = (
        f"{language.title} {'test' if context.test else 'source' if not language.prose else 'document'}"
        if language
        else _type(fact)
    )
    rows = [
        f"**Path**: {code(fact.path)}",
        f"**Size**: {fact.size:,} bytes" + (f" ({fact.size / 1024:,.1f} KiB)" if fact.size >= 1024 else ""),
        f"**Type**: {kind}",
    ]
    if extension:
        rows.append(f"**Extension**: {code(extension)}")
    if fact.status not in (Status.BINARY, Status.LINK, Status.UNREADABLE):
        rows.append(f"**Lines**: {fact.lines:,}")
    if language:
        rows.append(f"**Language**: {language.title}")
    if context.module:
        rows.append(f"**Module**: {code(context.module)}")
    if fact.encoding not in ("", "utf-8"):
        rows.append(f"**Encoding**: {fact.encoding}")
    if context.commit:
        rows.append(
            f"**Last commit**: {code(context.commit.id[:12])} of {context.commit.date}, {text(context.commit.subject)}"
        )
    if fact.note:
        rows.append(f"**Note**: {text(fact.note)}")
    page.items(rows)


def _type(fact: FileFacts) -> str:
    return {
        Status.BINARY: "binary",
        Status.LINK: "symbolic link",
        Status.UNREADABLE: "unreadable",
    }.get(fact.status, "text")


def _original(page: Page, fact: FileFacts, source: str, places: Places, own: str) -> None:
    page.heading(2, "Original Source")
    target = places.source(own, fact.path)
    if fact.status in (Status.LINK, Status.UNREADABLE):
        return
    if not source or fact.status in (Status.BINARY, Status.HUGE):
        if fact.size:
            page.add(f"Not shown here: {link(code(fact.path), target)} ({fact.size:,} bytes).")
        return
    language = grammars.languages().get(fact.language)
    word = language.fence if language else "text"
    if len(source) <= _SOURCE_LIMIT:
        page.add(fence(source, word))
        return
    cut = source.rfind("\n", 0, _SOURCE_LIMIT) + 1 or _SOURCE_LIMIT
    page.add(fence(source[:cut], word))
    rest = source.count("\n", 0, cut)
    page.add(
        f"The first {rest:,} of {fact.lines:,} lines. The rest is in {link(code(fact.path), places.source(own, fact.path, min(rest + 1, fact.lines)))}."
    )


def _at(places: Places, own: str, path: str, line: int) -> str:
    return link(f"line {line}", places.source(own, path, line))


def _entry(symbol: Symbol, places: Places, own: str, path: str, separator: str = "") -> str:
    """Describe a symbol; with a separator, also what encloses it, since no heading says that."""
    shown = symbol.signature if symbol.signature and symbol.kind is not Kind.CONSTANT else symbol.qualname
    parts = [f"{code(shown)}, {_at(places, own, path, symbol.line)}"]
    outer = symbol.qualname.rpartition(separator)[0] if separator and shown != symbol.qualname else ""
    if outer:
        parts[0] += f", in {code(outer)}"
    if symbol.label:
        parts[0] += f" ({symbol.label})"
    if symbol.decorators:
        parts.append("decorated with " + ", ".join(code(d) for d in symbol.decorators))
    out = "; ".join(parts)
    return f"{out}: {words(symbol.doc)}" if symbol.doc else out


def _structure(page: Page, fact: FileFacts, context: Context, places: Places, own: str) -> None:
    page.heading(2, "Detailed Analysis")
    page.heading(3, "Code Structure")
    taken = {d.name or d.module: d.targets for d in context.dependencies if d.targets}
    separator = grammars.languages()[fact.language].separator if fact.language else "."
    members: dict[str, list[Symbol]] = defaultdict(list)
    classes = [s for s in fact.symbols if s.kind is Kind.CLASS]
    known = {s.qualname for s in classes}
    for symbol in fact.symbols:
        owner = symbol.qualname.rpartition(separator)[0]
        if symbol.kind is not Kind.CLASS:
            members[owner if owner in known else ""].append(symbol)
    for symbol in classes:
        _class(page, symbol, members[symbol.qualname], taken, fact.path, places, own)
    loose = members[""]
    for title, kind in (("Functions", Kind.FUNCTION), ("Methods", Kind.METHOD), ("Constants", Kind.CONSTANT)):
        chosen = [s for s in loose if s.kind is kind]
        if chosen:
            page.heading(4, title)
            page.items([_entry(s, places, own, fact.path, separator) for s in chosen])
    if fact.headings:
        page.heading(4, "Outline")
        top = min(level for level, _, _ in fact.headings)
        page.add(
            "".join(
                f"{'  ' * min(level - top, 5)}- {link(text(title) or 'untitled', places.source(own, fact.path, line))}\n"
                for level, title, line in _steps(fact.headings)
            )
        )


def _steps(headings: tuple[tuple[int, str, int], ...]) -> list[tuple[int, str, int]]:
    """Make each heading at most one level deeper than the one before, as nested lists need."""
    out: list[tuple[int, str, int]] = []
    top = min(level for level, _, _ in headings)
    above = top - 1
    for level, title, line in headings:
        above = min(level, above + 1)
        out.append((above, title, line))
    return out


def _class(
    page: Page,
    symbol: Symbol,
    members: list[Symbol],
    taken: dict[str, tuple[str, ...]],
    path: str,
    places: Places,
    own: str,
) -> None:
    page.heading(4, code(symbol.qualname))
    facts = [f"{symbol.label or 'class'}, {_at(places, own, path, symbol.line)} to {symbol.end_line}"]
    if symbol.bases:
        bases = []
        for base in symbol.bases:
            targets = taken.get(base.split("[")[0]) or taken.get(base.split(".")[0]) or ()
            bases.append(link(code(base), href(own, docs_page(targets[0]))) if len(targets) == 1 else code(base))
        facts.append("bases " + ", ".join(bases))
    if symbol.decorators:
        facts.append("decorated with " + ", ".join(code(d) for d in symbol.decorators))
    line = facts[0][0].upper() + facts[0][1:] + "".join("; " + f for f in facts[1:]) + "."
    page.add(line + (f" {words(symbol.doc)}" if symbol.doc else ""))
    page.items([_entry(s, places, own, path) for s in members])


def _architecture(page: Page, context: Context, own: str) -> None:
    page.heading(2, "Architecture & Design")
    if not context.layers:
        return
    below = len(context.imports)
    above = len(context.imported_by)
    page.heading(3, "Role in the Repository")
    rows = [_layer(context)]
    rows.append(f"Fan-in {above:,}, fan-out {below:,}")
    if not above and not context.test:
        rows.append("No file of the repository imports it: an entry point, or used from outside")
    if context.cycle:
        rows.append(_cycle(context, own))
    page.items(rows)


def _layer(context: Context) -> str:
    if not context.layer:
        return f"Layer 0 of the import graph: to run, it needs no other file of the repository (the top layer is {context.layers - 1})"
    return f"Layer {context.layer} of the import graph (0 needs nothing of the repository, {context.layers - 1} is the top)"


def _cycle(context: Context, own: str) -> str:
    if len(context.cycle) > _CYCLE_LISTED:
        whole = link("the book lists them", href(own, BOOK, "import-cycles"))
        return f"In an import cycle with {len(context.cycle):,} other files; {whole}"
    return "In an import cycle with " + ", ".join(link(code(p), href(own, docs_page(p))) for p in context.cycle)


def _dependencies(page: Page, fact: FileFacts, context: Context, places: Places, own: str) -> None:
    page.heading(2, "Dependencies")
    inside: dict[str, list[str]] = defaultdict(list)
    outside: dict[str, list[tuple[str, int]]] = defaultdict(list)
    unknown: list[str] = []
    for item in context.dependencies:
        name = item.name or item.module
        for target in item.targets:
            inside[target].append(
                f"{code(name)} ({_at(places, own, fact.path, item.line)}{', for types' if item.typing else ''})"
            )
        if not item.targets:
            whole = f"{item.module}.{item.name}" if item.name and item.name != "*" else item.module
            if item.distribution:
                outside[item.distribution].append((whole, item.line))
            else:
                unknown.append(f"{code(whole)} ({_at(places, own, fact.path, item.line)})")
    page.heading(3, "Internal")
    page.items([f"{link(code(t), href(own, docs_page(t)))}: {', '.join(names)}" for t, names in sorted(inside.items())])
    page.heading(3, "External")
    page.items(
        [
            f"**{text(dist)}**: " + ", ".join(f"{code(n)} ({_at(places, own, fact.path, at)})" for n, at in names)
            for dist, names in sorted(outside.items())
        ]
    )
    page.heading(3, "Not Found")
    page.items(unknown)
    page.heading(3, "Imported By")
    page.items([link(code(p), href(own, docs_page(p))) for p in context.imported_by])
    page.heading(3, "Linked From")
    page.items([link(code(p), href(own, docs_page(p))) for p in context.linked_from])


def _findings(page: Page, fact: FileFacts, places: Places, own: str, section: str) -> None:
    page.heading(2, _SECTIONS[section])
    grouped: dict[str, list[int]] = defaultdict(list)
    known = grammars.rules()
    for finding in fact.findings:
        if known[finding.rule].section == section:
            grouped[finding.rule].append(finding.line)
    page.items(
        [
            f"{known[rule].text.rstrip('.')}: {', '.join(_at(places, own, fact.path, at) for at in lines)}"
            for rule, lines in sorted(grouped.items(), key=lambda pair: pair[1][0])
        ]
    )


def _testing(page: Page, context: Context, places: Places, own: str) -> None:
    page.heading(2, "Testing & Usage")
    if context.tests:
        page.heading(3, "Tests")
        rows = []
        for path, how in context.tests:
            lead, _, names = how.partition("names ")
            shown = lead + "names " + ", ".join(code(n) for n in names.split(",")) if names else how
            rows.append(f"{link(code(path), href(own, docs_page(path)))} {shown}")
        page.items(rows)
    if context.runs and (context.test or context.tests):
        page.heading(3, "How Tests Are Run Here")
        page.items(
            [
                f"{code(command)} (from {link(code(path), places.source(own, path, at))})"
                for command, path, at in context.runs
            ]
        )


def _related(page: Page, context: Context, own: str) -> None:
    page.heading(2, "Related Files")

    def files(paths: tuple[str, ...]) -> list[str]:
        return [link(code(p), href(own, docs_page(p))) for p in paths]

    page.heading(3, "By Imports")
    both = tuple(sorted({*context.imports, *context.imported_by}))
    if len(both) <= _NEIGHBOURS_LISTED:
        page.items(files(both))
    else:
        page.add(f"{len(both):,} files: see {link('Dependencies', '#dependencies')}.")
    page.heading(3, "By Tests")
    page.items(files(tuple(p for p, _ in context.tests)))
    page.heading(3, "By Commits")
    page.items([f"{link(code(p), href(own, docs_page(p)))}: {n} commits touch both" for p, n in context.together])


def docs(fact: FileFacts, context: Context, source: str, places: Places) -> Page:
    """Build the page ``F_docs.md`` of one file.

    Args:
        fact: What the file says.
        context: What the rest of the repository says about it.
        source: Its text; empty for binary files.
        places: Links to sources.
    """
    own = docs_page(fact.path)
    page = Page(f"Documentation: {code(fact.path)}")
    _metadata(page, fact, context)
    page.heading(2, "File Purpose")
    page.add(purpose(fact))
    _original(page, fact, source, places, own)
    page.heading(2, "High-Level Overview")
    if fact.overview:
        page.add(fence(fact.overview, "text"))
    _structure(page, fact, context, places, own)
    _architecture(page, context, own)
    _dependencies(page, fact, context, places, own)
    _findings(page, fact, places, own, "idiom")
    _findings(page, fact, places, own, "performance")
    _findings(page, fact, places, own, "security")
    _testing(page, context, places, own)
    _related(page, context, own)
    page.heading(2, "Cross-References")
    folder = parent(fact.path)
    page.items(
        [
            f"Keywords: {link(code(kw_page(fact.path).rpartition('/')[2]), href(own, kw_page(fact.path)))}",
            "Folder: "
            + ", ".join(
                link(label, href(own, folder_page(folder, name)))
                for label, name in (("index", "index.md"), ("description", "doc.md"), ("keywords", "sub.md"))
            ),
        ]
    )
    return page

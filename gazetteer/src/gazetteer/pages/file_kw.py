"""The keyword page of one file: every name in it, each with its line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gazetteer.markdown import Page, code, link, slug, text
from gazetteer.model import FileFacts, Kind
from gazetteer.paths import Places, docs_page, folder_page, href, kw_page, parent
from gazetteer.read import grammars

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["keywords"]

_TITLES = (
    (Kind.CLASS, "Classes"),
    (Kind.FUNCTION, "Functions"),
    (Kind.METHOD, "Methods"),
    (Kind.CONSTANT, "Constants"),
)
_ABOUT = {
    "File Metadata": "path, size, type, language, last commit",
    "File Purpose": "what the file says it is for",
    "Original Source": "the text itself",
    "High-Level Overview": "the file's own introduction",
    "Architecture & Design": "layer, fan-in and fan-out",
    "Code Patterns & Idioms": "patterns, with their lines",
    "Performance Considerations": "findings, with their lines",
    "Security & Safety": "findings, with their lines",
    "Testing & Usage": "tests of this file and how they are run",
    "Related Files": "by imports, tests and commits",
    "Cross-References": "pages beside this one",
}


def keywords(fact: FileFacts, sections: Sequence[str], places: Places) -> Page:
    """Build the page ``F_kw.md`` of one file.

    Args:
        fact: What the file says.
        sections: Sections of its docs page that have content; only these are linked.
        places: Links to sources.
    """
    own = kw_page(fact.path)
    page = Page(f"Keyword Index: {code(fact.path)}")
    docs = docs_page(fact.path)
    folder = parent(fact.path)
    page.heading(2, "File Information")
    language = grammars.languages().get(fact.language)
    page.items(
        [
            f"**Original File**: {link(code(fact.path), places.source(own, fact.path))}",
            f"**Documentation**: {link(code(docs.rpartition('/')[2]), href(own, docs))}",
            f"**Folder**: {link(code(folder or '.'), href(own, folder_page(folder, 'index.md')))}",
            *([f"**Language**: {language.title}"] if language else []),
        ]
    )
    page.heading(2, "Keywords Extracted")

    def at(line: int) -> str:
        return link(f"line {line}", places.source(own, fact.path, line))

    for kind, title in _TITLES:
        page.heading(3, title)
        page.items(
            [
                f"**{code(s.name)}**"
                + (f" ({s.label})" if s.label else "")
                + (f" in {code(s.qualname[: -len(s.name)].rstrip('.:'))}" if s.qualname != s.name else "")
                + f": {at(s.line)}"
                for s in fact.symbols
                if s.kind is kind
            ]
        )
    page.heading(3, "Imports")
    page.items(
        [
            f"**{code(i.name or i.module)}**" + (f" from {code(i.module)}" if i.name else "") + f": {at(i.line)}"
            for i in fact.imports
            if not (language and language.prose)
        ]
    )
    page.heading(3, "Headings")
    page.items([f"**{text(title)}**: {at(line)}" for _, title, line in fact.headings])
    page.heading(3, "Identifiers")
    page.items([f"**{code(name)}**: {at(line)}" for name, line in fact.identifiers])
    page.heading(2, "Keyword → Section Map")
    page.items([_mapped(section, fact, own, docs) for section in sections])
    return page


def _mapped(section: str, fact: FileFacts, own: str, docs: str) -> str:
    target = link(section, href(own, docs, slug(section)))
    if section == "Detailed Analysis":
        names = [code(s.qualname) for s in fact.symbols] or [text(h[1]) for h in fact.headings]
        return f"{target}: {', '.join(dict.fromkeys(names))}"
    if section == "Dependencies":
        names = list(dict.fromkeys(code(i.name or i.module) for i in fact.imports))
        return f"{target}: {', '.join(names) if names else 'who imports this file'}"
    return f"{target}: {_ABOUT[section]}"

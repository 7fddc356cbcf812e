"""A page as the site generator takes it: its Markdown with a head that says where it belongs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gazetteer.markdown import code, fence
from gazetteer.paths import Places, docs_page, folder_page, href, parent, source_page
from gazetteer.read import grammars
from gazetteer.read.analyze import read_text
from gazetteer.site.drawing import draw, read_mermaid

if TYPE_CHECKING:
    from gazetteer.read.scan import Found

__all__ = ["PageInfo", "stage_page", "stage_source"]

# A character that cannot be in our pages keeps ``{{`` from being a template; the layout takes it out.
_GUARD = "\ufdd0"
_MERMAID = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ORIGINAL = re.compile(r"^## Original Source\n\n(`{3,})[^\n]*\n", re.MULTILINE)
_PLAIN_BYTES = 512 * 1024


@dataclass(frozen=True)
class PageInfo:
    """Where a page stands.

    Attributes:
        repository: Name of the repository.
        name: The page, as a ``.md`` name relative to the output folder.
        path: The file or folder that it is about.
        kind: ``file``, ``folder``, ``source`` or ``whole``.
        title: What it says about that place.
        tabs: Titles and names of the pages about the same place.
        indexed: Whether the search knows its words.
    """

    repository: str
    name: str
    path: str
    kind: str
    title: str
    tabs: tuple[tuple[str, str], ...]
    indexed: bool

    @property
    def html(self) -> str:
        """Name of its HTML page."""
        return self.name.removesuffix(".md") + ".html"

    def link(self, target: str) -> str:
        """Return the link to another page of the site."""
        return href(self.html, target.removesuffix(".md") + ".html")


def _head(info: PageInfo, places: Places, **more: str) -> str:
    above: list[str] = []
    folder = info.path
    while folder:
        folder = parent(folder)
        above.append(folder)
    values = {
        "title": f"{info.path or info.repository} · {info.title}",
        "url": "/" + info.html,
        "kind": info.kind,
        "root": "../" * info.name.count("/"),
        "repo": places.source(info.name, ""),
        "repository": info.repository,
        "indexed": info.indexed,
        "crumbs": [
            {"title": f.rpartition("/")[2] or info.repository, "url": info.link(folder_page(f, "index.md"))}
            for f in reversed(above)
        ],
        "here": info.path.rpartition("/")[2] or (info.title if info.kind == "whole" else info.repository),
        "tabs": [{"title": title, "url": info.link(name), "current": name == info.name} for title, name in info.tabs],
        **more,
    }
    # A key of its own keeps Hugo from taking ours for its own settings.
    own = {key: values.pop(key) for key in ("title", "url")}
    return json.dumps({**own, "params": values}) + "\n\n"


def _guarded(text: str) -> str:
    return text.replace("{{", "{" + _GUARD + "{")


def _graph(info: PageInfo, block: str) -> str:
    nodes, edges = read_mermaid(block)
    folder = "" if info.kind == "whole" else info.path
    links = {}
    for node, label in nodes.items():
        path = f"{folder}/{label}" if folder else label
        target = folder_page(path[:-1], "doc.md") if path.endswith("/") else docs_page(path)
        links[node] = info.link(target)
    return draw(nodes, edges, links)


def _without_source(text: str, info: PageInfo) -> str:
    """Put a link where the source is quoted: on the site it has a page of its own."""
    match = _ORIGINAL.search(text)
    if not match:
        return text
    ticks = match.group(1)
    end = text.find(f"\n{ticks}\n", match.end() - 1)
    if end < 0:
        return text
    link = f"[{code(info.path)}]({info.link(source_page(info.path))}#L1), with a link for every line."
    return text[: match.start()] + f"## Original Source\n\n{link}\n" + text[end + len(ticks) + 2 :]


def stage_page(info: PageInfo, text: str, places: Places) -> str:
    """Return a Markdown page with its head, for the generator."""
    more = {}
    if info.kind == "file":
        text = _without_source(text, info)
    elif (match := _MERMAID.search(text)) is not None:
        more["graph"] = _graph(info, match.group(1))
    return _head(info, places, **more) + _guarded(text)


def stage_source(info: PageInfo, found: Found) -> str:
    """Return the page of a file's source, one anchor per line, for the generator."""
    text = read_text(found)
    head = _head(info, Places("."))
    title = f"# {code(info.path)}\n\n"
    if not text:
        words = "Empty." if not found.size else f"Not text that can be shown: {found.size:,} bytes."
        return head + title + words + "\n"
    language = grammars.languages().get(
        grammars.detect(info.path.rpartition("/")[2], text[:256].encode("utf-8", "replace"))
    )
    word = (language.highlight or language.fence) if language and len(text) <= _PLAIN_BYTES else "text"
    block = fence(text, word)
    ticks, _, rest = block.partition("\n")
    return head + title + _guarded(f"{ticks} {{lineNos=inline}}\n{rest}")

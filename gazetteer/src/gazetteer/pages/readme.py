"""A README inside a page of ours: its words and structure, none of its links, images or HTML."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markdown_it import MarkdownIt

from gazetteer.markdown import code, fence, text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from markdown_it.token import Token

__all__ = ["readable"]


def _inline(tokens: Sequence[Token]) -> str:
    out: list[str] = []
    for token in tokens:
        if token.type == "text":
            # text() trims; the spaces between two runs belong to the sentence.
            lead = " " if token.content[:1].isspace() else ""
            tail = " " if token.content[-1:].isspace() else ""
            out.append(lead + text(token.content) + tail)
        elif token.type == "code_inline":
            out.append(code(token.content))
        elif token.type in ("softbreak", "hardbreak"):
            out.append(" ")
        elif token.type in ("strong_open", "strong_close"):
            out.append("**")
    return " ".join("".join(out).replace("****", "").split())


def _row(tokens: Sequence[Token]) -> str:
    cells = [_inline(token.children or ()) for token in tokens if token.type == "inline"]
    return "; ".join(cell for cell in cells if cell)


def readable(markdown: str) -> str:
    """Return the text of a README as Markdown that is safe to put inside a page.

    Its headings become bold lines, so that the page's own outline stays whole; its first one,
    the title, is left out. Raw HTML, images and links' targets are left out.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    blocks: list[str] = []
    depth = 0
    tokens = parser.parse(markdown)
    titled = False
    row: list[Token] | None = None
    item_open = False
    for index, token in enumerate(tokens):
        if token.type in ("bullet_list_open", "ordered_list_open"):
            depth += 1
        elif token.type in ("bullet_list_close", "ordered_list_close"):
            depth -= 1
        elif token.type == "list_item_open":
            item_open = True
        elif token.type == "tr_open":
            row = []
        elif token.type == "tr_close":
            blocks.append(f"- {_row(row or ())}")
            row = None
        elif token.type in ("fence", "code_block"):
            blocks.append(fence(token.content, token.info.split(" ")[0] if token.info.isalnum() else "").rstrip("\n"))
        elif token.type == "inline":
            if row is not None:
                row.append(token)
                continue
            words = _inline(token.children or ())
            if not words:
                continue
            if tokens[index - 1].type == "heading_open":
                if not titled and tokens[index - 1].tag == "h1":
                    titled = True
                    continue
                words = "**" + words.replace("**", "") + "**"
            if depth:
                words = "  " * (depth - 1) + ("- " if item_open else "  ") + words
                item_open = False
            blocks.append(words)
    return _joined(blocks)


def _joined(blocks: list[str]) -> str:
    out: list[str] = []
    for block in blocks:
        is_item = block.lstrip().startswith("- ")
        if out and is_item and out[-1].lstrip().startswith("- "):
            out[-1] += "\n" + block
        else:
            out.append(block)
    return "\n\n".join(out)

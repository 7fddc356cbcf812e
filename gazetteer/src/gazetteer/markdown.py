"""Writing Markdown that cannot be broken or injected into by what it quotes.

Every piece of text that comes from a repository goes through :func:`text`, :func:`code` or
:func:`fence`; whatever characters it holds, it shows as itself and as nothing else.
"""

from __future__ import annotations

import re

from gazetteer.read.text import one_line

__all__ = ["Page", "clean", "code", "fence", "link", "slug", "text", "words"]

_STARTS = re.compile(r"^(\d+)([.)])")
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufeff\ufffe\uffff]"
)
# What Markdown, and GitHub's additions to it, could take for marks inside a line of words.
_INNER = re.compile(r"([\\`*\[\]<>&~$]|(?<!\w)_|_(?!\w)|:(?=//)|@(?=\w)|\|)")
# ``x``, `x` and :role:`x`; the ticks of a run are alike and hold none.
_CODE_RUN = re.compile(r"(?::[\w:+-]+:)?(``[^`]+``|`[^`]+`)(?!`)_*")
_SIMPLE = re.compile(r"[!-_a-~]+(?: [!-_a-~]+)*\Z")
_TICKS = re.compile(r"`+")
_SLUG_DROP = re.compile(r"[^\w\- ]")


def clean(value: str) -> str:
    """Replace control, direction and non-characters by U+FFFD; new lines and tabs stay."""
    return _UNPRINTABLE.sub("\ufffd", value)


def text(value: str) -> str:
    """Return ``value`` as plain words on one line: nothing in it is Markdown or HTML any more."""
    flat = _INNER.sub(r"\\\1", clean(one_line(value))).replace("www.", "www\\.")
    if flat[:1] in {"#", "+", "-", "=", "!"}:
        return "\\" + flat
    return _STARTS.sub(r"\1\\\2", flat)


def words(value: str) -> str:
    """Return a sentence of a docstring: what it sets as code stays code, all else is plain words."""
    out: list[str] = []
    for index, part in enumerate(_CODE_RUN.split(one_line(value))):
        if index % 2:
            out.append(code(part.strip("`").removeprefix("~")))
        elif part:
            lead = " " if part[0] == " " else ""
            tail = " " if len(part) > 1 and part[-1] == " " else ""
            out.append(lead + text(part) + tail)
    return "".join(out)


def code(value: str) -> str:
    """Return ``value`` as a code span on one line."""
    if _SIMPLE.match(value):
        return f"`{value}`"
    flat = clean(one_line(value)) or "\ufffd"
    if "`" not in flat:
        return f"`{flat}`"
    ticks = "`" * (max(len(run) for run in _TICKS.findall(flat)) + 1)
    return f"{ticks} {flat} {ticks}"


def fence(value: str, language: str = "") -> str:
    """Return ``value`` as a fenced block that none of its lines can close."""
    body = clean(value.replace("\r\n", "\n").replace("\r", "\n")).rstrip("\n")
    longest = max((len(run) for run in _TICKS.findall(body)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{body}\n{ticks}\n"


def link(label: str, target: str) -> str:
    """Return a link; ``label`` is Markdown already, ``target`` percent-encoded already."""
    return f"[{label}]({target})"


def slug(heading: str) -> str:
    """Return the anchor of a heading as GitHub makes it."""
    return _SLUG_DROP.sub("", heading.strip().lower()).replace(" ", "-")


class Page:
    """A page being written: headings, paragraphs and lists, without empty sections.

    A heading that nothing follows is left out, and with it every heading that then has nothing.
    """

    def __init__(self, title: str) -> None:
        self._parts: list[tuple[int, str]] = [(1, f"# {title}\n")]
        self.sections: list[str] = []

    def heading(self, level: int, plain: str) -> None:
        """Begin a section whose title is plain words of ours."""
        self._parts.append((level, f"{'#' * level} {plain}\n"))

    def add(self, block: str) -> None:
        """Add a block of Markdown; an empty one adds nothing."""
        if block:
            self._parts.append((0, block if block.endswith("\n") else block + "\n"))

    def items(self, lines: list[str]) -> None:
        """Add a list; an empty one adds nothing."""
        if lines:
            self._parts.append((0, "- " + "\n- ".join(lines) + "\n"))

    def render(self) -> str:
        """Return the page; ``sections`` then names the level-2 sections that have content."""
        kept: list[str] = []
        sections: list[str] = []
        pending: list[tuple[int, str]] = []
        for level, block in self._parts:
            if level == 0:
                for depth, head in pending:
                    kept.append(head)
                    if depth == 2:
                        sections.append(head[3:-1])
                pending.clear()
                kept.append(block)
                continue
            while pending and pending[-1][0] >= level:
                pending.pop()
            pending.append((level, block))
        self.sections = sections
        return "\n".join(kept)

"""Small pure functions on text: comments, docstrings, first lines, decoding."""

from __future__ import annotations

import codecs
import inspect
import re

__all__ = [
    "comment_text",
    "decode",
    "first_line",
    "is_licence",
    "one_line",
    "plain_sentence",
    "sentence",
    "split_commas",
    "split_scope",
    "tidy",
    "unquote",
]

_PREFIX = re.compile(r"^\s*(?://[/!]?<?|/\*+!?|\*+/|\*(?!/)|#+|--|;+|\.\.(?=\s|$))[ \t]?")
_STRING = re.compile(r"""^([rRuU]?)("{3}|'{3}|"|')(.*?)(?:\2)?$""", re.DOTALL)
_LICENCE = re.compile(r"copyright|licen[cs]ed? under|spdx-|all rights reserved|permission is hereby", re.IGNORECASE)
_NOISE = re.compile(
    r"^\s*(?:!/|-\*-|vim?:|coding[:=]|mypy:|ruff:|pylint:|flake8|noqa|type:|eslint|clang-format|NOLINT|@ts-|"
    r"shellcheck|owner\(s\):|@generated)",
    re.IGNORECASE,
)
_CODING = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`\"'(\[])")


def one_line(text: str, limit: int = 0) -> str:
    """Collapse all white space to single spaces and cut at ``limit`` characters, marked by ``…``."""
    flat = " ".join(text.split())
    if limit and len(flat) > limit:
        return flat[: limit - 1].rstrip() + "…"
    return flat


def unquote(literal: str) -> str:
    """Return what a Python string literal says, dedented; ``""`` for bytes and f-strings."""
    match = _STRING.match(literal.strip())
    return inspect.cleandoc(match.group(3)).strip() if match else ""


def comment_text(raw: str) -> str:
    """Take the comment marks off a comment; rulers and directives to tools go as well."""
    lines = []
    for line in raw.splitlines():
        text = _PREFIX.sub("", line.rstrip())
        text = re.sub(r"\s*\*+/\s*$", "", text)
        if _NOISE.match(text) or (text and not any(c.isalnum() for c in text)):
            continue
        lines.append(text)
    return inspect.cleandoc("\n".join(lines)).strip()


def is_licence(text: str) -> bool:
    """Tell whether a comment is a licence or copyright notice."""
    return bool(_LICENCE.search(text))


def first_line(text: str) -> str:
    """Return the first line that says something, on one line."""
    for line in text.splitlines():
        if any(c.isalnum() for c in line):
            return one_line(line, 300)
    return ""


def sentence(text: str, limit: int = 300) -> str:
    """Return the first sentence of the first paragraph."""
    paragraph: list[str] = []
    for line in text.splitlines():
        if not line.strip() or not any(c.isalnum() for c in line):
            if paragraph:
                break
            continue
        paragraph.append(line.strip())
    joined = one_line(" ".join(paragraph))
    return one_line(_SENTENCE_END.split(joined, maxsplit=1)[0], limit)


def plain_sentence(markup: str, limit: int = 300) -> str:
    """Return the first sentence of Markdown or reStructuredText without its marks; badges are skipped."""
    plain = re.sub(r"\[?!\[[^\]]*\]\([^)]*\)(?:\]\([^)]*\))?|<[^>]+>", "", markup)
    plain = re.sub(r"\[([^\]]+)\](?:\([^)]*\)|\[[^\]]*\])", r"\1", plain)
    plain = re.sub(r"`([^`<]+?) <[^>]*>`_+", r"\1", plain)
    plain = re.sub(r"\*\*|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)", "", plain)
    return sentence(plain, limit)


def split_commas(text: str) -> list[str]:
    """Split a list of bases at its own commas, not at those inside brackets."""
    text = text.strip()
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    depth = 0
    parts = [""]
    for char in text:
        depth += (char in "([{<") - (char in ")]}>")
        if char == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def split_scope(name: str) -> tuple[str, str]:
    """Split ``ns::Class::name`` into its scope and its last part; template arguments stay whole."""
    if "::" not in name:
        return "", name
    depth = 0
    cut = -1
    for at, char in enumerate(name):
        if name.startswith("operator", at):
            break
        depth += (char == "<") - (char == ">")
        if depth == 0 and name.startswith("::", at):
            cut = at
    return ("", name) if cut < 0 else (name[:cut], name[cut + 2 :])


def tidy(signature: str) -> str:
    """Take out the spaces that breaking a signature over lines leaves behind its brackets."""
    out = re.sub(r"([(\[]) ", r"\1", signature)
    return re.sub(r",? ([)\]])", r"\1", out)


def decode(data: bytes) -> tuple[str, str] | None:
    """Decode a file.

    Returns:
        The text and the name of its encoding, or None for binary data. Bytes that are no text in
        UTF-8, in the encoding that a byte order mark or a coding line names, are read as Latin-1.
    """
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            try:
                return data.decode(name), name
            except UnicodeDecodeError:
                break
    if b"\0" in data[:8192]:
        return None
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        pass
    for line in data.split(b"\n", 2)[:2]:
        match = _CODING.match(line)
        if match:
            try:
                return data.decode(match.group(1).decode("ascii")), match.group(1).decode("ascii")
            except (LookupError, UnicodeDecodeError, ValueError):
                break
    control = sum(1 for byte in data[:8192] if byte < 9 or 13 < byte < 27)
    if control > len(data[:8192]) // 50:
        return None
    return data.decode("latin-1"), "latin-1"

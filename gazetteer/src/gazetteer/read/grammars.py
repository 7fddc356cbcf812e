"""Languages as data: the registry, and each language's parser and query, loaded when first needed.

Nothing here is fetched: grammars are compiled into the wheels that the registry names.
"""

from __future__ import annotations

import functools
import importlib
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, TypeVar

import tree_sitter

from gazetteer.errors import LanguageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Grammar", "Language", "Rule", "detect", "grammar", "languages", "rules"]

_SECTIONS = ("security", "performance", "idiom")
_INSIDE = ("", "loop", "loop2", "async")


@dataclass(frozen=True, kw_only=True)
class Language:
    """One entry of the registry.

    Attributes:
        name: Key of the entry.
        grammar: Import path of the wheel's grammar function.
        queries: File names of the query; languages that share syntax share files.
        title: How pages name the language.
        fence: Word after the opening fence of a code block.
        highlight: Name that the site's highlighter knows it by, where that is not ``fence``.
        separator: Between the parts of a qualified name.
        resolver: How imports become files.
        prose: Whether headings and identifiers are its keywords.
        data: Whether it holds data, not code.
        inline_grammar: A second grammar for the ranges that ``@inline`` captures.
        inline_query: The query of that grammar.
        extensions: File extensions, with their dot.
        filenames: Whole file names.
        interpreters: Program names after ``#!``.
        stdlib: Prefixes of imports that belong to the language itself.
        names: Node types that are identifiers.
    """

    name: str
    grammar: str
    queries: tuple[str, ...]
    title: str
    fence: str
    highlight: str = ""
    separator: str = "."
    resolver: str = "none"
    prose: bool = False
    data: bool = False
    inline_grammar: str = ""
    inline_query: str = ""
    extensions: tuple[str, ...] = ()
    filenames: tuple[str, ...] = ()
    interpreters: tuple[str, ...] = ()
    stdlib: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a finding means and where it counts."""

    name: str
    section: str
    text: str
    inside: str = ""


@dataclass(frozen=True)
class Grammar:
    """A parser with its compiled query.

    Attributes:
        parser: Parses bytes to a tree.
        query: The language's query.
        names: Captures every identifier.
    """

    parser: tree_sitter.Parser
    query: tree_sitter.Query
    names: tree_sitter.Query | None = None


def _data(name: str) -> str:
    return resources.files("gazetteer.read").joinpath("languages", name).read_text("utf-8")


_T = TypeVar("_T")


def _entry(cls: Callable[..., _T], name: str, table: dict[str, Any]) -> _T:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    try:
        return cls(name=name, **values)
    except TypeError as error:
        msg = f"entry [{name}]: {error}. Compare it with its neighbours."
        raise LanguageError(msg) from error


@functools.cache
def languages() -> Mapping[str, Language]:
    """Return every language of the registry by name."""
    return {name: _entry(Language, name, table) for name, table in tomllib.loads(_data("registry.toml")).items()}


@functools.cache
def rules() -> Mapping[str, Rule]:
    """Return every rule by name.

    Raises:
        LanguageError: A rule names a section or a place that does not exist.
    """
    found = {name: _entry(Rule, name, table) for name, table in tomllib.loads(_data("rules.toml")).items()}
    for rule in found.values():
        if rule.section not in _SECTIONS or rule.inside not in _INSIDE:
            msg = f"rule [{rule.name}]: section is one of {_SECTIONS}, inside one of {_INSIDE}."
            raise LanguageError(msg)
    return found


@functools.cache
def _tables() -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    extensions: dict[str, str] = {}
    filenames: dict[str, str] = {}
    interpreters: dict[str, str] = {}
    for language in languages().values():
        for target, keys in (
            (extensions, language.extensions),
            (filenames, language.filenames),
            (interpreters, language.interpreters),
        ):
            for key in keys:
                if target.setdefault(key, language.name) != language.name:
                    msg = f"{key!r} belongs to both [{target[key]}] and [{language.name}]."
                    raise LanguageError(msg)
    return extensions, filenames, interpreters


def detect(name: str, head: bytes) -> str:
    """Return the name of the language of a file, or ``""``.

    Args:
        name: The file's own name, without folders.
        head: Its first bytes, for ``#!``.
    """
    extensions, filenames, interpreters = _tables()
    if name in filenames:
        return filenames[name]
    parts = name.lower().split(".")
    for first in range(1, len(parts)):
        found = extensions.get("." + ".".join(parts[first:]))
        if found:
            return found
    if head.startswith(b"#!"):
        words = head.split(b"\n", 1)[0][2:].decode("utf-8", "replace").split()
        programs = [word.rsplit("/", 1)[-1] for word in words]
        if programs[:1] == ["env"]:
            programs = [word for word in programs[1:] if not word.startswith("-")]
        if programs:
            return interpreters.get(programs[0], interpreters.get(programs[0].rstrip("0123456789."), ""))
    return ""


def _load(path: str, query_files: tuple[str, ...], names: tuple[str, ...] = ()) -> Grammar:
    module_name, _, function = path.partition(":")
    try:
        module = importlib.import_module(module_name)
        language = tree_sitter.Language(getattr(module, function)())
    except (ImportError, AttributeError) as error:
        msg = f"grammar {path!r} cannot be loaded: {error}. Install its wheel."
        raise LanguageError(msg) from error
    try:
        query = tree_sitter.Query(language, "\n".join([*map(_data, query_files), "(ERROR) @error\n"]))
        kinds = " ".join(f"({name})" for name in names)
        name_query = tree_sitter.Query(language, f"[{kinds}] @ref") if names else None
    except tree_sitter.QueryError as error:
        msg = f"{' + '.join(query_files)}: {error}"
        raise LanguageError(msg) from error
    for index in range(query.capture_count):
        name = query.capture_name(index)
        if name.startswith("find.") and name[5:] not in rules():
            msg = f"{' + '.join(query_files)}: @{name} has no entry in rules.toml."
            raise LanguageError(msg)
    return Grammar(tree_sitter.Parser(language), query, name_query)


@functools.cache
def grammar(name: str, *, inline: bool = False) -> Grammar:
    """Return the parser and query of a language, loaded once per process.

    Raises:
        LanguageError: The wheel is missing, or the query does not fit the grammar.
    """
    language = languages()[name]
    if inline:
        return _load(language.inline_grammar, (language.inline_query,))
    return _load(language.grammar, language.queries, language.names)

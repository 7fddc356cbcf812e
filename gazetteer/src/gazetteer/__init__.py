"""Gazetteer documents a whole repository from its syntax trees.

>>> import gazetteer
>>> summary = gazetteer.build("repo", "out")  # doctest: +SKIP
>>> gazetteer.check("out").broken  # doctest: +SKIP
[]
"""

from __future__ import annotations

from gazetteer.build import Summary, build
from gazetteer.check import Broken, Report, check
from gazetteer.errors import (
    BrokenLinksError,
    GazetteerError,
    LanguageError,
    OutputError,
    RepositoryError,
    SiteError,
    UsageError,
)
from gazetteer.read.collect import read_repository
from gazetteer.search import Hit, search

__all__ = [
    "Broken",
    "BrokenLinksError",
    "GazetteerError",
    "Hit",
    "LanguageError",
    "OutputError",
    "Report",
    "RepositoryError",
    "SiteError",
    "Summary",
    "UsageError",
    "build",
    "check",
    "read_repository",
    "search",
]

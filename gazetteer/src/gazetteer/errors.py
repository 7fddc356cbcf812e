"""Every error Gazetteer raises, in one tree.

::

    GazetteerError
    ├── UsageError        (ValueError)         an argument cannot be used as given
    ├── RepositoryError   (NotADirectoryError) the repository cannot be read
    ├── OutputError       (OSError)            the output folder cannot be used
    ├── LanguageError     (ValueError)         a language's data files are wrong
    ├── SiteError         (RuntimeError)       the site generator or the search indexer failed
    └── BrokenLinksError  (ValueError)         ``check`` found links that lead nowhere

Each message names what failed and what to do about it.
"""

from __future__ import annotations

__all__ = [
    "BrokenLinksError",
    "GazetteerError",
    "LanguageError",
    "OutputError",
    "RepositoryError",
    "SiteError",
    "UsageError",
]


class GazetteerError(Exception):
    """Base of every error that Gazetteer raises on purpose."""


class UsageError(GazetteerError, ValueError):
    """An argument cannot be used as given."""


class RepositoryError(GazetteerError, NotADirectoryError):
    """The repository does not exist or cannot be listed."""


class OutputError(GazetteerError, OSError):
    """The output folder cannot be used; nothing in it was deleted."""


class LanguageError(GazetteerError, ValueError):
    """A language's registry entry or query file is wrong."""


class SiteError(GazetteerError, RuntimeError):
    """The static site could not be generated; the Markdown pages are whole."""


class BrokenLinksError(GazetteerError, ValueError):
    """Some links lead nowhere.

    Attributes:
        count: How many links are broken.
    """

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} broken link(s)")
        self.count = count

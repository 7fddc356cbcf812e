"""`View`: what one rank sees of an attempt, and when it takes the checkpoint for committed."""

from __future__ import annotations

# Paths are str, here as in the storage package.
from contextlib import suppress

from milepost.commit.contents import list_names, read_manifest
from milepost.commit.place import Place
from milepost.commit.waiting import News, is_at_least, raise_if_aborted, unseen_error
from milepost.errors import EntryNotFoundError
from milepost.format.manifest import Manifest, identity_of
from milepost.format.names import ABORTED_NAME, MANIFEST_NAME, index_name
from milepost.storage import Folder

__all__ = ["View"]


class View:
    """What one rank sees of an attempt.

    Attributes:
        path: The absolute path of the checkpoint.
        folder: The folder in which the checkpoint is made.
        id: The attempt's id, the same for all ranks.
        rank: This rank.
        world_size: How many ranks there are.
        marked: This rank has arrived: its mark is there (perhaps made by a writer that was lost since).
        committed: The checkpoint is committed, by this rank or another; at the latest `close` publishes it.
        hidden: It is committed, as the other ranks said, but this rank's view of the folder does not show it.
    """

    def __init__(self, place: Place, attempt: str, rank: int, world_size: int) -> None:
        self.path, self.folder, self.id = place.path, place.folder, attempt
        self.rank, self.world_size = rank, world_size
        self.marked = self.committed = self.hidden = False
        self._place = place
        self._identity = ""
        self._seen, self._doubtful = 0, False

    def inside(self) -> Folder:
        """The attempt's folder, wherever it has been moved since."""
        return self._place.inside()

    def names(self) -> list[str]:
        """The names in it."""
        return list_names(self.inside())

    def has(self, name: str) -> bool:
        """Whether a file is in it."""
        with suppress(EntryNotFoundError):
            return self.inside().stat(name) is not None
        return False

    def check_view(self, names: list[str]) -> None:
        """Raise if a listing does not show this rank's own mark: then it shows nothing for sure."""
        if self.marked and index_name(self.rank) not in names:
            self._doubtful = True
            raise unseen_error(self.folder)

    def stop_if_aborted(self) -> None:
        """Raise AbortedError if another rank has failed."""
        if self.has(ABORTED_NAME):
            raise_if_aborted(self.inside(), self.names())

    def sees_commit(self, names: list[str] | None = None) -> bool:
        """Whether the checkpoint is committed, by whichever rank; if so that is durable on return.

        Args:
            names: A listing of the folder, if there is one already.
        """
        if self.committed:
            return True
        names = self.names() if names is None else names
        if MANIFEST_NAME not in names and not self._is_superseded(names):
            return False
        self._place.settle()
        self.committed = True
        return True

    def _is_superseded(self, names: list[str]) -> bool:
        """Whether it was published, and perhaps replaced and cleared: the path must show it or a later."""
        if not self.marked or index_name(self.rank) in names:
            return False
        published = self._published()
        return published is not None and (published.attempt == self.id or published.sequence > self._seen)

    def _published(self) -> Manifest | None:
        with self._place.at_path() as folder:
            return None if folder is None else read_manifest(folder)

    def heard(self, news: News) -> bool:
        """Take in what a meeting knows; whether it says that all ranks have arrived, or more."""
        if news.identity:
            self.committed, self._identity = True, news.identity
        elif news.failure is not None and not self.sees_commit():
            raise news.failure
        return news.arrived or self.committed

    def identity(self) -> str:
        """What `is_at_least` knows the committed checkpoint by; "" where that is not to be seen any more."""
        found = None if self._identity else self._place.committed()
        if found is not None:
            self._identity = f"{found.sequence}:{identity_of(found)}"
        return self._identity

    def is_pending(self) -> bool:
        """Whether the committed attempt may still be on its way to the path."""
        return self._place.is_pending()

    def is_shown(self) -> bool:
        """Whether this checkpoint is seen at its path, or a later one, or that it has been removed again.

        True also if there is no identity to know it by.
        """
        if not self._identity or is_at_least(self._published(), self._identity):
            return True
        return not self.names() or self.is_pending()

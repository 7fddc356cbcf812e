"""One rank's part in one try at one path, from the hidden folder to the commit."""

from __future__ import annotations

# Paths are str, here as in the storage package.
from collections.abc import Callable
from contextlib import suppress

from milepost.commit.folders import published_manifest
from milepost.commit.locate import VISIBLE_SECONDS, is_at_least
from milepost.commit.marks import assemble
from milepost.commit.part import Part
from milepost.commit.publish import is_pending, publish
from milepost.commit.recover import commit_manifest, tidy
from milepost.commit.waiting import News, Wait, raise_if_aborted, timeout_error
from milepost.errors import (
    CommitError,
    CommitTimeoutError,
    EntryExistsError,
    EntryNotFoundError,
    LoadError,
    error_context,
)
from milepost.format.manifest import identity_of
from milepost.format.names import ABORTED_NAME, ARRIVED_NAME, MANIFEST_NAME, index_name, ranks_in

__all__ = ["Attempt"]

_PUBLISH_SECONDS = 5.0


class Attempt(Part):
    """One rank's part in one try at one path, and what it does for all ranks.

    Its attributes are those of `Part`. For one thread at a time, in the process that made it.
    """

    def complete(self) -> bool:
        """Commit and publish, if every rank has arrived and none has failed; else do nothing.

        Any number of ranks may call it, any number of times. Afterwards `committed` tells.

        Returns:
            Whether this call made the manifest. Then the checkpoint is published and durable.

        Raises:
            AbortedError: Another rank has failed.
            CommitError: The ranks' marks contradict each other.
            CorruptCheckpointError: A mark is damaged.
            TargetError: Committed, but something that may not be replaced is at the path now.
        """
        if self.committed:
            return False
        with error_context(path=self.path, rank=self.rank, phase="commit"):
            names = self._names()
            if self._sees_commit(names):
                return False
            raise_if_aborted(self._folder(), names)
            self._check_view(names)
            if not ranks_in(names) >= set(range(self.world_size)):
                return False
            try:
                assembled = assemble(self._folder(), self.id, ranks_in(names), live=True)
                if assembled is None:
                    raise CommitError(
                        f"a file of this checkpoint has gone while it was saved: {self.folder}",
                        hint="does another program clear this folder?",
                    )
            except (CommitError, LoadError) as error:
                if self._sees_commit(self._names()):
                    return False
                self.abort(error)
                raise
            try:
                created = commit_manifest(self._storage, self.folder, *assembled)
            except EntryNotFoundError:  # another rank has published the folder just now
                created = False
            if created:
                self.committed = True
                publish(self._storage, self.path, assembled[0])
                if self.world_size > 1:  # all ranks have passed the earlier attempts of this start
                    tidy(self._storage, self.path, keep=self.id)
            elif not self._sees_commit(self._names()):
                raise CommitError(f"the folder of this attempt is gone: {self.folder}")
            return created

    def _sees_commit(self, names: list[str]) -> bool:
        """Whether another rank has committed; if so that is durable on return."""
        if MANIFEST_NAME not in names and not self._is_superseded(names):
            return False
        with suppress(EntryNotFoundError):  # else published, so that its names are durable
            self._storage.sync_folder(self.folder)
        self.committed = True
        return True

    def _is_superseded(self, names: list[str]) -> bool:
        """Whether it was published, and perhaps replaced and cleared: the path must show it or a later."""
        if not self.marked or index_name(self.rank) in names:
            return False
        published = published_manifest(self._storage, self.path)
        return published is not None and (published.attempt == self.id or published.sequence > self._seen)

    def sees_commit(self) -> bool:
        """Whether the checkpoint is committed, by whichever rank; if so that is durable on return."""
        return self.committed or self._sees_commit(self._names())

    def wait_for_marks(
        self, timeout_seconds: float, poll_seconds: float = 0.5, news: Callable[[], News] | None = None
    ) -> None:
        """Returns when every rank has arrived.

        Rank 0 lists the marks and then says so; the others look only for its word, and list for
        themselves only when its beacon stands still.

        Args:
            timeout_seconds: How long to wait.
            poll_seconds: The longest pause between two looks; the first ones are shorter.
            news: What a meeting of the ranks knows, which counts as well as what the folder shows.

        Raises:
            AbortedError: A rank has failed; raised at once.
            CommitTimeoutError: Ranks are missing; it names them and what they did last.
        """
        with error_context(path=self.path, rank=self.rank, phase="wait_for_marks"):
            wait = self._wait(timeout_seconds, poll_seconds, "wait_for_marks", news)
            while not (self._heard(wait.news) or self._has(ARRIVED_NAME) or self._has(MANIFEST_NAME)):
                # Without its own mark it may have been committed, replaced and cleared meanwhile.
                if wait.leads() or self._has(ABORTED_NAME) or not self._has(index_name(self.rank)):
                    names = self._names()
                    if self._sees_commit(names):
                        return
                    raise_if_aborted(self._folder(), names)
                    if ranks_in(names) >= set(range(self.world_size)):
                        with suppress(EntryExistsError, EntryNotFoundError):
                            self._word.put(ARRIVED_NAME, b"{}")
                        return
                if not wait.pause():
                    raise self._timeout(timeout_seconds)

    def wait_for_commit(
        self, timeout_seconds: float, poll_seconds: float = 0.5, news: Callable[[], News] | None = None
    ) -> None:
        """Returns when it is committed, by whomever, and mostly published; commits when rank 0 stands still.

        Args:
            timeout_seconds: How long to wait.
            poll_seconds: The longest pause between two looks.
            news: As for `wait_for_marks`.

        Raises:
            AbortedError: A rank has failed before the commit; raised at once.
            CommitTimeoutError: It was not committed in time.
        """
        if self._root is None:  # it was at its path from the beginning
            return
        with error_context(path=self.path, rank=self.rank, phase="wait_for_commit"):
            wait = self._wait(timeout_seconds, poll_seconds, "wait_for_commit", news)
            while not (self.committed or self._is_committed(wait)):
                if not wait.pause():
                    raise self._timeout(timeout_seconds)
            wait = self._wait(_PUBLISH_SECONDS, poll_seconds, "wait_for_commit")
            while is_pending(self._storage, self.path, self.id) and wait.pause():
                pass
            if self._identity:
                wait = self._wait(VISIBLE_SECONDS, poll_seconds, "wait_for_commit")
                while not (shows := self._shows(self._identity)) and wait.pause():
                    pass
                self.hidden = not shows

    def _shows(self, identity: str) -> bool:
        """Whether this checkpoint is seen at its path, or a later one, or that it has been removed again."""
        if is_at_least(published_manifest(self._storage, self.path), identity):
            return True
        return not self._names() or is_pending(self._storage, self.path, self.id)

    def identity(self) -> str:
        """What `is_at_least` knows the committed checkpoint by; "" where that is not to be seen any more."""
        for place in () if self._identity else (self.folder, self.path):
            found = published_manifest(self._storage, place)
            if found is not None and found.attempt == self.id:
                self._identity = f"{found.sequence}:{identity_of(found)}"
        return self._identity

    def _heard(self, news: News) -> bool:
        """Whether a meeting says that all ranks have arrived, or more."""
        if news.identity:
            self.committed, self._identity = True, news.identity
        elif news.failure is not None and not self.sees_commit():
            raise news.failure
        return news.arrived or self.committed

    def _is_committed(self, wait: Wait) -> bool:
        self._heard(wait.news)
        if self.committed:
            return True
        if wait.leads():
            self.complete()
        elif self._has(MANIFEST_NAME) or not self._has(index_name(self.rank)):
            self._sees_commit(self._names())
        elif self._has(ABORTED_NAME):
            raise_if_aborted(self._folder(), self._names())
        return self.committed

    def _timeout(self, seconds: float) -> CommitTimeoutError:
        self._check_view(names := self._names())
        return timeout_error(self._folder(), names, self.world_size, seconds)

    def _wait(
        self,
        timeout_seconds: float,
        poll_seconds: float,
        phase: str,
        news: Callable[[], News] | None = None,
    ) -> Wait:
        return Wait(
            self._clock,
            self._folder(),
            rank=self.rank,
            timeout_seconds=timeout_seconds,
            poll_seconds=poll_seconds,
            heartbeat=lambda: self.progress(phase),
            news=news,
        )

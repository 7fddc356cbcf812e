"""`Place`: what a commit asks of the kind of storage that it runs on.

The steps of an attempt are the same everywhere: data, marks, the manifest that is the commit, publishing.
How a rank gets into an attempt, how the manifest is created and how a checkpoint gets to its path differ.
`milepost.commit.by_rename` does it on file systems, with hidden folders, locks and renames.
"""

from __future__ import annotations

# Paths are str, here as in the storage package.
from contextlib import AbstractContextManager
from typing import Protocol

from milepost.format.index import FileDigest
from milepost.format.manifest import Manifest
from milepost.storage import Folder, NewFile

__all__ = ["Place"]


class Place(Protocol):
    """Where one rank works on one attempt at one path.

    Attributes:
        path: The absolute path of the checkpoint.
        folder: Where the files of the attempt are, for hooks and messages.
    """

    path: str
    folder: str

    # -- coming and going

    def prepare(self, *, tidy: bool) -> None:
        """Make the parents of the path; with `tidy`, finish or remove what earlier attempts left.

        Raises:
            CommitError: Another process saves here under an attempt id that this one cannot know.
            StorageError: The parents cannot be made.
        """

    def enter(self) -> None:
        """Join the attempt. From then on nobody takes it for dead while this process lives.

        Raises:
            CommitError: Somebody clears the attempt, and does not end.
            StorageError: The attempt cannot be begun.
        """

    @property
    def entered(self) -> bool:
        """Whether this process has joined the attempt and not left it."""

    def leave(self) -> None:
        """Give up the place in the attempt; idempotent, and without effect in a forked process."""

    # -- the attempt

    def inside(self) -> Folder:
        """The open attempt, wherever it has been moved since. CommitError after `leave`."""

    def names(self) -> list[str]:
        """The names in the attempt's folder, opened anew; none if there is no such folder."""

    def put(self, name: str, data: bytes, *, replace: bool = False, sync: bool = False) -> None:
        """Create a small file whole; EntryExistsError if there is one, unless `replace`.

        With `sync` its bytes are durable on return.
        """

    def create_data(self, name: str) -> NewFile:
        """Create a data file."""

    def discard(self, name: str) -> None:
        """Remove a data file that a lost writer left."""

    def attachments(self, world_size: int) -> list[FileDigest]:
        """The files that hooks have added, at any depth, durable and hashed.

        Raises:
            CommitError: A hook added something that a checkpoint cannot hold, or used a name of ours.
        """

    def remove(self) -> None:
        """Remove the attempt with everything in it, and leave it."""

    # -- the commit

    def next_sequence(self) -> int:
        """The number of a save that comes now: one above all that can be seen of saves to this path."""

    def commit(self, manifest: Manifest, shards: bytes | None) -> bool:
        """Create the manifest, and the shard map if there is one. This is the commit.

        Returns:
            Whether this call created it, so that it is durable. Else another rank has.
        """

    def settle(self) -> None:
        """Returns when what others have created in the attempt is durable."""

    def publish(self, manifest: Manifest) -> None:
        """Put the committed attempt in its place at the path; on return that is durable.

        Raises:
            TargetError: Something that may not be replaced is at the path now.
            StorageError: The attempt is neither seen in its folder nor at the path.
        """

    def tidy(self) -> None:
        """Finish or remove what earlier attempts left. Never raises."""

    def finish(self) -> None:
        """Publish the committed attempt if it is still in its folder; after `leave`."""

    def at_path(self) -> AbstractContextManager[Folder | None]:
        """What is at the path: an open folder, or None."""

    def committed(self) -> Manifest | None:
        """The attempt's own manifest, in its folder or at the path; None if it is not to be seen there."""

    def is_pending(self) -> bool:
        """Whether the committed attempt may still be on its way to the path."""

"""`Checkpoint`: an open checkpoint, whose files are checked when they are first used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from milepost.commit.contents import file_digest
from milepost.commit.marks import read_shards
from milepost.errors import CheckpointNotFoundError, CorruptCheckpointError, EntryNotFoundError
from milepost.format.index import FileDigest, Index, decode_index, digest
from milepost.format.limits import MAX_INDEX_BYTES
from milepost.format.manifest import Manifest, identity_of
from milepost.format.names import SHARDS_NAME, data_name
from milepost.format.shards import ShardMap, decode_shard_map
from milepost.storage import Folder, OpenFile

__all__ = ["Checkpoint"]


@dataclass(eq=False)
class Checkpoint:
    """An open checkpoint. It opens the files that the manifest lists; nothing else does.

    `index` and `shards` read a file once, compare it with the manifest, decode it and keep the result. As a
    context manager it closes the folder::

        with locate(storage, path) as checkpoint:
            index = checkpoint.index(0)

    Attributes:
        folder: The open folder. A file that is opened through it belongs to this checkpoint, even if a save
            replaces the checkpoint meanwhile.
        manifest: The manifest; None for a folder of plain ``checkpoint_<n>.pt`` files.
        path: Where the folder is.
        in_place: The checkpoint is complete, but was not published yet.
    """

    folder: Folder
    manifest: Manifest | None
    path: str
    in_place: bool = False
    _indexes: dict[int, Index] = field(default_factory=dict, repr=False)
    _shards: ShardMap | None = field(default=None, repr=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the folder. Data files that were opened through it stay open. Idempotent."""
        self.folder.close()

    @property
    def identity(self) -> str:
        """The SHA-256 of the manifest's file, which no other checkpoint has; for plain files, the path."""
        return self.path if self.manifest is None else identity_of(self.manifest)

    def index(self, rank: int) -> Index:
        """A rank's index. It is as the manifest lists it and describes data files of this checkpoint.

        Raises:
            CorruptCheckpointError: It is damaged, or belongs to another checkpoint.
            EntryNotFoundError: It is gone: a later save may be clearing the folder.
        """
        index = self._indexes.get(rank)
        if index is None:
            index = self._indexes[rank] = self._read_index(rank)
        return index

    def _read_index(self, rank: int) -> Index:
        manifest = self._manifest()
        listed = manifest.indexes[rank]
        place = f"{self.path}/{listed.name}"
        data = self.folder.read(listed.name, MAX_INDEX_BYTES)
        problem = _difference(digest(listed.name, data), listed)
        if problem is not None:
            raise CorruptCheckpointError(
                f"the index is damaged: {problem}: {place}",
                path=place,
                hint="`milepost verify` tells what else is damaged",
            )
        index = decode_index(data, place)
        if (index.attempt, index.rank, index.world_size) != (manifest.attempt, rank, manifest.world_size):
            raise CorruptCheckpointError(
                f"the index belongs to another checkpoint: it is of rank {index.rank} of {index.world_size} "
                f"in attempt {index.attempt}, expected rank {rank} of {manifest.world_size} "
                f"in attempt {manifest.attempt}: {place}",
                path=place,
            )
        if any(file not in manifest.files for file in index.files):
            raise CorruptCheckpointError(
                f"the index lists other files than the manifest: {place}", path=place
            )
        return index

    def data(self, rank: int) -> OpenFile:
        """Open a rank's data file. It has the size that was written. The caller closes it.

        Raises:
            CheckpointNotFoundError: A folder of plain files has none for this rank.
            CorruptCheckpointError: The file or the rank's index is damaged.
            EntryNotFoundError: The file is gone: a later save may be clearing the folder.
        """
        if self.manifest is None:
            return self._plain_data(data_name(rank))
        files = self.index(rank).files
        if len(files) != 1:
            place = f"{self.path}/{self.manifest.indexes[rank].name}"
            raise CorruptCheckpointError(
                f"the index lists {len(files)} files, expected 1: {place}", path=place
            )
        file = self.folder.open(files[0].name)
        if file.size != files[0].size:
            file.close()
            raise CorruptCheckpointError(
                f"the file has {file.size} bytes, {files[0].size} were written: {file.path}", path=file.path
            )
        return file

    def _plain_data(self, name: str) -> OpenFile:
        try:
            return self.folder.open(name)
        except EntryNotFoundError:
            raise CheckpointNotFoundError(
                f"there is no {name} in {self.path}",
                path=self.path,
                hint=f"it holds {', '.join(self.folder.names()[:5]) or 'nothing'}",
            ) from None

    def shards(self) -> ShardMap | None:
        """The shard map, checked; None if the manifest lists none.

        Raises:
            CorruptCheckpointError: It is malformed, or not what the manifest says.
            EntryNotFoundError: It is gone: a later save may be clearing the folder.
        """
        manifest = self._manifest()
        if self._shards is None and manifest.shards is not None:
            self._shards = decode_shard_map(
                read_shards(self.folder, manifest),
                f"{self.path}/{SHARDS_NAME}",
                attempt=manifest.attempt,
                world_size=manifest.world_size,
            )
        return self._shards

    def difference(self, listed: FileDigest) -> str | None:
        """How an index, the shard map or an attachment differs from what the manifest lists; None if equal.

        Raises:
            CorruptCheckpointError: There is no regular file of this name.
            StorageError: The file cannot be read.
        """
        return _difference(file_digest(self.folder, listed.name), listed)

    def _manifest(self) -> Manifest:
        assert self.manifest is not None  # plain files have neither indexes nor a shard map
        return self.manifest


def _difference(found: FileDigest, listed: FileDigest) -> str | None:
    if found.size != listed.size:
        return f"{listed.size} bytes expected, {found.size} found"
    return None if found == listed else f"SHA-256 {listed.sha256} expected, {found.sha256} found"

"""Make the manifest of a full set of marks, and compare a manifest with the files that are there."""

from __future__ import annotations

# Paths are str, here as in the storage package.
import os
from collections.abc import Mapping, Sequence

from milepost.commit.contents import file_digest, list_names, numbers
from milepost.commit.copies import Copies
from milepost.commit.merge import Merger
from milepost.errors import CommitError, CorruptCheckpointError, EntryNotFoundError
from milepost.format.index import FileDigest, Mark, decode_mark, digest
from milepost.format.limits import MAX_INDEX_BYTES
from milepost.format.manifest import Manifest
from milepost.format.names import MANIFEST_NAME, SHARDS_NAME, index_name, ranks_in
from milepost.format.shards import MAX_SHARDS_BYTES, SHARDS_FEATURE, encode_shard_map
from milepost.storage import Folder

__all__ = ["assemble", "missing_files", "read_shards"]


def missing_files(folder: Folder, manifest: Manifest, *, sizes: bool = True) -> list[str]:
    """The files that differ from the manifest: absent, not a file, or of another size.

    Args:
        folder: The checkpoint's folder.
        manifest: Its manifest.
        sizes: Look at each file; otherwise, in one listing, only whether files of these names are there.
    """
    listed = [(file.name, file.size) for file in manifest.entries()]
    if not sizes:
        names = set(folder.names())
        listed = [(name, size) for name, size in listed if name not in names]
    problems = []
    for name, size in listed:
        try:
            found = folder.stat(name)
        except CorruptCheckpointError:  # a link on the way
            found = None
        if found is None:
            problems.append(f"{name} is missing")
        elif found.kind != "file":
            problems.append(f"{name} is a {found.kind}, not a file")
        elif found.size_bytes != size:
            problems.append(f"{name} has {found.size_bytes} bytes instead of {size}")
    return problems


def assemble(
    folder: Folder, attempt: str, ranks: set[int], *, live: bool
) -> tuple[Manifest, bytes | None] | None:
    """The manifest of a full set of marks, and the shard map (if any rank has a part of a global tensor).

    None if the set is not full, or a file of it is not there.

    Every process that assembles the same folder gets the same bytes.

    Args:
        folder: The attempt's folder.
        attempt: Its id.
        ranks: The ranks whose marks are there.
        live: No power cut can have come since the marks were written. Then an attachment that is gone was
            a temporary file of another rank's hook, and not one that was lost.

    Raises:
        CommitError: The marks contradict each other.
        CorruptCheckpointError: A mark is damaged.
    """
    merger = Merger(attempt, len(ranks))
    copies = Copies() if live and len(ranks) > 1 else None
    read = _read_marks(folder, ranks, merger, copies)
    if not read:
        return None
    marks, indexes = zip(*read, strict=True)
    _check_agreement(attempt, marks, merger)
    shards = merger.finish()
    encoded = None if shards is None else encode_shard_map(shards)
    attachments = _attachments(folder, marks, live=live)
    if attachments is None:
        return None
    manifest = Manifest(
        requires=sorted({feature for mark in marks for feature in mark.requires}),
        attempt=attempt,
        world_size=len(marks),
        time=max(mark.time for mark in marks),
        sequence=marks[0].sequence,
        step=marks[0].step,
        metadata=marks[0].metadata,
        writer=marks[0].writer,
        indexes=list(indexes),
        files=[file for mark in marks for file in mark.files],
        attachments=attachments,
    )
    if missing_files(folder, manifest):
        return None
    if copies is not None:
        copies.tell()
    if encoded is not None:
        manifest.shards = digest(SHARDS_NAME, encoded)
    return manifest, encoded


def _read_marks(
    folder: Folder, ranks: set[int], merger: Merger, copies: Copies | None
) -> list[tuple[Mark, FileDigest]]:
    """The mark of each rank with its index's digest; none if the set is not full."""
    read: list[tuple[Mark, FileDigest]] = []
    for rank in range(len(ranks)):
        if rank not in ranks:
            return []
        name = index_name(rank)
        path = os.path.join(folder.path, name)
        try:
            data = folder.read(name, MAX_INDEX_BYTES)
        except EntryNotFoundError:
            return []
        mark = decode_mark(data, path)
        if rank == 0 and mark.world_size > len(ranks):
            return []
        read.append((mark, digest(name, data)))
        if SHARDS_FEATURE in mark.requires:
            merger.add(rank, data, path)
        if copies is not None:
            copies.add(data)
    return read


def read_shards(folder: Folder, manifest: Manifest) -> bytes:
    """The bytes of the shard map that a manifest lists; made from the marks if it was not written yet.

    Raises:
        CorruptCheckpointError: It is not what the manifest says.
        EntryNotFoundError: It is not there, nor are all marks: a later save may be clearing the folder.
    """
    assert manifest.shards is not None
    path = os.path.join(folder.path, SHARDS_NAME)
    try:
        data: bytes | None = folder.read(SHARDS_NAME, MAX_SHARDS_BYTES)
    except EntryNotFoundError:
        names, assembled = list_names(folder), None
        if MANIFEST_NAME not in names:
            assembled = assemble(folder, manifest.attempt, ranks_in(names), live=False)
        if assembled is None:
            raise
        data = assembled[1]
    if data is None or digest(SHARDS_NAME, data) != manifest.shards:
        raise CorruptCheckpointError(
            f"the shard map does not have the SHA-256 of the manifest: {path}", path=path
        )
    return data


def _check_agreement(attempt: str, marks: Sequence[Mark], merger: Merger) -> None:
    facts: Mapping[str, list[object]] = {
        "attempt": [mark.attempt for mark in marks],
        "world size": [mark.world_size for mark in marks],
        "step": [mark.step for mark in marks],
        "state they share": [mark.agreement for mark in marks],
    }
    for fact, values in facts.items():
        expected = {"attempt": attempt, "world size": len(marks)}.get(fact, values[0])
        other = [rank for rank, value in enumerate(values) if value != expected]
        if other:
            also = f" (as have ranks {numbers(other[1:])})" if other[1:] else ""
            told = f"expected {expected!r}, rank {other[0]} has {values[other[0]]!r}{also}"
            if fact == "state they share":  # of which these are hashes
                told = f"rank {other[0]} has another than rank 0{also}{merger.difference(0, other[0])}"
            raise CommitError(
                f"the ranks disagree on the {fact}: {told}",
                rank=other[0],
                phase="commit",
                hint="all ranks must save the same step with the same arguments; look at these ranks' logs",
            )
    for rank, mark in enumerate(marks):
        if mark.rank != rank:
            raise CommitError(
                f"the mark {index_name(rank)} says it is rank {mark.rank}'s",
                rank=rank,
                phase="commit",
            )
    names = [file.name for mark in marks for file in mark.files]
    if len(set(names)) != len(names):
        raise CommitError("two ranks wrote a data file of the same name", phase="commit")


def _attachments(folder: Folder, marks: Sequence[Mark], *, live: bool) -> list[FileDigest] | None:
    """Each attachment once. If ranks saw it differently, the file itself decides."""
    seen: dict[str, set[FileDigest]] = {}
    for mark in marks:
        for file in mark.attachments:
            seen.setdefault(file.name, set()).add(file)
    settled = []
    for name, digests in sorted(seen.items()):
        found = folder.stat(name)
        if found is None:
            if not live:
                return None
            continue
        if len(digests) == 1 and live:
            settled.append(next(iter(digests)))
            continue
        actual = file_digest(folder, name)
        if actual not in digests:
            raise CommitError(f"the attachment {name!r} was changed after pre_commit", phase="commit")
        settled.append(actual)
    return settled

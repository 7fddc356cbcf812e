"""When the marks in an attempt's folder make a whole checkpoint, and what its manifest says then."""

from __future__ import annotations

# Paths are str, here as in the storage package.
import os
from collections.abc import Iterable, Mapping

from milepost.commit.copies import Copies
from milepost.commit.folders import belongs, file_digest, list_names, numbers, read_manifest, read_note
from milepost.commit.merge import Merger
from milepost.errors import (
    CommitError,
    CorruptCheckpointError,
    EntryNotFoundError,
    UnsupportedFormatError,
)
from milepost.format.index import FileDigest, Mark, decode_mark, digest
from milepost.format.limits import MAX_INDEX_BYTES
from milepost.format.manifest import Manifest
from milepost.format.names import MANIFEST_NAME, SHARDS_NAME, index_name, is_aborted, ranks_in
from milepost.format.shards import (
    MAX_SHARDS_BYTES,
    SHARDS_FEATURE,
    ShardMap,
    decode_shard_map,
    encode_shard_map,
)
from milepost.storage import Folder

__all__ = ["assemble", "checked_manifest", "missing_files", "read_shard_map", "read_shards"]


def missing_files(folder: Folder, manifest: Manifest, *, sizes: bool = True) -> list[str]:
    """What does not fit the manifest: files that are absent, no files, or of another size.

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

    Everybody who assembles the same folder gets the same bytes.

    Args:
        folder: The attempt's folder.
        attempt: Its id.
        ranks: The ranks whose marks are there.
        live: Nothing was lost since the marks were written (no power cut). Then an attachment that
            is gone was a passing file of another rank's hook, and not one that was lost.

    Raises:
        CommitError: The marks contradict each other.
        CorruptCheckpointError: A mark is damaged.
    """
    marks: list[Mark] = []
    indexes: list[FileDigest] = []
    merger = Merger(attempt, len(ranks))
    copies = Copies() if live and len(ranks) > 1 else None
    for rank in range(len(ranks)):
        if rank not in ranks:
            return None
        name = index_name(rank)
        try:
            data = folder.read(name, MAX_INDEX_BYTES)
        except EntryNotFoundError:
            return None
        mark = decode_mark(data, os.path.join(folder.path, name))
        if rank == 0 and mark.world_size > len(ranks):
            return None
        marks.append(mark)
        indexes.append(digest(name, data))
        if SHARDS_FEATURE in mark.requires:
            merger.add(rank, data, os.path.join(folder.path, name))
        if copies is not None:
            copies.add(data)
    if not marks:
        return None
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
        indexes=indexes,
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


def read_shards(folder: Folder, manifest: Manifest) -> bytes:
    """The bytes of the shard map that a manifest lists; made from the marks where it was not written yet.

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


def read_shard_map(folder: Folder, manifest: Manifest) -> ShardMap | None:
    """The shard map that a manifest lists, checked; None if it lists none.

    Raises:
        CorruptCheckpointError: It is malformed, or not what the manifest says.
    """
    if manifest.shards is None:
        return None
    return decode_shard_map(
        read_shards(folder, manifest),
        os.path.join(folder.path, SHARDS_NAME),
        attempt=manifest.attempt,
        world_size=manifest.world_size,
    )


def _check_agreement(attempt: str, marks: list[Mark], merger: Merger) -> None:
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


def _attachments(folder: Folder, marks: list[Mark], *, live: bool) -> list[FileDigest] | None:
    """Each attachment once. What several ranks saw differently is settled by the file itself."""
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


def checked_manifest(folder: Folder, attempt: str, names: Iterable[str], *, deep: bool) -> Manifest | None:
    """The manifest of a hidden folder that holds a whole checkpoint of `attempt`, else None.

    Its attempt.json, if it can be read, says so; it has a manifest of this attempt, or a full set of marks
    and no abort mark; and all files are there with their sizes. (After a power cut a mark or manifest may be
    there without them.)

    Args:
        folder: The hidden folder.
        attempt: The attempt in its name.
        names: What is in it.
        deep: Compare indexes, shard map and attachments with the manifest's hashes as well.
    """
    names = set(names)
    note = read_note(folder)
    if note is not None and not belongs(note, folder, attempt):
        return None
    try:
        if MANIFEST_NAME in names:
            manifest = read_manifest(folder)
            if manifest is None or manifest.attempt != attempt or missing_files(folder, manifest):
                return None
            hashed = [file for file in manifest.entries() if deep and isinstance(file, FileDigest)]
            return manifest if all(file_digest(folder, file.name) == file for file in hashed) else None
        if is_aborted(names):
            return None
        assembled = assemble(folder, attempt, ranks_in(names), live=False)
        return assembled[0] if assembled else None
    except (CommitError, CorruptCheckpointError, UnsupportedFormatError, EntryNotFoundError):
        return None

"""What a hidden folder is. Recovery, `locate`, listings and `doctor` ask `classify`, and nothing else judges.

The content decides, never the name alone: a folder must say itself that it is the attempt in its name.
"""

from __future__ import annotations

# Paths are str, here as in the storage package.
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from milepost.commit.contents import (
    Note,
    belongs,
    file_digest,
    list_names,
    read_beacons,
    read_manifest,
    read_note,
)
from milepost.commit.marks import assemble, missing_files
from milepost.errors import (
    CommitError,
    CorruptCheckpointError,
    EntryNotFoundError,
    LoadError,
    StorageError,
    UnsupportedFormatError,
)
from milepost.format.index import FileDigest, decode_mark
from milepost.format.limits import MAX_INDEX_BYTES
from milepost.format.manifest import Manifest
from milepost.format.names import NOTE_NAME, index_name, is_aborted, is_note_aside, ranks_in
from milepost.storage import Folder

__all__ = ["State", "Verdict", "classify", "is_overtaken", "is_whole", "wording"]

State = Literal["unborn", "unreadable", "replaced", "remains", "foreign", "complete", "torn", "part"]


@dataclass(frozen=True)
class Verdict:
    """What `classify` found.

    Attributes:
        state: "unborn": the attempt died before it had an ``attempt.json``. "unreadable": the manifest is
            damaged, or a later version wrote it. "replaced": a checkpoint of another attempt than the one in
            the name; a save exchanged it out. "remains": nothing in it says what it is; after an exchange
            these are plain files, or what is left of a checkpoint. "foreign": its ``attempt.json`` is of
            another path or attempt, or cannot be read and nothing else says what it is. "complete": a whole
            checkpoint of the attempt in the name. "torn": that attempt has a manifest, so it is committed,
            but files seem to be missing or damaged. "part": that attempt, not committed and not complete.
        attempt: The attempt in the folder's name.
        names: What is in the folder.
        note: Its ``attempt.json``, if it can be read.
        manifest: Of "replaced", "complete" and "torn": the manifest, or the one that the marks make.
        error: Of "unreadable": why.
    """

    state: State
    attempt: str
    names: list[str]
    note: Note | None = None
    manifest: Manifest | None = None
    error: LoadError | None = None

    def is_leftover(self, published: Manifest | None) -> bool:
        """Whether a save may clear the folder once nobody works on it.

        Args:
            published: The manifest of the checkpoint at the path to which the folder belongs.
        """
        if self.state == "replaced":
            return published is not None
        if self.state == "remains":
            return published is not None and published.attempt == self.attempt
        if self.manifest is not None:
            return is_overtaken(self.manifest, published)
        return self.state in ("unborn", "part")


def classify(folder: Folder, attempt: str, *, deep: bool) -> Verdict:
    """Judge a hidden folder by its content; nothing is changed.

    Args:
        folder: The open folder.
        attempt: The attempt in its name.
        deep: Call it complete only if indexes, shard map and attachments have the manifest's hashes. Else
            only presence and size of all files count.

    Raises:
        StorageError: The folder or a file in it cannot be read.
    """
    names = list_names(folder)
    if all(map(is_note_aside, names)):
        return Verdict("unborn", attempt, names)
    note = read_note(folder)
    try:
        manifest = read_manifest(folder)
    except LoadError as error:
        return Verdict("unreadable", attempt, names, note, error=error)
    if manifest is not None and manifest.attempt != attempt:
        return Verdict("replaced", attempt, names, note, manifest)
    if not _says_so(folder, attempt, names, note, manifest):
        return Verdict("foreign" if NOTE_NAME in names else "remains", attempt, names, note)
    whole = _whole(folder, attempt, names, manifest, deep=deep)
    if whole is not None:
        return Verdict("complete", attempt, names, note, whole)
    return Verdict("part" if manifest is None else "torn", attempt, names, note, manifest)


def is_whole(folder: Folder, verdict: Verdict) -> bool:
    """Whether a replaced checkpoint could return to its path; all but the data is compared with its hashes.

    Args:
        folder: The folder that was judged.
        verdict: What `classify` said.
    """
    manifest, note = verdict.manifest, verdict.note
    if manifest is None or (note is not None and not belongs(note, folder, manifest.attempt)):
        return False
    return _whole(folder, manifest.attempt, verdict.names, manifest, deep=True) is not None


def is_overtaken(waiting: Manifest, published: Manifest | None) -> bool:
    """Whether a checkpoint that waits beside a path is of no use, because one as new as it is there.

    Of two savers that did not see each other, the one that is published is the later.
    """
    return published is not None and published.order >= waiting.order


def wording(state: str, path: str) -> str | None:
    """The sentence for people about a hidden folder; None for a state that needs the ranks' words.

    Args:
        state: A `State`, "overtaken", or "removed".
        path: The folder.
    """
    return {
        "complete": "complete, but not published",
        "overtaken": "complete, but overtaken by a newer checkpoint",
        "replaced": "left over: a former checkpoint, replaced by a later save",
        "foreign": f"not ours: {os.path.basename(path)} is named like a save to this path, "
        "but nothing in it says that it is one",
        "torn": "committed, but files of it seem to be missing or damaged",
        "unreadable": "not readable by this version",
        "removed": "what is left of a checkpoint that somebody has removed",
    }.get(state)


def _says_so(
    folder: Folder, attempt: str, names: list[str], note: Note | None, manifest: Manifest | None
) -> bool:
    """Whether the content says that the folder is this attempt.

    ``attempt.json`` is not fsynced. After a power cut the manifest, a beacon or a mark may have to speak.
    """
    if note is not None:
        return belongs(note, folder, attempt)
    if manifest is not None:
        return True
    if any(beacon.attempt == attempt for beacon in read_beacons(folder, names).values()):
        return True
    for rank in sorted(ranks_in(names))[:1]:
        with suppress(LoadError, StorageError):
            return decode_mark(folder.read(index_name(rank), MAX_INDEX_BYTES), folder.path).attempt == attempt
    return False


def _whole(
    folder: Folder, attempt: str, names: list[str], manifest: Manifest | None, *, deep: bool
) -> Manifest | None:
    """The manifest of a whole checkpoint, read or made of a full set of marks; None if it is not whole.

    All files must be there with their sizes: a power cut may leave a manifest or a mark without them.
    """
    try:
        if manifest is not None:
            if missing_files(folder, manifest):
                return None
            hashed = [file for file in manifest.entries() if deep and isinstance(file, FileDigest)]
            return manifest if all(file_digest(folder, file.name) == file for file in hashed) else None
        if is_aborted(names):
            return None
        assembled = assemble(folder, attempt, ranks_in(names), live=False)
        return assembled[0] if assembled else None
    except (CommitError, CorruptCheckpointError, UnsupportedFormatError, EntryNotFoundError):
        return None

"""Compare every byte of a checkpoint with its checksum. Torch-free."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from math import inf

from isal.isal_zlib import crc32_combine

from milepost.commit import Checkpoint, locate
from milepost.commit.by_rename.folders import published_manifest
from milepost.commit.contents import read_manifest
from milepost.errors import CorruptCheckpointError, IncompleteCheckpointError, LoadError, StorageError
from milepost.format.index import CHUNK_BYTES, DataFile, Index
from milepost.format.manifest import Manifest
from milepost.format.names import data_rank
from milepost.health.outline import Line, outline
from milepost.storage import Storage
from milepost.storage.reading import scan_file
from milepost.storage.stream import FileStream
from milepost.storage.writing import Ring

__all__ = ["Problem", "Report", "verify"]

_PLAIN_BYTES = 1 << 20
_TRIES = 5

Progress = Callable[[int, int], None]
"""Called as ``progress(bytes so far, bytes in all)``."""


@dataclass(frozen=True)
class Problem:
    """Damage in one file.

    Attributes:
        file: Name of the file in the checkpoint's folder.
        message: What is wrong.
        keys: Paths of the tensors and other values concerned.
        offset: Where in the file the damage starts; -1 if it has no one place.
        length: How many bytes the failed checksums cover.
    """

    file: str
    message: str
    keys: tuple[str, ...] = ()
    offset: int = -1
    length: int = 0


@dataclass
class Report:
    """What a verification found.

    Attributes:
        path: The folder whose files were read.
        kind: "milepost", or "torch" for files of plain ``torch.save``.
        step: The step that was recorded.
        files: How many files were read.
        bytes: How many bytes were compared with a checksum.
        problems: What is damaged.
        warnings: What is odd, but need be no damage.
    """

    path: str
    kind: str = "milepost"
    step: int | None = None
    files: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


class _Verification:
    """A report being made."""

    def __init__(self, checkpoint: Checkpoint, total: int, progress: Progress | None) -> None:
        self.checkpoint, self.folder = checkpoint, checkpoint.folder
        self.report = Report(checkpoint.path)
        self._total, self._done = total, 0
        self._progress = progress

    def tell(self, count: int) -> None:
        """Count bytes that have been read."""
        self._done += count
        if self._progress:
            self._progress(self._done, self._total)

    @contextmanager
    def file(self, name: str) -> Iterator[None]:
        """Make an error about a file a problem of the report."""
        try:
            yield
        except (LoadError, StorageError) as error:
            self.report.problems.append(Problem(name, error.message))
        else:
            self.report.files += 1


def verify(storage: Storage, path: str, progress: Progress | None = None) -> Report:
    """Read every file of a checkpoint once and compare it with its checksums.

    On return every byte has been read and compared, and nothing in the folder has changed. The report has the
    damage in files. If there is no checkpoint at all, it raises. If a save replaces the checkpoint meanwhile,
    the new one is verified instead.

    Args:
        storage: Where it is.
        path: The checkpoint's folder, or one with files of plain ``torch.save``.
        progress: Called in this thread as the reading goes on.

    Raises:
        CheckpointNotFoundError: There is none.
        IncompleteCheckpointError: The save never committed.
        CorruptCheckpointError: The manifest itself is damaged.
        UnsupportedFormatError: A later version wrote it.
    """
    for _ in range(_TRIES):
        report, attempt = _verified(storage, path, progress)
        if not report.problems or _attempt_at(storage, path) in (attempt, None):
            break
    return report


def _attempt_at(storage: Storage, path: str) -> str | None:
    with suppress(LoadError, StorageError):
        manifest = published_manifest(storage, os.path.abspath(path))
        return None if manifest is None else manifest.attempt
    return None


def _verified(storage: Storage, path: str, progress: Progress | None) -> tuple[Report, str | None]:
    try:
        checkpoint = locate(storage, path)
    except CorruptCheckpointError:
        checkpoint = _damaged(storage, path)  # files are missing or have a wrong size: read the others too
    with checkpoint:
        manifest = checkpoint.manifest
        if manifest is None:
            return _verify_plain(checkpoint, progress), None
        run = _Verification(checkpoint, manifest.size_bytes, progress)
        _verify_all(run, manifest)
        run.report.step = manifest.step
        return run.report, manifest.attempt


def _damaged(storage: Storage, path: str) -> Checkpoint:
    """Open the folder at a path with its manifest, even if other files are damaged."""
    path = os.path.realpath(path)
    folder = storage.open_folder(path)
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            raise IncompleteCheckpointError(f"this folder has no manifest: {path}", path=path)
        return Checkpoint(folder, manifest, path)
    except BaseException:
        folder.close()
        raise


def _verify_all(run: _Verification, manifest: Manifest) -> None:
    run.report.files = 1
    described: dict[str, tuple[Index, int]] = {}
    for rank, listed in enumerate(manifest.indexes):
        with run.file(listed.name):
            run.tell(listed.size)
            index = run.checkpoint.index(rank)
            run.report.bytes += listed.size
            described.update({file.name: (index, number) for number, file in enumerate(index.files)})
    ring = Ring()
    try:
        for file in manifest.files:
            with run.file(file.name):
                _verify_data(run, file, described.get(file.name), ring)
    finally:
        ring.close()
    for attachment in (*manifest.attachments, *([manifest.shards] if manifest.shards else [])):
        written = not run.checkpoint.in_place or run.folder.stat(attachment.name) is not None
        if attachment is manifest.shards and not written:
            continue  # it is made of the indexes when the attempt is committed
        with run.file(attachment.name):
            run.tell(attachment.size)
            if problem := run.checkpoint.difference(attachment):
                raise CorruptCheckpointError(problem)
            run.report.bytes += attachment.size


# ---------------------------------------------------------------------------- data files


@dataclass(frozen=True, slots=True)
class _Piece:
    """A chunk of a record, or (with record -1) what lies between two of them."""

    offset: int
    length: int
    record: int = -1
    crc: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.length


def _tiling(described: tuple[Index, int] | None, size: int) -> list[_Piece]:
    """A data file as pieces without gaps."""
    pieces: list[_Piece] = []
    position = 0
    if described:
        records = described[0].records
        for record, first in enumerate(records.chunks()[:-1]):
            if records.file[record] != described[1]:
                continue
            start, length = records.offset[record], records.length[record]
            if start > position:
                pieces.append(_Piece(position, start - position))
            for number, at in enumerate(range(0, length, CHUNK_BYTES)):
                crc = records.crcs[first + number]
                pieces.append(_Piece(start + at, min(CHUNK_BYTES, length - at), record, crc))
            position = start + length
    if size > position:
        pieces.append(_Piece(position, size - position))
    return pieces


def _verify_data(
    run: _Verification, listed: DataFile, described: tuple[Index, int] | None, ring: Ring
) -> None:
    pieces = _tiling(described, listed.size)
    with closing(run.folder.open(listed.name)) as file:
        size = file.size
        extents = [
            (piece.offset, min(piece.end, size) - piece.offset) for piece in pieces if piece.offset < size
        ]
        found = scan_file(file, extents, ring=ring, progress=run.tell)
    run.report.bytes += min(size, listed.size)
    keys = _Keys(described[0] if described else None)
    whole = true_whole = 0
    damage: list[tuple[_Piece, str]] = []
    for number, piece in enumerate(pieces):
        if piece.end > size:
            if piece.record >= 0:
                damage.append((piece, "missing: the file ends before it"))
            continue
        whole = crc32_combine(whole, found[number], piece.length)
        true = found[number] if piece.record < 0 else piece.crc
        true_whole = crc32_combine(true_whole, true, piece.length)
        if found[number] != true:
            damage.append((piece, "damaged: the CRC-32 is wrong"))
    if size != listed.size:
        run.report.problems.append(Problem(listed.name, f"{listed.size} bytes expected, {size} found"))
    elif described is None and whole != listed.crc32:
        message = (
            f"CRC-32 {listed.crc32:08x} expected, {whole:08x} found (without its index: no tensors named)"
        )
        run.report.problems.append(Problem(listed.name, message))
    elif true_whole != listed.crc32:
        run.report.problems.append(
            Problem(listed.name, "damaged outside of the tensors (headers or data.pkl)")
        )
    run.report.problems += _problems(listed.name, damage, keys)


def _problems(name: str, damage: list[tuple[_Piece, str]], keys: _Keys) -> Iterator[Problem]:
    """One problem for each run of damaged chunks of a record."""
    start = 0
    for number, (piece, message) in enumerate(damage):
        following = damage[number + 1][0] if number + 1 < len(damage) else None
        if following and following.record == piece.record and following.offset == piece.end:
            continue
        offset = damage[start][0].offset
        yield Problem(name, message, keys.within(piece.record, offset, piece.end), offset, piece.end - offset)
        start = number + 1


class _Keys:
    """Which values the bytes of a file belong to; looked up only when there is damage."""

    def __init__(self, index: Index | None) -> None:
        self._index = index
        self._by_record: dict[int, list[Line]] | None = None

    def within(self, record: int, start: int, end: int) -> tuple[str, ...]:
        """Paths of the values that reach into a range of the file, which lies in this record."""
        assert self._index is not None
        if self._by_record is None:
            self._by_record = {}
            for line in outline(self._index, inf):
                self._by_record.setdefault(line.record, []).append(line)
        base = self._index.records.offset[record]
        lines = self._by_record.get(record, [])
        return tuple(line.path for line in lines if line.start < end - base and line.end > start - base)


# ---------------------------------------------------------------------------- plain torch.save files


def _verify_plain(checkpoint: Checkpoint, progress: Progress | None) -> Report:
    """Entry CRCs of plain archives. They can be off in whole files, so a mismatch is a warning."""
    folder = checkpoint.folder
    names = [name for name in folder.names() if data_rank(name) is not None]
    total = sum(stat.size_bytes for name in names if (stat := folder.stat(name)))
    run = _Verification(checkpoint, total, progress)
    run.report.kind = "torch"
    for name in names:
        with run.file(name), closing(folder.open(name)) as file:
            try:
                with zipfile.ZipFile(io.BufferedReader(FileStream(file), _PLAIN_BYTES)) as archive:
                    for entry in archive.infolist():
                        _verify_entry(run, name, archive, entry)
            except (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, OverflowError) as error:
                raise CorruptCheckpointError(f"not a whole zip archive: {error}") from None
            run.report.bytes += file.size
    return run.report


def _verify_entry(run: _Verification, name: str, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    if entry.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"entry {entry.filename} is compressed")
    with archive.open(entry) as stream:
        try:
            while data := stream.read(_PLAIN_BYTES):
                run.tell(len(data))
        except zipfile.BadZipFile as error:
            if "CRC" not in str(error):
                raise
            message = f"entry {entry.filename}: the CRC-32 is wrong"
            run.report.warnings.append(
                Problem(name, message, offset=entry.header_offset, length=entry.file_size)
            )

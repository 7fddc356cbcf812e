"""What is wrong with a checkpoint, or with a folder of them, as plain facts. Torch-free; changes nothing.

The rules are those of `milepost.commit`: `locate` finds what is loadable here, and `roll_forward` publishes
what is complete here.
"""

# Paths are str, here as in the storage package.
from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

from milepost.commit import Checkpoint, absolute_path, locate
from milepost.commit.by_rename.claim import is_abandoned
from milepost.commit.by_rename.discard import is_emptied, is_rest
from milepost.commit.by_rename.folders import Hidden, names_of, opened, published_manifest, siblings
from milepost.commit.contents import list_names, read_manifest
from milepost.commit.judge import State, Verdict, classify, is_overtaken, is_whole
from milepost.commit.marks import assemble, missing_files
from milepost.errors import (
    CheckpointNotFoundError,
    CommitError,
    LoadError,
    StorageError,
    UnsupportedFormatError,
)
from milepost.format.index import FileDigest, decode_mark
from milepost.format.limits import MAX_INDEX_BYTES
from milepost.format.manifest import Manifest
from milepost.format.names import (
    MANIFEST_NAME,
    NOTE_NAME,
    REPLACED,
    data_name,
    data_rank,
    index_name,
    index_rank,
    is_aborted,
    is_own,
    is_plain_name,
    looks_hidden,
    ranks_in,
    removed_stem,
    stem_of,
)
from milepost.health.findings import Damage, Diagnosis, Finding, RankState
from milepost.health.listing import Entry, Explanation, explain_folder, scan
from milepost.health.outline import outline
from milepost.health.verify import Progress, verify
from milepost.storage import Folder, Storage

__all__ = ["LATE_SECONDS", "Watch", "diagnose"]

_TRIES = 5
LATE_SECONDS = 300.0
"""For so long after its last change an attempt may wait for ranks that have not begun.

Ranks that have arrived need not stay, so nobody may hold its lock."""
_CUT_STEM = re.compile(r".+~[0-9a-f]{16}", re.DOTALL)

Watch = Callable[[str], AbstractContextManager[Progress | None]]
"""Called with the path of a checkpoint before its bytes are read; the context gives a progress callback."""


# ---------------------------------------------------------------------------- the whole


def diagnose(storage: Storage, path: str, *, deep: bool = False, watch: Watch | None = None) -> Diagnosis:
    """Look at one checkpoint, which may exist as a hidden folder only, or at all in a folder.

    Args:
        storage: Where.
        path: The checkpoint, the folder in which checkpoints lie, or a hidden folder of an attempt.
        deep: Compare every byte of what is looked at with its checksum.
        watch: Told of the reading.

    Raises:
        CheckpointNotFoundError: There is neither, or this is no path.
        StorageError: It cannot be looked at.
    """
    path = absolute_path(path, CheckpointNotFoundError)
    at = storage.stat(path)
    if at is not None and at.kind == "symlink":
        path = os.path.realpath(path)
    damaged = None
    for _ in range(_TRIES):
        # A save may be replacing the folder: damage counts when it is seen twice in the same way.
        before, found = damaged, _look(storage, path)
        damaged = [finding for finding in found.findings if finding.state == "damaged"]
        if damaged in ([], before):
            break
    return _looked_into(storage, found, watch) if deep else found


def _look(storage: Storage, path: str) -> Diagnosis:
    is_run = not _is_one(storage, path)
    folder = path if is_run else os.path.dirname(path)
    names = names_of(storage, folder)
    if names is None:
        locate(storage, path).close()  # tells what is there instead, and what exists near it
        storage.open_folder(folder).close()  # tells why it cannot be listed
    listed = {entry.path: entry for entry in scan(storage, folder)}
    places = (os.path.join(folder, name) for name in names or ())
    looks = (_examine(storage, place, listed.get(place), names or []) for place in places)
    findings = [finding for finding in looks if finding is not None]
    asked = {path, *(finding.target for finding in findings if finding.path == path)} - {None}
    chosen = [found for found in findings if is_run or found.path == path or found.target in asked]
    if not is_run and not chosen:
        locate(storage, path).close()
    chosen.sort(key=lambda finding: (finding.time, finding.name, finding.path))
    return Diagnosis(path, is_run, chosen, _newest(findings), findings)


def _newest(findings: list[Finding]) -> Finding | None:
    return max((finding for finding in findings if finding.loads), key=_age, default=None)


def _age(finding: Finding) -> tuple[bool, int, float]:
    return finding.step is not None, finding.step or 0, finding.time


def _is_one(storage: Storage, path: str) -> bool:
    """Whether the path is one checkpoint's, and not that of a folder of checkpoints."""
    names = names_of(storage, path)
    if MANIFEST_NAME in (names or ()) or looks_hidden(os.path.basename(path)):
        return True
    parts = any(data_rank(name) is not None or index_rank(name) is not None for name in names or ())
    if not parts and not siblings(storage, path):
        return False
    return not names or not scan(storage, path)


# ---------------------------------------------------------------------------- one folder


def _examine(storage: Storage, path: str, entry: Entry | None, names: list[str]) -> Finding | None:
    base = os.path.basename(path)
    if is_rest(storage, path):
        return Finding(removed_stem(base) or base, path, path, "removed")
    stem, attempt = looks_hidden(base) or (base, None)
    with opened(storage, path) as folder:
        if folder is None or (attempt is None and entry is None):
            return None
        verdict = None if attempt is None else classify(folder, attempt, deep=True)
        target = path if verdict is None else _target(os.path.dirname(path), stem, verdict, names)
        found = Finding(os.path.basename(target) if target else stem, path, target, "incomplete")
        if entry is not None:
            facts = ("step", "time", "size_bytes", "world_size")
            found = replace(found, **{fact: getattr(entry, fact) for fact in facts})
        if verdict is not None:
            place = _Place(storage, folder, found, verdict, is_listed=entry is not None)
            return _LOOKS[verdict.state](place)
        return None if entry is None else _published(folder, found, entry)


def _target(parent: str, stem: str, verdict: Verdict, names: list[str]) -> str | None:
    """The path that a hidden folder belongs to; None if its name was cut and no file has the whole name."""
    note = verdict.note
    if not _CUT_STEM.fullmatch(stem):
        return os.path.join(parent, stem)
    candidates = [name for name in names if not looks_hidden(name)]
    if note is not None and note.attempt == verdict.attempt and is_plain_name(note.name):
        candidates.append(note.name)
    name = next((name for name in candidates if stem_of(name) == stem and "/" not in name), None)
    return None if name is None else os.path.join(parent, name)


def _published(folder: Folder, found: Finding, entry: Entry) -> Finding:
    names = list_names(folder)
    found = replace(found, state="damaged", published=True, emptied=is_emptied(folder))
    if entry.state == "committed" and MANIFEST_NAME not in names:
        return replace(found, state="whole", loads=True, problem=entry.problem)
    try:
        manifest = read_manifest(folder)
    except UnsupportedFormatError as error:
        return replace(found, state="unreadable", problem=error.message)
    except LoadError as error:
        return replace(found, damage=(Damage(MANIFEST_NAME, error.message),))
    missing = (Damage(MANIFEST_NAME, "is missing"),)
    damage = missing if manifest is None else _misfits(Checkpoint(folder, manifest, found.path), manifest)
    if entry.state == "damaged" or damage:
        return replace(found, damage=damage or (Damage("", entry.problem or "it changes all the time"),))
    left = tuple(name for name in names if is_own(name) and name != MANIFEST_NAME)
    return replace(found, state="whole", loads=True, compared="sizes", leftovers=left)


# ---------------------------------------------------------------------------- one hidden folder


@dataclass(frozen=True)
class _Place:
    """A hidden folder: what is known of it, what it was judged to be, and whether `scan` lists it."""

    storage: Storage
    folder: Folder
    found: Finding
    verdict: Verdict
    is_listed: bool

    def published(self) -> Manifest | None:
        """The manifest of the checkpoint at the path; None also if it cannot be read, or has no path."""
        with suppress(LoadError):
            return published_manifest(self.storage, self.found.target) if self.found.target else None
        return None

    def exchanged(self) -> bool:
        """Whether the attempt in the name is published, so that this is what it replaced."""
        published = self.published()
        return published is not None and published.attempt == self.verdict.attempt

    def alive(self) -> tuple[bool | None, bool]:
        """Whether somebody works on it, and whether it changed so lately that more ranks may come."""
        fresh = time.time() - self.found.time < LATE_SECONDS
        return _is_alive(self.storage, self.found.path, self.verdict, fresh=fresh), fresh


def _unborn(place: _Place) -> Finding:
    if place.verdict.names:
        return replace(place.found, alive=place.alive()[0])
    former = place.exchanged() or place.found.path.endswith(REPLACED)
    return replace(place.found, state="replaced" if former else "incomplete", problem="it is empty")


def _unreadable(place: _Place) -> Finding:
    error = place.verdict.error
    assert error is not None
    if isinstance(error, UnsupportedFormatError):
        return replace(place.found, state="unreadable", problem=error.message)
    return replace(place.found, state="damaged", damage=(Damage(MANIFEST_NAME, error.message),))


def _replaced(place: _Place) -> Finding:
    target = place.found.target
    free = target is not None and place.storage.stat(target) is None
    loads = free and is_whole(place.folder, place.verdict)
    return replace(place.found, state="replaced", loads=loads, compared="sizes")


def _remains(place: _Place) -> Finding | None:
    if place.exchanged():
        return replace(place.found, state="replaced")
    return _foreign(place) if place.is_listed else None


def _foreign(place: _Place) -> Finding:
    return replace(place.found, state="foreign", alive=place.alive()[0])


def _complete(place: _Place) -> Finding:
    assert place.verdict.manifest is not None
    late = is_overtaken(place.verdict.manifest, place.published())
    state: Literal["overtaken", "complete"] = "overtaken" if late else "complete"
    return replace(place.found, state=state, loads=not late, compared="sizes", alive=place.alive()[0])


def _attempt(place: _Place) -> Finding:
    """An attempt of which something is missing: what its ranks did, and whether more of them may come."""
    folder, verdict = place.folder, place.verdict
    told = explain_folder(folder)
    world_size = told.world_size or _marked_world_size(folder, told.arrived)
    full = world_size is not None and len(told.arrived) >= world_size
    aborted, ranks = is_aborted(verdict.names), tuple(_ranks(told, world_size))
    alive, fresh = place.alive()
    may_come = fresh and not aborted and any(rank.state == "silent" for rank in ranks)
    return replace(
        place.found,
        alive=alive or (None if may_come else alive),
        aborted=aborted,
        world_size=world_size,
        ranks=ranks,
        kept=verdict.state == "torn" and not verdict.is_leftover(place.published()),
        problem=_contradiction(folder, verdict) if full and not aborted else None,
    )


_LOOKS: dict[State, Callable[[_Place], Finding | None]] = {
    "unborn": _unborn,
    "unreadable": _unreadable,
    "replaced": _replaced,
    "remains": _remains,
    "foreign": _foreign,
    "complete": _complete,
    "torn": _attempt,
    "part": _attempt,
}


def _is_alive(storage: Storage, path: str, verdict: Verdict, *, fresh: bool) -> bool | None:
    try:
        if is_abandoned(storage, Hidden(path, verdict.attempt)):
            return False
    except StorageError:
        return None
    if NOTE_NAME in verdict.names:
        return True
    # Without the file there is no lock; but a saver that has just begun has not named the file yet.
    return None if fresh and verdict.state == "unborn" else False


def _marked_world_size(folder: Folder, arrived: list[int]) -> int | None:
    """How many ranks take part, from a mark, if ``attempt.json`` is lost."""
    for rank in arrived[:1]:
        with suppress(LoadError, StorageError):
            return decode_mark(folder.read(index_name(rank), MAX_INDEX_BYTES), folder.path).world_size
    return None


def _ranks(told: Explanation, world_size: int | None) -> Iterable[RankState]:
    arrived = set(told.arrived)
    for rank in range(world_size or 0) or sorted({*arrived, *told.aborted, *told.beacons}):
        word, failure = told.beacons.get(rank), told.aborted.get(rank)
        last = (word.phase, word.bytes_done, word.time) if word else (None, 0, 0.0)
        if failure is not None:
            error = f"{failure.type}: {failure.message}"
            yield RankState(rank, "failed", failure.phase, last[1], failure.time, error)
        elif rank in arrived:
            yield RankState(rank, "arrived", *last)
        else:
            yield RankState(rank, "missing" if word else "silent", *last)


def _contradiction(folder: Folder, verdict: Verdict) -> str:
    """Why an attempt is not complete although all ranks have arrived."""
    ranks = ranks_in(verdict.names)
    if verdict.manifest is not None:
        return "; ".join(missing_files(folder, verdict.manifest)[:5]) or "an index or attachment is damaged"
    try:
        assemble(folder, verdict.attempt, ranks, live=False)
    except (CommitError, LoadError, StorageError) as error:
        return str(error.message)
    missing = [name for rank in ranks if folder.stat(name := data_name(rank)) is None]
    more = f"{', '.join(sorted(missing)[:5])} {'is' if len(missing) == 1 else 'are'} missing"
    return more if missing else "files are not as the ranks' marks say"


# ---------------------------------------------------------------------------- damage


def _rank_of(name: str) -> int | None:
    rank = data_rank(name)
    return index_rank(name) if rank is None else rank


def _misfits(checkpoint: Checkpoint, manifest: Manifest) -> tuple[Damage, ...]:
    """The files that are missing, have another size or, if they are hashed whole, another content.

    A data file comes with the values that it has lost.
    """
    damage = []
    names = [entry.name for entry in manifest.entries()]
    for problem in missing_files(checkpoint.folder, manifest):
        name = max((name for name in names if problem.startswith(f"{name} ")), key=len, default="")
        keys = () if data_rank(name) is None else _keys_beyond(checkpoint, name)
        damage.append(Damage(name, problem.removeprefix(f"{name} "), _rank_of(name), keys))
    told = {known.file for known in damage}
    for listed in (*manifest.indexes, *([manifest.shards] if manifest.shards else [])):
        if listed.name not in told and (message := _difference(checkpoint, listed)):
            damage.append(Damage(listed.name, message, _rank_of(listed.name)))
    return tuple(damage)


def _difference(checkpoint: Checkpoint, listed: FileDigest) -> str | None:
    """How a file is not what the manifest says, if so."""
    try:
        same = checkpoint.difference(listed) is None
    except (LoadError, StorageError) as error:
        return f"cannot be read: {error.message}"
    return None if same else "does not have the SHA-256 that the manifest lists"


def _keys_beyond(checkpoint: Checkpoint, name: str) -> tuple[str, ...]:
    """The values that the index places beyond the end of a data file."""
    with suppress(LoadError, StorageError):
        found = checkpoint.folder.stat(name)
        size = found.size_bytes if found is not None and found.kind == "file" else 0
        index = checkpoint.index(data_rank(name) or 0)
        records = index.records
        return tuple(
            line.path
            for line in outline(index, inf)
            if line.record >= 0
            and index.files[records.file[line.record]].name == name
            and records.offset[line.record] + line.end > size
        )
    return ()


def _looked_into(storage: Storage, found: Diagnosis, watch: Watch | None) -> Diagnosis:
    """The diagnosis after every byte of what was asked for was compared."""
    read = [_read_whole(storage, finding, watch) for finding in found.findings]
    paths = {finding.path for finding in read}
    others = [finding for finding in found.around if finding.path not in paths]
    return replace(found, findings=read, newest=_newest([*read, *others]), around=[*read, *others])


def _read_whole(storage: Storage, finding: Finding, watch: Watch | None) -> Finding:
    """The finding after every byte was compared, if it is what a load of its path reads."""
    if finding.target is None or not (finding.loads or (finding.published and finding.state == "damaged")):
        return finding
    try:
        with watch(finding.target) if watch else nullcontext(None) as progress:
            report = verify(storage, finding.target, progress)
    except LoadError as error:
        if finding.damage:
            return finding
        return replace(finding, state="damaged", loads=False, damage=(Damage("", error.message),))
    if report.path != finding.path:
        return finding
    found = [Damage(p.file, p.message, _rank_of(p.file), p.keys) for p in report.problems]
    told = {damage.file: set(damage.keys) for damage in finding.damage}  # with the values that are lost
    more = [damage for damage in found if damage.file not in told or set(damage.keys) - told[damage.file]]
    if finding.damage or more:
        return replace(finding, state="damaged", loads=False, damage=(*finding.damage, *more))
    finding = replace(finding, compared="bytes")
    odd = "; ".join(f"{warning.file}: {warning.message}" for warning in report.warnings[:5])
    return replace(finding, problem=odd or finding.problem)

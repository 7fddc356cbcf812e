"""What is wrong with a checkpoint, or with a folder of them, as plain facts. Torch-free; changes nothing.

It judges by the rules of `milepost.commit`: what it calls loadable is what `locate` finds, and what it
calls complete is what `roll_forward` publishes.
"""

# Paths are str, here as in the storage package.
from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from math import inf
from typing import Literal

from milepost.commit import absolute_path, locate
from milepost.commit.claim import is_abandoned
from milepost.commit.folders import (
    Hidden,
    Note,
    belongs,
    file_digest,
    list_names,
    names_of,
    opened,
    published_manifest,
    read_manifest,
    read_note,
    siblings,
)
from milepost.commit.marks import assemble, checked_manifest, missing_files
from milepost.commit.recover import is_overtaken
from milepost.errors import (
    CheckpointNotFoundError,
    CommitError,
    LoadError,
    StorageError,
    UnsupportedFormatError,
)
from milepost.format.index import FileDigest, decode_index, decode_mark
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
    is_note_aside,
    is_own,
    is_plain_name,
    looks_hidden,
    ranks_in,
    stem_of,
)
from milepost.health.listing import Entry, Explanation, explain_folder, scan
from milepost.health.outline import outline
from milepost.health.verify import Progress, verify
from milepost.storage import Folder, Storage

__all__ = ["LATE_SECONDS", "Damage", "Diagnosis", "Finding", "RankState", "Watch", "diagnose"]

_TRIES = 5
LATE_SECONDS = 300.0
"""So long after its last change an attempt waits for ranks that have not begun, as those that have arrived
need not stay."""
_CUT_STEM = re.compile(r".+~[0-9a-f]{16}", re.DOTALL)

Watch = Callable[[str], AbstractContextManager[Progress | None]]
"""Called with the path of a checkpoint whose bytes are read; the context's value is told the progress."""


@dataclass(frozen=True)
class RankState:
    """What one rank did in an attempt that has not committed.

    Attributes:
        rank: The rank.
        state: "arrived": its part is durable. "failed": it left an abort mark. "missing": it began, and
            has not arrived. "silent": it has left no word.
        phase: What it was doing when it last said so, or when it failed.
        bytes_done: Bytes that it had written then.
        time: When that was, seconds since the epoch by its host's clock; 0 if it is not known.
        error: Type and message of what it failed with.
    """

    rank: int
    state: Literal["arrived", "failed", "missing", "silent"]
    phase: str | None = None
    bytes_done: int = 0
    time: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Damage:
    """A file that is not as it was written, the rank that wrote it, and the values concerned."""

    file: str
    message: str
    rank: int | None = None
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One folder that is a checkpoint, or belongs to one.

    Attributes:
        name: The checkpoint's name.
        path: The folder that was looked at.
        target: The path that `save` and `load` are given for it; None where it cannot be told.
        state: "whole". "damaged": files are not what they were. "unreadable": a later version wrote it.
            "complete": every rank's part is there, it loads, but it was not published. "overtaken": as
            "complete", but a newer checkpoint is published. "incomplete": parts are missing.
            "replaced": a former checkpoint, exchanged out by a later save. "foreign": named like an attempt
            here, but its content says that it is another's.
        loads: Whether `load` can read it, as far as was looked.
        compared: How far that was, where it seems whole: "sizes": the sizes of all files, and the bytes of
            the indexes and the shard map. "bytes": every byte. "nothing": there is nothing to compare with.
        published: It is at its own path, and not in a hidden folder.
        alive: Its lock is held: somebody works on it. None where that cannot be told, or ranks that have
            not begun may still come.
        aborted: A rank has failed, so that it will never be committed.
        step: The training step that was recorded.
        time: When it was saved, or last changed.
        size_bytes: Bytes of its files.
        world_size: How many ranks take part.
        ranks: What each rank did, in an attempt that has not committed.
        damage: What is damaged.
        problem: What else is worth knowing.
        leftovers: Passing files of the save that are still in a published checkpoint.
    """

    name: str
    path: str
    target: str | None
    state: Literal[
        "whole", "damaged", "unreadable", "complete", "overtaken", "incomplete", "replaced", "foreign"
    ]
    loads: bool = False
    compared: Literal["nothing", "sizes", "bytes"] = "nothing"
    published: bool = False
    alive: bool | None = False
    aborted: bool = False
    step: int | None = None
    time: float = 0.0
    size_bytes: int = 0
    world_size: int | None = None
    ranks: tuple[RankState, ...] = ()
    damage: tuple[Damage, ...] = ()
    problem: str | None = None
    leftovers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """What was found at a path.

    Attributes:
        path: The path.
        is_run: It is a folder of checkpoints, and not one checkpoint.
        findings: All that there is, by time.
        newest: The newest loadable one in the whole folder: by step, those without one by time.
        around: All in the folder, also what was not asked for.
    """

    path: str
    is_run: bool
    findings: list[Finding] = field(default_factory=list)
    newest: Finding | None = None
    around: list[Finding] = field(default_factory=list)


# ---------------------------------------------------------------------------- the whole


def diagnose(storage: Storage, path: str, *, deep: bool = False, watch: Watch | None = None) -> Diagnosis:
    """Look at one checkpoint (which may exist as a hidden partial only), or at all in a folder.

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
        # A save may be replacing what is looked at: damage that is seen twice in the same way is so.
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
        locate(storage, path).folder.close()  # tells what is there instead, and what exists near it
        storage.open_folder(folder).close()  # tells why it cannot be listed
    listed = {entry.path: entry for entry in scan(storage, folder)}
    places = (os.path.join(folder, name) for name in names or ())
    looks = (_examine(storage, place, listed.get(place), names or []) for place in places)
    findings = [finding for finding in looks if finding is not None]
    asked = {path, *(finding.target for finding in findings if finding.path == path)} - {None}
    chosen = [found for found in findings if is_run or found.path == path or found.target in asked]
    if not is_run and not chosen:
        locate(storage, path).folder.close()
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
    stem, attempt = looks_hidden(base) or (base, None)
    with opened(storage, path) as folder:
        if folder is None or (attempt is None and entry is None):
            return None
        note = read_note(folder)
        target = path if attempt is None else _target(os.path.dirname(path), stem, attempt, note, names)
        found = Finding(os.path.basename(target) if target else stem, path, target, "incomplete")
        if entry is not None:
            facts = ("step", "time", "size_bytes", "world_size")
            found = replace(found, **{fact: getattr(entry, fact) for fact in facts})
            if attempt is None:
                return _published(folder, found, entry)
        return _hidden(storage, folder, found, attempt or "", note, is_listed=entry is not None)


def _target(parent: str, stem: str, attempt: str, note: Note | None, names: list[str]) -> str | None:
    """The path to which a hidden folder belongs; None if its name was cut and is told nowhere."""
    if not _CUT_STEM.fullmatch(stem):
        return os.path.join(parent, stem)
    candidates = [name for name in names if not looks_hidden(name)]
    if note is not None and note.attempt == attempt and is_plain_name(note.name):
        candidates.append(note.name)
    name = next((name for name in candidates if stem_of(name) == stem and "/" not in name), None)
    return None if name is None else os.path.join(parent, name)


def _published(folder: Folder, found: Finding, entry: Entry) -> Finding:
    names = list_names(folder)
    found = replace(found, state="damaged", published=True)
    if entry.state == "committed" and MANIFEST_NAME not in names:
        return replace(found, state="whole", loads=True, problem=entry.problem)
    try:
        manifest = read_manifest(folder)
    except UnsupportedFormatError as error:
        return replace(found, state="unreadable", problem=error.message)
    except LoadError as error:
        return replace(found, damage=(Damage(MANIFEST_NAME, error.message),))
    damage = _misfits(folder, manifest) if manifest else (Damage(MANIFEST_NAME, "is missing"),)
    if entry.state == "damaged" or damage:
        return replace(found, damage=damage or (Damage("", entry.problem or "it changes all the time"),))
    left = tuple(name for name in names if is_own(name) and name != MANIFEST_NAME)
    return replace(found, state="whole", loads=True, compared="sizes", leftovers=left)


def _hidden(
    storage: Storage, folder: Folder, found: Finding, attempt: str, note: Note | None, *, is_listed: bool
) -> Finding | None:
    """What a hidden folder is: its content decides, by the rules of `milepost.commit.recover`."""
    names = list_names(folder)
    published = None
    with suppress(LoadError):
        published = published_manifest(storage, found.target) if found.target else None
    try:
        manifest = read_manifest(folder)
    except UnsupportedFormatError as error:
        return replace(found, state="unreadable", problem=error.message)
    except LoadError as error:
        return replace(found, state="damaged", damage=(Damage(MANIFEST_NAME, error.message),))
    if manifest is not None and manifest.attempt != attempt:
        whole = checked_manifest(folder, manifest.attempt, names, deep=True)
        free = found.target is not None and storage.stat(found.target) is None
        return replace(found, state="replaced", loads=whole is not None and free, compared="sizes")
    if not is_listed:  # nothing of ours is in it
        data = any(data_rank(name) is not None for name in names)
        exchanged = published is not None and published.attempt == attempt
        if names:
            return replace(found, state="replaced") if data and exchanged else None
        former = exchanged or found.path.endswith(REPLACED)
        return replace(found, state="replaced" if former else "incomplete", problem="it is empty")
    fresh = time.time() - found.time < LATE_SECONDS
    alive = _is_alive(storage, found.path, attempt, names, fresh=fresh)
    found = replace(found, alive=alive)
    whole = checked_manifest(folder, attempt, names, deep=True)
    if whole is not None:
        late = is_overtaken(whole, published)
        return replace(found, state="overtaken" if late else "complete", loads=not late, compared="sizes")
    if note is not None and not belongs(note, folder, attempt):
        return replace(found, state="foreign")
    told = explain_folder(folder)
    world_size = told.world_size or _marked_world_size(folder, told.arrived)
    full = world_size is not None and len(told.arrived) >= world_size
    aborted, ranks = is_aborted(names), tuple(_ranks(told, world_size))
    may_come = fresh and not aborted and any(rank.state == "silent" for rank in ranks)
    return replace(
        found,
        alive=alive or (None if may_come else alive),
        aborted=aborted,
        world_size=world_size,
        ranks=ranks,
        problem=_contradiction(folder, attempt, names, manifest) if full and not aborted else None,
    )


def _is_alive(storage: Storage, path: str, attempt: str, names: list[str], *, fresh: bool) -> bool | None:
    try:
        if is_abandoned(storage, Hidden(path, attempt)):
            return False
    except StorageError:
        return None
    if NOTE_NAME in names:
        return True
    # Nobody can hold a lock on a file that is not there; but one who has just begun has not named it yet.
    return None if fresh and all(is_note_aside(name) for name in names) else False


def _marked_world_size(folder: Folder, arrived: list[int]) -> int | None:
    """How many ranks take part, where the ``attempt.json`` that said so is lost."""
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


def _contradiction(folder: Folder, attempt: str, names: list[str], manifest: Manifest | None) -> str:
    """Why an attempt is not complete although all ranks have arrived."""
    if manifest is not None:
        return "; ".join(missing_files(folder, manifest)[:5]) or "an index or attachment is damaged"
    try:
        assemble(folder, attempt, ranks_in(names), live=False)
    except (CommitError, LoadError, StorageError) as error:
        return str(getattr(error, "message", error))
    missing = [name for rank in ranks_in(names) if folder.stat(name := data_name(rank)) is None]
    more = f"{', '.join(sorted(missing)[:5])} {'is' if len(missing) == 1 else 'are'} missing"
    return more if missing else "files are not as the ranks' marks say"


# ---------------------------------------------------------------------------- damage


def _rank_of(name: str) -> int | None:
    rank = data_rank(name)
    return index_rank(name) if rank is None else rank


def _misfits(folder: Folder, manifest: Manifest) -> tuple[Damage, ...]:
    """The files that are missing, have another size or, if `load` compares all of it, another content.

    A data file comes with the values that are lost with it.
    """
    damage = []
    names = [entry.name for entry in manifest.entries()]
    for problem in missing_files(folder, manifest):
        name = max((name for name in names if problem.startswith(f"{name} ")), key=len, default="")
        keys = () if data_rank(name) is None else _keys_beyond(folder, name)
        damage.append(Damage(name, problem.removeprefix(f"{name} "), _rank_of(name), keys))
    told = {known.file for known in damage}
    for listed in (*manifest.indexes, *([manifest.shards] if manifest.shards else [])):
        if listed.name not in told and (message := _difference(folder, listed)):
            damage.append(Damage(listed.name, message, _rank_of(listed.name)))
    return tuple(damage)


def _difference(folder: Folder, listed: FileDigest) -> str | None:
    """How a file is not what the manifest says, if so."""
    try:
        same = file_digest(folder, listed.name) == listed
    except (LoadError, StorageError) as error:
        return f"cannot be read: {error.message}"
    return None if same else "does not have the SHA-256 that the manifest lists"


def _keys_beyond(folder: Folder, name: str) -> tuple[str, ...]:
    """The values of a data file that reach beyond its end, as its index says."""
    with suppress(LoadError, StorageError):
        found = folder.stat(name)
        size = found.size_bytes if found is not None and found.kind == "file" else 0
        index = decode_index(folder.read(index_name(data_rank(name) or 0), MAX_INDEX_BYTES), name)
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

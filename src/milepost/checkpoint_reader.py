"""The reader: loads one rank's state dict, into a template or anew, and verifies what it loads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from milepost.commit import Checkpoint, given_path, locate
from milepost.errors import (
    CheckpointNotFoundError,
    ConfigError,
    EntryNotFoundError,
    MilepostError,
    MismatchError,
    error_context,
)
from milepost.format.shards import ShardMap
from milepost.loading.plain_file import PlainSource
from milepost.loading.rank_file import Verify
from milepost.loading.renames import Names
from milepost.loading.source import CheckpointSource
from milepost.loading.template import Match
from milepost.ranks.load_meeting import Meeting, Report, default_meeting, refuse
from milepost.storage import Storage, default_storage
from milepost.types import STATE_DICT, RankInfo, StrPath
from milepost.utils import gc_paused

__all__ = ["CheckpointReader", "load_with"]

logger = logging.getLogger(__name__)

_SHOWN = 20
_TRIES = 20


class CheckpointReader:
    """Reads checkpoints as one rank of a job. Thread-safe; holds nothing between reads.

    Args:
        rank_info: Which rank this is, of how many.
        storage: Where checkpoints live; the local file system by default.
        store: A ``torch.distributed`` store at which the ranks agree on each load; by default that of the
            default process group, if there is one of this size.
        timeout_seconds: How long to wait there for the other ranks.
    """

    def __init__(
        self,
        rank_info: RankInfo,
        *,
        storage: Storage | None = None,
        store: Any = None,
        timeout_seconds: float = 600,
    ) -> None:
        self._rank_info = rank_info
        self._storage = default_storage() if storage is None else storage
        self._store = store
        self._timeout_seconds = timeout_seconds

    def read(
        self,
        path: StrPath,
        state_dict: STATE_DICT | None = None,
        *,
        map_location: Any = None,
        verify: Verify = True,
        strict: bool = False,
        allow_missing: Sequence[str] = (),
        rename: Mapping[str, str] | None = None,
        together: bool = True,
        cast: bool = False,
        **kwargs: Any,
    ) -> tuple[STATE_DICT, list[str]]:
        """Read what this rank needs of the checkpoint at `path`.

        On return every byte that was loaded has been checked against the checksums made when it was
        saved (unless `verify` is False). If it raises, the template is as it was; the one exception are
        damage and failures found while reading, whose error then has ``targets_modified`` True.

        A tensor that several ranks saved between them (a DTensor, or one that was declared replicated) is
        loaded into whatever the template has: a DTensor of any placements gets this rank's part of it, a
        plain tensor all of it. Every other value is what rank `r` of N saved, for rank `r` of this job;
        ranks beyond N take those of rank ``r % N``.

        With several ranks, and a default process group or a store, all ranks must call this, with the same
        path: they return the same missing keys, and if one of them cannot load, all raise and no rank has
        changed anything (but for damage that is found while reading). With neither, each rank raises alone.

        Args:
            path: The checkpoint's folder, or one with a ``checkpoint_<rank>.pt`` of plain ``torch.save``.
            state_dict: A template to load into. Only its keys are loaded and none is added; its tensors
                are filled in place, its other values replaced; None stands for all that was saved there.
                Without a template the file is mapped privately: tensors are copies on write; those that
                several ranks saved come whole, as plain contiguous tensors.
            map_location: As for ``torch.load``, for tensors that are new.
            verify: True; False to skip the checksums; "first" to read twice, checking all before the
                template is touched.
            strict: Refuse keys of the template that were not saved, before anything is changed. Otherwise
                they, and saved keys that the template lacks, are one warning in the log. If not strict, a
                template that only lacks whole parts of what was saved, such as ``optimizer``, is none.
            allow_missing: Patterns (``*`` is any text) of paths that need not have been saved; what is let
                pass is named in the log, and is not among the missing keys.
            rename: From the path at which something was saved to the one that it has in the template, such
                as ``{"model.old.*": "model.new.*"}``; what is renamed is named in the log, and so are
                renames that fit nothing.
            cast: Convert what was saved to the dtypes of the template's tensors and arrays, as
                ``load_state_dict`` does. Complex values are converted to complex dtypes only.
            together: False to load on this rank alone although there is a process group.
            kwargs: Accepted and ignored; the log names those that ``torch.load`` does not have.

        Returns:
            The state dict (the template, if one was given), and the topmost paths in the template that
            were not saved, such as ``model.0.weight``.

        Raises:
            CheckpointNotFoundError: There is none; the message names the nearest.
            IncompleteCheckpointError: The save never committed.
            CorruptCheckpointError: A file is damaged; the message says which, and which key.
            MismatchError: The template does not fit, or (if strict) keys are missing; lists them all.
            PeerLoadError: Another rank could not load, or did not come.
            UnsupportedFormatError: A later version of Milepost wrote it.
        """
        unknown = kwargs.keys() - {"weights_only", "mmap"}
        if unknown:
            logger.warning("load ignores the unknown arguments %s", sorted(unknown))
        rank = self._rank_info.global_rank
        path = given_path(path, CheckpointNotFoundError)
        meeting = self._meeting() if together else None
        alone = self._rank_info.global_world_size == 1
        with error_context(path=path, rank=rank, phase="load", alone=alone):
            with nullcontext() if meeting is None else meeting.telling(path):
                names = _checked(state_dict, verify, rename, allow_missing, cast)
                source, found, identity = self._prepared(
                    path, state_dict, map_location, verify, names, alone=meeting is None
                )
            with source:
                report = Report(path, identity, strict=strict, first=verify == "first")
                first = self._judge(path, found or Match(), report, meeting)
                loaded: list[STATE_DICT] = []
                work = [(source.check, False)] if first else []
                work.append((partial(self._load, source, state_dict, found, loaded), True))
                for part, modifies in work:
                    if meeting is None:
                        part()
                    else:
                        meeting.agree(Report(path), part, modifies=modifies)
        if found is not None:
            _tell(path, found, strict=strict)
        return loaded[0], found.missing if found is not None else []

    def _meeting(self) -> Meeting | None:
        info = self._rank_info
        return default_meeting(info.global_rank, info.global_world_size, self._store, self._timeout_seconds)

    def _prepared(
        self,
        path: str,
        state_dict: STATE_DICT | None,
        map_location: Any,
        verify: Verify,
        names: Names,
        *,
        alone: bool,
    ) -> tuple[PlainSource | CheckpointSource, Match | None, str]:
        """Open what is to be read, and compare it with the template; also the checkpoint's identity.

        A save that replaces it may take a file away meanwhile: then look again.
        """
        for final in (*[False] * _TRIES, True):
            checkpoint, source = locate(self._storage, path), None
            try:
                source = self._opened(checkpoint, map_location, verify, alone=alone)
                with gc_paused():
                    found = None if state_dict is None else source.match(state_dict, names)
                    if found is None:
                        source.open_all()
                return source, found, checkpoint.identity
            except BaseException as error:
                if source is not None:
                    source.__exit__(None, None, None)
                checkpoint.close()
                if final or not isinstance(error, EntryNotFoundError | CheckpointNotFoundError):
                    raise
        raise AssertionError("unreachable")

    def _judge(self, path: str, found: Match, report: Report, meeting: Meeting | None) -> bool:
        """Refuse what does not fit, on all ranks alike; afterwards `found` is what all ranks found.

        Returns:
            Whether all is to be verified before anything is written to.
        """
        strict, first = report.strict, report.first
        if meeting is not None:
            report.missing, report.unexpected, report.misfits = found.missing, found.unexpected, found.misfits
            verdict = meeting.hold(report)
            refuse(verdict, modified=False)
            strict, first = verdict.strict, verdict.first
            found.missing, found.unexpected, found.misfits = (
                verdict.missing,
                verdict.unexpected,
                verdict.misfits,
            )
        if found.misfits or (strict and found.missing):
            hint = "nothing was changed"
            if found.misfits:
                hint += "; where dtypes alone differ, cast=True converts them"
            raise MismatchError(_differences(path, found, strict=strict), hint=hint)
        return first

    def _load(
        self,
        source: PlainSource | CheckpointSource,
        state_dict: STATE_DICT | None,
        found: Match | None,
        loaded: list[STATE_DICT],
    ) -> None:
        if found is None or state_dict is None:
            loaded.append(source.whole())
            return
        try:
            source.fill()
            found.finish()
        except MilepostError as error:
            error.targets_modified = source.filling
            raise
        loaded.append(state_dict)

    def _opened(
        self, checkpoint: Checkpoint, map_location: Any, verify: Verify, *, alone: bool
    ) -> PlainSource | CheckpointSource:
        """The source of a checkpoint, which is closed with its source at the latest."""
        manifest = checkpoint.manifest
        if manifest is None:
            with checkpoint:
                return PlainSource(checkpoint.data(self._rank_info.global_rank), map_location)
        rank = self._rank_info.global_rank % manifest.world_size
        if rank != self._rank_info.global_rank:
            logger.warning(
                "%s was saved by %d ranks; rank %d loads per-rank values from rank %d",
                *(checkpoint.path, manifest.world_size, self._rank_info.global_rank, rank),
            )
        with gc_paused():
            shards = checkpoint.shards()
            if shards is None:
                shards = ShardMap(attempt=manifest.attempt, world_size=manifest.world_size)
            return CheckpointSource(
                rank,
                shards,
                lambda rank: (checkpoint.index(rank), checkpoint.data(rank)),
                lambda index: checkpoint.data(index.rank),
                map_location,
                verify,
                own_only=alone and manifest.world_size == self._rank_info.global_world_size,
                close=checkpoint.close,
            )


def _checked(
    template: object, verify: object, rename: Any, allow_missing: Sequence[str], cast: object
) -> Names:
    """The names to use; raises for arguments that are not right."""
    if template is not None and not isinstance(template, dict):
        raise MismatchError(f"the template must be a dict, not {type(template).__name__}")
    if not (isinstance(verify, bool) or verify == "first"):
        raise ConfigError(f'verify must be True, False or "first", not {verify!r}')
    if not isinstance(cast, bool):
        raise ConfigError(f"cast must be True or False, not {cast!r}")
    names = Names(rename, allow_missing, cast=cast)
    if template is None and (names.renames or cast):
        option = "rename" if names.renames else "cast"
        raise ConfigError(f"{option} needs a template: pass the state dict to load into")
    return names


def _tell(path: str, found: Match, *, strict: bool) -> None:
    """Name in the log what differs, what was let pass and what was renamed."""
    differs = found.missing or found.unexpected or found.unused
    if differs and (strict or found.missing or found.unused or set(found.unexpected) - found.sections):
        logger.warning("%s", _differences(path, found))
    elif differs:
        logger.info("%s: the template does not ask for %s", path, "; ".join(found.unexpected))
    if found.allowed:
        logger.warning("%s lacks what is allowed to be missing: %s", path, "; ".join(found.allowed))
    if found.renamed:
        pairs = "; ".join(f"{old} -> {new}" for old, new in found.renamed)
        logger.warning("%s: loaded under new names: %s", path, pairs)


def _differences(path: str, found: Match, *, strict: bool = False) -> str:
    """One message for everything in which a template and a checkpoint differ."""
    parts = []
    for title, items in (
        ("does not fit", found.misfits),
        ("missing keys" if strict else "missing keys in the checkpoint", found.missing),
        ("unexpected keys in the checkpoint", found.unexpected),
        ("renames that fit nothing", found.unused),
    ):
        if items:
            more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
            parts.append(f"{title} ({len(items)}): {'; '.join(items[:_SHOWN])}{more}")
    return f"the template and the checkpoint differ: {path}: " + ". ".join(parts)


def load_with(
    reader: CheckpointReader,
    path: str,
    state_dict: STATE_DICT | None,
    *,
    map_location: Any,
    strict: bool,
    options: dict[str, Any],
) -> STATE_DICT:
    """Load through a reader, ours or one that only has ``read``.

    Ours refuses missing keys before it changes anything; from any other they are known only afterwards.
    """
    if strict and type(reader).read is CheckpointReader.read:
        options = {**options, "strict": True}
    loaded, missing = reader.read(path, state_dict, map_location=map_location, **options)
    if strict and missing:
        raise MismatchError(f"the checkpoint has missing keys: {', '.join(missing)}", path=path)
    return loaded

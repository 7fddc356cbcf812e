"""The reader: loads one rank's state dict, into a template or anew, and verifies what it loads."""

from __future__ import annotations

import logging
from typing import Any

from milepost.commit import Located, locate
from milepost.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    EntryNotFoundError,
    MilepostError,
    MismatchError,
    error_context,
)
from milepost.manifest import (
    MAX_INDEX_BYTES,
    Index,
    data_name,
    decode_index,
    digest,
)
from milepost.sources import IndexedSource, PlainSource, Verify
from milepost.storage import OpenFile, Storage, default_storage
from milepost.template import Match
from milepost.types import STATE_DICT, RankInfo
from milepost.utils import gc_paused

__all__ = ["CheckpointReader"]

logger = logging.getLogger(__name__)

_SHOWN = 20
_TRIES = 20


class CheckpointReader:
    """Reads this rank's part of checkpoints. Thread-safe; holds nothing between reads.

    Args:
        rank_info: Which rank this is, of how many.
        storage: Where checkpoints live; the local file system by default.
    """

    def __init__(self, rank_info: RankInfo, *, storage: Storage | None = None) -> None:
        self._rank_info = rank_info
        self._storage = default_storage() if storage is None else storage

    def read(
        self,
        path: str,
        state_dict: STATE_DICT | None = None,
        *,
        map_location: Any = None,
        verify: Verify = True,
        strict: bool = False,
        **kwargs: Any,
    ) -> tuple[STATE_DICT, list[str]]:
        """Read what this rank saved at `path`.

        On return every byte that was loaded has been checked against the checksums made when it was
        saved (unless `verify` is False). If it raises, the template is as it was; the one exception are
        damage and failures found while reading, whose error then has ``targets_modified`` True.

        Args:
            path: The checkpoint's folder, or one with a ``checkpoint_<rank>.pt`` of plain ``torch.save``.
            state_dict: A template to load into. Only its keys are loaded and none is added; its tensors
                are filled in place, its other values replaced; None stands for all that was saved there.
                Without a template the file is mapped privately: tensors are copies on write.
            map_location: As for ``torch.load``, for tensors that are new.
            verify: True; False to skip the checksums; "first" to read twice, checking all before the
                template is touched.
            strict: Refuse keys of the template that were not saved, before anything is changed. Otherwise
                they, and saved keys that the template lacks, are one warning in the log.
            kwargs: Accepted for compatibility with ``torch.load`` and ignored.

        Returns:
            The state dict (the template, if one was given), and the topmost paths in the template that
            were not saved, such as ``model.0.weight``.

        Raises:
            CheckpointNotFoundError: There is none; the message names the nearest.
            IncompleteCheckpointError: The save never committed.
            CorruptCheckpointError: A file is damaged; the message says which, and which key.
            MismatchError: The template does not fit, or (if strict) keys are missing; lists them all.
            UnsupportedFormatError: A later version of Milepost wrote it.
        """
        if state_dict is not None and not isinstance(state_dict, dict):
            raise MismatchError(f"the template must be a dict, not {type(state_dict).__name__}")
        if not (isinstance(verify, bool) or verify == "first"):
            raise ConfigError(f'verify must be True, False or "first", not {verify!r}')
        unknown = kwargs.keys() - {"weights_only", "mmap"}
        if unknown:
            logger.warning("load ignores the unknown arguments %s", sorted(unknown))
        rank = self._rank_info.global_rank
        with (
            error_context(path=path, rank=rank, phase="load"),
            self._source(path, map_location, verify) as source,
        ):
            if state_dict is None:
                return source.whole(), []
            with gc_paused():
                found = source.match(state_dict)
            if found.misfits or (strict and found.missing):
                raise MismatchError(_differences(path, found, strict=strict), hint="nothing was changed")
            try:
                source.fill(found.fills)
                found.finish()
            except MilepostError as error:
                error.targets_modified = source.filling
                raise
            if found.missing or found.unexpected:
                logger.warning("%s", _differences(path, found))
            return state_dict, found.missing

    def _source(self, path: str, map_location: Any, verify: Verify) -> PlainSource | IndexedSource:
        """Open what is to be read. A save that replaces it may take a file away meanwhile: look again."""
        for final in (*[False] * _TRIES, True):
            located = locate(self._storage, path)
            try:
                if located.manifest is None:
                    return PlainSource(self._open_plain(located), map_location)
                with gc_paused():
                    index, file = self._open(located)
                return IndexedSource(index, file, map_location, verify)
            except (EntryNotFoundError, CheckpointNotFoundError):
                if final:
                    raise
            finally:
                located.folder.close()
        raise AssertionError("unreachable")

    def _open(self, located: Located) -> tuple[Index, OpenFile]:
        manifest = located.manifest
        if manifest is None:
            raise AssertionError("a plain folder has no index")
        rank, world_size = self._rank_info.global_rank, self._rank_info.global_world_size
        if rank >= manifest.world_size:
            raise CheckpointNotFoundError(
                f"this checkpoint was saved by {manifest.world_size} ranks: it has no part of rank {rank}",
                path=located.path,
                hint=f"load it with {manifest.world_size} ranks",
            )
        if world_size != manifest.world_size:
            logger.warning(
                "%s was saved by %d ranks; rank %d of %d reads only what rank %d saved",
                *(located.path, manifest.world_size, rank, world_size, rank),
            )
        listed = manifest.indexes[rank]
        name = f"{located.path}/{listed.name}"
        data = located.folder.read(listed.name, MAX_INDEX_BYTES)
        if digest(listed.name, data) != listed:
            raise CorruptCheckpointError(
                f"the index does not have the SHA-256 of the manifest: {name}", path=name
            )
        index = decode_index(data, name)
        if (index.attempt, index.rank, index.world_size) != (manifest.attempt, rank, manifest.world_size):
            raise CorruptCheckpointError(f"the index belongs to another checkpoint: {name}", path=name)
        if len(index.files) != 1 or index.files[0] not in manifest.files:
            raise CorruptCheckpointError(f"the index lists other files than the manifest: {name}", path=name)
        file = located.folder.open(index.files[0].name)
        if file.size != index.files[0].size:
            file.close()
            raise CorruptCheckpointError(
                f"the file has {file.size} bytes, {index.files[0].size} were written: {file.path}",
                path=file.path,
            )
        return index, file

    def _open_plain(self, located: Located) -> OpenFile:
        name = data_name(self._rank_info.global_rank)
        try:
            file: OpenFile = located.folder.open(name)
        except FileNotFoundError:
            raise CheckpointNotFoundError(
                f"there is no {name} in {located.path}",
                path=located.path,
                hint=f"it holds {', '.join(located.folder.names()[:5]) or 'nothing'}",
            ) from None
        return file


def _differences(path: str, found: Match, *, strict: bool = False) -> str:
    """One message for everything in which a template and a checkpoint differ."""
    parts = []
    for title, items in (
        ("does not fit", found.misfits),
        ("missing keys" if strict else "missing keys in the checkpoint", found.missing),
        ("unexpected keys in the checkpoint", found.unexpected),
    ):
        if items:
            more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
            parts.append(f"{title} ({len(items)}): {'; '.join(items[:_SHOWN])}{more}")
    return f"the template and the checkpoint differ: {path}: " + ". ".join(parts)

"""The names of all files and folders of a checkpoint, in one place.

While it is made, a checkpoint ``name`` is the folder ``.<name>.<attempt>.partial`` beside its path. An older
one that a save replaces becomes ``.<name>.<attempt>.replaced``, and one that `milepost rm` removes becomes
``.<name>.<attempt>.removed``.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable

__all__ = [
    "ABORTED_NAME",
    "ARRIVED_NAME",
    "MANIFEST_NAME",
    "NOTE_NAME",
    "PARTIAL",
    "REMOVED",
    "REPLACED",
    "SHARDS_NAME",
    "abort_name",
    "beacon_name",
    "data_name",
    "data_rank",
    "index_name",
    "index_rank",
    "is_aborted",
    "is_attempt_id",
    "is_note_aside",
    "is_own",
    "is_plain_name",
    "join_hidden",
    "looks_hidden",
    "ranks_in",
    "removed_stem",
    "shown",
    "stem_of",
]

MANIFEST_NAME = "manifest.json"
SHARDS_NAME = "shards.json"
NOTE_NAME = "attempt.json"
ARRIVED_NAME = "arrived.json"
ABORTED_NAME = "aborted.json"
PARTIAL, REPLACED, REMOVED = ".partial", ".replaced", ".removed"

_MAX_STEM_BYTES = 170  # the dots, an attempt of 64 characters and a suffix must fit into 255 bytes with it
_NUMBER = "(0|[1-9][0-9]{0,8})"
_OWN = re.compile(
    rf"attempt\.json|arrived\.json|aborted\.json|manifest\.json|(?:state|abort)_{_NUMBER}\.json"
)
_ASIDE = re.compile(rf"\.(?:{_OWN.pattern}|shards\.json|index_{_NUMBER}\.json)\.[0-9a-f]{{16}}\.tmp")
_DATA = re.compile(rf"checkpoint_{_NUMBER}\.pt")
_INDEX = re.compile(rf"index_{_NUMBER}\.json")
_SILLY = re.compile(r"\.(?:nfs|fuse_hidden)[0-9a-f]{8,}")
_ATTEMPT = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HIDDEN = re.compile(r"\.(.+)\.([A-Za-z0-9_-]{1,64})(?:\.partial|\.replaced)", re.DOTALL)
_REMOVED = re.compile(r"\.(.+)\.[0-9a-f]{16}\.removed", re.DOTALL)


def data_name(rank: int) -> str:
    """The name of a rank's data file."""
    return f"checkpoint_{rank}.pt"


def index_name(rank: int) -> str:
    """The name of a rank's index."""
    return f"index_{rank}.json"


def beacon_name(rank: int) -> str:
    """The name of a rank's beacon."""
    return f"state_{rank}.json"


def abort_name(rank: int) -> str:
    """The name of a rank's abort mark."""
    return f"abort_{rank}.json"


def is_plain_name(name: str) -> bool:
    """Whether `name` is a relative path of plain components, which cannot leave its folder."""
    return (
        0 < len(name) <= 4096
        and "\0" not in name
        and "\\" not in name
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


def is_own(name: str) -> bool:
    """Whether an entry of a published folder can only be a leftover of ours (or the manifest).

    NFS and FUSE keep a removed file that is still open, under another name: that is one as well.
    """
    return bool(_OWN.fullmatch(name) or _ASIDE.fullmatch(name) or _SILLY.fullmatch(name))


def is_note_aside(name: str) -> bool:
    """Whether this is an ``attempt.json`` that has not got its name yet."""
    return bool(_ASIDE.fullmatch(name)) and name.startswith(f".{NOTE_NAME}.")


def data_rank(name: str) -> int | None:
    """The rank in the name of a data file."""
    match = _DATA.fullmatch(name)
    return int(match[1]) if match else None


def index_rank(name: str) -> int | None:
    """The rank in the name of an index."""
    match = _INDEX.fullmatch(name)
    return int(match[1]) if match else None


def ranks_in(names: Iterable[str]) -> set[int]:
    """The ranks whose marks are among these names."""
    return {rank for rank in map(index_rank, names) if rank is not None}


def is_aborted(names: Iterable[str]) -> bool:
    """Whether an abort mark is among these names."""
    return any(name == ABORTED_NAME or name.startswith("abort_") for name in names)


def shown(name: str) -> str:
    """A file name, or any text, as JSON can hold it, also where it is no valid Unicode."""
    return name.encode("utf-8", "surrogatepass").decode("utf-8", "backslashreplace")


def stem_of(name: str) -> str:
    """What stands for a checkpoint's name in the names of its hidden folders."""
    raw = os.fsencode(name)
    if len(raw) <= _MAX_STEM_BYTES:
        return name
    kept = raw[: _MAX_STEM_BYTES - 17].decode("utf-8", "ignore")
    return f"{kept}~{hashlib.sha256(raw).hexdigest()[:16]}"


def join_hidden(path: str, attempt: str, suffix: str = PARTIAL) -> str:
    """The path of the hidden folder of an attempt at `path`."""
    if not _ATTEMPT.fullmatch(attempt):
        raise ValueError(f"an attempt id has 1 to 64 characters of A-Z a-z 0-9 _ -, not {attempt!r}")
    parent, name = os.path.split(path)
    return os.path.join(parent, f".{stem_of(name)}.{attempt}{suffix}")


def looks_hidden(entry: str) -> tuple[str, str] | None:
    """The stem and the attempt in a name of a hidden folder."""
    match = _HIDDEN.fullmatch(entry)
    return (match[1], match[2]) if match else None


def removed_stem(entry: str) -> str | None:
    """The stem in the name of a folder that `milepost rm` removes; None for other names."""
    match = _REMOVED.fullmatch(entry)
    return match[1] if match else None


def is_attempt_id(text: str) -> bool:
    """Whether `text` can be the id of an attempt."""
    return bool(_ATTEMPT.fullmatch(text))

"""What an attempt is called, so that all ranks of one save, and nobody else, find each other."""

from __future__ import annotations

# Paths are str, here as in the storage package.
import hashlib
import os
import threading

__all__ = ["attempt_id", "count_save", "environment_start_id", "new_attempt_id", "process_id"]

_lock = threading.Lock()
_process_id = os.urandom(8).hex()
_private_start_id = os.urandom(8).hex()
_counts: dict[tuple[str, str, int], int] = {}


def _renew_ids() -> None:
    global _lock, _process_id, _private_start_id  # noqa: PLW0603 - they belong to the process, as its pid does
    _lock = threading.Lock()
    _process_id, _private_start_id = os.urandom(8).hex(), os.urandom(8).hex()
    _counts.clear()


os.register_at_fork(after_in_child=_renew_ids)


def process_id() -> str:
    """This process's random id; a forked child has its own."""
    return _process_id


def new_attempt_id() -> str:
    """A random attempt id, for the only rank."""
    return os.urandom(8).hex()


def environment_start_id() -> str | None:
    """The start id that the environment gives: MILEPOST_START_ID and the launchers' restart counts."""
    start = os.environ.get("MILEPOST_START_ID")
    if not start:
        return None
    counts = [os.environ.get(name) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    return "-".join([start, *(count for count in counts if count)])


def attempt_id(path: str, rank: int, world_size: int, start_id: str | None = None, number: int = 0) -> str:
    """The id of this rank's next attempt at `path`; all ranks of a save get the same one.

    Args:
        path: The checkpoint; a relative path means the folder at the time of this call.
        rank: This rank.
        world_size: The number of ranks; a single one always gets a random id.
        start_id: What all ranks of this start of the job, and nobody else, have in common. Without it
            the environment's is taken, else one of this process alone.
        number: What `count_save` has returned for this save; 0 to count it now.
    """
    if world_size == 1:
        return new_attempt_id()
    start = start_id or environment_start_id() or _private_start_id
    number = number or count_save(start, path, rank)
    if len(start) > 48 or not all(c.isascii() and (c.isalnum() or c in "-_") for c in start):
        start = _digest(start)[:32]
    # A copy of a checkpoint keeps its attempt's id. The first save to the copy's path must not have that one.
    name = os.path.basename(os.path.abspath(path))
    return f"{start}-{_digest(name)[:6]}-{number}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def count_save(start: str, path: str, rank: int) -> int:
    """How often this rank has saved to a path since a start of the job, this time included."""
    key = (start, os.path.abspath(path), rank)
    with _lock:
        _counts[key] = _counts.get(key, 0) + 1
        return _counts[key]

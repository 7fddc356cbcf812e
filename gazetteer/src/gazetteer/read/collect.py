"""Files with their digests and facts, parsing only what the last time did not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from gazetteer.cache import State, facts_of, load_facts, pack, save_facts
from gazetteer.errors import RepositoryError
from gazetteer.model import FileFacts, Status
from gazetteer.read.analyze import analyze
from gazetteer.read.scan import digest_file, scan
from gazetteer.read.workers import Workers, default_jobs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gazetteer.read.scan import Found

__all__ = ["Progress", "checked_root", "digest_all", "gather", "nothing", "read_repository"]

if TYPE_CHECKING:
    Progress = Callable[[str, int, int], None]


def nothing(_phase: str, _done: int, _total: int) -> None:
    """Take progress and do nothing with it."""


def checked_root(repository: Path | str) -> Path:
    """Return the real path of a repository.

    Raises:
        RepositoryError: It is not a folder.
    """
    root = Path(os.path.realpath(repository))
    if not root.is_dir():
        msg = f"{repository}: not a folder. Name the root of a repository."
        raise RepositoryError(msg)
    return root


def digest_all(files: Mapping[str, Found], progress: Progress = nothing) -> dict[str, bytes]:
    """Read every file once and return its digest."""
    out = {}
    progress("Reading", 0, len(files))
    for number, (path, file) in enumerate(files.items(), 1):
        out[path] = digest_file(file)
        if not number & 255 or number == len(files):
            progress("Reading", number, len(files))
    return out


def _analyze_packed(found: Found) -> bytes:
    return pack(analyze(found))


def _crashed(found: Found) -> bytes:
    note = "The parser crashed on it; nothing in it is listed."
    return pack(FileFacts(found.path, found.size, 0, "", Status.FAILED, note=note, encoding=""))


def gather(
    files: Mapping[str, Found],
    known: Mapping[str, bytes],
    packed: dict[str, bytes],
    workers: Workers[Found],
    progress: Progress = nothing,
) -> int:
    """Fill ``packed`` with the facts of every file.

    Args:
        files: The files, in order of path.
        known: Packed facts that still hold.
        packed: Filled as facts come in, so that an interrupt loses only what was under way.
        workers: The processes that parse.
        progress: Told how far it is.

    Returns:
        How many files were parsed.
    """
    packed.update((path, known[path]) for path in files if path in known)
    todo = [file for path, file in files.items() if path not in packed]
    progress("Parsing", 0, len(todo))
    for number, (file, facts) in enumerate(zip(todo, workers.run(_analyze_packed, todo, _crashed), strict=True), 1):
        packed[file.path] = facts
        if not number & 63 or number == len(todo):
            progress("Parsing", number, len(todo))
    return len(todo)


def still_holding(out: Path, state: State, digests: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the packed facts in a state folder whose files have not changed since."""
    if not state.digests:
        return {}
    old = load_facts(out)
    return {path: old[path] for path, digest in digests.items() if state.digests.get(path) == digest and path in old}


def _cache(root: Path) -> Path:
    import hashlib

    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "gazetteer", hashlib.sha256(os.fsencode(root)).hexdigest()[:24])


def read_repository(repository: Path | str, *, jobs: int = 0, progress: Progress = nothing) -> dict[str, FileFacts]:
    """Return every file's facts by path, without documenting anything.

    What was parsed is kept in the user's cache folder, so that a second call parses only what
    changed; where that folder cannot be written, nothing is kept.

    Raises:
        RepositoryError: The repository is not a folder that can be listed.
    """
    root = checked_root(repository)
    files = {file.path: file for file in scan(root).files}
    digests = digest_all(files, progress)
    cache = _cache(root)
    state = State.load(cache)
    packed: dict[str, bytes] = {}
    workers: Workers[Found]
    with Workers(jobs or default_jobs()) as workers:
        parsed = gather(files, still_holding(cache, state, digests), packed, workers, progress)
    if parsed or state.digests.keys() != digests.keys():
        try:
            save_facts(cache, packed)
            State(state.version, b"", digests).save(cache)
        except OSError:
            pass
    return {path: facts_of(data) for path, data in packed.items()}

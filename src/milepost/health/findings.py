"""What a diagnosis consists of, as plain facts."""

from __future__ import annotations

# Paths are str, here as in the storage package.
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Damage", "Diagnosis", "Finding", "RankState"]


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
    """A damaged file, the rank that wrote it, and the values in the damaged part."""

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
            here, but its content says that it is another's. "removed": what is left of one that
            `milepost rm` removes; it is its own `target`.
        loads: Whether `load` can read it, as far as was looked.
        compared: How far that was, where it seems whole: "sizes": the sizes of all files, and the bytes of
            the indexes and the shard map. "bytes": every byte. "nothing": there is nothing to compare with.
        published: It is at its own path, and not in a hidden folder.
        alive: Its lock is held: somebody works on it. None where that cannot be told, or ranks that have
            not begun may still come.
        aborted: A rank has failed, so that it will never be committed.
        kept: It has a manifest, so it is committed, though files seem to be missing: it stays until a later
            checkpoint is published.
        emptied: It has a manifest, but none of its data files is there.
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
        "whole", "damaged", "unreadable", "complete", "overtaken", "incomplete", "replaced", "foreign",
        "removed",
    ]  # fmt: skip
    loads: bool = False
    compared: Literal["nothing", "sizes", "bytes"] = "nothing"
    published: bool = False
    alive: bool | None = False
    aborted: bool = False
    kept: bool = False
    emptied: bool = False
    step: int | None = None
    time: float = 0.0
    size_bytes: int = 0
    world_size: int | None = None
    ranks: tuple[RankState, ...] = ()
    damage: tuple[Damage, ...] = ()
    problem: str | None = None
    leftovers: tuple[str, ...] = ()

    @property
    def is_wrong(self) -> bool:
        """Whether something was lost: it is damaged, or incomplete and nobody will complete it."""
        given_up = self.alive is False or self.aborted
        return self.state == "damaged" or (self.state == "incomplete" and given_up)

    @property
    def is_former(self) -> bool:
        """Whether it may be the last whole checkpoint. Of one that is empty the problem says so."""
        return self.state in ("replaced", "overtaken") and not self.problem


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

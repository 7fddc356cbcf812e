"""``milepost doctor``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

from milepost.cli.output import DAMAGED, FAILED, OK, Session, size
from milepost.cli.verify import _bar
from milepost.commit import clean_up, roll_forward
from milepost.commit.claim import unchanged_seconds
from milepost.commit.folders import names_of, numbers
from milepost.errors import CheckpointNotFoundError, MilepostError
from milepost.format.names import MANIFEST_NAME, is_own
from milepost.health.diagnosis import LATE_SECONDS, Damage, Diagnosis, Finding, RankState, Watch, diagnose
from milepost.health.listing import causes, ranks_named
from milepost.storage import Storage, default_storage

_MOST_RANKS = 10
_MOST_DAMAGE = 10
_MOST_KEYS = 5
_STYLES = {"whole": "green", "damaged": "bold red", "unreadable": "red", "complete": "green"}
_DOING = {"begin": "beginning", "write": "writing", "barrier": "at the barrier"}
_FORMER = ("replaced", "overtaken")
_COMPARED = {
    "nothing": ("unchecked", "nothing of it was checked: --deep reads every byte"),
    "sizes": ("whole by size", "its data were compared by size alone: --deep compares every byte"),
    "bytes": ("whole", ""),
}
_SPANS = ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


@dataclass(frozen=True)
class Action:
    """What a repair did with a folder, which was as `finding` says before."""

    what: Literal["published", "removed", "swept", "failed"]
    path: str
    message: str = ""
    finding: Finding | None = None


def run(session: Session, path: str, *, mend: bool, deep: bool, as_json: bool) -> int:
    """Tell what is wrong at a path and what to do; return the exit code."""
    storage, watch = default_storage(), partial(_bar, session)
    found = diagnose(storage, path, deep=deep, watch=watch)
    actions = repair(storage, found) if mend else []
    if actions:
        found = _again(storage, found, deep=deep, watch=watch)
    if as_json:
        session.json(_as_data(found, actions))
    else:
        _print(session, found, actions)
    if any(is_wrong(finding) for finding in found.findings) or any(a.what == "failed" for a in actions):
        return DAMAGED
    return FAILED if any(finding.state == "unreadable" for finding in found.findings) else OK


def is_wrong(finding: Finding) -> bool:
    """Whether something was lost: it is damaged, or incomplete and nobody will complete it."""
    given_up = finding.alive is False or finding.aborted
    return finding.state == "damaged" or (finding.state == "incomplete" and given_up)


def _again(storage: Storage, before: Diagnosis, *, deep: bool, watch: Watch) -> Diagnosis:
    """What is there after a repair, which may have removed or moved all that was at the path."""
    path = before.path
    if not before.is_run:
        path = next((finding.target for finding in before.findings if finding.target), path)
    try:
        return diagnose(storage, path, deep=deep, watch=watch)
    except CheckpointNotFoundError:
        return replace(before, findings=[], newest=diagnose(storage, os.path.dirname(path)).newest)


def repair(storage: Storage, diagnosis: Diagnosis) -> list[Action]:
    """Publish what is complete and remove what is dead, as the next saves to these paths would.

    Nothing is touched that somebody works on, or that does not say itself that it is ours; nor is anything
    that may be the last whole checkpoint given up for a damaged one.
    """
    actions: list[Action] = []
    by_target: dict[str, list[Finding]] = {}
    for finding in diagnosis.findings:
        if finding.target is not None:
            by_target.setdefault(finding.target, []).append(finding)
    for target, findings in by_target.items():
        if not all(finding.published and not finding.leftovers for finding in findings):
            refusal = _refusal(storage, findings)
            try:
                if refusal is None:
                    actions += _mend(storage, target, findings)
                elif refusal:
                    actions.append(Action("failed", target, refusal))
            except MilepostError as error:
                actions.append(Action("failed", target, error.message))
    return actions


def _is_former(finding: Finding) -> bool:
    """Whether it may be the last whole checkpoint. Of one that is empty the problem says so."""
    return finding.state in _FORMER and not finding.problem


def _refusal(storage: Storage, findings: list[Finding]) -> str | None:
    """Why recovery is not let loose on a path, if so; "" while ranks may still come."""
    for finding in findings:
        silent = not finding.aborted and any(rank.state == "silent" for rank in finding.ranks)
        if finding.state == "incomplete" and (finding.alive is None or (silent and not finding.alive)):
            # By the file system's clock, as a wrong one here must not give a live job up.
            if unchanged_seconds(storage, finding.path) < LATE_SECONDS:
                return ""
            if not silent:
                return f"it cannot be told whether somebody works on it: {_shown(finding.path)}"
        if not finding.published and any(damage.file != MANIFEST_NAME for damage in finding.damage):
            return f"a save that seemed complete is damaged; delete it yourself: {_shown(finding.path)}"
    damaged = any(finding.published and finding.state in ("damaged", "unreadable") for finding in findings)
    heir = any(finding.state == "complete" and finding.alive is False for finding in findings)
    if damaged and not heir and any(map(_is_former, findings)):
        return "the checkpoint there cannot be read whole, so what it replaced is kept"
    return None


def _mend(storage: Storage, target: str, findings: list[Finding]) -> list[Action]:
    was = {finding.path: finding for finding in findings}
    before = set(names_of(storage, target) or ())
    published = roll_forward(storage, target)
    actions = [Action("published", target, finding=was.get(path)) for path in published]
    actions += [Action("removed", path, finding=was.get(path)) for path in clean_up(storage, target)]
    passing = {name for name in before if is_own(name) and name != MANIFEST_NAME}
    gone = passing - set(names_of(storage, target) or ())
    if gone and not published:
        actions.append(Action("swept", target, ", ".join(sorted(gone)), was.get(target)))
    return actions


# ---------------------------------------------------------------------------- output


def _as_data(found: Diagnosis, actions: list[Action]) -> dict[str, object]:
    now = time.time()
    return {
        "path": found.path,
        "run": found.is_run,
        "checkpoints": [
            asdict(finding)
            | {"wrong": is_wrong(finding), "says": words(finding, now), "advice": advice(finding, found)}
            for finding in found.findings
        ],
        "newest": asdict(found.newest) if found.newest else None,
        "repaired": [asdict(action) for action in actions],
    }


def _print(session: Session, found: Diagnosis, actions: list[Action]) -> None:
    now = time.time()
    for action in actions:
        was = f" (it was {words(action.finding, now)})" if action.finding else ""
        if action.what == "swept":
            session.line(("swept", "bold"), f" {_shown(action.path)}: removed {action.message}")
        elif action.what == "failed":
            session.line(("not repaired", "red"), f" {_shown(action.path)}: {action.message}")
        else:
            session.line((action.what, "bold"), f" {_shown(action.path)}{was}")
    for finding in found.findings:
        style = _STYLES.get(finding.state, "yellow")
        session.line((finding.name, "bold"), ": ", (words(finding, now), style))
        if len(finding.damage) > 1:
            for damage in finding.damage[:_MOST_DAMAGE]:
                session.line("  ", _damage(damage))
            if len(finding.damage) > _MOST_DAMAGE:
                session.line(f"  and {len(finding.damage) - _MOST_DAMAGE} more")
        if todo := advice(finding, found):
            session.line("  -> ", todo)
    if found.is_run and not found.findings:
        session.message("no checkpoints in ", found.path)
        return
    if found.newest is None:
        session.line(("none is loadable", "bold red"))
        return
    unsure = _COMPARED[found.newest.compared][1]
    session.line((f"newest loadable is {_named(found.newest)}", "bold"), f"; {unsure}" if unsure else "")


def _shown(path: str) -> str:
    """A path as short as it can be given."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def _named(finding: Finding) -> str:
    if finding.step is None:
        return _shown(finding.target or finding.path)
    return f"step {finding.step} ({_shown(finding.target or finding.path)})"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _ago(moment: float, now: float) -> str:
    """How long ago something was."""
    seconds = int(max(now - moment, 0))
    span, word = next((pair for pair in _SPANS if seconds >= pair[0]), _SPANS[-1])
    return f"{_plural(seconds // span, word)} ago"


# ---------------------------------------------------------------------------- words


def words(finding: Finding, now: float) -> str:
    """What a finding is, in one line."""
    facts = [f"step {finding.step}"] if finding.step is not None else []
    facts += [_plural(finding.world_size, "rank")] if finding.world_size else []
    about = ", ".join(facts)
    text = {
        "whole": f"{_COMPARED[finding.compared][0]}: {about or 'no step recorded'}",
        "damaged": "damaged",
        "unreadable": "not readable by this version",
        "complete": f"complete, but not published: {about}",
        "overtaken": f"complete, but overtaken by a newer checkpoint: {about}",
        "incomplete": "incomplete",
        "replaced": f"left over: a former checkpoint, replaced by a later save{': ' if about else ''}{about}",
        "foreign": f"not ours: {os.path.basename(finding.path)} is named like a save to this path, "
        "but says itself that it is another's",
    }[finding.state]
    if finding.state == "damaged":
        many = len(finding.damage) > 1
        text += f": {len(finding.damage)} problems" if many else f": {_damage(finding.damage[0])}"
    elif finding.state == "incomplete":
        living = finding.alive and not finding.aborted
        text = ": ".join(["under way" if living else text, "; ".join(_told(finding, now))])
    elif finding.problem and finding.state in ("whole", "unreadable", "replaced"):
        text += f" ({finding.problem})"
    if finding.leftovers:
        text += f" ({_plural(len(finding.leftovers), 'passing file')} of its save still in it)"
    if finding.state not in ("whole", "incomplete") and finding.alive:
        text += "; somebody still works on it"
    return text


def _damage(damage: Damage) -> str:
    text = f"{damage.file} {damage.message}".strip()
    if damage.rank is not None:
        text = f"{damage.file} of rank {damage.rank}: {damage.message}"
    if damage.keys:
        more = len(damage.keys) - _MOST_KEYS
        text += f", in {', '.join(damage.keys[:_MOST_KEYS])}" + (f" and {more} more" if more > 0 else "")
    return text


def _told(finding: Finding, now: float) -> Iterable[str]:
    """What is known of the ranks of an attempt that has not committed."""
    by_state: dict[str, list[RankState]] = {}
    for rank in finding.ranks:
        by_state.setdefault(rank.state, []).append(rank)
    failed = sorted(by_state.get("failed", []), key=lambda rank: (rank.time, rank.rank))
    phases = {rank.rank: rank.phase or "its save" for rank in failed}
    roots, stopped = causes((rank.rank, rank.error or "") for rank in failed)
    for error, ranks in list(roots.items())[:_MOST_RANKS]:
        yield f"{ranks_named(ranks)} failed in {phases[ranks[0]]} with {error}"
    if len(roots) > _MOST_RANKS:
        yield f"and {_plural(sum(map(len, list(roots.values())[_MOST_RANKS:])), 'more rank')} failed"
    if stopped:
        yield f"{ranks_named(stopped)} stopped because of it"
    if finding.aborted and not failed:
        yield "a rank failed"
    missing = by_state.get("missing", [])
    living = finding.alive and not finding.aborted
    for rank in missing[:_MOST_RANKS]:
        last = _DOING.get(rank.phase or "", f"in {rank.phase}")
        if rank.bytes_done or rank.phase == "write":
            last += f", {size(rank.bytes_done)}"
        last += f", {_ago(rank.time, now)}"
        yield f"rank {rank.rank} " + (
            f"has not arrived yet ({last})" if living else f"never arrived (last seen {last})"
        )
    if len(missing) > _MOST_RANKS:
        yield f"and {len(missing) - _MOST_RANKS} more ranks {'have not' if living else 'never'} arrived"
    if silent := [rank.rank for rank in by_state.get("silent", [])]:
        begun = "has not begun yet" if living and len(silent) == 1 else "have not begun yet"
        yield f"{ranks_named(silent)} {begun if living else 'never began'}"
    arrived = [rank.rank for rank in by_state.get("arrived", [])]
    if arrived and len(arrived) == finding.world_size:
        yield "all ranks arrived" + (f", but {finding.problem}" if finding.problem else "")
    elif arrived:
        yield f"arrived: {numbers(arrived)}"
    if not finding.ranks:
        yield finding.problem or "no rank has left a word"
    if finding.alive and finding.aborted:
        yield "other ranks have not given up yet"


def advice(finding: Finding, found: Diagnosis) -> str | None:
    """What to do about a finding, if anything."""
    mend = "`milepost doctor --repair`"
    if finding.target is None:
        return f"its name is cut, and is told nowhere: move it away or delete it: {_shown(finding.path)}"
    instead = f"load {_named(found.newest)} instead" if found.newest else "no other checkpoint is loadable"
    if finding.state == "damaged":
        if not finding.published:
            return f"it is left alone: delete it yourself: {_shown(finding.path)}; {instead}"
        beside = found.newest is not None and found.newest.target == finding.target
        return "a complete save beside it is loaded in its place" if beside else instead
    if finding.state == "incomplete":
        if finding.aborted:
            return f"look at that rank's log; the next save to it, or {mend}, removes it; {instead}"
        if finding.alive:
            return "wait for it; if it hangs, look at the logs of the ranks that have not arrived"
        if finding.alive is None:
            return f"other ranks may still come: look again in a few minutes; {instead}"
        return f"nobody works on it any more: the next save to it, or {mend}, removes it; {instead}"
    if finding.state == "complete":
        later = "its owners publish it" if finding.alive else f"the next save to it, or {mend}, publishes it"
        return f"a load of its path reads it where it is; {later}"
    others = [other for other in found.findings if other.target == finding.target and other.published]
    if _is_former(finding) and any(other.state in ("damaged", "unreadable") for other in others):
        return f"what took its place cannot be read whole: move that away, and {mend} puts this one back"
    if finding.state == "replaced" and finding.loads:
        return f"nothing is at its path, so it loads from here; {mend} puts it back"
    return {
        "unreadable": "update Milepost: pip install -U milepost",
        "overtaken": f"it is of no use: the next save to it, or {mend}, removes it",
        "replaced": f"the next save to it, or {mend}, clears it",
        "foreign": f"it is left alone: move it away or delete it yourself: {_shown(finding.path)}",
    }.get(finding.state)

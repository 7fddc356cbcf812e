"""``milepost show``."""

from __future__ import annotations

import re
from typing import Any

from milepost.cli.output import OK, Session, moment, plain, size
from milepost.commit import Checkpoint, locate
from milepost.errors import CheckpointNotFoundError
from milepost.format.index import Index
from milepost.format.manifest import Manifest
from milepost.format.names import data_rank
from milepost.format.tree import numbers_of
from milepost.health.outline import Line, outline, outline_sharded, plain_value, text_of
from milepost.storage import default_storage

_MOST_CHARACTERS = 100
_MOST_ITEMS = 8
_LISTS = ("list", "tuple", "set")

Row = tuple[str, tuple[str, str], str]


def run(
    session: Session, path: str, depth: int | None, only: str | None, rank: int, *, exact: bool, as_json: bool
) -> int:
    """Print what a checkpoint holds; return the exit code."""
    with locate(default_storage(), path) as checkpoint:
        manifest = checkpoint.manifest
        if manifest is None:
            return _show_plain(session, path, checkpoint, exact=exact, as_json=as_json)
        if rank >= manifest.world_size:
            ranks = f"ranks 0 to {manifest.world_size - 1}"
            raise CheckpointNotFoundError(f"{path} has {ranks}, and no rank {rank}", path=path)
        index, shards = checkpoint.index(rank), checkpoint.shards()
    index, lines = (index, outline(index)) if shards is None else outline_sharded(index, shards)
    pattern = _pattern(only) if only is not None else None
    left_out = sum(line.left_out for line in lines)
    if as_json:
        chosen = [line for line in lines[1:] if _is_chosen(line, depth, pattern)]
        facts = _facts(path, checkpoint, manifest, index) | {"left_out": left_out}
        session.json(facts | {"values": [_as_data(line) for line in chosen]})
        return OK
    _print_head(session, path, checkpoint, manifest, index, lines[0].size_bytes, exact=exact)
    rows = _filtered(lines, depth, pattern, exact) if pattern else _tree(lines, depth, exact)
    if rows:
        session.line()
        session.table(("key", "value", "size"), rows)
    if left_out:
        session.line()
        session.line(f"{left_out:,} more values are not described, as there are so many")
    return OK


def _by_rank(manifest: Manifest, *, exact: bool) -> str:
    """The size of each rank's data file, or the range of them."""
    sizes = [file.size for file in manifest.files]
    if len(sizes) <= _MOST_ITEMS:
        return ", ".join(f"rank {rank} {size(count, exact=exact)}" for rank, count in enumerate(sizes))
    low, high = min(sizes), max(sizes)
    return (
        f"{size(low, exact=exact)} (rank {sizes.index(low)}) to {size(high, exact=exact)} "
        f"(rank {sizes.index(high)}), {size(sum(sizes) // len(sizes), exact=exact)} on average"
    )


def _is_chosen(line: Line, depth: int | None, pattern: re.Pattern[str] | None) -> bool:
    return (depth is None or line.depth <= depth) and (pattern is None or bool(pattern.search(line.path)))


def _filtered(lines: list[Line], depth: int | None, pattern: re.Pattern[str], exact: bool) -> list[Row]:
    """The values whose paths match, with their whole paths."""
    found = [line for line in lines[1:] if "entries" not in line.facts and _is_chosen(line, depth, pattern)]
    return [(line.path, *_cells(line, exact=exact)) for line in found]


def _tree(lines: list[Line], depth: int | None, exact: bool) -> list[Row]:
    """All values, indented; a list of plain values on one line, with no more than its beginning."""
    rows: list[Row] = []
    number = 1
    while number < len(lines):
        line = lines[number]
        number += 1
        count = line.facts.get("entries", 0)
        below = lines[number : number + count - line.left_out]
        beginning = ""
        if line.kind in _LISTS and count and all("value" in item.facts for item in below):
            shown = [item.text for item in below[:_MOST_ITEMS]] + ["…"] * (count > _MOST_ITEMS)
            beginning = ", ".join(shown)
            number += len(below)
        if depth is None or line.depth <= depth:
            label = "  " * (line.depth - 1) + line.label
            rows.append((label, *_cells(line, beginning, exact=exact)))
    return rows


def _cells(line: Line, beginning: str = "", *, exact: bool) -> tuple[tuple[str, str], str]:
    """What a value is, and its size."""
    text = line.text
    if "value" not in line.facts and line.kind not in ("tensor", "array"):
        text = f"{line.kind}, {text}" if "entries" in line.facts else f"{line.kind} {text}".strip()
    style = "dim" if "entries" in line.facts else ""
    count = size(line.size_bytes, exact=exact) if line.size_bytes or "dtype" in line.facts else ""
    return (plain(f"{text}: {beginning}" if beginning else text, _MOST_CHARACTERS), style), count


def _pattern(text: str) -> re.Pattern[str]:
    """What --filter means: part of a path or, with * or ?, a whole one."""
    if "*" not in text and "?" not in text:
        return re.compile(re.escape(text))
    wild = re.escape(text).replace(r"\*", ".*").replace(r"\?", ".")
    return re.compile(rf"\A{wild}\Z", re.DOTALL)


def _facts(path: str, checkpoint: Checkpoint, manifest: Manifest, index: Index) -> dict[str, Any]:
    """The facts about a checkpoint, for machines."""
    return {
        "path": path,
        "folder": checkpoint.path,
        "kind": "milepost",
        "version": list(manifest.version),
        "published": not checkpoint.in_place,
        "attempt": manifest.attempt,
        "step": manifest.step,
        "time": manifest.time,
        "world_size": manifest.world_size,
        "size_bytes": manifest.size_bytes,
        "writer": index.writer,
        "metadata": None if manifest.metadata is None else plain_value(manifest.metadata),
        "files": [{"name": file.name, "size": file.size} for file in manifest.files],
        "attachments": [{"name": file.name, "size": file.size} for file in manifest.attachments],
        "rank": index.rank,
    }


def _as_data(line: Line) -> dict[str, Any]:
    return {
        "path": line.path,
        "depth": line.depth,
        "kind": line.kind,
        "size_bytes": line.size_bytes,
        **line.facts,
    }


def _print_head(
    session: Session,
    path: str,
    checkpoint: Checkpoint,
    manifest: Manifest,
    index: Index,
    content: int,
    *,
    exact: bool,
) -> None:
    step = f"step {manifest.step}" if manifest.step is not None else "no step recorded"
    session.line(
        (path, "bold"), f"  {step}", "" if not checkpoint.in_place else "  (complete, not published yet)"
    )
    writer = dict(index.writer)
    place = f"{writer.pop('host', 'an unknown host')}, process {writer.pop('pid', 'unknown')}"
    versions = ", ".join(f"{name} {version}" for name, version in writer.items())
    session.line(f"saved     {moment(manifest.time)} on {place} ({versions})")
    ranks = f"{manifest.world_size} rank{'s' if manifest.world_size > 1 else ''}"
    extra = f", {len(manifest.attachments)} attached" if manifest.attachments else ""
    session.line(f"files     {size(manifest.size_bytes, exact=exact)} by {ranks}{extra}")
    if manifest.world_size > 1:
        session.line(f"by rank   {_by_rank(manifest, exact=exact)}")
    of_rank = f" for rank {index.rank}" if manifest.world_size > 1 else ""
    record = index.tensors.record  # below 0 in global tensors, and the same in those that share memory
    tensors = len({n if record[n] >= 0 else record[n] for n in numbers_of(index.tree, "tensor")})
    session.line(
        f"content   {tensors:,} tensor{'s' if tensors != 1 else ''}{of_rank}, {size(content, exact=exact)}"
    )
    if manifest.metadata is not None:
        session.line("metadata  ", text_of(plain_value(manifest.metadata)))


def _show_plain(session: Session, path: str, checkpoint: Checkpoint, *, exact: bool, as_json: bool) -> int:
    """Files of plain torch.save: only torch can tell what is in them."""
    files = [
        (name, stat.size_bytes)
        for name in checkpoint.folder.names()
        if data_rank(name) is not None and (stat := checkpoint.folder.stat(name))
    ]
    if as_json:
        session.json(
            {"path": path, "kind": "torch", "files": [{"name": name, "size": count} for name, count in files]}
        )
        return OK
    session.line((path, "bold"), "  files of plain torch.save, without an index: torch.load opens them")
    session.table(("file", "size"), [(name, size(count, exact=exact)) for name, count in files])
    return OK

"""What each file system gives and what Milepost does where it lacks something, for docs/filesystems.md.

Called by cog. tests/filesystems/test_features.py has written the facts to docs/filesystems.json.
"""

from __future__ import annotations

import json
from pathlib import Path

FACTS = json.loads(Path(__file__).resolve().parents[1].joinpath("docs", "filesystems.json").read_text())
NAMES = {
    "ext4": "ext4",
    "ext4-quota": "ext4 with a user quota",
    "xfs": "xfs",
    "btrfs": "btrfs",
    "btrfs-quota": "btrfs with a quota",
    "tmpfs": "tmpfs",
    "overlay": "overlay (on tmpfs)",
    "nfs": "NFS on loopback",
    "bindfs": "bindfs",
    "lying-fuse": "FUSE that lies",
}
FEATURES = {
    "direct_open": "O_DIRECT at open",
    "direct_write": "O_DIRECT at first write",
    "exchange": "exchange of two names",
    "noreplace": "rename that replaces nothing",
    "hard_links": "hard links",
    "locks": "`flock`",
    "network": "local, as the kernel tells",
    "mapped": "files are mapped",
    "fsync_folder": "fsync of a folder",
    "listing": "an open folder lists new names",
    "removed": "a removed file is gone while it is open",
    "chmod": "chmod",
    "reflink": "reflink",
}
INSTEAD = {
    "direct_open": "Files are written and read through the page cache.",
    "direct_write": "From that write on the file is written through the page cache.",
    "exchange": """The old checkpoint is renamed aside and the new one takes its place. Between the two
        renames `load` finds the new one beside the path.""",
    "noreplace": """A file gets its name by a hard link. A folder takes the place of an empty one that is made
        for it.""",
    "hard_links": "Milepost looks and then renames, if the rename that replaces nothing is missing as well.",
    "locks": "Nobody can tell whether a save is alive, so what a dead one left stays.",
    "network": """Locks of other hosts may not show. What a dead save left is removed when nothing in it has
        changed for a day.""",
    "mapped": "`load` reads files into memory of its own: another host could cut a file that is mapped.",
    "fsync_folder": "Names are as durable as the file system makes them.",
    "listing": "Milepost opens a folder anew each time that it lists it.",
    "removed": """What stays in its place (`.nfs…`, `.fuse_hidden…`) is no part of a checkpoint, and goes when
        the file is closed.""",
    "chmod": "The checkpoint's folder keeps the mode 0700, and the log says so.",
    "reflink": "Milepost does not use it.",
}
"""What Milepost does without a feature."""


def _tried() -> dict[str, dict]:
    found = FACTS["file_systems"]
    tried = {name: dict(found[name]) for name in NAMES if found[name]}
    for facts in tried.values():
        facts["network"] = not facts["network"]  # the table tells of what is there
    return tried


def _mark(facts: dict, feature: str) -> str:
    if feature == "direct_write" and facts["alignment"]:
        return f"yes, {max(facts['alignment'])} bytes"
    return "yes" if facts[feature] else "**no**"


def markdown() -> str:
    """The tables."""
    tried = _tried()
    missing = [NAMES[name] for name in NAMES if name not in tried]
    lines = [f"Found on Linux {FACTS['kernel']}, {FACTS['date']}."]
    if missing:
        lines[0] += f" That kernel could not mount: {', '.join(missing)}."
    lines += ["", "| | " + " | ".join(NAMES[name] for name in tried) + " |"]
    lines.append("|---" * (len(tried) + 1) + "|")
    for feature, name in FEATURES.items():
        lines.append(f"| {name} | " + " | ".join(_mark(facts, feature) for facts in tried.values()) + " |")
    lines += [
        "",
        "What Milepost does where it is missing:",
        "",
        "| missing | on | instead |",
        "|---|---|---|",
    ]
    for feature, name in FEATURES.items():
        places = [NAMES[place] for place, facts in tried.items() if not facts[feature]]
        lines.append(
            f"| {name} | {', '.join(places) or 'none of these'} | {' '.join(INSTEAD[feature].split())} |"
        )
    return "\n" + "\n".join(lines) + "\n"

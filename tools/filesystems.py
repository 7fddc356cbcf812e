"""Tables for docs/filesystems.md: the features of each file system, and what Milepost does without one.

Cog calls this module. tests/filesystems/test_features.py has written the facts to docs/filesystems.json.
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
    "network": "the kernel says that it is local",
    "mapped": "Milepost maps files",
    "fsync_folder": "fsync of a folder",
    "listing": "an open folder lists new names",
    "removed": "an open file disappears when it is removed",
    "chmod": "chmod",
    "reflink": "reflink",
}
INSTEAD = {
    "direct_open": "Milepost writes and reads files through the page cache.",
    "direct_write": "From that write on, Milepost writes the file through the page cache.",
    "exchange": """Milepost renames the old checkpoint aside and renames the new one to the path. Between the
        two renames `load` finds the new checkpoint beside the path.""",
    "noreplace": """Milepost names a file by a hard link. A folder replaces an empty folder that Milepost
        makes for this purpose.""",
    "hard_links": """If the rename that replaces nothing is missing too, Milepost checks that the name is free
        and then renames.""",
    "locks": "Milepost cannot tell whether a save is alive. So it keeps the files of dead saves.",
    "network": """Locks of other hosts may not be visible. Milepost removes the files of a dead save when
        nothing in its folder has changed for a day.""",
    "mapped": "`load` reads files into its memory. Another host could truncate a mapped file.",
    "fsync_folder": "Names are as durable as the file system makes them.",
    "listing": "Milepost opens a folder anew for each listing.",
    "removed": """The file that stays in its place (`.nfs…`, `.fuse_hidden…`) does not belong to the
        checkpoint. It disappears when the file is closed.""",
    "chmod": "The checkpoint's folder keeps the mode 0700. The log says so.",
    "reflink": "Milepost does not use reflinks.",
}
"""What Milepost does without a feature."""


def _tried() -> dict[str, dict]:
    found = FACTS["file_systems"]
    tried = {name: dict(found[name]) for name in NAMES if found[name]}
    for facts in tried.values():
        facts["network"] = not facts["network"]  # the table lists the features that exist
    return tried


def _mark(facts: dict, feature: str) -> str:
    if feature == "direct_write" and facts["alignment"]:
        return f"yes, {max(facts['alignment'])} bytes"
    return "yes" if facts[feature] else "**no**"


def markdown() -> str:
    """The tables."""
    tried = _tried()
    missing = [NAMES[name] for name in NAMES if name not in tried]
    lines = [f"Tested on Linux {FACTS['kernel']}, {FACTS['date']}."]
    if missing:
        lines[0] += f" That kernel could not mount: {', '.join(missing)}."
    lines += ["", "| | " + " | ".join(NAMES[name] for name in tried) + " |"]
    lines.append("|---" * (len(tried) + 1) + "|")
    for feature, name in FEATURES.items():
        lines.append(f"| {name} | " + " | ".join(_mark(facts, feature) for facts in tried.values()) + " |")
    lines += [
        "",
        "Milepost's behaviour without a feature:",
        "",
        "| missing feature | missing on | Milepost's behaviour |",
        "|---|---|---|",
    ]
    for feature, name in FEATURES.items():
        places = [NAMES[place] for place, facts in tried.items() if not facts[feature]]
        lines.append(
            f"| {name} | {', '.join(places) or 'none of these'} | {' '.join(INSTEAD[feature].split())} |"
        )
    return "\n" + "\n".join(lines) + "\n"

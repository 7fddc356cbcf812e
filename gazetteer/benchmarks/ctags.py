"""Which Python classes, functions and methods universal-ctags finds that Gazetteer does not, and the reverse.

    python benchmarks/ctags.py TREE [--sample N]

Symbols are compared by file, line, name and whether they are classes. Differences are printed, a
sample of them with their line, so that each can be explained.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from gazetteer.cache import facts_of
from gazetteer.model import Kind
from gazetteer.read.collect import gather
from gazetteer.read.scan import Found, scan
from gazetteer.read.workers import Workers, default_jobs

BAR = 0.99
Key = tuple[str, int, str, str]
_KINDS = {"class": "class", "function": "function", "member": "function"}


def from_ctags(root: Path, paths: list[str]) -> set[Key]:
    """Return what universal-ctags finds."""
    program = shutil.which("ctags-universal") or shutil.which("ctags")
    if not program:
        sys.exit("universal-ctags is not installed (Debian: universal-ctags).")
    done = subprocess.run(
        [
            program,
            "--output-format=json",
            "--languages=Python",
            "--python-kinds=cfm",
            "--fields=+n",
            "-f",
            "-",
            "-L",
            "-",
        ],
        input="\n".join(paths),
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    found = set()
    for line in done.stdout.splitlines():
        tag = json.loads(line)
        if tag["_type"] == "tag" and tag["kind"] in _KINDS:
            found.add((tag["path"], tag["line"], tag["name"], _KINDS[tag["kind"]]))
    return found


def from_gazetteer(root: Path) -> set[Key]:
    """Return what Gazetteer finds."""
    files = {f.path: f for f in scan(root).files if f.path.endswith(".py")}
    packed: dict[str, bytes] = {}
    workers: Workers[Found]
    with Workers(default_jobs()) as workers:
        gather(files, {}, packed, workers)
    found = set()
    for path, data in packed.items():
        for symbol in facts_of(data).symbols:
            if symbol.kind is Kind.CLASS and not symbol.label:
                found.add((path, symbol.line, symbol.name, "class"))
            elif symbol.kind in (Kind.FUNCTION, Kind.METHOD):
                found.add((path, symbol.line, symbol.name, "function"))
    return found


def show(title: str, root: Path, keys: set[Key], sample: int) -> None:
    """Print a sample of differences with their lines."""
    print(f"\n{title}: {len(keys):,}")
    ordered = sorted(keys)
    for path, line, name, kind in ordered[:: max(1, len(ordered) // sample)][:sample]:
        text = (root / path).read_text("utf-8", "replace").splitlines()
        print(f"  {path}:{line}: {kind} {name}: {text[line - 1].strip() if line <= len(text) else ''}")


def main() -> int:
    """Print the comparison; return 1 below the bar."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("tree", type=Path)
    arguments.add_argument("--sample", type=int, default=12)
    options = arguments.parse_args()
    root: Path = options.tree.resolve()
    ours = from_gazetteer(root)
    theirs = from_ctags(root, [f.path for f in scan(root).files if f.path.endswith(".py")])
    both = ours & theirs
    share = len(both) / len(theirs) if theirs else 1.0
    print(f"{'':<24}{'symbols':>10}")
    print(f"{'universal-ctags':<24}{len(theirs):>10,}")
    print(f"{'Gazetteer':<24}{len(ours):>10,}")
    print(f"{'both':<24}{len(both):>10,}")
    print(f"found of what ctags finds: {share:.4%}  (bar {BAR:.0%})")
    show("only universal-ctags", root, theirs - ours, options.sample)
    show("only Gazetteer", root, ours - theirs, options.sample)
    print("\nmet" if share >= BAR else "\nmissed")
    return int(share < BAR)


if __name__ == "__main__":
    raise SystemExit(main())

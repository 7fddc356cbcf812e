"""Lines per module of src/milepost against the budget; exit code 1 when it is exceeded.

Size is a design tool: a module that outgrows its budget does more than one thing.
"""

from __future__ import annotations

import sys
from pathlib import Path

WARN_LINES = 400
MAX_LINES = 480
MAX_TOTAL_LINES = 7000

REASONS: dict[str, str] = {}
"""Modules that may be longer than MAX_LINES, each with the reason."""


def main() -> int:
    """Print the table; return the exit code."""
    root = Path(__file__).resolve().parent.parent / "src" / "milepost"
    sizes = {
        str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sorted(root.rglob("*.py"))
    }
    failed = False
    for name, lines in sorted(sizes.items(), key=lambda item: -item[1]):
        note = ""
        if lines > MAX_LINES:
            reason = REASONS.get(name)
            failed = failed or reason is None
            note = f"allowed: {reason}" if reason else f"TOO LONG (at most {MAX_LINES})"
        elif lines > WARN_LINES:
            note = f"long (aim at {WARN_LINES})"
        print(f"{lines:6}  {name:32}{note}".rstrip())
    for name in sorted(REASONS.keys() - {name for name, lines in sizes.items() if lines > MAX_LINES}):
        failed = True
        print(f"tools/size.py has a reason for {name}, which needs none")
    total = sum(sizes.values())
    failed = failed or total > MAX_TOTAL_LINES
    print(f"{total:6}  in all, of {MAX_TOTAL_LINES}{' TOO LONG' if total > MAX_TOTAL_LINES else ''}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

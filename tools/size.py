"""Lines per module of src/milepost against the budget; exit code 1 when it is exceeded.

Size is a design tool: a module that outgrows its budget does more than one thing. The second column
counts code alone: no blank lines, comments and docstrings.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

WARN_LINES = 400
MAX_LINES = 480
MAX_TOTAL_CODE_LINES = 15_340

REASONS: dict[str, str] = {}
"""Modules that may be longer than MAX_LINES, each with the reason."""


_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(text: str) -> int:
    """How many lines hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def main() -> int:
    """Print the table; return the exit code."""
    root = Path(__file__).resolve().parent.parent / "src" / "milepost"
    texts = {
        str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py"))
    }
    sizes = {name: len(text.splitlines()) for name, text in texts.items()}
    code = {name: code_lines(text) for name, text in texts.items()}
    failed = False
    print(f"{'lines':>6}{'code':>7}")
    for name, lines in sorted(sizes.items(), key=lambda item: -item[1]):
        note = ""
        if lines > MAX_LINES:
            reason = REASONS.get(name)
            failed = failed or reason is None
            note = f"allowed: {reason}" if reason else f"TOO LONG (at most {MAX_LINES})"
        elif lines > WARN_LINES:
            note = f"long (aim at {WARN_LINES})"
        print(f"{lines:6}{code[name]:7}  {name:32}{note}".rstrip())
    for name in sorted(REASONS.keys() - {name for name, lines in sizes.items() if lines > MAX_LINES}):
        failed = True
        print(f"tools/size.py has a reason for {name}, which needs none")
    total = sum(code.values())
    failed = failed or total > MAX_TOTAL_CODE_LINES
    verdict = (
        f"in all, of {MAX_TOTAL_CODE_LINES} of code{' TOO LONG' if total > MAX_TOTAL_CODE_LINES else ''}"
    )
    print(f"{sum(sizes.values()):6}{total:7}  {verdict}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

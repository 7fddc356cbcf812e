"""Tables, charts and verdicts from a results file; needs nothing but the standard library.

    python benchmarks/report.py            # write docs/benchmarks and README's table from results.json
    python benchmarks/report.py --check    # fail if they are not what results.json says

Ratios are paired: one for each round, then their median.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import charts

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DOCS = os.path.join(ROOT, "docs", "benchmarks")
STORED = os.path.join(DOCS, "results.json")
MARKS = ("<!-- benchmarks: written by `make docs/benchmarks` -->", "<!-- benchmarks: end -->")

MAX_LOAD = 0.7
MAX_OTHERS = 0.08
MAX_DRIFT = {"cpu": 1.25, "disk": 3.0}
TOLERANCE = 1.2
"""How much worse than the stored ratio a ratio may be before `--check` fails: disks are noisy."""

TABLES = {
    "Saving": ["first stall", "first durable", "prepare", "prepared", "prepared stall", "stall",
               "durable", "bytes"],
    "Loading": ["restart", "restart read", "again", "again read", "warm", "cold", "same process"],
    "Other ways to load": ["warm, unverified", "warm, no template", "warm, no template, unverified",
                           "warm, resharded", "verify"],
    "Memory and descriptors": ["save: trainer private", "save: trainer shared", "save: writer private",
                               "load: trainer private", "save: trainer descriptors",
                               "save: writer descriptors"],
}  # fmt: skip
LABELS = {
    "first stall": "first save: stall", "first durable": "first save: durable", "prepare": "prepare: stall",
    "prepared": "prepare: done after", "prepared stall": "first save after it: stall",
    "durable": "until durable", "bytes": "written", "restart read": "of it from disk",
    "again": "again, another process", "again read": "of it from disk",
    "same process": "right after a save", "save: trainer private": "trainer, save",
    "save: trainer shared": "staging", "save: writer private": "writer",
    "load: trainer private": "trainer, load",
    "save: trainer descriptors": "descriptors", "save: writer descriptors": "writer's descriptors",
}  # fmt: skip
LIMIT_OF = {
    "first stall": "first touch and copy", "prepared stall": "copy", "stall": "copy", "warm": "copy",
    "warm, unverified": "copy", "same process": "copy", "warm, resharded": "copy", "restart": "direct read",
    "again": "direct read", "cold": "direct read", "verify": "direct read", "durable": "direct write",
    "first durable": "direct write", "warm, no template": "checksum", "seconds": "seconds",
}  # fmt: skip
"""Which limit a figure of ours is compared with, by the beginning of its name."""


# -- figures -----------------------------------------------------------------------------------------


def disturbed(entry: dict[str, Any]) -> str:
    """Why no verdict may be given on a group; "" if the machine was quiet."""
    reasons = [f"load average {load:.1f} when it started" for load in entry["loads"] if load > MAX_LOAD]
    control = entry["control"]
    others = statistics.median(one["others"] for one in control)
    if others > MAX_OTHERS:
        reasons.append(f"others used {others:.0%} of the cores")
    for name, limit in MAX_DRIFT.items():
        times = sorted(one[name] for one in control)
        times = times[: len(times) - len(times) // 5]  # one outlier in five is no drift
        if times[-1] > limit * times[0]:
            reasons.append(f"the control's {name} took {times[0]:.2f}–{times[-1]:.2f} s")
    return "; ".join(reasons)


def values(entry: dict[str, Any], row: str, figure: str) -> list[float]:
    rounds = entry["rows"].get(row, {"rounds": []})["rounds"]
    return [one[figure] for one in rounds if figure in one]


def median(entry: dict[str, Any], row: str, figure: str) -> float | None:
    found = values(entry, row, figure)
    return statistics.median(found) if found else None


def ratio(entry: dict[str, Any], row: str, figure: str, base: str, base_figure: str = "") -> float | None:
    """The median of the rounds' ratios."""
    pairs = zip(entry["rows"].get(row, {"rounds": []})["rounds"],
                entry["rows"].get(base, {"rounds": []})["rounds"], strict=False)  # fmt: skip
    other = base_figure or figure
    found = [a[figure] / b[other] for a, b in pairs if figure in a and b.get(other)]
    return statistics.median(found) if found else None


def best(entry: dict[str, Any], row: str, prefix: str) -> str:
    """Of a row's figures that begin like this, the one with the least median."""
    names = {name for one in entry["rows"].get(row, {"rounds": []})["rounds"] for name in one}
    found = [name for name in names if name == prefix or name.startswith(prefix + ", ")]
    return min(found, key=lambda name: median(entry, row, name) or 0.0, default="")


def is_ours(row: str) -> bool:
    return row.startswith("milepost")


def is_peer(entry: dict[str, Any], row: str) -> bool:
    return not is_ours(row) and row != "limits" and bool(entry["rows"][row].get("config"))


def unit(figure: str) -> str:
    words = figure.replace(":", "").replace(",", "").split()
    if "descriptors" in words or words[-1] in ("operations", "listings", "marks"):
        return "count"
    if words[-1] in ("bytes", "memory", "JSON", "private", "shared", "read") and words[0] != "direct":
        return "bytes"
    return "share" if words[0] == "slower" or words[-1] == "cached" else "seconds"


def shown(value: float, kind: str) -> str:
    if kind == "count":
        return f"{value:,.4g}"
    if kind == "bytes":
        return f"{value / 2**20:,.0f} MiB" if value >= 10 * 2**20 or not value else f"{value / 2**20:.1f} MiB"
    if kind == "share":
        return f"{value:.0%}"
    return f"{value:,.2f} s" if value >= 0.1 else f"{value * 1e3:.3g} ms"


def cell(entry: dict[str, Any], row: str, figure: str) -> str:
    """Median, range, and how many times ours it is."""
    found = values(entry, row, figure)
    if not found:
        return "–"
    kind = unit(figure)
    text = shown(statistics.median(found), kind)
    if len(found) > 1 and kind == "seconds":
        text += f" ({shown(min(found), kind)[:-2].strip()}–{shown(max(found), kind)})"
    ours = entry["ours"]
    times = None if row in (ours, "limits") else ratio(entry, row, figure, ours)
    if times is not None and kind == "seconds" and not is_ours(row):
        text += f" ×{times:.2g}"
    return text


# -- tables ------------------------------------------------------------------------------------------


def table(entry: dict[str, Any], rows: list[str], figures: list[str]) -> Iterator[str]:
    figures = [name for name in figures if any(values(entry, row, name) for row in rows)]
    rows = [row for row in rows if any(values(entry, row, name) for name in figures)]
    if figures and rows:
        yield ""
        yield "| | " + " | ".join(LABELS.get(name, name) for name in figures) + " |"
        yield "|---" * (len(figures) + 1) + "|"
        for row in rows:
            yield f"| {row} | " + " | ".join(cell(entry, row, name) for name in figures) + " |"


def group_lines(name: str, entry: dict[str, Any]) -> Iterator[str]:
    """A group as Markdown."""
    about = entry["about"]
    size = f", {entry['bytes'] / 2**20:,.0f} MiB" if entry["bytes"] else ""
    yield f"## {entry['title']}{size}"
    yield ""
    rounds = "1 round" if entry["rounds"] == 1 else f"{entry['rounds']} rounds"
    yield f"`{name}`, {rounds}, {about['date']}, commit {about['commit']}. {entry['notes']}".rstrip()
    if entry.get("disturbed"):
        yield f"\n**The machine was busy, so these figures carry no verdict: {entry['disturbed']}.**"
    rows = [row for row in entry["rows"] if row != "limits"]
    cycle = any("restart" in one or "stall" in one for row in rows for one in entry["rows"][row]["rounds"])
    if cycle:
        yield from limit_lines(entry)
        for title, figures in TABLES.items():
            lines = [*table(entry, rows, figures)]
            if lines:
                yield f"\n**{title}**"
                yield from lines
    else:
        seen = dict.fromkeys(name for row in entry["rows"].values() for one in row["rounds"] for name in one)
        yield from table(entry, [*entry["rows"]], [*seen])
    yield ""
    yield from remarks(entry)
    if not entry.get("disturbed"):
        yield from verdicts(entry)


def limit_lines(entry: dict[str, Any]) -> Iterator[str]:
    """The limits, and how far ours is from them."""
    if not values(entry, "limits", "copy"):
        return
    parts = []
    seen = dict.fromkeys(name for one in entry["rows"]["limits"]["rounds"] for name in one)
    for figure in seen:
        found = values(entry, "limits", figure)
        mark = "**" if figure in {best(entry, "limits", prefix) for prefix in LIMIT_OF.values()} else ""
        parts.append(f"{mark}{figure} {shown(statistics.median(found), 'seconds')}{mark}")
    yield "\nLimits (bold: the best of its kind): " + ", ".join(parts) + "."
    against = [
        f"{row} {LABELS.get(figure, figure)} {times:.2f} × {base}" for row, figure, base, times in held(entry)
    ]
    yield "\nAgainst them: " + ", ".join(against) + "."


def remarks(entry: dict[str, Any]) -> Iterator[str]:
    """Who was configured how, what it does not do, and who failed."""
    for row, found in entry["rows"].items():
        words = [found["config"]] if found.get("config") else []
        if found.get("lacks"):
            words.append(found["lacks"])
        if len(found["rounds"]) < entry["rounds"] and not found["error"]:
            words.append(f"{len(found['rounds'])} rounds")
        if found["error"]:
            words.append(f"**{found['error']}**")
        if words:
            yield f"- {row}: {'; '.join(words)}."


def faster_peers(entry: dict[str, Any]) -> Iterator[str]:
    """Where a peer is faster than ours, by the median of the paired ratios."""
    figures = [name for names in TABLES.values() for name in names if unit(name) == "seconds"]
    for figure in [*figures, *(name for name in _lost(entry))]:
        for row in entry["rows"]:
            ours = "milepost" if values(entry, "milepost", figure) else "milepost sync"
            if (
                ours != "milepost sync"
                and figure in ("durable", "first durable")
                and not _background(entry, row)
            ):
                ours = "milepost sync"
            if figure in ("stall", "first stall") and not _background(entry, row):
                continue  # its stall is its whole save
            times = ratio(entry, row, figure, ours) if is_peer(entry, row) else None
            if times is not None and 0 < times < 1:
                clear = max(values(entry, row, figure)) < min(values(entry, ours, figure))
                yield (
                    f"{LABELS.get(figure, figure)}: {row} takes {times:.2f} × as long as {ours}"
                    + ("" if clear else " (the ranges overlap)")
                )


def _lost(entry: dict[str, Any]) -> list[str]:
    rounds = entry["rows"].get("milepost", {"rounds": []})["rounds"]
    return [name for name in (rounds[0] if rounds else {}) if name.startswith("lost")]


def _background(entry: dict[str, Any], row: str) -> bool:
    """Whether its save returns before it is durable."""
    stall, durable = median(entry, row, "stall"), median(entry, row, "durable")
    return stall is not None and durable is not None and stall < 0.95 * durable


def bars(entry: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """Whether each thing that is asked for was met, and in words."""
    for bar in entry["bars"]:
        figure = bar["figure"]
        if bar["base"]:
            base = best(entry, bar["base"], bar["base_figure"] or figure) or bar["base_figure"] or figure
            value = ratio(entry, bar["row"], figure, bar["base"], base)
            against = f" × {base}" if bar["base"] == "limits" else f" × {bar['base']}'s {base}"
            text, limit = f"{value or 0:.2f}{against}", f"{bar['limit']:.2f}"
        else:
            value = median(entry, bar["row"], figure)
            text, limit = (shown(number, unit(figure)) for number in (value or 0, bar["limit"]))
        if value is not None:
            yield value <= bar["limit"], f"{bar['row']}, {figure}: {text} (asked: at most {limit})"


def verdicts(entry: dict[str, Any]) -> Iterator[str]:
    found = [*bars(entry)]
    if found:
        yield f"\nOf {len(found)} things that are asked, {sum(met for met, _ in found)} are met."
        yield from (f"- missed: {text}" for met, text in found if not met)
    peers = [*faster_peers(entry)]
    if peers:
        yield "\nA peer is faster:"
        yield from (f"- {line}" for line in peers)


def group_text(name: str, entry: dict[str, Any]) -> str:
    return "\n".join(group_lines(name, entry)) + "\n"


# -- against other results ---------------------------------------------------------------------------


def held(entry: dict[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """Ours, in ratios to the limits of the same run: row, figure, limit, ratio."""
    for row in entry["rows"]:
        for figure, prefix in LIMIT_OF.items() if is_ours(row) else ():
            base = best(entry, "limits", prefix)
            times = ratio(entry, row, figure, "limits", base) if base else None
            if times is not None and (_background(entry, row) or not figure.endswith("stall")):
                yield row, figure, base, times


def compare(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """What changed, in ours: medians, and the ratio to the limit, where ranges do not overlap or by 10 %."""
    for name, entry in new["groups"].items():
        before = old["groups"].get(name)
        if before is None:
            continue
        reason = before.get("disturbed") or entry.get("disturbed")
        yield f"{name}: no verdict, the machine was busy: {reason}" if reason else f"{name}:"
        if reason:
            continue
        was, same = {(row, figure): times for row, figure, _, times in held(before)}, 0
        now = {(row, figure): times for row, figure, _, times in held(entry)}
        for row in filter(is_ours, entry["rows"]):
            figures = dict.fromkeys(figure for one in entry["rows"][row]["rounds"] for figure in one)
            for figure in figures:
                a, b = values(before, row, figure), values(entry, row, figure)
                if not a or not b:
                    continue
                x, y = statistics.median(a), statistics.median(b)
                apart = max(a) < min(b) or max(b) < min(a)
                if not x or abs(y / x - 1) < 0.1 or not apart:
                    same += 1
                    continue
                kind = unit(figure)
                line = f"  {row}, {figure}: {shown(x, kind)} -> {shown(y, kind)} ({y / x - 1:+.0%})"
                if (row, figure) in was and (row, figure) in now:
                    line += f", of its limit {was[row, figure]:.2f} -> {now[row, figure]:.2f}"
                yield line
        yield f"  {same} figures as before (within 10 %, or the ranges overlap)"


def check(stored: dict[str, Any], new: dict[str, Any]) -> tuple[int, list[str]]:
    """Hold the stored ratios as a floor: 0 when held, 1 when not, 3 when a machine was too busy to tell."""
    lines, code = [], 0
    for name, entry in new["groups"].items():
        before = stored["groups"].get(name)
        reason = entry.get("disturbed") or (before or {}).get("disturbed")
        if before is None or reason:
            lines.append(f"{name}: no verdict: {reason or 'nothing is stored for it'}")
            code = max(code, 3)
            continue
        floor = {(row, figure): times for row, figure, _, times in held(before)}
        for row, figure, base, times in held(entry):
            least = floor.get((row, figure))
            if least is not None and times > least * TOLERANCE:
                lines.append(f"{name}: {row}, {figure}: {times:.2f} × {base}, was {least:.2f}")
                code = 1
    return code, lines or ["every stored ratio holds"]


# -- documents ---------------------------------------------------------------------------------------

README_ROWS = (
    ("durable save, the training waits", "milepost sync", "durable", "direct write"),
    ("background save: the training stands still", "milepost", "stall", "copy"),
    ("background save: until durable", "milepost", "durable", "copy and direct write"),
    ("restart: killed after a save, a new process loads", "milepost", "restart", "direct read"),
    ("load, page cache warm", "milepost", "warm", "copy"),
    ("load, cold", "milepost", "cold", "direct read"),
)


def readme_table(content: dict[str, Any], group: str = "gpt2") -> str:
    """README's table: ours, the best peer and the limit."""
    entry = content["groups"].get(group)
    if entry is None:
        return ""
    about = entry["about"]
    lines = [
        f"{entry['title']}, {entry['bytes'] / 2**30:.2f} GiB; medians of {entry['rounds']} rounds;",
        f"{about['machine']}; {about['date']}. Milepost verifies every load.",
        "",
        "| | Milepost | best peer | limit |",
        "|---|---|---|---|",
    ]
    for label, ours, figure, prefix in README_ROWS:
        waits = ours == "milepost sync"
        found = {
            row: median(entry, row, figure)
            for row in entry["rows"]
            if is_peer(entry, row)
            and (figure in ("restart", "warm", "cold") or _background(entry, row) != waits)
        }
        times = {row: value for row, value in found.items() if value is not None}
        peer = min(times, key=lambda row: times[row], default="")
        limit = best(entry, "limits", prefix)
        cells = [
            shown(value, "seconds") if value is not None else "–"
            for value in (median(entry, ours, figure), times.get(peer), median(entry, "limits", limit))
        ]
        lines.append(f"| {label} | {cells[0]} | {cells[1]} ({peer}) | {cells[2]} ({limit}) |")
    if entry.get("disturbed"):
        lines += ["", f"The machine was busy, so these figures carry no verdict: {entry['disturbed']}."]
    return "\n".join(lines)


def documents(content: dict[str, Any]) -> dict[str, str]:
    """Every generated file by path, as it should be."""
    made = {}
    for name, drawing in charts.all_charts(content).items():
        made[os.path.join(DOCS, f"{name}.svg")] = drawing
    lines = []
    abouts = {
        json.dumps([group["about"][key] for key in ("machine", "versions")])
        for group in content["groups"].values()
    }
    for machine, versions in map(json.loads, sorted(abouts)):
        names = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines.append(f"Machine: {machine}. {names}.\n")
    lines += [f"![{name}]({name}.svg)\n" for name in charts.all_charts(content)]
    lines += [group_text(name, entry) for name, entry in content["groups"].items()]
    for path, text in (
        (os.path.join(DOCS, "README.md"), "\n".join(lines).rstrip()),
        (os.path.join(ROOT, "README.md"), readme_table(content)),
    ):
        with open(path, encoding="utf-8") as file:
            before, begin, rest = file.read().partition(MARKS[0])
        made[path] = f"{before}{begin}\n{text}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"
    return made


def main() -> int:
    if not os.path.exists(STORED):
        print("docs/benchmarks/results.json is not there: nothing to write")
        return 0
    with open(STORED, encoding="utf-8") as file:
        made = documents(json.load(file))
    wrong = []
    for path, text in made.items():
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                if file.read() == text:
                    continue
        wrong.append(os.path.relpath(path, ROOT))
        if "--check" not in sys.argv:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
    if wrong:
        print(("not as results.json says: " if "--check" in sys.argv else "written: ") + ", ".join(wrong))
    return int(bool(wrong) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())

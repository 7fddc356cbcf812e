"""Charts as SVG, by hand: bars for one workload, lines over sizes and counts."""

from __future__ import annotations

import html
import math
import statistics
from typing import Any

COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#8d6a9f", "#c58c2c", "#4f5d75", "#2e8b8b")
BARS = {
    "stall": "stall",
    "durable": "until durable",
    "restart": "restart",
    "warm": "warm load",
    "cold": "cold load",
}
LINES = ("stall", "durable", "restart", "cold")


def _middle(entry: dict[str, Any], row: str, figure: str) -> float | None:
    found = [one[figure] for one in entry["rows"].get(row, {"rounds": []})["rounds"] if figure in one]
    return statistics.median(found) if found else None


def _svg(width: float, height: float, parts: list[str]) -> str:
    style = "text{font:12px sans-serif;fill:#333}.t{font-weight:bold;font-size:14px}.g{stroke:#ddd}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}">'
    )
    return "\n".join(
        [
            head,
            f"<style>{style}</style>",
            '<rect width="100%" height="100%" fill="#fff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{html.escape(text)}</text>'


def bars(entry: dict[str, Any]) -> str:
    """Seconds of each row, a block for each figure."""
    parts, y = [_text(10, 20, f"{entry['title']}: seconds, median", kind="t")], 40.0
    for figure, label in BARS.items():
        found = {row: _middle(entry, row, figure) for row in entry["rows"]}
        times = {row: value for row, value in found.items() if value is not None}
        if not times:
            continue
        most = max(times.values())
        parts.append(_text(10, y + 4, label, kind="t"))
        y += 12
        for row, value in times.items():
            colour = COLOURS[0] if row.startswith("milepost") else COLOURS[5]
            width = 430 * value / most
            parts.append(_text(190, y + 11, row, anchor="end"))
            parts.append(f'<rect x="198" y="{y:.1f}" width="{width:.1f}" height="13" fill="{colour}"/>')
            parts.append(_text(203 + width, y + 11, f"{value:.3g}"))
            y += 17
        y += 16
    return _svg(700, y, parts)


def lines(title: str, axis: str, points: dict[float, dict[str, Any]], figure: str) -> str:
    """A figure of each row over sizes or counts, both axes logarithmic."""
    series: dict[str, list[tuple[float, float]]] = {}
    for x, entry in sorted(points.items()):
        for row in entry["rows"]:
            value = _middle(entry, row, figure)
            if value:
                series.setdefault(row, []).append((x, value))
    series = {row: found for row, found in series.items() if len(found) > 1}
    if not series:
        return ""
    every = [point for found in series.values() for point in found]
    x0, x1 = (math.log10(pick(x for x, _ in every)) for pick in (min, max))
    y0, y1 = math.floor(math.log10(min(y for _, y in every))), math.ceil(math.log10(max(y for _, y in every)))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            70 + 430 * (math.log10(x) - x0) / ((x1 - x0) or 1),
            300 - 250 * (math.log10(y) - y0) / ((y1 - y0) or 1),
        )

    parts = [_text(10, 20, title, kind="t"), _text(285, 335, axis, anchor="middle")]
    for power in range(y0, y1 + 1):
        y = place(10**x0, 10.0**power)[1]
        parts.append(f'<line class="g" x1="70" x2="500" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(64, y + 4, f"{10.0**power:g} s", anchor="end"))
    for x in sorted(points):
        parts.append(_text(place(x, 10.0**y0)[0], 317, f"{x:,.0f}", anchor="middle"))
    for number, (row, found) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(x, y) for x, y in found))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<rect x="515" y="{40 + 20 * number}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(533, 51 + 20 * number, row))
    return _svg(700, 350, parts)


def all_charts(content: dict[str, Any]) -> dict[str, str]:
    """Every chart that the results suffice for, by file name."""
    groups = content["groups"]
    made = {name: bars(groups[name]) for name in ("gpt2", "500x4MiB", "lora") if name in groups}
    for kind, axis in (("size", "MB, in tensors of 4 MB at most"), ("count", "tensors of 16 KiB")):
        points = {entry["x"][1]: entry for entry in groups.values() if entry.get("x", ("",))[0] == kind}
        for figure in LINES:
            drawing = lines(f"{BARS[figure]} by {kind}", axis, points, figure)
            if drawing:
                made[f"{kind}-{figure}"] = drawing
    return made

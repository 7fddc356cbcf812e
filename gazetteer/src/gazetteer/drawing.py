"""A small drawing of a directed graph: layered, left to right, as SVG that needs no script."""

from __future__ import annotations

import html
import re
from collections import defaultdict
from typing import TYPE_CHECKING

import networkx as nx

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["draw", "read_mermaid"]

_NODE = re.compile(r'^  (n\d+)\["(.*)"\]$')
_EDGE = re.compile(r"^  (n\d+) -->(?:\|(\d+)\|)? (n\d+)$")
_ENTITY = re.compile(r"#(\d+);")
_CHAR, _HIGH, _ROW, _GAP, _PAD = 7.3, 26, 40, 76, 12


def read_mermaid(block: str) -> tuple[dict[str, str], dict[tuple[str, str], int]]:
    """Read the nodes (id to label) and edges (with their counts) of a graph that Gazetteer wrote."""
    nodes: dict[str, str] = {}
    edges: dict[tuple[str, str], int] = {}
    for line in block.splitlines():
        node = _NODE.match(line)
        edge = _EDGE.match(line)
        if node:
            nodes[node.group(1)] = _ENTITY.sub(lambda m: chr(int(m.group(1))), node.group(2))
        elif edge:
            edges[edge.group(1), edge.group(3)] = int(edge.group(2) or 1)
    return nodes, edges


def _ranks(nodes: Mapping[str, str], edges: Mapping[tuple[str, str], int]) -> tuple[dict[str, int], set[tuple[str, str]]]:
    """Give each node its column; edges that would close a cycle point back and count for nothing."""
    graph = nx.DiGraph()
    graph.add_nodes_from(nodes)
    back: set[tuple[str, str]] = set()
    for edge in sorted(edges, key=lambda e: (-edges[e], e)):
        graph.add_edge(*edge)
        if nx.has_path(graph, edge[1], edge[0]):
            graph.remove_edge(*edge)
            back.add(edge)
    ranks: dict[str, int] = {}
    for node in nx.lexicographical_topological_sort(graph):
        ranks[node] = max((ranks[p] + 1 for p in graph.predecessors(node)), default=0)
    return ranks, back


def draw(nodes: Mapping[str, str], edges: Mapping[tuple[str, str], int], links: Mapping[str, str]) -> str:
    """Return the drawing of a graph.

    Args:
        nodes: Id to label.
        edges: Pairs of ids, with how many imports each stands for.
        links: Id to where a click on it leads.

    Returns:
        One ``<svg>`` element in which every label is escaped; the same for the same arguments.
    """
    ranks, back = _ranks(nodes, edges)
    columns: dict[int, list[str]] = defaultdict(list)
    for node in sorted(nodes, key=lambda n: (ranks[n], nodes[n])):
        columns[ranks[node]].append(node)
    _untangle(columns, edges)
    places: dict[str, tuple[float, float, float]] = {}
    left = float(_PAD)
    tall = max((len(column) for column in columns.values()), default=0) * _ROW
    for rank in sorted(columns):
        column = columns[rank]
        wide = max(len(nodes[n]) for n in column) * _CHAR + 18
        top = _PAD + (tall - len(column) * _ROW) / 2
        for row, node in enumerate(column):
            places[node] = (left, top + row * _ROW, wide)
        left += wide + _GAP
    parts = [_edge(places[a], places[b], back=(a, b) in back, count=count) for (a, b), count in sorted(edges.items())]
    for node, label in nodes.items():
        x, y, wide = places[node]
        shown = html.escape(label)
        parts.append(
            f'<a href="{html.escape(links[node])}"><rect x="{x:.0f}" y="{y:.0f}" width="{wide:.0f}" height="{_HIGH}" rx="5"/>'
            f'<text x="{x + 9:.0f}" y="{y + 17:.0f}">{shown}</text></a>'
        )
    size = f'width="{left - _GAP + _PAD:.0f}" height="{tall + _PAD:.0f}"'
    return (
        f'<svg {size} role="img" aria-label="Import graph" xmlns="http://www.w3.org/2000/svg">'
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker></defs>'
        + "".join(parts) + "</svg>"
    )


def _untangle(columns: dict[int, list[str]], edges: Mapping[tuple[str, str], int]) -> None:
    """Order each column by the mean place of its neighbours to the left, which crosses fewer lines."""
    for rank in sorted(columns)[1:]:
        before = {node: place for place, node in enumerate(columns[rank - 1])}
        column = columns[rank]

        def mean(node: str, before: Mapping[str, int] = before, column: list[str] = column) -> float:
            found = [before[a] for a, b in edges if b == node and a in before]
            return sum(found) / len(found) if found else column.index(node)

        columns[rank] = sorted(column, key=lambda n: (mean(n), n))


def _edge(one: tuple[float, float, float], other: tuple[float, float, float], *, back: bool, count: int) -> str:
    x1, y1 = one[0] + one[2], one[1] + _HIGH / 2
    x2, y2 = other[0], other[1] + _HIGH / 2
    if back:
        x1, x2 = one[0], other[0] + other[2]
    bend = max(24.0, abs(x2 - x1) / 2) * (-1 if back else 1)
    width = min(1 + count / 8, 4)
    looks = ' class="back"' if back else ""
    words = f"{count} import" + ("" if count == 1 else "s")
    return (
        f'<path{looks} d="M{x1:.0f},{y1:.0f} C{x1 + bend:.0f},{y1:.0f} {x2 - bend:.0f},{y2:.0f} {x2:.0f},{y2:.0f}" '
        f'stroke-width="{width:.1f}" marker-end="url(#tip)"><title>{words}</title></path>'
    )

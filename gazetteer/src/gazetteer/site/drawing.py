"""A small drawing of a directed graph: layered, top down, as SVG that needs no script."""

from __future__ import annotations

import html
import re
from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

import networkx as nx

if TYPE_CHECKING:
    from collections.abc import Mapping

    _Edge = tuple[str, str]

__all__ = ["draw", "read_mermaid"]

_NODE = re.compile(r'^  (n\d+)\["(.*)"\]$')
_EDGE = re.compile(r"^  (n\d+) -->(?:\|(\d+)\|)? (n\d+)$")
_ENTITY = re.compile(r"#(\d+);")
_CHAR, _HIGH, _ROW, _GAP, _PAD, _THREAD = 7.3, 26, 70, 14, 12, 6
_SWEEPS = 8


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


def _ranks(nodes: Mapping[str, str], edges: Mapping[_Edge, int]) -> tuple[dict[str, int], set[_Edge]]:
    """Give each node its row; edges that would close a cycle point back and count for nothing."""
    graph = nx.DiGraph()
    graph.add_nodes_from(nodes)
    back: set[_Edge] = set()
    for edge in sorted(edges, key=lambda e: (-edges[e], e)):
        if nx.has_path(graph, edge[1], edge[0]):
            back.add(edge)
        else:
            graph.add_edge(*edge)
    ranks: dict[str, int] = {}
    for node in nx.lexicographical_topological_sort(graph):
        ranks[node] = max((ranks[p] + 1 for p in graph.predecessors(node)), default=0)
    return ranks, back


class _Rows:
    """Nodes in rows, with a thread through each row that an edge passes."""

    def __init__(self, nodes: Mapping[str, str], edges: Mapping[_Edge, int]) -> None:
        self.ranks, self.back = _ranks(nodes, edges)
        self.labels = dict(nodes)
        self.paths: dict[_Edge, list[str]] = {}
        self.rows: dict[int, list[str]] = defaultdict(list)
        for node in sorted(nodes, key=lambda n: (self.ranks[n], nodes[n])):
            self.rows[self.ranks[node]].append(node)
        self.near: dict[str, list[str]] = defaultdict(list)
        for edge in sorted(edges):
            self._thread(edge)
        for sweep in range(_SWEEPS):
            self._order(down=sweep % 2 == 0)
        self.places = self._places()

    def _thread(self, edge: _Edge) -> None:
        top, bottom = edge if edge not in self.back else (edge[1], edge[0])
        path = [top]
        for rank in range(self.ranks[top] + 1, self.ranks[bottom]):
            point = f"{edge[0]}>{edge[1]}@{rank}"
            self.rows[rank].append(point)
            path.append(point)
        path.append(bottom)
        for one, other in pairwise(path):
            self.near[one].append(other)
            self.near[other].append(one)
        self.paths[edge] = path if edge not in self.back else path[::-1]

    def _order(self, *, down: bool) -> None:
        """Sort each row by the mean place of its neighbours in the row before, which crosses fewer lines."""
        ranks = sorted(self.rows, reverse=not down)
        for before, rank in pairwise(ranks):
            place = {node: at / max(1, len(self.rows[before]) - 1) for at, node in enumerate(self.rows[before])}
            row = self.rows[rank]
            old = {node: at / max(1, len(row) - 1) for at, node in enumerate(row)}
            means = {}
            for node in row:
                found = [place[n] for n in self.near[node] if n in place]
                means[node] = sum(found) / len(found) if found else old[node]
            row.sort(key=lambda n: (means[n], old[n]))

    def width(self, node: str) -> float:
        """Return how wide a node is drawn."""
        return len(self.labels[node]) * _CHAR + 18

    def _space(self, node: str) -> float:
        """Return the room that a node takes with its gap, or a thread."""
        return self.width(node) + _GAP if node in self.labels else _THREAD

    def _places(self) -> dict[str, tuple[float, float]]:
        wide = {rank: sum(map(self._space, row)) for rank, row in self.rows.items()}
        self.wide = max(wide.values(), default=0.0) + 2 * _PAD
        out: dict[str, tuple[float, float]] = {}
        for rank, row in self.rows.items():
            left = (self.wide - wide[rank]) / 2
            for node in row:
                out[node] = (left + self._space(node) / 2, _PAD + rank * _ROW)
                left += self._space(node)
        return out


def draw(nodes: Mapping[str, str], edges: Mapping[tuple[str, str], int], links: Mapping[str, str]) -> str:
    """Return the drawing of a graph.

    Args:
        nodes: Id to label.
        edges: Pairs of ids, with how many imports each stands for.
        links: Id to where a click on it leads.

    Returns:
        One ``<svg>`` element in which every label is escaped; the same for the same arguments.
    """
    rows = _Rows(nodes, edges)
    parts = [_line(rows, edge, count) for edge, count in sorted(edges.items())]
    for node, label in nodes.items():
        x, y = rows.places[node]
        left = x - rows.width(node) / 2
        parts.append(
            f'<a href="{html.escape(links[node])}"><rect x="{left:.0f}" y="{y:.0f}" width="{rows.width(node):.0f}" height="{_HIGH}" rx="5"/>'
            f'<text x="{left + 9:.0f}" y="{y + 17:.0f}">{html.escape(label)}</text></a>'
        )
    tall = len(rows.rows) * _ROW - _ROW + _HIGH + 2 * _PAD
    return (
        f'<svg width="{rows.wide:.0f}" height="{tall:.0f}" role="img" aria-label="Import graph" xmlns="http://www.w3.org/2000/svg">'
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto" markerUnits="userSpaceOnUse"><path d="M0,0 L8,4 L0,8 z"/></marker></defs>'
        + "".join(parts)
        + "</svg>"
    )


def _line(rows: _Rows, edge: tuple[str, str], count: int) -> str:
    path = rows.paths[edge]
    up = edge in rows.back
    points = [rows.places[node] for node in path]
    x, y = points[0]
    drawn = f"M{x:.0f},{y + (0 if up else _HIGH):.0f}"
    y += 0 if up else _HIGH
    for node, (x2, top) in zip(path[1:], points[1:], strict=True):
        thread = node not in rows.labels
        enter, leave = (top + _HIGH, top) if up else (top, top + _HIGH)
        bend = (enter - y) / 2
        drawn += f" C{x:.0f},{y + bend:.0f} {x2:.0f},{enter - bend:.0f} {x2:.0f},{enter:.0f}"
        if thread:
            drawn += f" L{x2:.0f},{leave:.0f}"
        x, y = x2, leave
    looks = ' class="back"' if up else ""
    words = f"{count} import" + ("" if count == 1 else "s")
    return f'<path{looks} d="{drawn}" stroke-width="{min(1 + count / 10, 3):.1f}" marker-end="url(#tip)"><title>{words}</title></path>'

"""The whole repository as one JSON document, for other tools."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gazetteer.paths import docs_page, kw_page

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gazetteer.model import FileFacts
    from gazetteer.relate.relations import Context, Relations

__all__ = ["index_json"]

_VERSION = 1


def index_json(repository: str, facts: Mapping[str, FileFacts], relations: Relations) -> str:
    """Return the index: every file with its symbols, imports, findings and pages.

    ``version`` rises when a field changes its meaning or goes; new fields do not raise it.
    """
    files = [_file(fact, relations.contexts[path]) for path, fact in facts.items()]
    whole = {"version": _VERSION, "repository": repository, "files": files}
    return json.dumps(whole, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def _file(fact: FileFacts, context: Context) -> dict[str, Any]:
    return {
        "path": fact.path,
        "language": fact.language,
        "status": fact.status.value,
        "note": fact.note,
        "size": fact.size,
        "lines": fact.lines,
        "overview": fact.overview,
        "test": context.test,
        "layer": context.layer,
        "docs": docs_page(fact.path),
        "keywords": kw_page(fact.path),
        "symbols": [
            {
                "name": s.name,
                "qualname": s.qualname,
                "kind": s.kind.value,
                "label": s.label,
                "line": s.line,
                "end_line": s.end_line,
                "signature": s.signature,
                "bases": s.bases,
                "decorators": s.decorators,
                "doc": s.doc,
            }
            for s in fact.symbols
        ],
        "headings": [{"level": level, "title": title, "line": line} for level, title, line in fact.headings],
        "imports": [
            {"module": d.module, "name": d.name, "line": d.line, "files": d.targets, "distribution": d.distribution}
            for d in context.dependencies
        ],
        "imported_by": context.imported_by,
        "tests": [path for path, _ in context.tests],
        "findings": [{"rule": f.rule, "line": f.line} for f in fact.findings],
    }

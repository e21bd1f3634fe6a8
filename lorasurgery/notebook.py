"""A report as a notebook shows it: summary, warnings, totals and modules in tables, everything escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

ROWS = 40
"""Modules that are shown; a model has thousands."""


def page(report: Mapping[str, Any]) -> str:
    """HTML of a report as JSON has it.

    >>> page({"command": "merge", "summary": "<b>", "totals": {}, "modules": [], "warnings": []})
    '<div><b>merge</b>: &lt;b&gt;</div>'
    """
    said = report.get("error") or report["summary"]
    output = f" → <code>{_text(report['output'])}</code>" if report.get("output") else ""
    parts = [f"<b>{_text(report['command'])}</b>{output}: {_text(said)}"]
    if report["warnings"]:
        parts.append(f"<ul>{''.join(f'<li>{_text(w)}</li>' for w in report['warnings'])}</ul>")
    totals = {name: value for name, value in report["totals"].items() if not isinstance(value, (list, dict))}
    if totals:
        parts.append(_table(["total", "value"], list(totals.items())))
    if report["modules"]:
        parts.append(_modules(report["modules"]))
    if report.get("adapters"):
        parts.append(_adapters(report["adapters"]))
    return f"<div>{''.join(parts)}</div>"


def _modules(modules: Sequence[Mapping[str, Any]]) -> str:
    """The first modules, with the numbers that any of them has."""
    shown = modules[:ROWS]
    names = list(dict.fromkeys(key for m in shown for key, value in m.items() if _is_short(key, value)))
    return _table(names, [[m.get(name) for name in names] for m in shown], more=len(modules) - len(shown))


def _is_short(key: str, value: Any) -> bool:
    return key == "shape" or not isinstance(value, (list, dict))


def _adapters(adapters: Sequence[Mapping[str, Any]]) -> str:
    rows = [[", ".join(a["inputs"]), a.get("error") or a["summary"]] for a in adapters[:ROWS]]
    return _table(["adapter", "summary"], rows, more=len(adapters) - len(rows))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, more: int = 0) -> str:
    titles = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row)}</tr>" for row in rows)
    rest = f'<tr><td colspan="{len(head)}">… and {more:,} more</td></tr>' if more > 0 else ""
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}{rest}</tbody></table>"


def _cell(value: Any) -> str:
    """A value in few characters: floats with four digits, shapes with crosses.

    >>> _cell(0.123456), _cell(1234567), _cell([4, 8]), _cell(None), _cell("<x>")
    ('0.1235', '1,234,567', '4×8', '', '&lt;x&gt;')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return _text("×".join(map(str, value)))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _text(value: Any) -> str:
    return escape(str(value)).replace("\n", "<br/>")

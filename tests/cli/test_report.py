"""A report in Python: typed totals, one line, and a page in a notebook."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lorasurgery.notebook import ROWS
from lorasurgery.report import ModuleReport, Report
from lorasurgery.totals import KINDS, MergeTotals, Totals

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/schemas/report.schema.json").read_text())
GROUPS = {
    "extract": ["extract"], "merge": ["merge", "undone", "settled"], "unmerge": ["merge", "undone", "settled"],
    "switch": ["merge", "undone", "settled"], "blend": ["blend"], "rerank": ["blend", "folder"],
    "convert": ["convert", "folder"], "inspect": ["inspect_adapter", "inspect_checkpoint", "folder"],
    "check": ["check", "folder"], "diff": ["diff_checkpoints", "diff_adapters"], "plan": ["plan"], "push": ["push"],
    "verify": ["verify"],
}  # fmt: skip
TYPES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "array": "list", "object": "dict"}


def kind_of(schema: dict[str, Any]) -> str:
    """Python's name for what a schema allows."""
    if "$ref" in schema:
        return kind_of(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    if "const" in schema:
        return type(schema["const"]).__name__
    return "str" if "enum" in schema else TYPES[schema["type"]]


@pytest.mark.parametrize("verb", KINDS)
def test_totals_are_those_of_the_schema(verb: str) -> None:
    """Every total of the JSON schema is a typed attribute, of its kind, and may be None where it can be missing."""
    parts = [SCHEMA["$defs"][name]["properties"]["totals"] for name in GROUPS[verb]]
    annotated = {name: text for cls in KINDS[verb].__mro__ for name, text in inspect.get_annotations(cls).items()}
    assert set(annotated) == set(KINDS[verb].names())
    typed = {name.removesuffix("_"): text for name, text in annotated.items()}
    known = {name for part in parts for name in part["properties"]}
    only_check = {"for", "serves"} if verb != "check" else set()  # of a folder of adapters
    assert known - only_check <= set(typed)
    for part in parts:
        for name, schema in part["properties"].items():
            assert name in only_check or kind_of(schema) in re.findall(r"\w+", typed[name]), name
    always = [name for name in known if all(name in part.get("required", ()) for part in parts)]
    shared = {v for v in KINDS if KINDS[v] is KINDS[verb]} - {verb}
    assert shared or {n for n, text in typed.items() if "None" not in text} == set(always)


def test_no_total_hides_a_method_of_dictionaries() -> None:
    """An attribute is the total, not a method of the dictionary."""
    for kind in KINDS.values():
        assert not set(kind.names()) & set(dir(dict))


def test_attributes_and_keys_are_the_same() -> None:
    """Both ways, also after the verbs' own |= and item assignment; unknown names are errors."""
    report = Report("merge", ["base", "style"], "out")
    report.totals = {"weights": [0.5], "from": ["style"]}  # type: ignore[assignment]
    report.totals |= {"retention": 0.9}
    report.totals["noise"] = 0.1
    assert isinstance(report.totals, MergeTotals)
    assert (report.totals.weights, report.totals.from_, report.totals.retention) == ([0.5], ["style"], 0.9)
    assert report.totals.noise == report.totals["noise"] == 0.1
    assert report.totals.untied is None
    assert "untied" not in report.totals
    with pytest.raises(AttributeError, match="MergeTotals has no 'eror'"):
        _ = report.totals.eror
    assert report.to_dict()["totals"] == {"weights": [0.5], "from": ["style"], "retention": 0.9, "noise": 0.1}
    assert type(Report("other", [], "").totals) is Totals
    assert Report("merge", [], "").totals is not Report("merge", [], "").totals


def test_the_repr_is_one_short_line() -> None:
    """Command, output and summary, however long the summary and the modules are."""
    report = Report("extract", ["a", "b"], "out", summary="error 1%\nmore", modules=[ModuleReport("m", (2, 2))] * 1000)
    assert repr(report) == "<Report of extract, out: error 1% …>"
    assert repr(Report("inspect", ["a"], "", summary="x" * 1000)).endswith("x…>")
    assert len(repr(Report("inspect", ["a"], "", summary="x" * 1000))) < 250
    assert repr(Report("rerank", ["a"], "", error="broken")) == "<Report of rerank: broken>"


def test_the_page_is_bounded_and_escaped() -> None:
    """Names and messages from files are text, and thousands of modules are a few rows."""
    evil = "<script>alert('&')</script>"
    report = Report("merge", [evil], evil, summary=evil, warnings=[evil], totals={evil: evil, "error": 0.123456})  # type: ignore[arg-type]
    report.modules = [ModuleReport(f"{evil}{i}", (2, 3), rank=4, error=0.5) for i in range(5000)]
    report.adapters = [Report("merge", [evil], "", error=evil)]
    page = report._repr_html_()
    tree = ElementTree.fromstring(page)
    assert not list(tree.iter("script"))
    assert "".join(tree.itertext()).count(evil) >= 5
    totals, modules, _ = ["".join(t.itertext()) for t in tree.iter("table")]
    assert "0.1235" in totals
    assert modules.count(evil) == ROWS
    assert modules.endswith(f"… and {5000 - ROWS:,} more")
    assert "2×3" in modules
    assert len(page) < 40_000

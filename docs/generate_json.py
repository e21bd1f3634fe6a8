"""Write docs/json.md from the schemas and examples in docs/schemas; `--check` only says whether it is current."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCHEMAS = HERE / "schemas"
TARGET = HERE / "json.md"
LISTS = ("modules", "full", "left_out")
LONG = 12  # an enum of more words is not spelt out

INTRO = """\
# The JSON reports

Made from the schemas in docs/schemas by `make docs`; do not edit.

Every command takes `--json` and then prints one object on stdout, a report, and nothing else there. When the command
fails there is none: stdout is empty, stderr says why in one line, and the exit status is 1 (2 for wrong usage). Only
what failed of a folder of adapters, or a `--push` after the work was done, is told in a report, by `error`.

- [report.schema.json](schemas/report.schema.json) describes the reports,
  [record.schema.json](schemas/record.schema.json) the record beside a result, both in JSON Schema 2020-12. A field
  that is not in them is not in a report.
- What is marked *optional* is left out where it does not apply or is not a finite number; nothing is ever null.
- Sizes are bytes, ‖·‖ is the Frobenius norm, shares go from 0 to 1, dtypes have safetensors' names (F32, BF16).
- The examples are real, from the weights of `make demo`, and shortened: numbers are rounded, long lists are cut, and
  `sources` is shown only once.
"""

GROUPS = {
    "extract": "extract base tuned -o adapter --rank 16",
    "merge": "merge base adapter -o merged --dtype bfloat16",
    "undone": "unmerge kept adapter -o restored",
    "settled": "switch kept --to lean --resume",
    "blend": "rerank adapter -o smaller --budget 25%",
    "convert": "convert lean -o portable --to peft --portable --base base",
    "inspect_adapter": "inspect adapter --spectrum --base base",
    "inspect_checkpoint": "inspect base",
    "diff_checkpoints": "diff base tuned",
    "diff_adapters": "diff adapter smaller",
    "check": "check adapter --for vllm --base base",
    "verify": "verify merged --against base --adapter adapter -w 0.5",
    "plan": "plan base --rank 8 --target attention",
    "push": "push adapter me/minilm",
    "folder": "rerank loras -o loras-8 --rank 8",
}

JQ = """\
## With jq

Where more rank would help: the modules with the largest error.

```console
$ lorasurgery extract base tuned -o adapter --rank 16 --json |
    jq -r '.modules | sort_by(-.error)[:3][] | [.name, .rank, .error] | @tsv'
embeddings.word_embeddings	16	0.9207617914294857
encoder.layer.0.intermediate.dense	16	0.8262303570225152
encoder.layer.1.intermediate.dense	16	0.7904790038220951
```

What a fine-tune changed most, relative to the weights.

```console
$ lorasurgery diff base tuned --json |
    jq -r '.modules | map(select(.relative)) | sort_by(-.relative)[:3][] | [.name, .relative] | @tsv'
encoder.layer.5.attention.self.value.bias	0.03823192725933735
encoder.layer.0.attention.self.key.bias	0.027243098035653397
encoder.layer.5.attention.self.key.bias	0.02518204826178541
```

Which adapters of a folder failed, and why.

```console
$ lorasurgery rerank loras -o loras-8 --rank 8 --json | jq -r '.adapters[] | select(.error) | .error'
loras/broken.safetensors: claims a header of 749689261983559534 bytes (at most 100000000); not a safetensors file
```
"""


@dataclass(frozen=True)
class Field:
    """One row of a table: `path` is dotted, with [] after a list; `when` is empty for what is always there."""

    path: str
    type: str
    when: str
    meaning: str


class Schema:
    """A schema file whose references into itself are followed; what stands beside a reference comes first."""

    def __init__(self, name: str) -> None:
        self.whole: dict[str, Any] = json.loads((SCHEMAS / f"{name}.schema.json").read_text())

    def at(self, node: dict[str, Any]) -> dict[str, Any]:
        """The node with its reference followed; other files' are only named."""
        reference = node.get("$ref", "")
        if not reference.startswith("#/"):
            return node
        found: Any = self.whole
        for part in reference[2:].split("/"):
            found = found[part]
        return self.at(found) | {key: value for key, value in node.items() if key != "$ref"}

    def group(self, name: str) -> dict[str, Any]:
        """A command's definition."""
        found: dict[str, Any] = self.whole["$defs"][name]
        return found

    def part(self, group: dict[str, Any], name: str) -> tuple[dict[str, Any], list[str]]:
        """The totals or what is in a list of a command's report, and what only a run that is no dry run has."""
        node, late = self.at(group["properties"].get(name, {})), group.get("then", {}).get("properties", {})
        late = late.get(name, {})
        if name in LISTS:
            node, late = self.at(node.get("items", {})), late.get("items", {})
        return node, late.get("required", [])

    def fields(self, node: dict[str, Any], late: list[str] = (), prefix: str = "") -> Iterator[Field]:  # type: ignore[assignment]
        """All fields of an object, those of objects in its lists included."""
        for name, raw in node.get("properties", {}).items():
            found, path = self.at(raw), prefix + name
            when = "" if name in node.get("required", ()) else "not in dry runs" if name in late else "optional"
            yield Field(path, self.type_of(found), when, found.get("description", ""))
            if found.get("type") == "array":
                yield from self.fields(self.at(found.get("items", {})), prefix=f"{path}[].")

    def type_of(self, node: dict[str, Any]) -> str:
        """The type in words."""
        if "const" in node:
            return f"`{json.dumps(node['const'])}`"
        if "enum" in node:
            return ", ".join(f"`{word}`" for word in node["enum"]) if len(node["enum"]) <= LONG else "string"
        if node.get("type") == "array" and node.get("items"):
            inner = self.at(node["items"])
            return f"list of {inner.get('type', 'string' if 'enum' in inner else 'object')}s"
        if "additionalProperties" in node and isinstance(node["additionalProperties"], dict):
            return f"object: {self.at(node['additionalProperties'])['type']}s by name"
        return str(node.get("type", "list" if "items" in node else "object"))


def table(fields: Iterator[Field], prefix: str = "") -> list[str]:
    """The rows of one table."""
    rows = ["| field | type | meaning |", "|---|---|---|"]
    for f in fields:
        when = f", {f.when}" if f.when else ""
        rows.append(f"| `{prefix}{f.path}` | {f.type}{when} | {f.meaning.replace('|', chr(92) + '|')} |")
    return [*rows, ""]


def section(schema: Schema, name: str) -> list[str]:
    """One command, or two that are alike: totals, what is in the lists, an example."""
    group = schema.group(name)
    lines = [f"## {group['title']}", "", group["description"], ""]
    lines += ["`totals`", "", *table(schema.fields(*schema.part(group, "totals")))]
    shown: dict[str, str] = {}
    for part in LISTS:
        node, late = schema.part(group, part)
        if "properties" not in node:
            continue
        says, key = node.get("description", ""), json.dumps(node["properties"])
        if key in shown:
            lines += [f"`{part}` has the fields of `{shown[key]}`. {says}".rstrip(), ""]
        else:
            shown[key] = part
            lines += [f"`{part}[]`" + (f": {says}" if says else ""), "", *table(schema.fields(node, late))]
    return [*lines, f"`lorasurgery {GROUPS[name]} --json`", "", *example(name)]


def example(name: str) -> list[str]:
    """A real report, as docs/schemas/examples has it."""
    return ["```json", (SCHEMAS / f"examples/{name}.json").read_text().rstrip(), "```", ""]


def reference() -> str:
    """The whole page."""
    report, record = Schema("report"), Schema("record")
    lines = [INTRO, "## Every report", "", *table(f for f in report.fields(report.whole) if "[]" not in f.path)]
    for name in GROUPS:
        lines += section(report, name)
    for name in ("source", "pushed"):
        node = report.group(name)
        lines += [f"## {node['title']}", "", node["description"], "", *table(report.fields(node))]
    lines += ["## The record beside a result", "", record.whole["description"], "", *table(record.fields(record.whole))]
    lines += [*example("record"), JQ]
    return "\n".join(lines)


if __name__ == "__main__":
    if "--check" not in sys.argv:
        TARGET.write_text(reference())
    elif not TARGET.exists() or TARGET.read_text() != reference():
        sys.exit("docs/json.md is not what docs/schemas says; run `make docs`")

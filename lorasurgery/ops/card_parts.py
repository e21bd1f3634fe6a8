"""The sections of a model card, as Markdown. No network, no files but a config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.clients.finding import Setting
from lorasurgery.clients.servers import findings
from lorasurgery.report import Report

HOME = "lorasurgery"
_COLUMNS = {
    "rank": ("rank", "{}"), "alpha": ("alpha", "{:g}"), "delta_norm": ("‖ΔW‖", "{:.4g}"), "error": ("error", "{:.2%}"),
    "energy": ("energy", "{:.2%}"), "retention": ("kept", "{:.2%}"), "noise": ("rounding noise", "{:.2%}"),
    "effective_rank": ("effective rank", "{:.1f}"),
}  # fmt: skip
_OF = {"extract": "the fine-tune's update of these modules", "rerank": "the larger adapter's update",
       "blend": "the exact blend's update"}  # fmt: skip
_RANKS = (16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for max_lora_rank


def opening(report: Report | None, record: dict[str, Any], base: str | None) -> str:
    """One paragraph: what this is, and for which model."""
    link = f"[{base}](https://huggingface.co/{base})" if base and "/" in base else base or "a base model"
    totals = record.get("totals", {})
    if report is None:
        lines = [f"LoRA adapters merged into the weights of {link}."] if record.get("command") == "merge" else []
        if totals.get("retention") is not None:
            lines.append(
                f"{totals['tensors_touched']} tensors were changed; {totals['retention']:.2%} of the update is in the "
                f"weights after rounding, with rounding noise of {totals['noise']:.2%} of its norm."
            )
        return " ".join(lines)
    t = report.totals
    ranks = str(t["rank_max"]) if t["rank_min"] == t["rank_max"] else f"{t['rank_min']} to {t['rank_max']}"
    text = (
        f"A LoRA adapter for {link}: {t['modules']} modules of rank {ranks}, {t['parameters']:,} parameters, "
        f"{t['adapter_bytes'] / 1e6:,.2f} MB."
    )
    if t["full"]:
        text += f" {t['full']} tensors (norms, biases and the like) are stored whole."
    if totals.get("error") is not None and record.get("command") in ("extract", "rerank", "blend"):
        text += (
            f" The factors hold {totals['energy']:.2%} of the energy of {_OF[record['command']]}: the relative error "
            f"‖ΔW − BA‖/‖ΔW‖ is {totals['error']:.2%}, measured on the factors as they are written."
        )
    return text


def usage(path: Path, adapter: Adapter | None, repo: str, base: str | None) -> str:
    """How to load it, in code that can be pasted."""
    base = base or "BASE_MODEL"
    if adapter is None:
        return _section(
            "Use", f'```python\nfrom transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("{repo}")\n```'
        )
    if adapter.format != "peft" or adapter.members:
        name = f', weight_name="{path.name}"' if path.is_file() else ""
        code = (
            "from diffusers import DiffusionPipeline\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("{base}")\npipe.load_lora_weights("{repo}"{name})'
        )
        return _section("Use with diffusers", f"```python\n{code}\n```")
    return (
        _section("Use with PEFT", _peft(adapter, repo, base))
        + "\n\n"
        + _section("Use with vLLM", _vllm(adapter, repo, base))
    )


def _peft(adapter: Adapter, repo: str, base: str) -> str:
    task = str(adapter.config.get("task_type") or "")
    auto = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
            "SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification",
            "QUESTION_ANS": "AutoModelForQuestionAnswering"}.get(task, "AutoModel")  # fmt: skip
    return (
        f"```python\nfrom peft import PeftModel\nfrom transformers import {auto}\n\n"
        f'model = {auto}.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(model, "{repo}")\n```'
    )


def _vllm(adapter: Adapter, repo: str, base: str) -> str:
    top = max((d.rank for d in adapter.deltas.values()), default=1)
    rank = next((r for r in _RANKS if r >= top), _RANKS[-1])
    against = findings(adapter, "vllm", Setting(max_lora_rank=rank))
    if against:
        says = "; ".join(f.what for f in against[:3])
        merge = f"lorasurgery merge {base} {repo} -o merged\nvllm serve merged"
        return f"vLLM does not serve it as an adapter ({says}). Merge it, and serve the model:\n\n```\n{merge}\n```"
    name = repo.partition("/")[2]
    return (
        f"```\nvllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={repo}\n```\n\n"
        f"and ask for the model `{name}`. Or merge it once, which costs nothing at inference: "
        f"`lorasurgery merge {base} {repo} -o merged`."
    )


def history(record: dict[str, Any], sources: Sequence[dict[str, Any]]) -> str:
    """How it was made: the command, the version, the inputs with revisions and hashes."""
    if not record:
        return ""
    lines = [f"```\n{record.get('call')}\n```", f"with {HOME} {record.get('version')}, from:", ""]
    lines += ["| input | kind | revision |", "|---|---|---|"]
    lines += [f"| {s.get('name')} | {s.get('kind')} | {s.get('revision') or 'local files'} |" for s in sources]
    rows = [
        f"| {s.get('name')}/{f.get('name')} | {f.get('bytes', 0):,} | {_hash(f)} |"
        for s in sources
        for f in s.get("files", [])
    ]
    table = ["| file | bytes | SHA-256 |", "|---|---:|---|", *rows]
    for warning in record.get("warnings", []):
        lines += ["", f"> {warning}"]
    return _section("How it was made", "\n".join(lines) + "\n\n" + _folded("Hashes of the inputs", "\n".join(table)))


def _hash(file: dict[str, Any]) -> str:
    return f"`{file['sha256']}`" if "sha256" in file else f"`{file.get('header_sha256')}` (of the header)"


def modules(report: Report | None, record: dict[str, Any]) -> str:
    """The table of modules, folded away: rank and error, or how much of the update rounding kept."""
    rows = record.get("modules") or (report.to_dict()["modules"] if report else [])
    if not rows:
        return ""
    used = [c for c in _COLUMNS if any(row.get(c) is not None for row in rows)]
    head = "| module | shape | " + " | ".join(_COLUMNS[c][0] for c in used) + " |"
    table = [head, "|---|---:|" + "---:|" * len(used)]
    for row in rows:
        cells = [_COLUMNS[c][1].format(row[c]) if row.get(c) is not None else "" for c in used]
        table.append(f"| {row['name']} | {'×'.join(map(str, row['shape']))} | " + " | ".join(cells) + " |")
    return _section("Modules", _folded(f"{len(rows)} modules", "\n".join(table)))


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"

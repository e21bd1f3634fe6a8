"""The sections of a model card, as Markdown in which what files say is quoted as it stands. No network.

What stands in a record, an adapter or a file's name goes through `words` or `block`, so that it is read as it stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.checkpoint.locate import exists, load_config
from lorasurgery.clients.issue import Setting
from lorasurgery.clients.servers import findings
from lorasurgery.errors import SurgeryError, UsageError, plain, size_of
from lorasurgery.ops.inspect import inspect_adapter
from lorasurgery.ops.provenance.card_reader import CARD, is_licence, license_of
from lorasurgery.ops.provenance.record import COLUMNS, HUB_NAME, read_record
from lorasurgery.report import Progress, Report

HOME = "lorasurgery"
_COLUMNS = {
    "rank": ("rank", "{}"), "alpha": ("alpha", "{:g}"), "delta_norm": ("‖ΔW‖", "{:.4g}"), "error": ("error", "{:.2%}"),
    "energy": ("energy", "{:.2%}"), "retention": ("kept", "{:.2%}"), "noise": ("rounding noise", "{:.2%}"),
    "effective_rank": ("effective rank", "{:.1f}"),
}  # fmt: skip
_OF = {"extract": "the fine-tune's update of these modules", "rerank": "the larger adapter's update",
       "blend": "the exact blend's update"}  # fmt: skip
_RANKS = (16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for max_lora_rank
_MOST = 2000  # rows of a table; lorasurgery.json has all of them


def opening(report: Report | None, record: dict[str, Any], base: str | None) -> str:
    """One paragraph: what this is, and for which model."""
    name = words(base or "a base model")
    link = f"[{name}](https://huggingface.co/{base})" if base and "/" in base else name
    totals = record.get("totals", {})
    if report is None:
        lines = [f"LoRA adapters merged into the weights of {link}."] if record.get("command") == "merge" else []
        if {"tensors_touched", "retention", "noise"} <= set(totals):
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
    if {"error", "energy"} <= set(totals) and record.get("command") in _OF:
        text += (
            f" The factors hold {totals['energy']:.2%} of the energy of {_OF[record['command']]}: the relative error "
            f"‖ΔW − BA‖/‖ΔW‖ is {totals['error']:.2%}, measured on the factors as they are written."
        )
    return text


def usage(path: Path, adapter: Adapter | None, repo: str, base: str | None) -> str:
    """How to load it, in code that can be pasted."""
    base = base or "BASE_MODEL"
    if adapter is None:
        code = f'from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("{repo}")'
        return _section("Use", block(code, "python"))
    if adapter.format != "peft" or adapter.members:
        name = f", weight_name={json.dumps(path.name)}" if path.is_file() else ""
        code = (
            "from diffusers import DiffusionPipeline\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("{base}")\npipe.load_lora_weights("{repo}"{name})'
        )
        return _section("Use with diffusers", block(code, "python"))
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
    return block(
        f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f'model = {auto}.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(model, "{repo}")',
        "python",
    )


def _vllm(adapter: Adapter, repo: str, base: str) -> str:
    top = max((d.rank for d in adapter.deltas.values()), default=1)
    rank = next((r for r in _RANKS if r >= top), _RANKS[-1])
    against = findings(adapter, "vllm", Setting(max_lora_rank=rank))
    if against:
        says = words("; ".join(f.what for f in against[:3]))
        merge = block(f"lorasurgery merge {base} {repo} -o merged\nvllm serve merged")
        return f"vLLM does not serve it as an adapter ({says}). Merge it, and serve the model:\n\n{merge}"
    name = repo.partition("/")[2]
    serve = block(f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={repo}")
    return (
        f"{serve}\n\nand ask for the model `{name}`. Or merge it once, which costs nothing at inference: "
        f"`lorasurgery merge {base} {repo} -o merged`."
    )


def history(record: dict[str, Any], sources: Sequence[dict[str, Any]]) -> str:
    """How it was made: the command, the version, the inputs with revisions and hashes."""
    if not record:
        return ""
    lines = [block(record["call"]), f"with {HOME} {words(record['version'])}, from:", ""]
    lines += ["| input | kind | revision |", "|---|---|---|"]
    lines += [row(words(text) for text in (s["name"], s["kind"], s.get("revision") or "local files")) for s in sources]
    rows = [row(_file(s["name"], f)) for s in sources for f in s["files"]]
    table = ["| file | bytes | SHA-256 |", "|---|---:|---|", *rows[:_MOST]]
    for warning in record["warnings"][:_MOST]:
        lines += ["", f"> {words(warning)}"]
    return _section("How it was made", "\n".join(lines) + "\n\n" + _folded("Hashes of the inputs", "\n".join(table)))


def _file(source: str, file: dict[str, Any]) -> tuple[str, ...]:
    whole, header = file.get("sha256"), file.get("header_sha256")
    said = words(whole) if whole else f"{words(header)} (of the header)" if header else ""
    return words(f"{source}/{file['name']}"), f"{file['bytes']:,}", said


def modules(report: Report | None, record: dict[str, Any]) -> str:
    """The table of modules, folded away: rank and error, or how much of the update rounding kept."""
    rows = record.get("modules") or (report.to_dict()["modules"] if report else [])
    if not rows:
        return ""
    used = [c for c in COLUMNS if any(item.get(c) is not None for item in rows)]
    table = [row(["module", "shape", *(_COLUMNS[c][0] for c in used)]), "|---|---:|" + "---:|" * len(used)]
    for item in rows[:_MOST]:
        cells = [_COLUMNS[c][1].format(item[c]) if item.get(c) is not None else "" for c in used]
        table.append(row([words(item["name"]), size_of(item["shape"]), *cells]))
    more = f", of which {_MOST:,} are shown" if len(rows) > _MOST else ""
    return _section("Modules", _folded(f"{len(rows):,} modules{more}", "\n".join(table)))


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


PICTURE = "spectrum.png"
_PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification",
              "QUESTION_ANS": "question-answering", "FEATURE_EXTRACTION": "feature-extraction"}  # fmt: skip


def make_card(
    path: Path, adapter: Adapter | None, repo: str, warnings: list[str], progress: Progress | None = None, *,
    base: str | None = None,
) -> dict[str, bytes]:  # fmt: skip
    """Write a model card for an adapter or a merged checkpoint, with its picture where there are singular values.

    Args:
        path: The folder or file; its record (lorasurgery.json) tells how it was made.
        repo: Where it will be published, for the lines that load it.
        warnings: Gets what keeps the card from being complete.
        base: The base model's name on the Hub; None for what config and record say.

    Returns:
        Name in the repository -> bytes.
    """
    record = read_record(path, warnings) if path.is_dir() else {}
    report = _inspected(path, progress) if adapter else None
    picture = _picture(report, warnings) if report else None
    sources = record.get("sources", [])
    base = base or base_model(adapter, sources)
    if base is None and (adapter or record):
        warnings.append(
            "the model card names no base model, for none is known by a name on the Hub; "
            "`lorasurgery push … --base-model ORG/NAME` names it"
        )
    metadata = _metadata(path, adapter, record, base, warnings)
    body = [f"# {words(repo.partition('/')[2])}", opening(report, record, base)]
    if picture:
        body.append(f"![singular values of each module, and error against rank and size]({PICTURE})")
    body += [usage(path, adapter, repo, base), history(record, sources), modules(report, record)]
    text = f"---\n{metadata}---\n\n" + "\n\n".join(part for part in body if part) + "\n"
    return {CARD: text.encode()} | ({PICTURE: picture} if picture else {})


def base_model(adapter: Adapter | None, sources: Sequence[dict[str, Any]]) -> str | None:
    """The base's name on the Hub; None for one that only this machine knows."""
    local = {s.get("name") for s in sources if s.get("kind") == "checkpoint" and not s.get("revision")}
    named = [s.get("name") for s in sources if s.get("kind") == "checkpoint" and s.get("revision")]
    named += [adapter.config.get("base_model_name_or_path") if adapter else None]
    named += [s.get("base_model") for s in sources]
    for name in named:
        if isinstance(name, str) and HUB_NAME.fullmatch(name) and not (Path(name).name in local or exists(name)):
            return name
    return None


def _metadata(
    path: Path, adapter: Adapter | None, record: dict[str, Any], base: str | None, warnings: list[str]
) -> str:
    """The front matter, as YAML that means nothing but these words."""
    import yaml  # type: ignore[import-untyped,unused-ignore]

    folder = path if path.is_dir() else path.parent
    image = adapter is not None and (adapter.format != "peft" or bool(adapter.members))
    merged = record.get("command") in ("merge", "unmerge", "switch")
    found = {
        "base_model": base,
        "base_model_relation": ("adapter" if adapter else "finetune" if merged else None) if base else None,
        "library_name": _library(folder, adapter, image=image),
        "license": _licence(folder, record, warnings),
        "pipeline_tag": _PIPELINES.get(str(adapter.config.get("task_type"))) if adapter else None,
        "tags": ["lorasurgery", *(["lora"] if adapter or merged else []), *(["merge"] if _is_blend(record) else [])],
    }
    known = {key: value for key, value in found.items() if value is not None}
    text: str = yaml.safe_dump(known, sort_keys=False, allow_unicode=True)
    return text


def _licence(folder: Path, record: dict[str, Any], warnings: list[str]) -> str | None:
    """That of the first input that has one, or the folder's own; never something that is not an identifier."""
    named = [s.get("license") for s in record.get("sources", [])]
    return next((name for name in named if name and is_licence(name)), None) or license_of(folder, warnings)


def _is_blend(record: dict[str, Any]) -> bool:
    return [s["kind"] for s in record.get("sources", [])].count("adapter") > 1


def _library(folder: Path, adapter: Adapter | None, *, image: bool) -> str | None:
    if image or (folder / "model_index.json").exists():
        return "diffusers"
    if adapter:
        return "peft"
    return "transformers" if load_config(folder / "config.json").get("model_type") else None


def _inspected(path: Path, progress: Progress | None) -> Report:
    """With the spectrum where it can be had; whatever stands against it is no reason not to publish."""
    try:
        return inspect_adapter(path, spectrum=True, progress=progress)
    except SurgeryError:
        return inspect_adapter(path)


def _picture(report: Report, warnings: list[str]) -> bytes | None:
    from lorasurgery.plots import card_picture

    try:
        return card_picture(report)
    except UsageError as problem:
        warnings.append(f"the model card has no picture: {problem}")
        return None


_LONGEST = 1000  # characters of one text
# an underscore inside a word is nothing to Markdown, and names of modules are full of them
_SPECIAL = re.compile(r"^\d+(?=[.)])|^[^\w ]|(?<![^\W_])_|_(?![^\W_])|[^\w ./,-]|www(?=\.)", re.IGNORECASE)


def words(text: str) -> str:
    """A text inside a line, a cell or a quotation.

    >>> words("model.layers.0.self_attn.q_proj")
    'model.layers.0.self_attn.q_proj'
    >>> words("<b>|# x")
    '&#60;b&#62;&#124;&#35; x'
    """
    shown = plain(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…").strip()
    shown = _SPECIAL.sub(_entities, shown)
    return re.sub(" {2,}", " ", shown)


def _entities(found: re.Match[str]) -> str:
    return "".join(f"&#{ord(c)};" for c in found[0])


def block(text: str, language: str = "") -> str:
    """Code on lines of its own, between fences longer than any inside.

    >>> print(block("x = 1", "python"))
    ```python
    x = 1
    ```
    """
    lines = [plain(line) for line in text.split("\n")]
    longest = max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}{language}", *lines, fence])


def row(cells: Iterable[str]) -> str:
    """A row of a table, of cells that are Markdown already."""
    return f"| {' | '.join(cells)} |"

"""The model card: the Hub's metadata, how it was made, what is in it, and how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.checkpoint.locate import exists, load_config
from lorasurgery.errors import SurgeryError, UsageError
from lorasurgery.ops import card_parts as parts
from lorasurgery.ops.base_name import HUB_NAME
from lorasurgery.ops.card_reader import CARD, is_licence, license_of
from lorasurgery.ops.inspect_adapter import inspect_adapter
from lorasurgery.ops.markdown import words
from lorasurgery.ops.record import read_record
from lorasurgery.report import Progress, Report

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
    body = [f"# {words(repo.partition('/')[2])}", parts.opening(report, record, base)]
    if picture:
        body.append(f"![singular values of each module, and error against rank and size]({PICTURE})")
    body += [parts.usage(path, adapter, repo, base), parts.history(record, sources), parts.modules(report, record)]
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
    """That of the first input that has one, or the folder's own; never something that is no identifier."""
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

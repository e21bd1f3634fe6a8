"""What the Hub says about the YAML at the head of a README.md: its metadata, errors that refuse a push, warnings.

The rules are those that a card of a LoRA or of a merged model can break; the Hub has more.
"""

from __future__ import annotations

import re
from typing import Any

try:
    import yaml
except ImportError:  # the server itself needs no packages; a machine with huggingface_hub has PyYAML
    yaml = None

FRONT = re.compile(r"\s*---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")  # the Hub's own pattern
MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
RELATIONS = ("adapter", "merge", "finetune", "quantized")
LICENSES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0"
    " bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc"
    " cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0"
    " cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0"
    " deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl"
    " lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa"
    " unlicense zlib pddl gemma llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 apple-ascl apple-amlr"
    " intel-research fair-noncommercial-research-license h-research grok2-community unknown other"
).split()


def metadata(text: str) -> dict[str, Any]:
    """The mapping at the head of a README, or nothing where there is none that can be read."""
    found = FRONT.match(text)
    if yaml is None or not found:
        return {}
    try:
        value = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def card_warnings(text: str) -> list[str]:
    """What the Hub remarks on and still takes."""
    return [] if metadata(text) else ["empty or missing yaml metadata in repo card"]


def card_errors(text: str) -> list[str]:
    """Why the Hub would refuse this README; nothing where it would take it."""
    found = FRONT.match(text)
    if yaml is None or not found:
        return []
    try:
        card = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"]
    if card is None:
        return []
    if not isinstance(card, dict):
        return ["metadata must be a mapping of keys to values"]
    return [*_license_errors(card), *_base_errors(card), *_tag_errors(card)]


def _license_errors(card: dict[str, Any]) -> list[str]:
    if "license" not in card:
        return []
    if not isinstance(card["license"], str):
        return ['"license" must be a string']
    return [] if card["license"] in LICENSES else [f'"license" must be one of [{", ".join(LICENSES)}]']


def _base_errors(card: dict[str, Any]) -> list[str]:
    told = card.get("base_model", [])
    errors = [
        f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.'
        for name in (told if isinstance(told, list) else [told])
        if not isinstance(name, str) or not MODEL_ID.fullmatch(name)
    ]
    if card.get("base_model_relation", "adapter") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    return errors


def _tag_errors(card: dict[str, Any]) -> list[str]:
    tags = card.get("tags", [])
    if not isinstance(tags, list):
        return ['"tags" must be an array']
    return [f'"tags[{i}]" must be a string' for i, tag in enumerate(tags) if not isinstance(tag, str)]

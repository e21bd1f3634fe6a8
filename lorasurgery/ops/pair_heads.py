"""What a task puts on a model's body, and what the size of a vocabulary changes: differences that are no mistake."""

from __future__ import annotations

import re
from typing import Any

from lorasurgery.adapters.naming import is_embedding, is_head, module_of
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.places import place_of

_BODIES = re.compile(r"(?:(?:model|transformer|backbone|bert|roberta|electra|distilbert|vit|deit|esm)\.)*")
_HEAD_WORDS = re.compile(
    r"(?:.*_)?(?:heads?|classifier|cls|scores?|pooler|predictions|summary|logits|outputs|regressor)(?:_.*)?"
    r"|embed_out|output_projection|vocab_.*|pred_layer|project_(?:q|hid)|quantizer|logits_proj"
)


def is_task_head(name: str) -> bool:
    """Tell what a task puts on a model's body: a language model's head, a classifier, a pooler, a score.

    >>> [is_task_head(n) for n in ("score.weight", "bert.pooler.dense.bias", "h.2.mlp.c_fc.weight")]
    [True, True, False]
    """
    path = module_of(name)
    top = _BODIES.sub("", path, count=1).partition(".")[0]
    return is_head(path) or (place_of(path).layer is None and _HEAD_WORDS.fullmatch(top) is not None)


def task_of(config: dict[str, Any]) -> str:
    """The class of a model, as config.json has it: LlamaForCausalLM; "" when it is silent."""
    names = [a for a in config.get("architectures") or [] if isinstance(a, str)]
    return names[0] if names else ""


def other_task(base: dict[str, Any], tuned: dict[str, Any]) -> bool:
    """Whether two models of one body have heads for different tasks, by what their config.json say.

    >>> other_task({"architectures": ["BertForMaskedLM"]}, {"architectures": ["BertModel"]})
    True
    """
    first, second = task_of(base), task_of(tuned)
    return bool(first and second) and _task(first) != _task(second)


def _task(architecture: str) -> str:
    match = re.search(r"For[A-Z].*|LMHeadModel|DoubleHeadsModel|Model$", architecture)
    task = match[0] if match else architecture
    return "ForCausalLM" if task in ("LMHeadModel", "ForConditionalGeneration") else task


def is_growth(name: str, base: TensorInfo, tuned: TensorInfo) -> bool:
    """Whether a shape differs by the size of the vocabulary alone: an embedding's or an output head's rows."""
    path = module_of(name)
    if len(base.shape) == len(tuned.shape) == 1:
        return is_head(path) or path.endswith("predictions")
    table = len(base.shape) == 2 and base.shape[1:] == tuned.shape[1:]
    return table and (is_embedding(path) or is_head(path))

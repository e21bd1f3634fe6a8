"""What PEFT makes of names: which modules a config means, which it saves by itself, which names mean just these.

Facts: peft 0.21.2 (tuners_utils.check_target_module_exists and _check_lora_target_modules_mamba,
utils/other._set_trainable, peft_model.PeftModelFor…).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# Modules that PEFT adds to modules_to_save for a task, and then demands in the file, trained or not.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# model_type -> leaves at which PEFT stops: these models' kernels read the weights past the layer.
LAYERS_PAST = dict.fromkeys(("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"), ("out_proj", "conv1d"))

# class of the parent -> children whose weight it reads itself (transformers 5.23): PEFT's layer is never called.
_TABLES = (
    "AudioFlamingo3Encoder VoxtralEncoder Qwen2AudioEncoder MossTranscribeDiarizeAudioModel WhisperEncoder "
    "embed_positions|"
    "CLIPVisionEmbeddings Cosmos3EdgeVisionEmbeddings GitVisionEmbeddings Glm4vVisionEmbeddings "
    "Glm4vMoeVisionEmbeddings GraniteDoclingVisionEmbeddings JanusVisionEmbeddings Kosmos2VisionEmbeddings "
    "MetaClip2VisionEmbeddings Phi4MultimodalVisionEmbeddings Siglip2VisionEmbeddings SiglipVisionEmbeddings "
    "Step3p7VisionEmbeddings UnlimitedOcrVisionEmbeddings position_embedding|"
    "JanusVQVAEVectorQuantizer embedding|ProphetNetDecoder ngram_embeddings|SEWDTransformerEncoder rel_embeddings|"
    "NeoMMEForMaskedLM unembedding_projection|LongcatFlashTopkRouter classifier|JambaMambaMixer dt_proj|"
    "Gemma3nTextAltUp correction_coefs"
)
READ_PAST: dict[str, tuple[str, ...]] = {
    **{parent: (row.split()[-1],) for row in _TABLES.split("|") for parent in row.split()[:-1]},
    "MultiheadAttention": ("out_proj",),  # torch's own
    "LayoutLMv3Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "MambaMixer": ("dt_proj", "x_proj", "out_proj"),
    "FalconMambaMixer": ("dt_proj", "x_proj", "out_proj"),
}
# The same of layers too large to be stored whole for it: their factors count once they are merged.
MERGED_ONLY = {"WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj")}


def task_type(config: dict[str, Any]) -> str | None:
    """PEFT's task type for a model, from config.json's architectures.

    >>> task_type({"architectures": ["BertForSequenceClassification"]})
    'SEQ_CLS'
    """
    for architecture in config.get("architectures") or []:
        for ending, task in TASKS.items():
            if isinstance(architecture, str) and architecture.endswith(ending):
                return task
    return None


def for_task(config: dict[str, Any], task: str | None) -> str | None:
    """The class of a model's family for a task, where config.json's own is for another; None where it is not.

    >>> for_task({"architectures": ["LlamaForCausalLM"]}, "SEQ_CLS")
    'LlamaForSequenceClassification'
    """
    own = task_type(config)
    if own is None or task is None or own == task:
        return None
    ending = next((e for e, t in TASKS.items() if t == task), None)
    stem = re.split("For|LMHeadModel", config["architectures"][0])[0]
    return f"{stem}{ending}" if ending else None


def saved_for(task: str | None, paths: Iterable[str]) -> set[str]:
    """The modules that PEFT stores whole for a task, whatever modules_to_save says: it compares endings of paths.

    >>> sorted(saved_for("SEQ_CLS", ["bert.pooler", "classifier", "pre_classifier"]))
    ['classifier', 'pre_classifier']
    """
    heads = _HEADS.get(task or "", ())
    return {path for path in paths if heads and path.endswith(heads)}


class Shutter:
    """Which modules names in modules_to_save keep from being adapted: a name that is any part of the path will do.

    >>> shutter = Shutter(["layers.0.norm.linear", "layers.0.norm1"])
    >>> shutter.shuts("norm"), shutter.shuts("norm1.linear")
    (True, False)

    Args:
        targets: Paths of the modules with factors.
    """

    def __init__(self, targets: Iterable[str]) -> None:
        self._text = "\n".join(f".{t}." for t in targets)

    def shuts(self, name: str) -> bool:
        """Whether any of the modules would be kept from being adapted."""
        return f".{name}." in self._text


def saved_names(chosen: set[str], paths: Iterable[str], targets: Iterable[str]) -> tuple[list[str], set[str]]:
    """The fewest modules_to_save that mean just the chosen modules, and those that no name can mean alone.

    A name means every path that ends as it, at a dot or not, and shuts targets out that have it in their paths.

    >>> saved_names({"a.norm", "b.norm"}, ["a.norm", "b.norm", "b.k"], ["b.k"])
    (['norm'], set())
    >>> saved_names({"a.norm"}, ["a.norm", "b.a.norm"], [])
    ([], {'a.norm'})
    """
    everything, shutter = list(paths), Shutter(targets)
    by_leaf: dict[str, set[str]] = defaultdict(set)
    for path in chosen:
        by_leaf[path.rpartition(".")[2]].add(path)
    names: list[str] = []
    unnamed: set[str] = set()
    for leaf, own in by_leaf.items():
        ending = [p for p in everything if p.endswith(leaf)]
        if set(ending) == own and not shutter.shuts(leaf):
            names.append(leaf)
            continue
        alone = {p for p in own if sum(q.endswith(p) for q in ending) == 1 and not shutter.shuts(p)}
        names += alone
        unnamed |= own - alone
    return sorted(names), unnamed

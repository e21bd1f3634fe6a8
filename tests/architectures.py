"""Every model class that transformers' auto classes know, built tiny from its own default config."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

# Which auto classes are gone through. A model type with a class of its own in one of the others is not tried again for
# the last two, whose classes are the same encoder under one more head.
TASKS = {
    "causal language models": "CAUSAL_LM",
    "sequence to sequence": "SEQ_TO_SEQ_CAUSAL_LM",
    "image and text to text": "IMAGE_TEXT_TO_TEXT",
    "sequence classification": "SEQUENCE_CLASSIFICATION",
    "image classification": "IMAGE_CLASSIFICATION",
    "speech to text": "SPEECH_SEQ_2_SEQ",
    "CTC": "CTC",
    "masked language models": "MASKED_LM",
    "token classification": "TOKEN_CLASSIFICATION",
}
REPEATED = ("masked language models", "token classification")
LARGEST = 30_000_000  # parameters: what is larger in spite of all below takes too long

# What the numbers of a config become, whatever part of a model they stand in.
SMALL = {
    1: "n_group topk_group n_shared_experts first_k_dense_replace mamba_n_groups bos_token_id cls_token_id"
       " decoder_start_token_id",
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers depth"
       " num_key_value_heads num_kv_heads multi_query_group_num num_experts_per_tok linear_num_key_heads mamba_expand"
       " temporal_patch_size spatial_merge_size eos_token_id sep_token_id",
    3: "num_channels num_labels mask_token_id",
    4: "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads"
       " linear_num_value_heads num_experts num_local_experts n_routed_experts rotary_dim",
    8: "head_dim attention_head_dim global_head_dim d_kv kv_channels kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"
       " linear_key_head_dim linear_value_head_dim mamba_d_state mamba_d_head mamba_n_heads state_size patch_size"
       " hidden_size_per_layer_input num_mel_bins",
    16: "projection_dim q_lora_rank",
    24: "moe_intermediate_size shared_expert_intermediate_size",
    32: "hidden_size d_model n_embd dim hidden_dim embed_dim embedding_size word_embed_proj_dim out_hidden_size"
        " encoder_hidden_size decoder_hidden_size cross_attention_hidden_size text_hidden_size kv_hidden_size"
        " image_size max_source_positions max_target_positions",
    48: "intermediate_size ffn_dim ffn_hidden_size d_ff d_inner n_inner encoder_ffn_dim decoder_ffn_dim",
    64: "vocab_size vocab_size_per_layer_input max_position_embeddings n_positions max_seq_len",
    0: "pad_token_id num_kv_shared_layers",
    10: "image_token_id image_token_index", 11: "video_token_id", 12: "audio_token_id",
    13: "vision_start_token_id", 14: "vision_end_token_id",
}  # fmt: skip
NUMBERS = {name: number for number, names in SMALL.items() for name in names.split()}
# What a family needs beside them, or instead, by its model_type.
OWN: dict[str, dict[str, Any]] = {
    "donut-swin": {"embed_dim": 24},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]}, "luke": {"entity_vocab_size": 64, "entity_emb_size": 32},
    "mamba2": {"num_heads": 8, "n_groups": 1}, "falcon_h1": {"mamba_d_ssm": 64, "mamba_expand": 2},
    "esmc": {"num_key_value_heads": 4}, "zaya": {"num_experts_per_tok": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
}  # fmt: skip
# Left to the class's own idea where it can't be built with ours: the first that works is taken.
WITHOUT = ((), ("layer_types",), ("head_dim",), ("layer_types", "head_dim"))
# Some configs leave these None, and their classes do not mind that until they are built.
FORGOTTEN = ("head_dim", "num_key_value_heads", "vocab_size")
# Parts of a path that a fine-tune by LoRA leaves alone.
HEADS = frozenset("lm_head score classifier cls embed_out output_projection proj_out decoder predictions".split())


@dataclass(frozen=True)
class Architecture:
    """One class to try.

    Args:
        name: The class, of the tuned model. task: The auto class that lists it.
        base: The class of the base, where it is another one.
        linear_only: Move linear layers only, heads left out, as after a merged LoRA.
        library: Where the classes are.
    """

    name: str
    task: str = ""
    base: str = ""
    linear_only: bool = False
    library: str = "transformers"

    @property
    def known(self) -> Any:
        """The class itself."""
        return getattr(importlib.import_module(self.library), self.name)

    def __str__(self) -> str:
        return f"{self.base}-{self.name}" if self.base else self.name


def every() -> list[Architecture]:
    """Each class of the auto mappings once, in their order."""
    return list(_listed())


def denoisers() -> list[Architecture]:
    """The classes of diffusers that load adapters; importing them all takes a while."""
    import diffusers_models

    return [
        Architecture(name, "image and video models", library="diffusers") for name in diffusers_models.adapter_classes()
    ]


def _listed() -> Iterator[Architecture]:
    types: set[str] = set()
    seen: set[str] = set()
    for task, mapping in TASKS.items():
        for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            name = names if isinstance(names, str) else names[0]
            if name not in seen and not (task in REPEATED and model_type in types):
                yield Architecture(name, task)
            seen.add(name)
            types.add(model_type)


def model_of(one: Architecture) -> Any:
    """The base with random weights, of which none is at its initial value, where zeros hide mistakes."""
    known = getattr(tf, one.base or one.name)
    config = _fitting(known)
    torch.manual_seed(0)
    model = known(config).eval().float()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def _fitting(known: Any) -> Any:
    """The smallest config that the class takes; the reason given is that against our own numbers."""
    family = known.config_class
    reason: Exception | None = None
    for numbers in _attempts(family()):
        try:
            config = family(**numbers)
            with torch.device("meta"):
                size = sum(p.numel() for p in known(config).parameters())
            if size > LARGEST:
                raise ValueError(f"{size / 1e6:.0f} million parameters however small its config")
        except Exception as error:
            reason = reason or error
        else:
            return config
    assert reason is not None
    raise reason


def _attempts(defaults: Any) -> Iterator[dict[str, Any]]:
    """Arguments for a config: small numbers, without some that a class computes, with some that it forgets to."""
    numbers = _shrunk(defaults) | OWN.get(defaults.model_type, {})
    for left_out in WITHOUT:
        yield {k: v for k, v in numbers.items() if k not in left_out}
    yield _shrunk(defaults, unset=True)
    yield {k: v for k, v in numbers.items() if not isinstance(v, dict)}


def _shrunk(config: Any, unset: bool = False) -> dict[str, Any]:
    """The arguments that differ from a config's defaults, those of its parts too; with `unset` what is None too."""
    found: dict[str, Any] = {}
    for key, value in vars(config).items():
        if isinstance(value, tf.PretrainedConfig) and not key.startswith("_"):
            found[key] = _shrunk(value, unset)
        elif key in NUMBERS and (type(value) is int or (unset and value is None and key in FORGOTTEN)):
            found[key] = NUMBERS[key]
        elif key == "layer_types" and isinstance(value, list) and value:
            found[key] = [value[0], value[-1]]
    return found


def tune(model: Any, linear_only: bool) -> None:
    """Move every weight (or those of linear layers): matrices by rank 4, each expert by its own, vectors freely."""
    generator = torch.Generator().manual_seed(2)
    layers = {
        id(m.weight)
        for path, m in model.named_modules()
        if isinstance(m, (torch.nn.Linear, Conv1D)) and not HEADS & set(path.split(".")[-2:])
    }
    if linear_only and not layers:
        raise ValueError("no linear layers but the head's")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and (not linear_only or id(parameter) in layers):
                parameter += _update(name, parameter.shape, generator)


def _update(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    if len(shape) < 2:
        return 0.1 * normal(*shape)
    if len(shape) == 3 and "expert" in name:
        return 0.025 * normal(shape[0], shape[1], 4) @ normal(shape[0], 4, shape[2])
    return 0.025 * (normal(shape[0], 4) @ normal(4, shape[1:].numel())).reshape(shape)

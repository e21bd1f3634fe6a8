"""Where a model's names in memory differ from its names on disk: transformers 5 renames some families when it loads.

A rule only proposes a name; it counts when the checkpoint has that tensor, in that shape. Facts: transformers 5.23,
conversion_mapping.py, and what each family's save_pretrained wrote.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """Substitutions that lead from memory to disk, all applied one after the other, and back.

    Args:
        model_types: config.json's model_type of the models whose disk names are these; back only goes for them.
    """

    to_disk: Rules
    to_memory: Rules = ()
    model_types: frozenset[str] = frozenset()


_VL_TYPES = (
    "llava llava_next llava_next_video llava_onevision vipllava paligemma gemma3 mllama aya_vision got_ocr2 internvl "
    "mistral3 aria"
)
_VIT_TYPES = "vit deit beit vit_mae vit_msn vivit ijepa audio-spectrogram-transformer"
_TOWERS = "vision_tower|vision_model|multi_modal_projector"
_VL_DISK: Rules = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (rf"^model\.({_TOWERS})\b", r"\1"),
)
_VL_MEMORY: Rules = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (rf"^({_TOWERS})\b", r"model.\1"),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),  # of older files
)
_QKV_DISK: Rules = (
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
_QKV_MEMORY: Rules = (
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)

# What old files of any family call a LayerNorm's weight and bias.
_LEGACY: Rules = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))

FAMILIES = (
    Family(_VL_DISK, _VL_MEMORY, frozenset(_VL_TYPES.split())),
    # older files of the same models keep the tower's own prefix
    Family((*_VL_DISK, (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."))),
    Family(
        ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
        ((r"^model\.(?!language_model\.|visual\.)", "model.language_model."), (r"^visual\.", "model.visual.")),
        frozenset(("qwen2_vl", "qwen2_5_vl")),
    ),
    Family(
        (
            (r"(^|\.)layers\.(\d+)\.", r"\1encoder.layer.\2."),
            *_QKV_DISK,
            (r"\.mlp\.fc1\.", ".intermediate.dense."),
            (r"\.mlp\.fc2\.", ".output.dense."),
        ),
        (
            (r"encoder\.layer\.(\d+)\.", r"layers.\1."),
            *_QKV_MEMORY,
            (r"\.intermediate\.dense\.", ".mlp.fc1."),
            (r"(?<!attention)\.output\.dense\.", ".mlp.fc2."),
        ),
        frozenset(_VIT_TYPES.split()),
    ),
    Family(_QKV_DISK, _QKV_MEMORY, frozenset(("dinov2", "dinov2_with_registers"))),
    Family(
        ((r"\.mlp\.gate\.", ".block_sparse_moe.gate."), (r"\.mlp\.experts\b", ".block_sparse_moe.experts")),
        ((r"\.block_sparse_moe\.", ".mlp."),),
        frozenset(("mixtral", "minimax", "minimax_m2")),
    ),
    Family(((r"^lm_head\.", "embed_out."),), ((r"^embed_out\.", "lm_head."),), frozenset(("gpt_neox",))),
)


def model_types(config: dict[str, Any]) -> frozenset[str]:
    """config.json's model_type, and its text model's.

    >>> sorted(model_types({"model_type": "aria", "text_config": {"model_type": "aria_text"}}))
    ['aria', 'aria_text']
    """
    text = config.get("text_config")
    found = (c.get("model_type") for c in (config, text if isinstance(text, dict) else {}))
    return frozenset(kind for kind in found if isinstance(kind, str))


def disk_names(name: str) -> Iterator[str]:
    """The names a tensor may have on disk, given its name in memory.

    >>> list(disk_names("model.language_model.layers.0.mlp.up_proj.weight"))[:2]
    ['language_model.model.layers.0.mlp.up_proj.weight', 'model.layers.0.mlp.up_proj.weight']
    """
    seen = {name}
    for family in FAMILIES:
        found = _apply(family.to_disk, name)
        if found not in seen:
            seen.add(found)
            yield found


def memory_name(name: str, model_types: Collection[str]) -> str:
    """A tensor's name in memory, for models whose files are named differently; others keep their name.

    >>> memory_name("vit.encoder.layer.0.output.dense.weight", ["vit"])
    'vit.layers.0.mlp.fc2.weight'
    >>> memory_name("model.layers.0.block_sparse_moe.gate.weight", ["phimoe"])
    'model.layers.0.mlp.router.weight'
    >>> memory_name("h.0.mlp.c_fc.weight", ["gpt2"])
    'h.0.mlp.c_fc.weight'

    Args:
        model_types: What config.json says of the whole and of its text model.
    """
    for family in FAMILIES:
        if not family.model_types.isdisjoint(model_types):
            name = _apply(family.to_memory, name)
    for kind in sorted(model_types):
        name = _apply(TO_MEMORY.get(kind, ()), name)
    return _apply(_LEGACY, name)


def _apply(rules: Rules, name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


Rules = tuple[tuple[str, str], ...]

# Language model in `language_model.model`, head in `language_model.lm_head`, towers at the top.
_COMPOSITE: Rules = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.(model\.)?", "model.language_model."),
)
_GRANITE: Rules = (
    (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
    (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
    (r"\.block_sparse_moe\.router\.layer\.", ".block_sparse_moe.router."),
)
_ARIA: Rules = (
    (r"\.mlp\.experts\.fc1\.weight$", ".mlp.experts.gate_up_proj"),
    (r"\.mlp\.experts\.fc2\.weight$", ".mlp.experts.down_proj"),
)
_AUDIO: Rules = (*_COMPOSITE, (r"^(audio_tower|multi_modal_projector)\b", r"model.\1"))
_SPEECH: Rules = (*_COMPOSITE, (r"^(encoder|projector)\b", r"model.\1"))
_THINKER: Rules = (
    (r"^thinker\.", ""),
    (r"^(audio_tower|visual)\b", r"model.\1"),
    (r"^model\.(?!language_model\.|visual\.|audio_tower\.)", "model.language_model."),
)
_SELF: Rules = tuple((rf"attention\.self\.{old}\b", f"attention.{new}")
                     for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")))  # fmt: skip
_DENSE: Rules = (
    (r"attention\.output\.dense\b", "attention.o_proj"),
    (r"intermediate\.dense\b", "mlp.fc1"),
    (r"(?<!attention\.)output\.dense\b", "mlp.fc2"),
)

TO_MEMORY: dict[str, Rules] = {
    "aria": _ARIA,
    "aria_text": _ARIA,
    "axk1": ((r"\.post_mlp_layernorm\.", ".mlp.post_mlp_layernorm."),),
    "axk2": (
        (r"\.W_down\b", ".mlp.fc1"),
        (r"\.W_up\b", ".mlp.fc2"),
        (r"\.self_attn\.q_b_proj\.", ".self_attn.q_gate_proj."),
    ),
    "bailing_hybrid": (
        (r"^model\.word_embeddings\.", "model.embed_tokens."),
        (r"\.attention\.", ".self_attn."),
        (r"\.self_attn\.(f_proj\.|dt_bias|A_log)", r".self_attn.forget_gate.\1"),
        (r"\.self_attn\.dense\.", ".self_attn.o_proj."),
        (r"\.mlp\.gate\.expert_bias", ".mlp.gate.e_score_correction_bias"),
    ),
    "deepseek_v4": (
        (r"\.attn\.", ".self_attn."),
        (r"\.ffn\.", ".mlp."),
        (r"\.indexer\.compressor\.", ".compressor.indexer."),
        (r"^(model\.)?embed\.weight", r"\1embed_tokens.weight"),
        (r"^head\.weight", "lm_head.weight"),
        (r"\.attn_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
        *((rf"\.hc_{old}_(fn|base|scale)", rf".{new}.\1") for old, new in (("attn", "attn_hc"), ("ffn", "ffn_hc"))),
        (r"\.attn_sink\b", ".sinks"),
        (r"\.indexer\.weights_proj\.", ".compressor.indexer.scorer.weights_proj."),
        (r"(?<!compressor)\.indexer\.wq_b\.", ".compressor.indexer.q_b_proj."),
        (r"\.(compressor|indexer|self_attn)\.norm\.", r".\1.kv_norm."),
        (r"\.ape$", ".position_bias"),
        (r"\.wq_a\.", ".q_a_proj."),
        (r"\.self_attn\.wq_b\.", ".self_attn.q_b_proj."),
        (r"\.wkv\.", ".kv_proj."),
        (r"\.wgate\.", ".gate_proj."),
        (r"\.wo_([ab])\.", r".o_\1_proj."),
        (r"\.q_norm\.", ".q_a_norm."),
        (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
        (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
        (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
        (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
    ),
    "dinov3_convnext": ((r"^stages\.", "model.stages."),),
    "dinov3_vit": ((r"^layer\.", "model.layer."),),
    "emu3": (
        (r"^text_model\.lm_head\.", "lm_head."),
        (r"^text_model\.(model\.)?", "model.text_model."),
        (r"^vqmodel\.", "model.vqmodel."),
    ),
    "ernie4_5_moe": ((r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics."),),
    "exaone_moe": ((r"\.mlp\.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),),
    "flint": ((r"\.self_attn\.softmax_offset", ".self_attn.sinks"),),
    "fuyu": (*_COMPOSITE, (r"^vision_embed_tokens\.", "model.vision_embed_tokens.")),
    "gte": (
        (r"^new\.", ""),
        (r"^encoder\.layer\.", "layers."),
        (r"\.attention\.", ".self_attn."),
        (r"\.attn_ln\.", ".post_attention_layernorm."),
        (r"\.mlp_ln\.", ".post_mlp_layernorm."),
        (r"^lm_head\.norm\.", "lm_head.layer_norm."),
    ),
    "hy_v3": (
        (r"\.mlp\.router\.gate\.", ".mlp.gate."),
        (r"\.mlp\.expert_bias", ".mlp.e_score_correction_bias"),
        (r"\.mlp\.shared_mlp\.", ".mlp.shared_experts."),
    ),
    "hy_v4": (
        (r"\.hc_pre\.hc_", ".hc_"),
        (r"\.learnable_sink_param", ".sinks"),
        (r"\.linear_gate\b", ".gate_proj"),
        (r"\.hc_attn_layer\.hc_", ".attn_hc."),
        (r"\.hc_mlp_layer\.hc_", ".ffn_hc."),
        (r"\.hc_head_(fn|base|scale)", r".hc_\1"),
    ),
    "jina_embeddings_v3": (
        (r"^emb_ln\.", "embeddings.LayerNorm."),
        (r"^encoder\.layers\.", "layers."),
        (r"\.mixer\.out_proj\.", ".self_attn.o_proj."),
        (r"\.mixer\.Wqkv\.", ".self_attn.qkv_proj."),
        (r"\.norm1\.", ".post_attention_layernorm."),
        (r"\.norm2\.", ".post_mlp_layernorm."),
    ),
    "kimi_linear": (
        (r"\.self_attn\.(f_a_proj\.|f_b_proj\.|dt_bias|A_log)", r".self_attn.forget_gate.\1"),
        (r"\.block_sparse_moe\.", ".mlp."),
    ),
    "kolibri1": (
        (r"\.moe\.router\.expert_bias", ".mlp.gate.e_score_correction_bias"),
        (r"\.post_attn_norm\.", ".post_self_attn_layernorm."),
        (r"\.post_ffn_norm\.", ".post_mlp_layernorm."),
    ),
    "laguna": (
        (r"\.mlp\.experts\.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
        (r"\.mlp\.shared_expert\.", ".mlp.shared_experts."),
    ),
    "lfm3_vl_vision": (
        (r"^patchifier\.", "patch_embed."),
        (r"\.([qk])_layernorm\.", r".\1_norm."),
    ),
    "lw_detr": (
        (r"\.attention\.attention\.query\b", ".attention.q_proj"),
        (r"\.attention\.attention\.key\b", ".attention.k_proj"),
        (r"\.attention\.attention\.value\b", ".attention.v_proj"),
        (r"\.attention\.output\b", ".attention.o_proj"),
    ),
    "mimo_v2_flash": ((r"\.self_attn\.attention_sink_bias", ".self_attn.sinks"),),
    "nemotron_h": ((r"^backbone\.", "model."),),
    "nomic_bert": (
        (r"^emb_ln\.", "embeddings.LayerNorm."),
        (r"^encoder\.layers\.", "layers."),
        (r"\.attn\.out_proj\.", ".self_attn.o_proj."),
        (r"\.attn\.Wqkv\.", ".self_attn.qkv_proj."),
        (r"\.fc11\.", ".up_proj."),
        (r"\.fc12\.", ".gate_proj."),
        (r"\.fc2\.", ".down_proj."),
        (r"\.norm1\.", ".post_attention_layernorm."),
        (r"\.norm2\.", ".post_mlp_layernorm."),
    ),
    "olmo_hybrid": (
        (r"\.attention_layer_norm\.", ".input_layernorm."),
        (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
    ),
    "paddleocr_vl": (
        (r"^mlp_AR\.", "model.projector."),
        (r"^visual\.", "model.visual."),
        (r"^model\.(?!visual\.|projector\.|language_model\.)", "model.language_model."),
    ),
    "phimoe": ((r"\.block_sparse_moe\.gate\.", ".mlp.router."), (r"\.block_sparse_moe\.", ".mlp.")),
    "pixio": (
        (r"^encoder\.layer\.", "layers."),
        (r"\.attention\.attention\.(query|key|value)\b", r".attention.self.\1"),
        *_SELF,
        *_DENSE,
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
    ),
    "segformer": (
        (r"\bencoder\.patch_embeddings\.(\d+)\.", r"stages.\1.patch_embeddings."),
        (r"\bencoder\.block\.(\d+)\.", r"stages.\1.blocks."),
        (r"\bencoder\.layer_norm\.(\d+)\.", r"stages.\1.layer_norm."),
        *_SELF,
        (r"attention\.self\.sr\b", "attention.sequence_reduction.sequence_reduction"),
        (r"attention\.self\.layer_norm\b", "attention.sequence_reduction.layer_norm"),
        (r"attention\.output\.dense\b", "attention.o_proj"),
        (r"\bmlp\.dense([12])\b", r"mlp.fc\1"),
        (r"\blayer_norm_1\b", "layernorm_before"),
        (r"\blayer_norm_2\b", "layernorm_after"),
        (r"^decode_head\.linear_c\.", "decode_head.linear_projections."),
    ),
    "swin": (
        *_SELF,
        (r"attention\.self\.(relative_position_bias_table)", r"attention.relative_position_bias.\1"),
        *_DENSE,
    ),
    "timesfm2_5": ((r"\.ff0\.", ".fc1."), (r"\.ff1\.", ".fc2.")),
    "vibevoice_asr": (
        *_COMPOSITE,
        (r"^(acoustic_tokenizer_encoder|semantic_tokenizer_encoder|multi_modal_projector)\b", r"model.\1"),
    ),
    "video_llava": (*_COMPOSITE, (r"^(image_tower|video_tower|multi_modal_projector)\b", r"model.\1")),
    "videomae": (
        (r"\.attention\.attention\.q_bias$", ".attention.attention.query.bias"),
        (r"\.attention\.attention\.v_bias$", ".attention.attention.value.bias"),
    ),
}
TO_MEMORY |= dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid"), _GRANITE)
TO_MEMORY |= dict.fromkeys(
    ("qwen2_audio", "voxtral", "voxtral_realtime", "audioflamingo3", "glmasr", "musicflamingo"), _AUDIO
)
TO_MEMORY |= dict.fromkeys(("granite_speech", "granite_speech_plus"), _SPEECH)
TO_MEMORY |= dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), _THINKER)

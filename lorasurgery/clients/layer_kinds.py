"""Layers of known models whose kind names alone tell wrongly (transformers 5.23.0).

Written by docs/generate_layer_kinds.py. A row is a model type, a kind as PEFT sees it, and endings of paths, numbers
as `*`. They are for machines without transformers, and for dry runs; elsewhere the class itself is asked.
"""

from __future__ import annotations

from typing import cast

from lorasurgery.adapters.model_names.naming import (
    CONV1D_LEAVES,
    CONV1D_MODELS,
    is_embedding,
    is_position_table,
    is_router,
)
from lorasurgery.adapters.model_names.skeleton import LayerKind

# fmt: off
_ROWS = """
aria other multihead_attn.out_proj
aya_vision other attention.out_proj embeddings.position_embedding
canine embedding char_embeddings.HashBucketCodepointEmbedder_0 char_embeddings.HashBucketCodepointEmbedder_1
  char_embeddings.HashBucketCodepointEmbedder_2 char_embeddings.HashBucketCodepointEmbedder_3
  char_embeddings.HashBucketCodepointEmbedder_4 char_embeddings.HashBucketCodepointEmbedder_5
  char_embeddings.HashBucketCodepointEmbedder_6 char_embeddings.HashBucketCodepointEmbedder_7
clip other embeddings.position_embedding
cohere2_vision other attention.out_proj embeddings.position_embedding
cohere_asr embedding decoder.pos_emb
ctrl embedding transformer.w
deepseek_v4 other self_attn.o_a_proj
deepseek_vl other attention.out_proj embeddings.position_embedding
deepseek_vl_hybrid other attention.out_proj embeddings.position_embedding
falcon_h1 other mamba.out_proj
falcon_mamba other mixer.dt_proj mixer.out_proj mixer.x_proj
fuyu linear model.vision_embed_tokens
gemma3 other attention.out_proj embeddings.position_embedding
gemma3n_text embedding model.embed_tokens_per_layer
gemma3n_text other altup.correction_coefs
gemma4 embedding language_model.embed_tokens_per_layer
gemma4_text embedding model.embed_tokens_per_layer
git other embeddings.position_embedding
glm46v other embeddings.position_embedding
glm4v other embeddings.position_embedding
glm4v_moe other embeddings.position_embedding
granite_docling other embeddings.position_embedding
granite_speech embedding attn.rel_pos_emb
granite_speech_plus embedding attn.rel_pos_emb
ibert other embeddings.position_embeddings embeddings.token_type_embeddings embeddings.word_embeddings
  intermediate.dense output.dense self.key self.query self.value
idefics other lm_head model.embed_tokens
inkling2 linear embeddings.patch_embedding
inkling2 other language_model.embed_tokens
inkling2_text other model.embed_tokens
inkling_mm_model embedding embed_audio_tokens.embed_audio_tokens
inkling_mm_model other language_model.embed_tokens
inkling_text other model.embed_tokens
jamba other mamba.dt_proj
kosmos-2 other embeddings.position_embedding
kosmos-2.5 embedding embeddings.column_embedder embeddings.row_embedder model.segment_emb
layoutlmv3 other encoder.rel_pos_bias encoder.rel_pos_x_bias encoder.rel_pos_y_bias
lfm2_vl linear embeddings.patch_embedding
lfm2_vl other attention.out_proj embeddings.position_embedding
lilt linear layout_embeddings.box_linear_embeddings
llava other embeddings.position_embedding
llava_next other embeddings.position_embedding
llava_next_video other embeddings.position_embedding
llava_onevision other attention.out_proj embeddings.position_embedding
mamba other mixer.dt_proj mixer.out_proj mixer.x_proj
mamba2 other mixer.out_proj
markuplm embedding xpath_subs_sub_embeddings.* xpath_tag_sub_embeddings.*
metaclip_2 other embeddings.position_embedding
modernvbert other attention.out_proj embeddings.position_embedding
muse_glimmer embedding patch_embedder.position_embedding_table
muse_glimmer linear patch_embedder.patch_embedding
muse_glimmer other language_model.embed_tokens
musicgen_decoder embedding embed_tokens.*
musicgen_melody_decoder embedding embed_tokens.*
nemotron_h other mixer.out_proj
neomme other unembedding_projection
openai-gpt embedding transformer.positions_embed transformer.tokens_embed
ovis2 other model.visual_embeddings_table
paligemma other attention.out_proj embeddings.position_embedding
pegasus_x embedding encoder.embed_global
phi4_multimodal embedding relative_attention_bias_layer.bias_values
phi4_multimodal other attention.out_proj embeddings.position_embedding
pi0 other attention.out_proj embeddings.position_embedding
pix2struct embedding embeddings.column_embedder embeddings.row_embedder
prophetnet linear self_attn.relative_pos_embeddings
prophetnet other decoder.ngram_embeddings decoder.position_embeddings encoder.position_embeddings
qwen2_5_omni_thinker embedding audio_tower.audio_bos_eos_token
roc_bert embedding embeddings.pronunciation_embed embeddings.shape_embed
sew-d other encoder.rel_embeddings
shieldgemma2 other attention.out_proj embeddings.position_embedding
siglip other attention.out_proj embeddings.position_embedding
siglip2 linear embeddings.patch_embedding
siglip2 other attention.out_proj embeddings.position_embedding
speecht5 embedding embed_positions.pe_k
step3p7 other embeddings.position_embedding
t5gemma2 other attention.out_proj embeddings.position_embedding
tapas embedding embeddings.token_type_embeddings_0 embeddings.token_type_embeddings_1
  embeddings.token_type_embeddings_2 embeddings.token_type_embeddings_3 embeddings.token_type_embeddings_4
  embeddings.token_type_embeddings_5 embeddings.token_type_embeddings_6
ultravbert other attention.out_proj embeddings.position_embedding
unlimited_ocr other embeddings.position_embedding
video_llava other embeddings.position_embedding
vipllava other embeddings.position_embedding
wavlm embedding attention.rel_attn_embed
whisper embedding encoder.embed_positions
"""
# fmt: on


def ending_of(path: str, parts: int) -> str:
    """The last parts of a path, numbers as `*`.

    >>> ending_of("h.3.attn.out_proj", 2)
    'attn.out_proj'
    """
    return ".".join("*" if p.isdigit() else p for p in path.split(".")[-parts:])


KINDS: dict[str, dict[str, LayerKind]] = {}
for _row in _ROWS.replace("\n ", " ").strip().splitlines():
    _model, _kind, *_endings = _row.split()
    KINDS.setdefault(_model, {}).update(dict.fromkeys(_endings, cast(LayerKind, _kind)))


def told_by_name(path: str, model_type: str | None) -> LayerKind:
    """The kind that a path's own words tell.

    >>> [told_by_name(p, "gpt2") for p in ("transformer.wte", "h.0.attn.c_attn", "lm_head")]
    ['embedding', 'conv1d', 'linear']
    """
    if is_position_table(path) or is_router(path):
        return "other"
    if is_embedding(path):
        return "embedding"
    return "conv1d" if model_type in CONV1D_MODELS and path.rpartition(".")[2] in CONV1D_LEAVES else "linear"

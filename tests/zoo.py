"""Tiny models of many architectures, from their configs: what transformers 5 writes to disk and calls by other names."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf

TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_SEEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "image_size": 16, "patch_size": 8}  # fmt: skip
_BERT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "max_position_embeddings": 32}  # fmt: skip
_CLIP = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_SEQ = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MLA = {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "n_group": 1, "topk_group": 1}  # fmt: skip
# Every name that configs of mixtures of experts have for the same few sizes; each takes those it knows.
_TINY = {
    **TEXT, "head_dim": 8, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
    "shared_expert_intermediate_size": 40, "max_position_embeddings": 64, "image_size": 16, "patch_size": 8,
    "tie_word_embeddings": False,
}  # fmt: skip
_ROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}


def causal(model_type: str, **extra: object) -> Callable[[], torch.nn.Module]:
    """A maker of a tiny language model of any type that transformers knows."""
    return lambda: tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(model_type, **(_TINY | extra)))


def body(model_type: str, **extra: object) -> Callable[[], torch.nn.Module]:
    """The same for models without a head."""
    return lambda: tf.AutoModel.from_config(tf.AutoConfig.for_model(model_type, **(_TINY | extra)))


# fmt: off
MAKERS: dict[str, Callable[[], torch.nn.Module]] = {
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**TEXT)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**TEXT, head_dim=8)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**TEXT, head_dim=8)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**TEXT)),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)),
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**TEXT, num_local_experts=4)),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**TEXT, **_MOE, shared_expert_intermediate_size=40)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**TEXT, **_MOE, head_dim=8)),
    "deepseek_v2": lambda: tf.DeepseekV2ForCausalLM(tf.DeepseekV2Config(**(TEXT | _MLA))),
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**(TEXT | _MLA))),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**TEXT, head_dim=8, num_local_experts=4, num_experts_per_tok=2)),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**_SEEN)),
    "deit": lambda: tf.DeiTForImageClassification(tf.DeiTConfig(**_SEEN)),
    "beit": lambda: tf.BeitForImageClassification(tf.BeitConfig(**_SEEN)),
    "dinov2": lambda: tf.Dinov2Model(tf.Dinov2Config(**_SEEN)),
    "clip": lambda: tf.CLIPModel(tf.CLIPConfig(text_config=_CLIP, vision_config=_SEEN, projection_dim=16)),
    "siglip": lambda: tf.SiglipModel(tf.SiglipConfig(text_config=_CLIP, vision_config=_SEEN)),
    "llava": lambda: tf.LlavaForConditionalGeneration(tf.LlavaConfig(text_config=tf.LlamaConfig(**TEXT), vision_config=tf.CLIPVisionConfig(**_SEEN))),
    "paligemma": lambda: tf.PaliGemmaForConditionalGeneration(tf.PaliGemmaConfig(text_config=tf.GemmaConfig(**TEXT, head_dim=8).to_dict(), vision_config=tf.SiglipVisionConfig(**_SEEN).to_dict(), projection_dim=32)),
    "gemma3": lambda: tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(text_config=tf.Gemma3TextConfig(**TEXT, head_dim=8).to_dict(), vision_config=tf.SiglipVisionConfig(**_SEEN).to_dict(), mm_tokens_per_image=4)),
    "mllama": lambda: tf.MllamaForConditionalGeneration(tf.MllamaConfig(text_config={**TEXT, "cross_attention_layers": [1]}, vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4, "intermediate_size": 48, "image_size": 16, "patch_size": 8, "vision_output_dim": 64, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]})),
    "qwen2_vl": lambda: tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(text_config=TEXT | _ROPE, vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8})),
    "qwen2_5_vl": lambda: tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(text_config=TEXT | _ROPE, vision_config={"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 8})),
    "whisper": lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**_SEQ, max_source_positions=16, max_target_positions=16, num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_SEQ, max_position_embeddings=32)),
    "bert_mlm": lambda: tf.BertForMaskedLM(tf.BertConfig(**_BERT)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**_BERT)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(tf.DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=32)),
    "phimoe": causal("phimoe"),
    "minimax": causal("minimax"),
    "minimax_m2": causal("minimax_m2"),
    "olmoe": causal("olmoe"),
    "glm4_moe": causal("glm4_moe"),
    "ernie4_5_moe": causal("ernie4_5_moe"),
    "hunyuan_v1_moe": causal("hunyuan_v1_moe"),
    "hy_v3": causal("hy_v3"),
    "laguna": causal("laguna"),
    "qwen3_next": causal("qwen3_next"),
    "granitemoe": causal("granitemoe"),
    "aria_text": causal("aria_text"),
    "jamba": causal("jamba"),
    "lfm2_moe": causal("lfm2_moe", layer_types=["full_attention", "full_attention"], num_dense_layers=1),
    "nemotron_h": causal("nemotron_h", layer_types=["moe", "attention"], layers_block_type=["moe", "attention"]),
    "llama4_text": causal("llama4_text"),
    "deepseek_v4": causal("deepseek_v4"),
    "axk2": causal("axk2"),
    "bailing_hybrid": causal("bailing_hybrid"),
    "fuyu": causal("fuyu"),
    "qwen3_vl_moe": lambda: tf.Qwen3VLMoeForConditionalGeneration(tf.Qwen3VLMoeConfig(text_config=_TINY | {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}, vision_config={"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 8, "deepstack_visual_indexes": [0], "num_position_embeddings": 16})),
    "dinov3_vit": body("dinov3_vit"),
    "pixio": body("pixio"),
    "nomic_bert": body("nomic_bert"),
    "gte": body("gte"),
    "jina_embeddings_v3": body("jina_embeddings_v3"),
    "segformer": lambda: tf.SegformerForImageClassification(tf.SegformerConfig(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], num_attention_heads=[1, 2], patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=16)),
    "swin": lambda: tf.SwinForImageClassification(tf.SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2)),
    "videomae": body("videomae", num_frames=2, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=16),
}
# fmt: on
# Families whose q, k and v are one tensor on disk, so that fewer tensors change than parameters.
FUSED_ON_DISK = ("nomic_bert", "gte", "jina_embeddings_v3")
# Where each family holds its experts; most in mlp.
_PLACES = {
    "granitemoe": "block_sparse_moe",
    "jamba": "feed_forward",
    "lfm2_moe": "feed_forward",
    "nemotron_h": "mixer",
    "llama4_text": "feed_forward",
}  # fmt: skip
EXPERTS = (
    "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "phimoe", "minimax", "minimax_m2",
    "olmoe", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe", "hy_v3", "laguna", "qwen3_next", "aria_text", "deepseek_v4",
    "axk2", "bailing_hybrid", "qwen3_vl_moe", *_PLACES,
)  # fmt: skip


def parameters(name: str) -> list[str]:
    """The names of a family's fused experts, as PEFT's target_parameters wants them."""
    first = "up_proj" if name == "nemotron_h" else "gate_up_proj"
    return [f"{_PLACES.get(name, 'mlp')}.experts.{leaf}" for leaf in (first, "down_proj")]


def make(name: str) -> torch.nn.Module:
    """A tiny model of one architecture, always with the same weights."""
    torch.manual_seed(0)
    model = MAKERS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # some families begin at zero, where nothing could be told apart
            torch.nn.init.normal_(parameter, std=0.05)
    return model

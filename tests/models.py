"""Tiny models from configs: nothing is downloaded, and transformers and PEFT can judge every file."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = _SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}

MAKERS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA)),
    "qwen2-tied": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_LLAMA, tie_word_embeddings=True)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)),
    "bert": lambda: tf.BertModel(tf.BertConfig(**_SIZES, intermediate_size=48, max_position_embeddings=32)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**_SIZES, ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=32)
    ),
}
FAMILIES = tuple(MAKERS)
TOKENS = torch.arange(4, 16)[None]


def make(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A model of one family, in eval mode, always with the same weights; GPT-like biases are not left at zero."""
    torch.manual_seed(0)
    model = MAKERS[family]().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(dtype)


def save(model: torch.nn.Module, path: Path) -> Path:
    """save_pretrained, as users have it on disk."""
    model.save_pretrained(path)
    return path


def load(family: str, path: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Load a checkpoint with the family's own class."""
    return type(make(family)).from_pretrained(path, dtype=dtype).eval()


def perturb(model: torch.nn.Module, std: float = 0.02, only: str = "") -> torch.nn.Module:
    """Move every parameter (whose name holds `only`) by Gaussian noise, as a full fine-tune would."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if only in name:
            noise = std * torch.randn(parameter.shape, generator=generator)
            parameter.data += noise.to(parameter.dtype)
    return model


def outputs(model: torch.nn.Module) -> Tensor:
    """Logits, or last hidden states where there is no head."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    extra = {"decoder_input_ids": TOKENS} if inner.config.model_type == "t5" else {}
    with torch.no_grad():
        found = model(input_ids=TOKENS, **extra)
    return found.logits if "logits" in found else found.last_hidden_state


def peft_adapter(family: str, path: Path, std: float = 0.1, seed: int = 1, **config: object) -> PeftModel:
    """A PEFT model with random factors, biases and saved modules, saved to `path`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(make(family), LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = std * torch.randn(parameter.shape, generator=generator)
        elif "modules_to_save" in name or (parameter.requires_grad and name.endswith("bias")):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(path, save_embedding_layers=False)
    return model


def peft_deltas(family: str, path: Path) -> dict[str, Tensor]:
    """ΔW of every module as PEFT computes it after loading the folder, in the orientation of the weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing.*")  # a key that PEFT does not find is not a result
        model = PeftModel.from_pretrained(make(family), path)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference over all modules; a module that one side lacks counts as zero there."""
    worst = 0.0
    for name in found.keys() | expected.keys():
        one, two = found.get(name, torch.zeros(())), expected.get(name, torch.zeros(()))
        worst = max(worst, float((one - two).norm() / max(float(two.norm()), 1e-12)))
    return worst

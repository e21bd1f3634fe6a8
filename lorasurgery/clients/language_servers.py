"""What the servers of language models reject, get wrong or drop: vLLM 0.33.0, SGLang 0.5.23, llama.cpp's converter."""

from __future__ import annotations

from collections.abc import Iterator

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.model_names.naming import BaseNames, is_head
from lorasurgery.adapters.peft.read import PREFIX
from lorasurgery.clients.client import HEADS
from lorasurgery.clients.issue import MERGE, PORTABLE, UNDONE, Issue, Rule, Setting, briefly
from lorasurgery.clients.peft_load import INITS, is_folder, named_keys

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def _folder(adapter: Adapter, setting: Setting) -> Iterator[Issue]:
    yield from is_folder(adapter, setting)
    if adapter.members:
        yield Issue("rejected", "several PEFT folders, one for each part of an image model", MERGE)


def _dora(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    if any(d.magnitude for d in adapter.deltas.values()):
        yield Issue("rejected", "DoRA", f"{MERGE}; or, nearly the same, {UNDONE}")


def _kinds(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """Layers that are no linear layer or embedding of their own."""
    odd = [p for p, d in adapter.deltas.items() if d.merge_only or d.kernel]
    if adapter.tokens:
        yield Issue("rejected", f"single rows that are replaced ({briefly(list(adapter.tokens))})", MERGE)
    if odd:
        yield Issue("rejected", f"fused experts, attention wrappers or convolutions ({briefly(odd)})", MERGE)


def _vllm_config(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """PEFTHelper.from_dict, _validate_features and validate_legal."""
    config = adapter.config
    for key in ("r", "lora_alpha", "target_modules"):
        if adapter.format == "peft" and not adapter.members and key not in config:
            yield Issue("rejected", f"adapter_config.json has no {key}", PORTABLE)
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        yield Issue("rejected", "trained biases", MERGE)
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in INITS:
        yield Issue("rejected", f"init_lora_weights is {init!r}, expected true", PORTABLE)


def _vllm_whole(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """Tensors stored whole: parse_fine_tuned_lora_name, is_base_embedding_weights, from_lora_tensors."""
    keys = list(adapter.replaced.values()) if adapter.format == "peft" else []
    copies = [k for k in keys if k.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight"))]
    other = [k for k in keys if k not in copies and k.rpartition(".")[0].rpartition(".")[2] not in HEADS]
    if copies:
        yield Issue("dropped", f"{briefly(copies)} is skipped: the base's own is used", MERGE)
    if other:
        yield Issue("rejected", f"{briefly(other)} is stored whole; only score and classifier may be", MERGE)


def _vllm_rank(adapter: Adapter, setting: Setting) -> Iterator[Issue]:
    """The largest of r and rank_pattern must fit, whatever the tensors are."""
    if adapter.format != "peft":
        return
    named = [adapter.config.get("r") or 0, *(adapter.config.get("rank_pattern") or {}).values()]
    top, allowed = max(*named, *(d.rank for d in adapter.deltas.values()), 0), setting.max_lora_rank or 16
    if top <= allowed:
        return
    fitting = next((r for r in VLLM_RANKS if r >= top), None)
    mend = f"start vLLM with --max-lora-rank {fitting}, or " if fitting else ""
    rerank = f"lorasurgery rerank {{path}} -o OUT --rank {allowed if fitting else VLLM_RANKS[-1]}"
    yield Issue("rejected", f"rank {top} is above max_lora_rank {allowed}", mend + rerank)


def _compiled(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """A prefix that no module of the server has: the adapter is taken and the base is served."""
    keys = [k for k in adapter.weights.tensors if k.removeprefix(PREFIX).startswith("_orig_mod.")]
    if keys:
        yield Issue("dropped", f"keys of a compiled model ({briefly(keys)}): the base model is served", PORTABLE)


def _named(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    keys = named_keys(adapter) if adapter.format == "peft" else []
    if keys:
        yield Issue("rejected", f"keys that carry the adapter's name ({briefly(keys)})", PORTABLE)


def _sglang(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    config = adapter.config
    if config.get("use_rslora"):
        yield Issue("wrong", "use_rslora is ignored, so the update is √r too small", PORTABLE)
    if isinstance(config.get("target_modules"), str) and config["target_modules"] not in ("all", "all-linear"):
        yield Issue("rejected", "target_modules is a regular expression, not a list", PORTABLE)
    leaves = {p.rpartition(".")[2] for p in adapter.deltas}
    if "q_proj" in leaves and "v_proj" not in leaves:
        yield Issue("rejected", "q_proj is adapted without v_proj", MERGE)
    if (adapter.folder / "added_tokens.json").exists() and adapter.format == "peft":
        yield Issue("rejected", "added_tokens.json: tokens that the base's vocabulary may lack", MERGE)
    if adapter.replaced or adapter.tokens or adapter.diffs:
        yield Issue("dropped", "tensors stored whole are not looked at", MERGE)


def _sglang_ranks(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    if adapter.format == "peft" and any(d.rank != adapter.config.get("r", 8) for d in adapter.deltas.values()):
        yield Issue("rejected", "ranks differ from r (rank_pattern is ignored)", PORTABLE)


def _one_alpha(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    if adapter.format == "peft" and any(
        d.alpha != adapter.config.get("lora_alpha", 8) for d in adapter.deltas.values()
    ):
        yield Issue("wrong", "alphas differ from lora_alpha, the only one that is read", PORTABLE)


def _llama_cpp(adapter: Adapter, setting: Setting) -> Iterator[Issue]:
    """get_tensors exits at what is not a lora_A or lora_B; norms pass and are then skipped by the loader."""
    if adapter.format != "peft":
        return
    if adapter.config.get("use_rslora"):
        yield Issue("wrong", "use_rslora is ignored, so the update is √r too small", PORTABLE)
    keys = list(adapter.replaced.values())
    skipped = [k for k in keys if ".base_layer.weight" in k or "_layernorm" in k or ".norm" in k]
    if skipped:
        yield Issue("dropped", f"{briefly(skipped)} is stored whole and skipped", MERGE)
    if len(skipped) < len(keys):
        yield Issue("rejected", f"{briefly([k for k in keys if k not in skipped])} is stored whole: it exits", MERGE)
    if any(d.bias for d in adapter.deltas.values()):
        yield Issue("rejected", "biases of the factors (lora_bias): the converter exits", MERGE)


def _llama_cpp_head(adapter: Adapter, setting: Setting) -> Iterator[Issue]:
    """A head that shares the embedding's tensor is no tensor of its own in GGUF."""
    if setting.base is None:
        return
    names = BaseNames(setting.base.tensors, setting.base.config, str(setting.base.path))
    tied = [p for p in adapter.deltas if is_head(p) and names.tied_source(p)]
    if tied:
        yield Issue("rejected", f"{tied[0]} is tied to the embedding in this base: the converter exits", MERGE)


VLLM: tuple[Rule, ...] = (_folder, _dora, _kinds, _vllm_config, _vllm_whole, _vllm_rank, _compiled, _named)
SGLANG: tuple[Rule, ...] = (_folder, _dora, _kinds, _sglang, _sglang_ranks, _one_alpha, _compiled)
LLAMA_CPP: tuple[Rule, ...] = (_folder, _dora, _kinds, _llama_cpp, _one_alpha, _llama_cpp_head, _named)

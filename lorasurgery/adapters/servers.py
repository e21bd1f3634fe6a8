"""What each program that serves adapters rejects, gets wrong or drops; versions are in docs/formats.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.peft import PREFIX

Verdict = Literal["rejected", "wrong", "dropped"]
SERVERS = ("peft", "vllm", "sglang", "llama.cpp")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_UNIFORM = "lorasurgery rerank {path} -o OUT --uniform-rank"
_MERGE = "lorasurgery merge BASE {path} -o OUT, and serve the merged model"


@dataclass(frozen=True)
class Finding:
    """One thing that would not work as meant.

    Args:
        verdict: `rejected` with an error, `wrong` results without one, or `dropped` without a word.
        what: What it is, in a few words. mend: The command or the setting that helps.
    """

    verdict: Verdict
    what: str
    mend: str


def findings(adapter: Adapter, server: str, *, max_lora_rank: int | None = None) -> list[Finding]:
    """Everything about an adapter that a server would not serve as it is meant; empty when all is well."""
    rules: dict[str, tuple[Callable[..., Iterator[Finding]], ...]] = {
        "peft": (),
        "vllm": (_vllm, _vllm_rank),
        "sglang": (_sglang, _flat_config),
        "llama.cpp": (_llama_cpp,),
    }
    found = [f for rule in rules[server] for f in rule(adapter, max_lora_rank)]
    return [Finding(f.verdict, f.what, f.mend.format(path=adapter.path)) for f in found]


def _vllm(adapter: Adapter, _: int | None) -> Iterator[Finding]:
    config = adapter.config
    yield from _dora(adapter)
    for key in ("r", "lora_alpha", "target_modules"):
        if not config.get(key):
            yield Finding("rejected", f"adapter_config.json has no {key}", _UNIFORM)
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        yield Finding("rejected", "trained biases", _MERGE)
    init = config.get("init_lora_weights", True)
    if isinstance(init, str):
        yield Finding("rejected", f"init_lora_weights is {init!r}, expected true", _UNIFORM)
    if any(not k.startswith(PREFIX) for k in adapter.weights.tensors):
        yield Finding("dropped", f"keys without {PREFIX}: vLLM serves the base model instead", _UNIFORM)
    for name in adapter.replaced:
        if name.rpartition(".")[0].rpartition(".")[2] not in ("score", "classifier"):
            yield Finding("rejected", f"{name} is stored whole; only score and classifier may be", _MERGE)
            break
    if adapter.tokens or any(d.experts or d.wrapped or d.kernel for d in adapter.deltas.values()):
        yield Finding("rejected", "single rows, fused experts, attention wrappers or convolutions", _MERGE)


def _vllm_rank(adapter: Adapter, limit: int | None) -> Iterator[Finding]:
    top, allowed = max((d.rank for d in adapter.deltas.values()), default=0), limit or 16
    if top <= allowed:
        return
    fitting = next((r for r in VLLM_RANKS if r >= top), None)
    mend = f"start vLLM with --max-lora-rank {fitting}, or " if fitting else ""
    rerank = f"lorasurgery rerank {{path}} -o OUT --rank {allowed if fitting else VLLM_RANKS[-1]}"
    yield Finding("rejected", f"rank {top} is above max_lora_rank {allowed}", mend + rerank)


def _sglang(adapter: Adapter, _: int | None) -> Iterator[Finding]:
    yield from _dora(adapter)
    if adapter.config.get("use_rslora"):
        yield Finding("wrong", "use_rslora is ignored, so the update is √r too small", _UNIFORM)
    if isinstance(adapter.config.get("target_modules"), str):
        yield Finding("rejected", "target_modules is a regular expression, not a list", _UNIFORM)
    leaves = {p.rpartition(".")[2] for p in adapter.deltas}
    if "q_proj" in leaves and "v_proj" not in leaves:
        yield Finding("rejected", "q_proj is adapted without v_proj", _MERGE)
    if adapter.replaced or adapter.tokens:
        yield Finding("dropped", "tensors stored whole are not looked at", _MERGE)


def _flat_config(adapter: Adapter, _: int | None) -> Iterator[Finding]:
    config = adapter.config
    if any(d.rank != config.get("r") for d in adapter.deltas.values()):
        yield Finding("rejected", "ranks differ from r (rank_pattern is ignored)", _UNIFORM)
    if any(d.alpha != config.get("lora_alpha") for d in adapter.deltas.values()):
        yield Finding("wrong", "alphas differ from lora_alpha (alpha_pattern is ignored)", _UNIFORM)


def _llama_cpp(adapter: Adapter, _: int | None) -> Iterator[Finding]:
    yield from _dora(adapter)
    if adapter.config.get("use_rslora"):
        yield Finding("wrong", "use_rslora is ignored, so the update is √r too small", _UNIFORM)
    if any(d.alpha != adapter.config.get("lora_alpha") for d in adapter.deltas.values()):
        yield Finding("wrong", "alphas differ from lora_alpha, the only one the converter reads", _UNIFORM)
    if adapter.replaced or adapter.tokens:
        yield Finding("rejected", "tensors stored whole: the converter exits", _MERGE)


def _dora(adapter: Adapter) -> Iterator[Finding]:
    if any(d.magnitude for d in adapter.deltas.values()):
        yield Finding("rejected", "DoRA", _MERGE)

"""What each program that serves adapters rejects, gets wrong or drops: the table of programs and of their rules.

Sources and versions are in docs/formats.md ("What servers take"); the rules themselves are in peft_load.py,
language_servers.py and diffusers_comfyui.py.
"""

from __future__ import annotations

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.clients import diffusers_comfyui, language_servers, peft_load
from lorasurgery.clients.issue import Issue, Rule, Setting

_RULES: dict[str, tuple[Rule, ...]] = {
    "peft": peft_load.RULES,
    "vllm": language_servers.VLLM,
    "sglang": language_servers.SGLANG,
    "llama.cpp": language_servers.LLAMA_CPP,
    "diffusers": diffusers_comfyui.DIFFUSERS,
    "comfyui": diffusers_comfyui.COMFYUI,
}
SERVERS = tuple(_RULES)


def findings(adapter: Adapter, server: str, setting: Setting | None = None) -> list[Issue]:
    """Everything about an adapter that a server would not serve as it is meant; empty when all is well.

    Args:
        server: One of SERVERS.
        setting: vLLM's max_lora_rank, and the base where it is known.
    """
    setting = setting or Setting()
    place = {"path": adapter.path, "base": str(setting.base.path) if setting.base else "BASE"}
    found = [f for rule in _RULES[server] for f in rule(adapter, setting)]
    return [Issue(f.verdict, f.what, f.mend.format(**place)) for f in found]

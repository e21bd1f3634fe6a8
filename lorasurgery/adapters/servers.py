"""What each program that serves adapters rejects, gets wrong or drops: the table of programs and of their rules.

Sources and versions are in docs/formats.md ("What servers take"); the rules themselves are in servers_peft.py,
servers_language.py and servers_image.py.
"""

from __future__ import annotations

from lorasurgery.adapters import servers_image, servers_language, servers_peft
from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.finding import Finding, Rule, Setting

_RULES: dict[str, tuple[Rule, ...]] = {
    "peft": servers_peft.RULES,
    "vllm": servers_language.VLLM,
    "sglang": servers_language.SGLANG,
    "llama.cpp": servers_language.LLAMA_CPP,
    "diffusers": servers_image.DIFFUSERS,
    "comfyui": servers_image.COMFYUI,
}
SERVERS = tuple(_RULES)


def findings(adapter: Adapter, server: str, setting: Setting | None = None) -> list[Finding]:
    """Everything about an adapter that a server would not serve as it is meant; empty when all is well.

    Args:
        server: One of SERVERS. setting: vLLM's max_lora_rank, and the base where it is known.
    """
    setting = setting or Setting()
    place = {"path": adapter.path, "base": str(setting.base.path) if setting.base else "BASE"}
    found = [f for rule in _RULES[server] for f in rule(adapter, setting)]
    return [Finding(f.verdict, f.what, f.mend.format(**place)) for f in found]

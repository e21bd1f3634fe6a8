"""What each program takes of an adapter: kinds of change as factors, tensors stored whole, and in which file.

extract leaves out what a client would not take; `servers` says what it makes of a file that has it all the same. Facts
and versions are in docs/formats.md ("What servers take").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorasurgery.errors import UsageError

HEADS = ("score", "classifier")  # what vLLM alone of the servers takes whole


@dataclass(frozen=True)
class Client:
    """One program.

    Args:
        factors: Kinds of change that it takes as A and B.
        whole: Which tensors it takes whole: any, a classifier's head, or none.
        one_rank: Whether every module must have the same rank.
        file: The format of its one file; empty for PEFT's folder.
    """

    name: str
    factors: frozenset[str]
    whole: Literal["any", "heads", "none"] = "none"
    one_rank: bool = False
    file: Literal["", "diffusers", "comfyui", "kohya"] = ""

    def takes_whole(self, path: str) -> bool:
        """Whether a module may be stored whole."""
        return self.whole == "any" or (self.whole == "heads" and path.rpartition(".")[2] in HEADS)


_ALL = frozenset(("linear", "conv1d", "embedding", "conv", "experts"))
_LAYERS = frozenset(("linear", "conv1d"))
_IMAGE = frozenset(("linear", "conv"))
CLIENTS = {
    client.name: client
    for client in (
        Client("peft", _ALL, "any"),
        Client("vllm", _LAYERS, "heads"),
        Client("sglang", _LAYERS, one_rank=True),
        Client("llama.cpp", _LAYERS, one_rank=True),
        Client("diffusers", _IMAGE, file="diffusers"),
        Client("comfyui", _IMAGE, "any", file="comfyui"),
        Client("kohya", _IMAGE, "any", file="kohya"),
    )
}


def client_named(name: str) -> Client:
    """The client of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in CLIENTS:
        raise UsageError(f"--for {name}: expected one of {', '.join(CLIENTS)}")
    return CLIENTS[name]

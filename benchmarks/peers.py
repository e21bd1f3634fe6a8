"""How others merge, blend and resize, written from their descriptions; never imported by lorasurgery.

python -m benchmarks.peers merge BASE ADAPTER OUT                      PEFT: load, merge_and_unload, save
python -m benchmarks.peers blend A B OUT HIDDEN INNER LAYERS RANK      PEFT: add_weighted_adapter, svd
python -m benchmarks.peers resize A OUT RANK [LOWRANK]                 sd-scripts' algorithm on PEFT's keys
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from lorasurgery.lowrank import LowRank

WEIGHTS = "adapter_model.safetensors"


def dense_resize(up: Tensor, down: Tensor, scale: float, rank: int, *, lowrank: bool = False) -> tuple[Tensor, Tensor]:
    """Form the dense product, then torch.linalg.svd, or svd_lowrank with q = 2·rank and niter 2 (sd-scripts #2240)."""
    dense = scale * (up @ down)
    if lowrank:
        u, s, v = torch.svd_lowrank(dense, q=2 * rank, niter=2)
        vt = v.mT
    else:
        u, s, vt = torch.linalg.svd(dense)
    return u[:, :rank] @ torch.diag(s[:rank]), vt[:rank]


class PeftLayer:
    """A model of one linear layer that holds the factors as PEFT adapters a0, a1 …, with scale 1."""

    def __init__(self, terms: Sequence[LowRank], device: str) -> None:
        from peft import LoraConfig, get_peft_model

        (out, into), rank = terms[0].shape, terms[0].rank
        linear = torch.nn.utils.skip_init(torch.nn.Linear, into, out, bias=False, device=device)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])
        self.model: Any = get_peft_model(torch.nn.Sequential(OrderedDict(layer=linear)), config, adapter_name="a0")
        self.layer = self.model.base_model.model.layer
        for i, term in enumerate(terms):
            if i:
                self.model.add_adapter(f"a{i}", config)
            self.layer.lora_B[f"a{i}"].weight.data = term.up.clone()
            self.layer.lora_A[f"a{i}"].weight.data = term.down.clone()

    def blend(self, weights: list[float], rank: int) -> tuple[Tensor, Tensor]:
        """Run add_weighted_adapter with its default combination."""
        names = [f"a{i}" for i in range(len(weights))]
        if "mixed" in self.model.peft_config:  # otherwise PEFT keeps the existing one
            self.model.delete_adapter("mixed")
        self.model.add_weighted_adapter(names, weights, "mixed", combination_type="svd", svd_rank=rank)
        return self.layer.lora_B["mixed"].weight, self.layer.lora_A["mixed"].weight


def _merge(base: str, adapter: str, out: str) -> None:
    """Do what a PEFT user does: load the model and the adapter, merge, save."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


def _blend(a: str, b: str, out: str, hidden: str, inner: str, layers: str, rank: str) -> None:
    """Do what a PEFT user does: build the model, load both adapters, combine, save."""
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=int(hidden), intermediate_size=int(inner), num_hidden_layers=int(layers), vocab_size=1024,
        num_attention_heads=16, num_key_value_heads=16,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")  # its weights are never read, so they need not be initialized
    both = PeftModel.from_pretrained(model, a, adapter_name="a")
    both.load_adapter(b, "b")
    both.add_weighted_adapter(["a", "b"], [0.7, 0.3], "mixed", combination_type="svd", svd_rank=int(rank))
    both.save_pretrained(out, selected_adapters=["mixed"])


def _resize(a: str, out: str, rank: str, lowrank: str = "") -> None:
    config = json.loads((Path(a) / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    tensors, done = load_file(Path(a) / WEIGHTS), {}
    for name in [n for n in tensors if n.endswith("lora_A.weight")]:
        other = name.replace("lora_A", "lora_B")
        up, down = dense_resize(tensors[other].float(), tensors[name].float(), scale, int(rank), lowrank=bool(lowrank))
        done[name], done[other] = down.contiguous().to(tensors[name].dtype), up.contiguous().to(tensors[name].dtype)
    Path(out).mkdir(parents=True, exist_ok=True)
    save_file(done, Path(out) / WEIGHTS, {"format": "pt"})
    (Path(out) / "adapter_config.json").write_text(json.dumps(config | {"r": int(rank), "lora_alpha": int(rank)}))


if __name__ == "__main__":
    {"merge": _merge, "blend": _blend, "resize": _resize}[sys.argv[1]](*sys.argv[2:])

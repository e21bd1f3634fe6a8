"""Rows of the table whose oracle is LyCORIS: its own modules make the files and the merged weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from lycoris.modules import FullModule, LoConModule, LohaModule, LokrModule, NormModule
from lycoris.modules.base import LycorisBaseModule
from rows import Made, Row, Weights
from safetensors.torch import save_file
from torch import Tensor, nn

ORACLE = f"lycoris-lora {version('lycoris-lora')}"
# kind of layer -> how it is made, its name in the original SD checkpoint, and in a LoRA file
_ATTENTION, _RESNET = "input_blocks.1.1.transformer_blocks.0", "input_blocks.1.0"
LAYERS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "linear": (lambda: nn.Linear(24, 16), f"{_ATTENTION}.attn1.to_out.0",
               "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"),
    "square": (lambda: nn.Linear(16, 16), f"{_ATTENTION}.attn1.to_q",
               "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"),
    "conv 3×3": (lambda: nn.Conv2d(8, 16, 3), f"{_RESNET}.in_layers.2", "lora_unet_down_blocks_0_resnets_0_conv1"),
    "conv 1×1": (lambda: nn.Conv2d(8, 16, 1), "input_blocks.1.1.proj_in", "lora_unet_down_blocks_0_attentions_0_proj_in"),
    "LayerNorm": (lambda: nn.LayerNorm(16), f"{_ATTENTION}.norm1",
                  "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm1"),
    "GroupNorm": (lambda: nn.GroupNorm(4, 16), "input_blocks.1.1.norm", "lora_unet_down_blocks_0_attentions_0_norm"),
}  # fmt: skip
PREFIX = "model.diffusion_model."


def random_(tensors: list[Tensor], dtype: torch.dtype, std: float = 0.3, seed: int = 1) -> None:
    """Fill float64 tensors with noise that `dtype` holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    for t in tensors:
        t.data = (std * torch.randn(t.shape, generator=generator)).to(dtype).to(torch.float64)


def layer(kind: str, dtype: torch.dtype) -> nn.Module:
    """One layer in float64 whose values the base's dtype holds exactly."""
    found = LAYERS[kind][0]().double()
    random_(list(found.parameters()), dtype, seed=2)
    return found


def module(
    cls: type[LycorisBaseModule], base: nn.Module, dtype: torch.dtype, rank: int = 4, alpha: float = 2.0,
    whole_w2: bool = False, **options: object,
) -> LycorisBaseModule:  # fmt: skip
    """LyCORIS's module on a layer, with random values in place of what it begins with.

    Args:
        whole_w2: Of a LoKr, w2 in one piece though w1 is factored, which LyCORIS reads but seldom makes.
    """
    found = cls("name", base, lora_dim=rank, alpha=alpha, **options).double()
    if whole_w2:
        found.use_w2, shape = True, (found.lokr_w2_a.shape[0], found.lokr_w2_b.shape[1])
        found.lokr_w2 = nn.Parameter(torch.empty(shape, dtype=torch.float64))
    scales = [p for n, p in found.named_parameters() if n == "dora_scale"]
    random_(
        [p for n, p in found.named_parameters() if n != "dora_scale"], dtype, std=0.3 if cls is LoConModule else 0.7
    )
    for p in scales:
        factor = 1 + 0.3 * torch.rand(p.shape, generator=torch.Generator().manual_seed(4))
        p.data = (p * factor).to(dtype).to(torch.float64)
    return found


def save(path: Path, kind: str, base: nn.Module, parts: Weights, adapter: torch.dtype, stored: torch.dtype) -> Made:
    """Write a single-file checkpoint with a layer beside others, and the adapter with LyCORIS's keys."""
    _, name, key = LAYERS[kind]
    weights = {f"{PREFIX}{n}.{leaf}": t for k, (_, n, _) in LAYERS.items()
               for leaf, t in (base if k == kind else layer(k, stored)).state_dict().items()}  # fmt: skip
    save_file({k: v.to(stored).contiguous() for k, v in weights.items()}, path / "base.safetensors")
    found = {f"{key}.{part}": t.detach().to(adapter).contiguous() for part, t in parts.items()}
    save_file(found, path / "adapter.safetensors", {"ss_network_module": "lycoris.kohya"})
    return Made(path / "base.safetensors", path / "adapter.safetensors", {f"{PREFIX}{name}.weight": torch.empty(0)})


def merged(made: LycorisBaseModule, strength: float) -> tuple[Tensor, Tensor | None]:
    """The weight that LyCORIS runs with.

    LoHa's and LoKr's get_diff_weight multiplies by the scale twice (4.1.3), which forward does not; what was trained is
    what forward does.
    """
    if not isinstance(made, (LohaModule, LokrModule)):
        return made.get_merged_weight(strength)
    weight, delta = made.org_weight, made.get_weight(made.org_weight.shape)
    if made.wd:
        return made.apply_weight_decompose(weight + delta, strength), None
    return weight + strength * delta, None


def row_of(
    cls: type[LycorisBaseModule], kind: str, options: dict[str, object], strength: float,
    path: Path, adapter: torch.dtype, stored: torch.dtype,
) -> Made:  # fmt: skip
    """Make one row's files from a LyCORIS module."""
    base = layer(kind, stored)
    made = module(cls, base, adapter, **options)  # type: ignore[arg-type]
    parts = dict(made.state_dict())
    if isinstance(made, FullModule):  # before it is applied to a layer, its state_dict() subtracts a weight too many
        parts = {"diff": made.weight, "diff_b": made.bias}
    files = save(path, kind, base, parts, adapter, stored)
    with torch.no_grad():
        weight, bias = merged(made, strength)
    name = f"{PREFIX}{LAYERS[kind][1]}"
    expected = {f"{name}.weight": weight.detach()} | ({} if bias is None else {f"{name}.bias": bias.detach()})
    return Made(files.base, files.adapter, expected)


def replacing(path: Path, adapter: torch.dtype, stored: torch.dtype) -> Made:
    """ComfyUI's set_weight: the tensor itself."""
    base, new = layer("linear", stored), torch.empty(16, 24, dtype=torch.float64)
    random_([new], adapter, seed=3)
    files = save(path, "linear", base, {"set_weight": new}, adapter, stored)
    return Made(files.base, files.adapter, {f"{PREFIX}{LAYERS['linear'][1]}.weight": new})


_PAIRS = [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")]
_CASES: list[tuple[str, type[LycorisBaseModule], str, dict[str, object], list[tuple[str, str]]]] = [
    ("LoCon", LoConModule, "linear", {}, [*_PAIRS, ("float16", "float16"), ("float32", "float8_e4m3fn")]),
    ("LoCon", LoConModule, "conv 3×3", {}, _PAIRS),
    ("LoCon", LoConModule, "conv 1×1", {}, _PAIRS[:1]),
    ("LoCon, Tucker", LoConModule, "conv 3×3", {"use_tucker": True}, _PAIRS),
    ("LoCon, rsLoRA", LoConModule, "linear", {"rs_lora": True}, _PAIRS[:1]),
    ("LoHa", LohaModule, "linear", {}, _PAIRS),
    ("LoHa", LohaModule, "conv 3×3", {}, _PAIRS[:1]),
    ("LoHa, Tucker", LohaModule, "conv 3×3", {"use_tucker": True}, _PAIRS[:2]),
    ("LoHa, rsLoRA", LohaModule, "linear", {"rs_lora": True}, _PAIRS[:1]),
    ("LoKr, w1 and w2", LokrModule, "linear", {"factor": 4, "full_matrix": True}, _PAIRS),
    ("LoKr, w1 and w2_a·w2_b", LokrModule, "linear", {"factor": 2, "rank": 2, "alpha": 1.0}, _PAIRS[:2]),
    ("LoKr, w1_a·w1_b and w2", LokrModule, "linear", {"factor": 4, "rank": 1, "alpha": 0.5, "decompose_both": True,
     "whole_w2": True}, _PAIRS[:1]),
    ("LoKr, both factored", LokrModule, "linear", {"factor": 4, "rank": 1, "alpha": 0.5, "decompose_both": True},
     _PAIRS[:1]),
    ("LoKr, w1 and w2", LokrModule, "conv 3×3", {"factor": 4, "full_matrix": True}, _PAIRS[:1]),
    ("LoKr, w1 and w2_a·w2_b", LokrModule, "conv 3×3", {"factor": 2, "rank": 1, "alpha": 0.5}, _PAIRS[:1]),
    ("LoKr, Tucker", LokrModule, "conv 3×3", {"factor": 2, "rank": 1, "alpha": 0.5, "use_tucker": True}, _PAIRS[:2]),
    ("full difference", FullModule, "linear", {}, _PAIRS[:2]),
    ("full difference", FullModule, "conv 3×3", {}, _PAIRS[:1]),
    ("norms", NormModule, "LayerNorm", {}, _PAIRS[:2]),
    ("norms", NormModule, "GroupNorm", {}, _PAIRS[:1]),
    ("LyCORIS DoRA by output", LoConModule, "square", {"weight_decompose": True}, _PAIRS),
    ("LyCORIS DoRA by input", LoConModule, "square", {"weight_decompose": True, "wd_on_out": False}, _PAIRS[:1]),
    ("LyCORIS DoRA by output", LoConModule, "conv 3×3", {"weight_decompose": True}, _PAIRS[:1]),
    ("LyCORIS DoRA by input", LoConModule, "conv 3×3", {"weight_decompose": True, "wd_on_out": False}, _PAIRS[:1]),
    ("LoHa with DoRA", LohaModule, "conv 3×3", {"weight_decompose": True}, _PAIRS[:1]),
    ("LoKr with DoRA", LokrModule, "linear", {"factor": 4, "full_matrix": True, "weight_decompose": True}, _PAIRS[:1]),
]  # fmt: skip


def _row(family: str, cls: type[LycorisBaseModule], kind: str, options: dict[str, object], pair: tuple[str, str],
         strength: float = 1.0) -> Row:  # fmt: skip
    make = partial(row_of, cls, kind, options, strength)
    return Row(family, "linear" if kind == "square" else kind, ORACLE, make, *pair, strength)


ROWS = [_row(family, cls, kind, options, pair) for family, cls, kind, options, pairs in _CASES for pair in pairs]
ROWS += [_row(family, cls, kind, options, ("float32", "float32"), 0.5) for family, cls, kind, options, _ in _CASES
         if "weight_decompose" in options or kind == "LayerNorm"]  # fmt: skip
ROWS += [Row("set_weight", "linear", "the tensor itself", replacing)]

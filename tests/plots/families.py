"""Names of the modules of well-known networks, and reports over them with made-up numbers, always the same."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

from lorasurgery.report import Change, Comparison, ModuleReport, Report, Spectrum

_LLAMA = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{x}_proj" for x in "koqv"))
_BERT = (*(f"attention.self.{x}" for x in ("key", "query", "value")), "attention.output.dense", "intermediate.dense", "output.dense")  # fmt: skip
_BLOCK = (
    *(f"{attn}.{leaf}" for attn in ("attn1", "attn2") for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj", "ff.net.2",
)  # fmt: skip


def llama(layers: int) -> list[str]:
    return [f"model.layers.{i}.{kind}" for i in range(layers) for kind in _LLAMA]


def bert() -> list[str]:
    outside = [f"embeddings.{x}_embeddings" for x in ("position", "token_type", "word")] + ["pooler.dense"]
    return [*outside, *(f"encoder.layer.{i}.{kind}" for i in range(6) for kind in _BERT)]


def bert_tensors() -> list[str]:
    """With biases and norms, as diff of two checkpoints names them."""
    norms = [f"{place}.LayerNorm.{leaf}" for place in ("attention.output", "output") for leaf in ("weight", "bias")]
    layers = [f"encoder.layer.{i}.{kind}" for i in range(6) for kind in (*norms, *_BERT, *(f"{k}.bias" for k in _BERT))]
    return [*bert()[:4], "embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias", "pooler.dense.bias", *layers]


def t5(layers: int) -> list[str]:
    found = [f"decoder.block.{i}.layer.{n}.{a}.{x}" for i in range(layers) for n, a in enumerate(("SelfAttention", "EncDecAttention")) for x in "koqv"]  # fmt: skip
    found += [f"encoder.block.{i}.layer.0.SelfAttention.{x}" for i in range(layers) for x in "koqv"]
    for stack, n in (("decoder", 2), ("encoder", 1)):
        found += [f"{stack}.block.{i}.layer.{n}.DenseReluDense.{x}" for i in range(layers) for x in ("wi", "wo")]
    return [*found, "lm_head", "shared"]


def gpt2() -> list[str]:
    return [f"h.{i}.{kind}" for i in range(12) for kind in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


def mixture(layers: int, experts: int) -> list[str]:
    kinds = [*(f"self_attn.{x}_proj" for x in "koqv"), *(f"mlp.experts.{e}.w{w}" for e in range(experts) for w in (1, 2, 3))]  # fmt: skip
    return [f"model.layers.{i}.{kind}" for i in range(layers) for kind in kinds]


def sdxl() -> list[str]:
    """The 794 linear layers and convolutions of Stable Diffusion XL's U-Net, as diffusers names them."""
    found = ["conv_in", "conv_out", *(f"{x}_embedding.linear_{i}" for x in ("time", "add") for i in (1, 2))]
    for block, depth in enumerate((0, 2, 10)):
        place = f"down_blocks.{block}"
        found += _unet_block(place, resnets=2, depth=depth, shortcuts=range(1) if block else ())
        found += [f"{place}.downsamplers.0.conv"] if block < 2 else []
    found += _unet_block("mid_block", resnets=2, attentions=1, depth=10)
    for block, depth in enumerate((10, 2, 0)):
        place = f"up_blocks.{block}"
        found += _unet_block(place, resnets=3, depth=depth, shortcuts=range(3))
        found += [f"{place}.upsamplers.0.conv"] if block < 2 else []
    return found


def _unet_block(place: str, resnets: int, depth: int, attentions: int = 0, shortcuts: Iterable[int] = ()) -> list[str]:
    found = [f"{place}.resnets.{r}.{leaf}" for r in range(resnets) for leaf in ("conv1", "time_emb_proj", "conv2")]
    found += [f"{place}.resnets.{r}.conv_shortcut" for r in shortcuts]
    for a in range((attentions or resnets) if depth else 0):
        found += [f"{place}.attentions.{a}.{leaf}" for leaf in ("proj_in", "proj_out")]
        found += [f"{place}.attentions.{a}.transformer_blocks.{d}.{k}" for d in range(depth) for k in _BLOCK]
    return found


def extracted(names: Iterable[str], *, ranks: bool = False) -> Report:
    """As extract reports it; with `ranks` they differ."""
    rng = random.Random(0)
    modules = [
        ModuleReport(n, (64, 32), rank=rng.randint(1, 99) if ranks else 16, delta_norm=rng.lognormvariate(-1, 0.7),
                     error=rng.uniform(0.1, 0.9))
        for n in names
    ]  # fmt: skip
    return Report(
        "extract", ["base", "tuned"], "out", modules=modules, totals={"error": 0.5, "adapter_bytes": 4_800_000}
    )


def spectra(names: Iterable[str], rank: int = 16) -> Report:
    """As inspect --spectrum reports it."""
    rng, modules = random.Random(0), []
    for name in names:
        fall = rng.uniform(0.3, 1.2)
        values = [rng.uniform(1.0, 1.01) * (i + 1) ** -fall for i in range(rank)]
        values.sort(reverse=True)
        modules.append(Spectrum(name, (64, 32), rank=rank, delta_norm=math.hypot(*values), singular_values=values))
    return Report("inspect", ["adapter"], "", modules=modules, totals={"dtypes": ["BF16"]})


def compared(names: Iterable[str]) -> Report:
    """As diff reports two adapters; every seventh module is in one of them only."""
    rng, modules = random.Random(0), []
    for i, name in enumerate(names):
        both = i % 7 != 3
        cosine, overlap = (rng.gauss(0, 0.3), rng.random()) if both else (None, None)
        modules.append(Comparison(name, (64, 32), norm_a=1.0, norm_b=float(both), cosine=cosine, overlap=overlap))
    return Report("diff", ["style", "topic"], "", modules=modules, totals={"chance": 0.12})


def changed(names: Iterable[str]) -> Report:
    """As diff reports two checkpoints; every seventh tensor is the same in both, every eleventh of another shape."""
    rng, modules = random.Random(0), []
    for i, name in enumerate(names):
        delta = None if i % 11 == 5 else 0.0 if i % 7 == 3 else rng.lognormvariate(-1, 1)
        modules.append(
            Change(name, (64, 32), delta_norm=delta, norm=50.0, relative=None if delta is None else delta / 50)
        )
    return Report("diff", ["base", "tuned"], "", modules=modules)

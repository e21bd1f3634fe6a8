"""A Llama-shaped pair of checkpoints: a random base, and the base plus an update with a decaying spectrum."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.adapters import llama_modules
from benchmarks.streams import Shapes, Writer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIGNAL_RANK = 128
NOISE = 0.28  # of the signal's norm, spread over all directions, as after rounding and long training
STRENGTH = 0.03  # ‖ΔW‖/‖W‖
ORIGINALS = 2  # layers with their own numbers; the others are these, rolled along both axes


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-shaped model."""

    hidden: int = 4096
    inner: int = 11008
    layers: int = 2
    vocab: int = 8192

    @property
    def name(self) -> str:
        """Return a folder name that states the sizes."""
        return f"bench-llama-{self.hidden}x{self.inner}x{self.layers}-{self.vocab}"

    def tensors(self) -> Shapes:
        """Return the shape of each tensor, in the order of the files."""
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for path, out, into in llama_modules(self.hidden, self.inner, self.layers):
            shapes[f"{path}.weight"] = (out, into)
        for i in range(self.layers):
            shapes |= {f"model.layers.{i}.{n}_layernorm.weight": (self.hidden,) for n in ("input", "post_attention")}
        return shapes | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocab, self.hidden)}

    def with_layers(self, layers: int) -> Shape:
        """Return the same sizes with another number of layers."""
        return replace(self, layers=layers)

    def bytes(self) -> int:
        """Return the bytes of the tensors in bfloat16."""
        return sum(2 * torch.Size(s).numel() for s in self.tensors().values())

    def config(self) -> str:
        """Return config.json."""
        heads = max(self.hidden // 128, 1)
        sizes = {"hidden_size": self.hidden, "intermediate_size": self.inner, "num_hidden_layers": self.layers}
        sizes |= {"vocab_size": self.vocab, "num_attention_heads": heads, "num_key_value_heads": heads}
        return json.dumps(CONFIG | sizes, indent=2)


def make_pair(work: Path, shape: Shape, *, tuned: bool = True) -> tuple[Path, Path]:
    """Make or find (base, tuned) under `work` in bfloat16; all linear layers of tuned differ."""
    folder = work / shape.name
    base, other = folder / "base", folder / "tuned"
    wanted = [p for p in (base, *[other] * tuned) if not (p / "config.json").exists()]
    if wanted:
        with ExitStack() as stack, torch.inference_mode():
            writers = {p: stack.enter_context(Writer(p, shape.tensors())) for p in wanted}
            for name, before, after in _tensors(shape):
                for path, writer in writers.items():
                    writer.put(name, after if path == other else before)
        for path in wanted:
            (path / "config.json").write_text(shape.config())  # last: it marks the folder as complete
    return base, other


def _tensors(shape: Shape) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, base, tuned) for every tensor, kind by kind, so that at most two originals are in memory."""
    shapes = shape.tensors()
    for name, sizes in shapes.items():
        if len(sizes) == 1:
            yield name, *[torch.ones(sizes)] * 2
        elif ".layers." not in name:
            weight = 0.02 * torch.randn(sizes, generator=_generator(name))
            yield name, weight, weight
    first = "model.layers.0."
    for name in [n for n, sizes in shapes.items() if n.startswith(first) and len(sizes) == 2]:
        originals: list[tuple[Tensor, Tensor]] = []
        for i in range(shape.layers):
            path = name.replace(first, f"model.layers.{i}.")
            if i < ORIGINALS:
                originals.append(_matrix(path, shapes[path]))
                yield path, *originals[i]
            else:
                before, after = originals[i % ORIGINALS]
                yield path, before.roll((i, i), (0, 1)), after.roll((i, i), (0, 1))


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _matrix(name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return a random matrix in bfloat16, and the same with its update."""
    generator = _generator(name)
    weight = (0.02 * torch.randn(shape, generator=generator)).to(torch.bfloat16)
    return weight, _update(weight.float(), generator).add_(weight).to(torch.bfloat16)


def _update(weight: Tensor, generator: torch.Generator) -> Tensor:
    m, n = weight.shape
    spectrum = torch.arange(1, SIGNAL_RANK + 1) ** -0.8
    up = torch.randn(m, SIGNAL_RANK, generator=generator) / m**0.5
    down = torch.randn(SIGNAL_RANK, n, generator=generator) / n**0.5
    signal = (up * spectrum) @ down
    noise = torch.randn(m, n, generator=generator)
    update = signal.add_(noise, alpha=NOISE * float(signal.norm()) / (m * n) ** 0.5)
    return update.mul_(STRENGTH * float(weight.norm() / update.norm()))

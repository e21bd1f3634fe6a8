"""The choices of the runner's command line, for every section."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.adapters import make_adapter
from benchmarks.measure import ROOT
from benchmarks.pair import Shape

TINY = Shape(256, 688, 2, 512)


@dataclass(frozen=True)
class Options:
    """Number of runs, sizes, folders and peers."""

    work: Path = ROOT / ".bench"
    runs: int = 5
    peer_runs: int = 5
    hidden: int | None = None
    inner: int | None = None
    layers: int | None = None
    vocab: int | None = None
    sizes: tuple[float, ...] = (1, 2, 4, 8)
    without: tuple[str, ...] = ()
    tiny: bool = False
    keep: bool = False
    cuda: bool = False
    device: str = "cuda"
    environments: Path = ROOT / ".bench"  # the peers' environments

    def shape(self, layers: int, hidden: int = 4096, inner: int = 11008, vocab: int = 8192) -> Shape:
        """Return a section's shape, unless the command line says otherwise."""
        if self.tiny:
            hidden, inner, layers, vocab = TINY.hidden, TINY.inner, min(layers, TINY.layers), TINY.vocab
        return Shape(self.hidden or hidden, self.inner or inner, self.layers or layers, self.vocab or vocab)

    def adapter(self, shape: Shape, rank: int, seed: int = 0) -> Path:
        """Make or find an adapter of all linear layers in bfloat16."""
        sizes = {"hidden": shape.hidden, "inner": shape.inner, "layers": shape.layers}
        folder = self.work / f"{shape.name}-rank{rank}-{seed}"
        return make_adapter(folder, **sizes, rank=rank, seed=seed, dtype=torch.bfloat16)

    @property
    def logs(self) -> Path:
        """Return the folder for the output of the processes."""
        return self.work / "logs"

"""The rows of the table of results: an adapter of each family on each kind of layer, with the oracle's merged weights.

Every row makes its files again and says what each tensor of the merged checkpoint must be, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lorasurgery.ops.merge import merge

Weights = dict[str, Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "float8_e4m3fn": torch.float8_e4m3fn}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A row's files, and what merging them must give: tensor -> value in float64, for all that changes."""

    base: Path
    adapter: Path
    expected: Weights


@dataclass(frozen=True)
class Row:
    """One case.

    Args:
        family: What kind of adapter. layer: What it adapts.
        adapter, base: Their dtypes.
        oracle: Whose result it is compared with.
        make: Writes base and adapter into a folder: (folder, adapter dtype, base dtype) -> Made.
        strength: The weight it is merged with.
    """

    family: str
    layer: str
    oracle: str
    make: Callable[[Path, torch.dtype, torch.dtype], Made]
    adapter: str = "float32"
    base: str = "float32"
    strength: float = 1.0

    @property
    def name(self) -> str:
        """What pytest calls it."""
        words = (self.family, self.layer, self.adapter, "on", self.base, f"{self.strength:g}")
        return "-".join(words).replace(" ", "_").replace("/", "÷")

    @property
    def dtypes(self) -> str:
        """The table's word for both dtypes."""
        return self.base if self.adapter == self.base else f"{self.adapter} on {self.base}"


@dataclass(frozen=True)
class Result:
    """How far the merged file is from the oracle's weights, beside the size of the update.

    Args:
        difference: Largest ‖ours − oracle‖/‖oracle − base‖ over the tensors; for narrow bases after one rounding of
            the oracle's float64 weights.
        unequal: Share of elements that differ from that rounding.
        strays: Tensors that changed though the oracle's did not, or did not change though it did.
    """

    difference: float
    unequal: float
    strays: tuple[str, ...]


def run(row: Row, folder: Path) -> Result:
    """Make a row's files, merge them, compare every tensor of the result."""
    made = row.make(folder, DTYPES[row.adapter], DTYPES[row.base])
    out = folder / "merged" if made.base.is_dir() else folder / "merged.safetensors"
    merge(made.base, [made.adapter], out, weights=[row.strength], allow_loss=True)
    before, after = weights_of(made.base), weights_of(out)
    assert set(made.expected) <= set(before)
    assert set(before) == set(after)
    worst, unequal, total, strays = 0.0, 0, 0, []
    for name, old in before.items():
        wanted, was, is_now = (t.to(torch.float64) for t in (made.expected.get(name, old), old, after[name]))
        if torch.equal(wanted, was):
            if not torch.equal(after[name].reshape(-1).view(torch.uint8), old.reshape(-1).view(torch.uint8)):
                strays.append(name)
            continue
        rounded = wanted.to(old.dtype).to(torch.float64)
        goal = wanted if old.dtype == torch.float32 else rounded
        worst = max(worst, float((is_now - goal).norm() / (wanted - was).norm()))
        unequal, total = unequal + int((is_now != rounded).sum()), total + wanted.numel()
        if torch.equal(is_now, was) and not torch.equal(rounded, was):
            strays.append(name)
    assert total > 0, "a row in which nothing changes shows nothing"
    return Result(worst, unequal / total, tuple(strays))


def weights_of(path: Path) -> Weights:
    """All tensors of a file, or of a folder with one file or several parts."""
    if path.is_file():
        return load_file(path)
    found: Weights = {}
    for file in sorted(path.rglob("*.safetensors")):
        part = file.parent.relative_to(path).as_posix()
        found |= {(k if part == "." else f"{part}.{k}"): v for k, v in load_file(file).items()}
    return found

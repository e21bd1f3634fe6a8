"""The adapter that rerank and blend put together, and how it is laid out in the format it came in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.adapters.adapter import Adapter, Module
from lorasurgery.adapters.model_names.naming import module_of
from lorasurgery.adapters.single_file.write import LooseFile
from lorasurgery.checkpoint.output import Output
from lorasurgery.ops.blending.join import Joint, Whole
from lorasurgery.ops.blending.options import BlendOptions
from lorasurgery.ops.factors.factored import Factored, common_dtype, fit, hold, unit_scale
from lorasurgery.ops.factors.layout import Layout, loose_layout, peft_layout, write_layout
from lorasurgery.ops.factors.sidecars import tokenizer_files
from lorasurgery.ops.placement.block_weight import Blocks
from lorasurgery.report import ModuleReport

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Composed:
    """Modules with their factors, tensors stored whole, and the adapters they came from.

    Args:
        sources: In the order given; the first one's config is the pattern for the new one.
        whole: Tensors stored whole.
        dtype: safetensors name of what factors are written in.
        weights: One strength for each source.
        blocks: Strengths by module, for the vectors that are added.
        cast: Whether tensors stored whole are written in that dtype too.
        beside: Tokenizer files that go along: name -> source.
        dropped: modules without any direction: nothing is left of them, or the budget has no room.
    """

    sources: Sequence[Adapter]
    whole: Sequence[Whole]
    dtype: str
    weights: Sequence[float] = ()
    blocks: Blocks | None = None
    cast: bool = False
    modules: list[tuple[Joint, Factored]] = field(default_factory=list)
    dropped: list[ModuleReport] = field(default_factory=list)
    beside: dict[str, Path] = field(init=False)

    def __post_init__(self) -> None:
        self.beside = tokenizer_files(self.sources)  # as they are now, before hours of work

    def add(self, joint: Joint, found: Factored) -> None:
        """Keep one module, unless it vanished: then it is only reported."""
        kept = _alive(found)
        if kept is None:
            self.dropped.append(found.report)
        else:
            self.modules.append((joint, kept))

    def hold(self, budget: int, *, uniform: bool) -> None:
        """Keep memory near the budget while modules come in."""
        cut = hold([f for _, f in self.modules], budget, unit_scale, uniform=uniform)
        if cut is not None:
            self._keep(cut)

    def spend(self, budget: int, *, uniform: bool) -> None:
        """Cut the factors so that the file takes at most `budget` bytes, all else in it counted.

        Raises:
            SurgeryError: the budget is too small, and what would be enough.
        """
        found = [f for _, f in self.modules]
        least = [int(f.bias is not None) for f in found]  # PEFT wants a direction for a bias to hang on
        self._keep(fit(found, self.layout().files, budget, unit_scale, uniform=uniform, least=least))

    def pad(self) -> None:
        """Zero-pad every module to the largest rank."""
        top = max((f.update.rank for _, f in self.modules), default=0)
        self.modules = [(joint, f.pad(top)) for joint, f in self.modules]

    def _keep(self, found: list[Factored]) -> None:
        joints, self.modules = [joint for joint, _ in self.modules], []
        for joint, f in zip(joints, found, strict=True):
            self.add(joint, f)

    def layout(self) -> Layout:
        """The result in the format of the first source."""
        first = self.sources[0]
        whole = {w.name: w.value(self.dtype if self.cast else None) for w in self.whole}
        if first.format == "peft":
            return peft_layout(self.sources, self._modules(), whole)
        extra = {self._loose_key(name): t for name, t in whole.items()}
        extra |= {key: self._added(name, key) for name, key in self._keys().items()}
        return loose_layout(LooseFile(first.format, self._modules(), extra, first.metadata))

    def _modules(self) -> list[Module]:
        return [Module(j.path, f.update, j.kernel, f.bias, kind=j.kind) for j, f in self.modules]

    def _loose_key(self, name: str) -> str:
        return f"{name.rpartition('.')[0]}.set_weight"

    def _keys(self) -> dict[str, str]:
        """The keys of the added vectors that are not wholly weighed away."""
        return {n: key for n, key in first_keys(self.sources).items() if any(w for _, w in self._strengths(n))}

    def _strengths(self, name: str) -> list[tuple[Adapter, float]]:
        """The adapters that hold an added vector, with its strength in each."""
        held = [(a, w) for a, w in zip(self.sources, self.weights, strict=True) if name in a.diffs]
        return [(a, w * self.blocks.of(a, module_of(name))) for a, w in held] if self.blocks else held

    def _added(self, name: str, key: str) -> Tensor:
        """A vector that is added to the base: the weighted sum of the sources' own."""
        held = [(a, w) for a, w in self._strengths(name) if w]
        (first, weight), *others = held
        value = first.weights.read(first.diffs[name])
        if others or weight != 1:
            total = value.float() * weight
            for adapter, w in others:
                total += adapter.weights.read(adapter.diffs[name]).float() * w
            value = total.to(value.dtype)
        return value

    def write(self, output: Output) -> None:
        """Write weights, tokenizer files and, last, what makes the folder complete."""
        write_layout(self.layout(), output, self.beside)


def first_keys(sources: Sequence[Adapter]) -> dict[str, str]:
    """Each added vector's key in the first adapter that has it, by name."""
    found: dict[str, str] = {}
    for adapter in sources:
        found = adapter.diffs | found
    return found


def _alive(found: Factored) -> Factored | None:
    """None for a module that has neither directions nor a bias; PEFT wants a direction for the bias to hang on."""
    if found.update.rank:
        return found
    return found.pad(1) if found.bias is not None else None


def factor_dtype(sources: Sequence[Adapter], options: BlendOptions) -> str:
    """What --dtype says, float32 for a blend that is to be exact, else the widest dtype among the factors."""
    if options.dtype:
        return options.dtype
    exact = len(sources) > 1 and options.choice is None
    return "F32" if exact else common_dtype(sources)

"""What the tensors of two checkpoints are called in memory, so that both call the same tensor the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorasurgery.adapters.align import Alignment, align, unwrapped
from lorasurgery.adapters.library import library_names
from lorasurgery.adapters.naming import is_buffer
from lorasurgery.adapters.renames import memory_name, model_types
from lorasurgery.checkpoint.reader import Checkpoint

# Prefixes that a model with a head puts before its body's: in memory the longer name is the module's path.
_BODIES = {
    "model", "transformer", "backbone", "bert", "roberta", "xlm_roberta", "distilbert", "electra", "albert", "deberta",
    "mpnet", "gpt_neox", "vit", "deit", "beit", "dinov2", "esm", "rwkv", "encoder", "decoder",
}  # fmt: skip


@dataclass(frozen=True)
class PairNames:
    """Name in memory -> name on disk, of each side; where the sides call a tensor differently, the base's name counts.

    Example:
        PairNames.of(Checkpoint.open("gpt2"), Checkpoint.open("my-gpt2")).base["transformer.h.0.ln_1.weight"]
    """

    base: dict[str, str]
    tuned: dict[str, str]

    @classmethod
    def of(cls, base: Checkpoint, tuned: Checkpoint) -> PairNames:
        """The names of two checkpoints of one model, from their headers and config.json.

        Where files of one model lie under different prefixes, the rename tables may know only one of them: then the
        names as they lie on disk meet better.
        """
        found = cls._met(base, tuned, _in_memory(base, tuned), _in_memory(tuned, base))
        if found.shared == min(len(found.base), len(found.tuned)):
            return found
        plain = cls._met(base, tuned, *({n: d for d, n in unwrapped(s.tensors).items()} for s in (base, tuned)))
        return max(found, plain, key=lambda names: names.shared)

    @property
    def shared(self) -> int:
        """How many names both have."""
        return len(self.base.keys() & self.tuned.keys())

    @classmethod
    def _met(cls, base: Checkpoint, tuned: Checkpoint, before: dict[str, str], after: dict[str, str]) -> PairNames:
        """The names once prefixes are aligned, and transformers is asked about what is left."""
        shapes = [
            {memory: side.tensors[name].shape for memory, name in names.items() if not is_buffer(memory)}
            for side, names in ((base, before), (tuned, after))
        ]
        pipeline = bool(base.parts or tuned.parts)
        for found in align(*shapes):
            before, after = _aligned(before, after, found, pipeline=pipeline)
        return cls(*_by_library(base, tuned, before, after))


def _in_memory(side: Checkpoint, other: Checkpoint) -> dict[str, str]:
    """A side's names in memory; a file without a config.json is taken to be what the other one is."""
    types = model_types(side.config) or model_types(other.config)
    short = unwrapped(side.tensors)
    found = {memory_name(name, types): disk for disk, name in short.items()}
    return found if len(found) == len(short) else {name: disk for disk, name in short.items()}


def _aligned(
    base: dict[str, str], tuned: dict[str, str], found: Alignment, *, pipeline: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Both sides under one prefix: that of the model with a head, which both are in memory, else the base's.

    What DDP puts before a model is no part of a path, wherever it was saved.
    """
    words = set(found.longer.split(".")) - {""}
    body = not found.base and words <= _BODIES and not pipeline
    wanted = found.tuned if body or "module" in found.base.split(".") else found.base
    return _moved(base, tuned, found.base, wanted, found.tuned), _moved(tuned, base, found.tuned, wanted, found.base)


def _moved(names: dict[str, str], other: Mapping[str, str], old: str, new: str, counterpart: str) -> dict[str, str]:
    """One side's names with a prefix changed: of what the other side has, and of what stands beside that in a stack.

    A head at the top of a model without a prefix stays where it is.
    """
    if old == new:
        return names
    rest = {n: n.removeprefix(old) for n in names if n.startswith(old) and n not in other}
    tops = {r.partition(".")[0] for r in rest.values() if counterpart + r in other}
    moves = {n: new + r for n, r in rest.items() if r.partition(".")[0] in tops and new + r not in names}
    return {moves.get(n, n): disk for n, disk in names.items()}


def _by_library(
    base: Checkpoint, tuned: Checkpoint, before: dict[str, str], after: dict[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """The last resort before an error: what transformers itself would call the tensors that have no partner yet."""
    lone = [
        {n: d for n, d in a.items() if n not in b and not is_buffer(n)} for a, b in ((before, after), (after, before))
    ]
    if not all(lone):
        return before, after
    known = [_library(side, names) for side, names in zip((base, tuned), lone, strict=True)]
    if not any(known):
        return before, after
    partners = [{known_side.get(n, n): n for n in names} for known_side, names in zip(known, lone, strict=True)]
    same = {
        m for m in partners[0].keys() & partners[1].keys()
        if base.tensors[before[partners[0][m]]].shape == tuned.tensors[after[partners[1][m]]].shape
    }  # fmt: skip
    moved = [{side[m]: m for m in same} for side in partners]
    return {moved[0].get(n, n): d for n, d in before.items()}, {moved[1].get(n, n): d for n, d in after.items()}


def _library(side: Checkpoint, names: dict[str, str]) -> dict[str, str]:
    """Name in memory, as far as known here -> as transformers has it, where it has but one."""
    shapes = {memory: side.tensors[name].shape for memory, name in names.items()}
    table = library_names(shapes, side.config) if side.config else {}
    found: dict[str, set[str]] = {}
    for memory, disks in table.items():
        for disk in disks:
            found.setdefault(disk, set()).add(memory)
    return {name: next(iter(memories)) for name, memories in found.items() if len(memories) == 1}

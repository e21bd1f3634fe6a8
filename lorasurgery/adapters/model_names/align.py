"""Two sets of names for the tensors of one model: which name of one is which of the other.

Libraries put prefixes before a model's names, saved with a head or without, wrapped or not; a prefix is only believed
where it makes many names meet.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from lorasurgery.adapters.model_names.library import library_names
from lorasurgery.adapters.model_names.naming import is_buffer
from lorasurgery.adapters.model_names.renames import memory_name, model_types
from lorasurgery.checkpoint.reader import Checkpoint

# What torch.compile and FSDP put anywhere in a name, DDP and DeepSpeed before all of it. No model has them of its own.
_WRAPPED = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = "module."
# What may stand before the body of one model in one file and not, or otherwise, in another.
_PREFIXES = {
    "base_model", "model", "module", "transformer", "backbone", "language_model", "text_model", "llm", "thinker",
    "bert", "roberta", "xlm_roberta", "distilbert", "electra", "albert", "deberta", "mpnet", "gpt_neox", "vit", "deit",
    "beit", "dinov2", "esm", "rwkv", "encoder", "decoder", "visual", "vision_tower", "vision_model", "audio_tower",
    "multi_modal_projector", "diffusion_model",
}  # fmt: skip
_DEEPEST = 5  # parts of a prefix
_ROUNDS = 4  # prefixes that differ: body, tower, projector


@dataclass(frozen=True)
class Alignment:
    """A prefix of one side's names that is another, or none, on the other side."""

    base: str
    tuned: str

    @property
    def longer(self) -> str:
        """The longer of the two."""
        return max(self.base, self.tuned, key=len)


def unwrapped(names: Collection[str]) -> dict[str, str]:
    """Name on disk -> without what torch.compile, FSDP, DDP and DeepSpeed wrapped around it.

    >>> unwrapped(["module.h.0.w", "module._orig_mod.wte.w"])
    {'module.h.0.w': 'h.0.w', 'module._orig_mod.wte.w': 'wte.w'}
    """
    found = {name: _WRAPPED.sub("", name) for name in names}
    while found and all(n.startswith(_PARALLEL) and n != _PARALLEL for n in found.values()):
        found = {name: short.removeprefix(_PARALLEL) for name, short in found.items()}
    return found if len(set(found.values())) == len(found) else {name: name for name in names}


def align(base: Mapping[str, tuple[int, ...]], tuned: Mapping[str, tuple[int, ...]]) -> list[Alignment]:
    """Find the prefixes by which the names of two checkpoints of one model differ, the one that explains most first.

    >>> align({"h.0.w": (2,), "wte.w": (2,)}, {"transformer.h.0.w": (2,), "transformer.wte.w": (2,), "head.w": (2,)})
    [Alignment(base='', tuned='transformer.')]

    Args:
        base: name -> shape of the tensors.
        tuned: name -> shape of the tensors.
    """
    left, right = set(base) - set(tuned), set(tuned) - set(base)
    least = min(len(base), len(tuned))
    found = []
    for _ in range(_ROUNDS):
        best = _best(left, right, base, tuned, least) if left and right else None
        if best is None:
            break
        found.append(best)
        met = {n for n in left if n.startswith(best.base) and _other(n, best) in right}
        left, right = left - met, right - {_other(n, best) for n in met}
    return found


def _other(name: str, found: Alignment) -> str:
    return found.tuned + name.removeprefix(found.base)


def _best(
    left: set[str], right: set[str], base: Mapping[str, tuple[int, ...]], tuned: Mapping[str, tuple[int, ...]],
    least: int,
) -> Alignment | None:  # fmt: skip
    """The alignment that most names agree on, if no other explains as many."""
    votes: Counter[Alignment] = Counter()
    fits: Counter[Alignment] = Counter()
    for found, old, new in _meetings(left, right, _stems(base), _stems(tuned)):
        votes[found] += 1
        fits[found] += base[old] == tuned[new]
    ranked = [(a, n) for a, n in votes.most_common() if _believed(a, n, fits[a], least)]
    if not ranked or (len(ranked) > 1 and ranked[1][1] == ranked[0][1] and _rival(ranked[0][0], ranked[1][0])):
        return None
    return ranked[0][0]


def _meetings(
    left: set[str], right: set[str], in_base: set[str], in_tuned: set[str]
) -> Iterable[tuple[Alignment, str, str]]:
    """Names with the longest ending in common, where neither side has both prefixes before it for things of its own."""
    endings: dict[str, list[str]] = defaultdict(list)
    for name in left:
        for ending, prefix in _cuts(name):
            endings[ending].append(prefix)
    for name in right:
        for ending, prefix in _cuts(name):
            if ending in endings:
                top = ending.partition(".")[0]
                for head in endings[ending]:
                    if prefix + top not in in_base and head + top not in in_tuned:
                        yield Alignment(head, prefix), head + ending, name
                break


def _stems(names: Iterable[str]) -> set[str]:
    """All that stands before a dot in these names."""
    found: set[str] = set()
    for name in names:
        stem = name.rpartition(".")[0]
        while stem and stem not in found:
            found.add(stem)
            stem = stem.rpartition(".")[0]
    return found


def _rival(a: Alignment, b: Alignment) -> bool:
    """Whether two alignments claim the same names: two halves of a model may well be of one size."""
    same_base = a.base.startswith(b.base) or b.base.startswith(a.base)
    return same_base or a.tuned.startswith(b.tuned) or b.tuned.startswith(a.tuned)


def _believed(found: Alignment, votes: int, fits: int, least: int) -> bool:
    """Most shapes must agree; words that are no known prefix must explain more than half of the smaller checkpoint."""
    if 2 * fits <= votes:
        return False
    words = set(f"{found.base}{found.tuned}".split(".")) - {""}
    if not found.base or not found.tuned:
        return 2 * votes > least or (words <= _PREFIXES and votes > 1)
    return words <= _PREFIXES and votes > 1


def _cuts(name: str) -> Iterable[tuple[str, str]]:
    """(ending, prefix) of a name, the longest ending first; an ending is a module's name and its tensor's."""
    parts = name.split(".")
    for i in range(min(len(parts) - 1, _DEEPEST + 1)):
        if i and parts[i - 1].isdecimal():
            return  # a layer's number is not a prefix
        yield ".".join(parts[i:]), "".join(f"{p}." for p in parts[:i])


# Prefixes that a model with a head puts before its body's: in memory the longer name is the module's path.
_BODIES = {
    "model", "transformer", "backbone", "bert", "roberta", "xlm_roberta", "distilbert", "electra", "albert", "deberta",
    "mpnet", "gpt_neox", "vit", "deit", "beit", "dinov2", "esm", "rwkv", "encoder", "decoder",
}  # fmt: skip


@dataclass(frozen=True)
class PairNames:
    """Name in memory -> name on disk, of each side; where the sides call a tensor differently, the base's name counts.

    Examples:
        ```python
        PairNames.of(Checkpoint.open("gpt2"), Checkpoint.open("my-gpt2")).base["transformer.h.0.ln_1.weight"]
        ```
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

    What DDP puts before a model is not part of a path, wherever it was saved.
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

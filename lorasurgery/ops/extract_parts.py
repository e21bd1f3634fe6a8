"""Modules that a library cuts out of one tensor on disk, or joins from several: their factors, their whole tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorasurgery.adapters.model_names.cuts import Cut
from lorasurgery.adapters.model_names.naming import module_of
from lorasurgery.lowrank import LowRank
from lorasurgery.ops.factors.factored import Factored, Scaling
from lorasurgery.ops.pairs import Pair

if TYPE_CHECKING:
    from torch import Tensor

    from lorasurgery.checkpoint.reader import Checkpoint

Part = tuple[Cut, Factored]


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor of the tuned checkpoint, in this order; None means all of them."""

    tensor: str
    rows: range | tuple[int, ...] | None = None


def pieces_in_memory(cuts: Mapping[str, tuple[Cut, ...]]) -> dict[str, tuple[Piece, ...]]:
    """Name in memory -> what its tensor is put together from, top to bottom."""
    found: dict[str, list[tuple[int, Piece]]] = defaultdict(list)
    for disk, own in cuts.items():
        for cut in own:
            found[cut.memory].append((cut.into.start, Piece(disk, cut.rows)))
    return {m: tuple(p for _, p in sorted(pieces, key=lambda x: x[0])) for m, pieces in found.items()}


def put_together(tuned: Checkpoint, pieces: Sequence[Piece]) -> Tensor:
    """The tensor in memory."""
    from torch import cat

    whole = [(tuned.read(p.tensor), p.rows) for p in pieces]
    parts = [t if rows is None else t[list(rows)] for t, rows in whole]
    return parts[0] if len(parts) == 1 else cat(parts)


def shape_of(tuned: Checkpoint, pieces: Sequence[Piece]) -> tuple[int, ...]:
    """The shape in memory."""
    first = tuned.tensors[pieces[0].tensor].shape
    if pieces[0].rows is None:
        return first
    return (sum(len(p.rows or ()) for p in pieces), *first[1:])


def pairs_in_memory(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs by their names in memory: each cut for itself, and what is joined once."""
    found: dict[str, Pair] = {}
    for pair in pairs:
        for cut in pair.cuts:
            path, leaf = module_of(cut.memory), cut.memory.rpartition(".")[2]
            found.setdefault(cut.memory, replace(pair, path=path, leaf=leaf, cuts=()))
        if not pair.cuts:
            found[f"{pair.path} {pair.leaf}"] = pair
    return list(found.values())


def parts_of_modules(factors: Sequence[tuple[Pair, Factored]], whole: Sequence[Pair]) -> dict[str, list[Part]]:
    """Module path in memory -> the factors it has a share in.

    Args:
        whole: What is stored whole; a module of which a part is has no factors.
    """
    stored = {cut.memory for pair in whole for cut in pair.cuts}
    found: dict[str, list[Part]] = defaultdict(list)
    for pair, factored in factors:
        for cut in pair.cuts:
            if cut.memory not in stored:
                found[module_of(cut.memory)].append((cut, factored))
    return dict(found)


def scales_of_parts(parts: Mapping[str, Sequence[Part]], scaling: Scaling) -> dict[int, float]:
    """id of factors -> their scale: that of the rank of the module they are joined in, one for all that meet somewhere.

    Args:
        parts: By module, as `parts_of_modules` gives them.
    """
    found: dict[int, float] = {}
    for own in parts.values():
        whole = scaling(sum(f.rank for _, f in own))[1]
        found |= {id(f): min(whole, found.get(id(f), whole)) for _, f in own}
    while True:
        before = dict(found)
        for own in parts.values():
            least = min(found[id(f)] for _, f in own)
            found |= {id(f): least for _, f in own}
        if found == before:
            return found


def joined(parts: Sequence[Part], *, rslora: bool) -> tuple[LowRank, float]:
    """One module's factors and alpha: the downs one above the other, the ups' own rows in blocks along the diagonal."""
    import torch

    (cut, first), rank = parts[0], sum(f.rank for _, f in parts)
    up, at = first.update.up.new_zeros(cut.height, rank), 0
    for cut, factored in parts:
        one = factored.update
        up[cut.into.start : cut.into.stop, at : at + one.rank] = one.up[list(cut.rows)]
        at += one.rank
    downs = torch.cat([f.update.down for _, f in parts]).to(up.dtype)
    alpha = (first.report.alpha or 0.0) * ((rank / first.rank) ** (0.5 if rslora else 1.0) if first.rank else 1.0)
    return LowRank(up.contiguous(), downs.contiguous(), first.update.scale), float(f"{alpha:.15g}")


def surplus(pair: Pair) -> int:
    """Numbers more that one direction takes in the file than the pair's own factors have: downs in each, and zeros."""
    if not pair.cuts:
        return 0
    rows, columns = pair.matrix
    return (len(pair.cuts) - 1) * columns + sum(cut.height for cut in pair.cuts) - rows


def room_to_pad(factors: Sequence[tuple[Pair, Factored]], whole: Sequence[Pair]) -> list[int]:
    """How many directions each pair's factors must have so that all modules come out with one rank."""
    modules = parts_of_modules(factors, whole)
    totals = {id(parts[0][1]): sum(f.rank for _, f in parts) for parts in modules.values()}
    later = {id(f) for parts in modules.values() for _, f in parts[1:]}
    top = max([f.rank for _, f in factors] + list(totals.values()), default=0)
    ranks = []
    for _, factored in factors:
        own = factored.rank
        ranks.append(own if id(factored) in later else own + top - totals.get(id(factored), own))
    return ranks

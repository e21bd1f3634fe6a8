"""The tensors of a conversion: each new module's factors out of those it is made of, without rounding any bit."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorasurgery.adapters.adapter import Adapter, Delta, Module
from lorasurgery.adapters.image_names.translate import ModuleRows, NewModule
from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.engine.device_memory import Fallback
from lorasurgery.errors import SurgeryError, UnsupportedError
from lorasurgery.linalg.blocks import InMemory
from lorasurgery.linalg.core import distance, inner
from lorasurgery.linalg.elementwise import sum_of
from lorasurgery.linalg.fit import check_kept, narrowed
from lorasurgery.linalg.norms import ranged, row_squares
from lorasurgery.linalg.rank import EVERYTHING, RankChoice
from lorasurgery.linalg.svd import truncated_svd
from lorasurgery.linalg.thin import NOT_FINITE
from lorasurgery.linalg.truncate import all_finite, core_of, to_store, truncated_core, truncated_matrix
from lorasurgery.lowrank import Dense, LowRank, common, widened
from lorasurgery.ops.merging.arithmetic import in_turn
from lorasurgery.ops.placement.edits import Contribution, Edit
from lorasurgery.ops.placement.plan import plan_edits


@dataclass(frozen=True)
class Reduced:
    """Factors for a module that the file holds in another form.

    Args:
        update: In the dtype of the file.
        lost: Of every row (out,), what the factors leave of ΔW, and ΔW itself, squared.
        total: Of every row (out,), what the factors leave of ΔW, and ΔW itself, squared.
    """

    update: LowRank
    lost: Tensor
    total: Tensor


@dataclass(frozen=True)
class Source:
    """One of the adapter's modules, read: factors, and what comes with them.

    Args:
        update: In the dtype of the file.
        bias: What is added to the layer's bias (out,).
        magnitude: DoRA's, (out,); along the input axis as it is.
    """

    update: LowRank
    bias: Tensor | None = None
    magnitude: Tensor | None = None


class Assembly:
    """Builds the new file's modules.

    Args:
        adapter: The source.
        reduced: Factors of modules that the file holds as other products, by path.
        dtype: torch dtype that factors are cast to; None keeps their own.
        kernels: Of convolutions that the file holds flat, by path.
        undone: DoRA whose norm is in the factors already.
        bake: Whether scales go into lora_B, so that alpha is the rank.
    """

    def __init__(
        self, adapter: Adapter, reduced: dict[str, Reduced], dtype: str | None,
        kernels: Mapping[str, tuple[int, ...]], undone: Collection[str] = (), *, bake: bool = False,
    ) -> None:  # fmt: skip
        self.adapter, self.reduced, self.kernels, self.undone, self.bake = adapter, reduced, kernels, undone, bake
        self.dtype = torch_dtype(dtype) if dtype else None

    def build(self, target: NewModule, name: str, *, lycoris: bool) -> tuple[Module, float, float]:
        """One module under its new name, its error and norm.

        Args:
            lycoris: The new format writes DoRA's magnitude as LyCORIS does.

        Raises:
            UnsupportedError: DoRA along the input axis, for a format that has it along the output axis only.
            SurgeryError: a factor that is not finite, or does not fit --dtype.
        """
        found = {path: self._read(path) for path in target.sources}
        first = self.adapter.deltas[target.sources[0]]
        exact = join_rows(target.pieces, {path: s.update for path, s in found.items()})
        norm, lost = self._measured(target.pieces, found, exact)
        update = self._cast(exact)
        if self.bake and update.scale != 1:
            update = narrowed(LowRank(update.up.float() * update.scale, update.down), update.up.dtype)
        if update is not exact:  # what the rows of reduced modules leave is not rounded a second time
            rounded = distance(_at_one(exact), _at_one(update))
            check_kept(update, rounded**2, norm**2)
            lost = math.hypot(lost, rounded)
        kernel = first.kernel or self.kernels.get(first.path, ())
        module = Module(
            name, update, kernel, join_vectors(target.pieces, {p: s.bias for p, s in found.items()}),
            self._magnitude(target, found, first, lycoris), "conv" if kernel else first.kind,
        )  # fmt: skip
        return module, lost / norm if norm else 0.0, norm

    def _measured(self, pieces: Sequence[ModuleRows], found: dict[str, Source], exact: LowRank) -> tuple[float, float]:
        """‖ΔW‖ of the new module, and what was lost already where its sources had no factors of their own."""
        if not self.reduced.keys() & found.keys():
            norm, lost = math.sqrt(max(inner([exact], [exact]), 0.0)), 0.0
        else:
            norms, losses = [0.0], [0.0]
            for piece in (p for p in pieces if p.source):
                own = self.reduced.get(piece.source or "")
                if own is None:
                    part = found[piece.source or ""].update.part(piece.rows)
                    norms.append(math.sqrt(max(inner([part], [part]), 0.0)))
                else:
                    norms.append(math.sqrt(float(own.total[piece.rows].sum())))
                    losses.append(math.sqrt(float(own.lost[piece.rows].sum())))
            norm, lost = math.hypot(*norms), math.hypot(*losses)
        if not math.isfinite(norm):
            raise SurgeryError(NOT_FINITE)
        return norm, lost

    def _read(self, path: str) -> Source:
        delta = self.adapter.deltas[path]
        bias = None
        if delta.bias:
            bias = self.adapter.load_bias(delta).dense().squeeze(1)
        elif f"{path}.bias" in self.adapter.diffs:
            bias = self.adapter.load_diff(f"{path}.bias").matrix.squeeze(1)
        kept = delta.magnitude if path not in self.undone else None
        magnitude = self.adapter.weights.read(kept.name) if kept else None
        if path in self.reduced:
            return Source(self.reduced[path].update, bias, magnitude)
        return Source(self.adapter.load(delta), bias, magnitude)

    def _cast(self, update: LowRank) -> LowRank:
        dtype = self.dtype
        if dtype is None and update.up.dtype != update.down.dtype:
            dtype = common(update.up.dtype, update.down.dtype)
        if dtype is None or (update.up.dtype == dtype and update.down.dtype == dtype):
            return update
        return narrowed(update, dtype)

    def _magnitude(self, target: NewModule, found: dict[str, Source], first: Delta, lycoris: bool) -> Tensor | None:
        vectors = {path: s.magnitude for path, s in found.items()}
        whole = vectors[target.sources[0]]
        if whole is None:
            return None
        if first.magnitude and first.magnitude.by_input:  # (1, in, 1 …)
            if not lycoris or len(target.pieces) > 1:
                raise UnsupportedError(
                    f"{first.path} is DoRA along the input axis, which only kohya's and ComfyUI's files can say"
                )
            return whole
        flat = join_vectors(target.pieces, {p: v.flatten() for p, v in vectors.items() if v is not None})
        assert flat is not None
        kernel = [1] * len(first.kernel)
        if lycoris:
            return flat.reshape(-1, 1, *kernel)
        return flat.reshape(1, -1, *kernel) if kernel else flat


def join_rows(pieces: Sequence[ModuleRows], updates: dict[str, LowRank]) -> LowRank:
    """The update whose rows are the pieces', from top to bottom.

    Parts of one fused module have one lora_A between them, so they are put together as they were; others make up a
    block-diagonal lora_B, and the ranks add up.

    >>> one, two = LowRank(torch.ones(2, 1), torch.ones(1, 3)), LowRank(torch.ones(2, 1), 2 * torch.ones(1, 3))
    >>> join_rows([ModuleRows(2, "q"), ModuleRows(1), ModuleRows(2, "k")], {"q": one, "k": two}).up.shape
    torch.Size([5, 2])
    """
    first, *others = updates.values()
    whole = len(pieces) == 1 and not others and pieces[0].height == len(first.up)
    if whole:
        return first
    shared = all(u.scale == first.scale and torch.equal(u.down, first.down) for u in others)
    if shared:
        up = torch.cat([_rows(piece, updates, first) for piece in pieces])
        return LowRank(up, first.down, first.scale)
    if any(u.scale != first.scale for u in others):
        updates = {path: _unscaled(u) for path, u in updates.items()}
    width, place, ups = sum(u.rank for u in updates.values()), {}, []
    start = 0
    for path, update in updates.items():
        place[path], start = start, start + update.rank
    for piece in pieces:
        rows = _rows(piece, updates, first)
        left = place[piece.source] if piece.source else 0
        ups.append(pad(rows, (left, width - left - rows.shape[1])))
    return LowRank(torch.cat(ups), torch.cat([u.down for u in updates.values()]), next(iter(updates.values())).scale)


def _rows(piece: ModuleRows, updates: dict[str, LowRank], like: LowRank) -> Tensor:
    if piece.source is None:
        return like.up.new_zeros(piece.height, like.rank)
    return updates[piece.source].up[piece.rows]


def _unscaled(update: LowRank) -> LowRank:
    return LowRank(update.up.float() * update.scale, update.down.float())


def join_vectors(pieces: Sequence[ModuleRows], vectors: dict[str, Tensor | None]) -> Tensor | None:
    """The same for vectors, one entry a row; None when no source has one."""
    like = next((v for v in vectors.values() if v is not None), None)
    if like is None:
        return None
    found = []
    for piece in pieces:
        vector = vectors.get(piece.source) if piece.source else None
        found.append(like.new_zeros(piece.height) if vector is None else vector[piece.rows])
    return torch.cat(found)


def is_zero(module: Module) -> bool:
    """Whether a part of a fused module was never trained, or never existed."""
    return module.bias is None and module.magnitude is None and not bool(module.update.up.any())


def padded(modules: Sequence[Module]) -> list[Module]:
    """One rank for all, zero-padded; the scale stays, so it should be 1."""
    top = max((m.update.rank for m in modules), default=0)
    found = []
    for m in modules:
        more, u = top - m.update.rank, m.update
        wide = LowRank(pad(u.up, (0, more)), pad(u.down, (0, 0, 0, more)), u.scale)
        found.append(replace(m, update=wide))
    return found


def _at_one(update: LowRank) -> LowRank:
    """The same update with the scale in lora_B, in float64."""
    return LowRank(update.up.to(torch.float64) * update.scale, update.down.to(torch.float64))


Places = list[tuple[Edit, Contribution]]


def plain_lora(
    base: Checkpoint, adapter: Adapter, dtype: torch.dtype, device: torch.device, rank: int | None = None
) -> dict[str, Reduced]:
    """Factors of W' − W for every DoRA module, one matrix in memory at a time, each with its measured error.

    Args:
        dtype: What factors are written in.
        rank: Of all of them; None keeps each module's own.
    """
    found = {}
    for path, places in _places(base, adapter).items():
        delta = adapter.deltas[path]
        difference = _difference(base, delta, places, device)
        found[path] = _factor(delta, difference, rank or delta.rank, dtype)
    return found


def factors_of(
    adapter: Adapter, delta: Delta, dtype: torch.dtype, device: torch.device, rank: int | None = None
) -> LowRank:
    """Factors of a module that the file holds in another form (LoHa, LoKr, Tucker, a whole difference), on the CPU.

    Args:
        dtype: What they are written in.
        rank: At most; None is all that the module has.

    Raises:
        SurgeryError: file, module, and what of its values or its factors does not fit.
    """
    choice = RankChoice(rank=rank) if rank else None

    def on(device: torch.device) -> LowRank:
        if delta.is_thin:
            thin = adapter.load(delta).to(device)
            core = core_of([thin], choice or EVERYTHING)
            made = truncated_core(core, choice or EVERYTHING, delta.shape, dtype)
        else:
            whole = adapter.load_update(delta).to(device)
            if not all_finite(whole):  # comparisons would pass over a NaN in silence
                raise SurgeryError(NOT_FINITE)
            made = truncated_matrix(sum_of([whole]), choice or RankChoice(rank=min(delta.shape)), dtype)
        return to_store(made.update, made.norm)

    try:
        found, _ = Fallback().first(delta.path, [partial(on, device), partial(on, torch.device("cpu"))])
    except SurgeryError as problem:
        raise type(problem)(f"{adapter.path}: {delta.path}: {problem}") from None
    if not found.rank and delta.bias:  # which PEFT wants a direction for
        return LowRank(pad(found.up, (0, 1)), pad(found.down, (0, 0, 0, 1)), found.scale)
    return found


def _places(base: Checkpoint, adapter: Adapter) -> dict[str, Places]:
    found: dict[str, Places] = defaultdict(list)
    for edit in plan_edits(base, [adapter], [1.0]).edits.values():
        for c in edit.contributions:
            if c.decomposes and c.delta is not None:
                found[c.delta.path].append((edit, c))
    return found


def _difference(base: Checkpoint, delta: Delta, places: Places, device: torch.device) -> Tensor:
    """W' − W in the orientation of the update (out, in), put together from all tensors it is spread over."""
    total: Tensor | None = None
    for edit, c in places:
        assert edit.source is not None
        weight = base.read(edit.source.name).to(device).flatten(1)
        weight = weight.to(widened(weight.dtype))
        part = in_turn(replace(edit, contributions=[c]), weight).sub_(weight)
        part = part if c.into is None else part[c.into]
        part = part.mT if c.transposed else part
        if c.rows is None:
            return part
        total = part.new_zeros(delta.shape) if total is None else total
        total[c.rows] = part
    assert total is not None
    return total


def _factor(delta: Delta, difference: Tensor, rank: int, dtype: torch.dtype) -> Reduced:
    matrix, power = ranged(InMemory(difference))
    found = truncated_svd(matrix, RankChoice(rank=min(rank, *delta.shape)))
    root = (found.s * 2.0**power).sqrt().to(difference)
    update = narrowed(LowRank(found.u * root, root[:, None] * found.vt), dtype)
    squares = row_squares(Dense(difference, 2.0**power), update)
    return Reduced(LowRank(update.up.cpu().contiguous(), update.down.cpu().contiguous()), *squares)

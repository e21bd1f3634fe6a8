"""The tensors of a conversion: each new module's factors out of those it is made of, without rounding any bit."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorasurgery.adapters.adapter import Adapter, Delta
from lorasurgery.adapters.module import Module
from lorasurgery.adapters.translate import Piece, Target
from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.errors import SurgeryError, UnsupportedError
from lorasurgery.linalg.core import distance, inner
from lorasurgery.linalg.thin import NOT_FINITE
from lorasurgery.lowrank import LowRank, common
from lorasurgery.ops.factored import Factored


@dataclass(frozen=True)
class Source:
    """One of the adapter's modules, read: factors, and what comes with them.

    Args:
        update: In the dtype of the file. error: ‖ΔW − scale·B·A‖/‖ΔW‖, 0 where the file itself holds factors.
        bias: What is added to the layer's bias (out,). magnitude: DoRA's, (out,); along the input axis as it is.
    """

    update: LowRank
    error: float = 0.0
    norm: float | None = None
    bias: Tensor | None = None
    magnitude: Tensor | None = None


class Assembly:
    """Builds the new file's modules.

    Args:
        adapter: The source. reduced: Factors of modules that the file holds as other products, by path.
        dtype: torch dtype that factors are cast to; None keeps their own.
        kernels: Of convolutions that the file holds flat, by path. undone: DoRA whose norm is in the factors already.
    """

    def __init__(
        self, adapter: Adapter, reduced: dict[str, Factored], dtype: str | None,
        kernels: Mapping[str, tuple[int, ...]], undone: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.adapter, self.reduced, self.kernels, self.undone = adapter, reduced, kernels, undone
        self.dtype = torch_dtype(dtype) if dtype else None

    def build(self, target: Target, name: str, *, lycoris: bool) -> tuple[Module, float, float]:
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
        update = self._cast(exact)
        norm = math.sqrt(max(inner([exact], [exact]), 0.0))
        if not math.isfinite(norm):
            raise SurgeryError(NOT_FINITE)
        lost = math.hypot(*(s.error * (s.norm or 0.0) for s in found.values()))
        norm = math.hypot(norm, lost)  # what was cut off is orthogonal to what is left
        lost = math.hypot(lost, distance(exact, update) if update is not exact else 0.0)
        kernel = first.kernel or self.kernels.get(first.path, ())
        module = Module(
            name, update, kernel, join_vectors(target.pieces, {p: s.bias for p, s in found.items()}),
            self._magnitude(target, found, first, lycoris), "conv" if kernel else first.kind,
        )  # fmt: skip
        return module, lost / norm if norm else 0.0, norm

    def _read(self, path: str) -> Source:
        delta = self.adapter.deltas[path]
        bias = None
        if delta.bias:
            bias = self.adapter.load_bias(delta).dense().squeeze(1)
        elif f"{path}.bias" in self.adapter.diffs:
            bias = self.adapter.load_diff(f"{path}.bias").matrix.squeeze(1)
        kept = delta.magnitude if path not in self.undone else None
        magnitude = self.adapter.weights.read(kept) if kept else None
        if path in self.reduced:
            own = self.reduced[path]
            return Source(own.update, own.report.error or 0.0, own.report.delta_norm, bias, magnitude)
        return Source(self.adapter.load(delta), bias=bias, magnitude=magnitude)

    def _cast(self, update: LowRank) -> LowRank:
        dtype = self.dtype
        if dtype is None and update.up.dtype != update.down.dtype:
            dtype = common(update.up.dtype, update.down.dtype)
        if dtype is None or (update.up.dtype == dtype and update.down.dtype == dtype):
            return update
        cast = update.to(dtype)
        if not bool(torch.isfinite(cast.up).all() and torch.isfinite(cast.down).all()):
            raise SurgeryError(f"the factors do not fit {str(dtype).removeprefix('torch.')}; try --dtype float32")
        return cast

    def _magnitude(self, target: Target, found: dict[str, Source], first: Delta, lycoris: bool) -> Tensor | None:
        vectors = {path: s.magnitude for path, s in found.items()}
        whole = vectors[target.sources[0]]
        if whole is None:
            return None
        if first.lycoris and whole.numel() != first.shape[0]:  # (1, in, 1 …)
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


def join_rows(pieces: Sequence[Piece], updates: dict[str, LowRank]) -> LowRank:
    """The update whose rows are the pieces', from top to bottom.

    Parts of one fused module have one lora_A between them, so they are put together as they were; others make up a
    block-diagonal lora_B, and the ranks add up.

    >>> one, two = LowRank(torch.ones(2, 1), torch.ones(1, 3)), LowRank(torch.ones(2, 1), 2 * torch.ones(1, 3))
    >>> join_rows([Piece(2, "q"), Piece(1), Piece(2, "k")], {"q": one, "k": two}).up.shape
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


def _rows(piece: Piece, updates: dict[str, LowRank], like: LowRank) -> Tensor:
    if piece.source is None:
        return like.up.new_zeros(piece.height, like.rank)
    return updates[piece.source].up[piece.rows]


def _unscaled(update: LowRank) -> LowRank:
    return LowRank(update.up.float() * update.scale, update.down.float())


def join_vectors(pieces: Sequence[Piece], vectors: dict[str, Tensor | None]) -> Tensor | None:
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


def portable(modules: Sequence[Module]) -> list[Module]:
    """One rank for all, zero-padded, and the scale in lora_B: alpha = r."""
    top = max((m.update.rank for m in modules), default=0)
    found = []
    for m in modules:
        more, u = top - m.update.rank, m.update
        up = u.up if u.scale == 1 else (u.up.float() * u.scale).to(u.up.dtype)
        found.append(replace(m, update=LowRank(pad(up, (0, more)), pad(u.down, (0, 0, 0, more)))))
    return found

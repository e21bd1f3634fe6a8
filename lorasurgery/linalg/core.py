"""Recompression: the SVD of Σ scaleᵢ·BᵢAᵢ from its factors, without the matrix itself.

With U = [B₁ B₂ …] and D = [A₁; A₂; …]ᵀ the sum is U·diag(scales)·Dᵀ. Thin QR of both sides leaves a core of R×R
numbers, R the sum of the ranks, whose singular values are those of the whole; Eckart–Young then gives every truncation
and its exact error. It is done in float64: thin factors make that cheap, and terms may cancel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.norms import corners, norm_of
from lorasurgery.linalg.svd import lapack_svd
from lorasurgery.linalg.thin import Thin, thin_qr
from lorasurgery.lowrank import LowRank, common, widened

# Singular values below float32's precision of the largest are rounding of the factors, not update.
NOISE = torch.finfo(torch.float32).eps
_CANCELLED = 1e-12  # of the terms' own size: what float64 leaves where they cancel
_PLAIN = 2.0**-40, 2.0**50  # sizes whose squares float32 can tell
_LARGEST = 2.0**400  # sizes whose squares and fourth powers float64 can tell
SMALLEST = 2.0**-400
_LARGE = 256  # cores wider than this, of which few directions are wanted, go the fast way


@dataclass(frozen=True)
class Core:
    """The singular values of a sum of low-rank terms, and what writes any truncation of it.

    >>> a = LowRank(torch.tensor([[3.0], [0.0]]), torch.tensor([[1.0, 0.0]]))
    >>> b = LowRank(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0, 2.0]]))
    >>> core = recompress([a, b])
    >>> [round(s, 6) for s in core.singular.tolist()], core.rank, round(core.error(1), 6)
    ([4.0, 3.0], 2, 0.6)

    Attributes:
        left: QR of U (m, R) and of D (n, R).
        right: QR of U (m, R) and of D (n, R).
        singular: all singular values, (min(m, n, R),) in float64 on the CPU, falling.
        x: the core's leading singular vectors, as columns.
        y: the core's leading singular vectors, as columns.
        matrix: the core itself.
        terms: What the sum is of, where the bases are of float32 and can't tell small errors.
        size: norm of the terms' rank-one parts, by which cancellation is measured.
    """

    left: Thin
    right: Thin
    singular: Tensor
    x: Tensor
    y: Tensor
    matrix: Tensor
    size: float
    terms: Sequence[LowRank] = ()

    @property
    def total(self) -> float:
        """‖ΔW‖_F²."""
        return float(self.singular.square().sum())

    @property
    def rank(self) -> int:
        """The numerical rank of the sum: σ above float32's precision of σ₁, and above what cancellation leaves."""
        if not len(self.singular):
            return 0
        floor = max(NOISE * float(self.singular[0]), _CANCELLED * self.size)
        return int((self.singular > floor).sum())

    @property
    def is_plain(self) -> bool:
        """Whether float32 holds factors of it to all their digits."""
        return _PLAIN[0] < self.size < _PLAIN[1]

    def tail(self, rank: int) -> float:
        """‖ΔW − ΔW_r‖_F² of the best approximation of this rank (Eckart & Young 1936): exact, not estimated."""
        return float(self.singular[rank:].square().sum())

    def error(self, rank: int) -> float:
        """‖ΔW − ΔW_r‖_F/‖ΔW‖_F of it."""
        return math.sqrt(self.tail(rank) / self.total) if self.total else 0.0

    def truncate(self, rank: int) -> LowRank:
        """The best approximation of at most this rank: up = U√S (m, r) and down = √S Vᵀ (r, n) in float32, scale 1."""
        r = min(rank, self.rank, self.x.shape[1])
        root = self.singular[:r].sqrt().to(self.x)
        up, down = self.left.times(self.x[:, :r] * root), self.right.times(self.y[:, :r] * root)
        return LowRank(up.to(torch.float32).mT.contiguous(), down.to(torch.float32))

    def losses(self, written: LowRank) -> list[float]:
        """‖ΔW − scale·up[:, :r]@down[:r]‖_F² for every r from 0 to the rank of factors that nearly say ΔW.

        In the coordinates of both bases: what lies outside of them is rounding, and orthogonal to all that is inside.
        Differences are taken before they are squared, so that nothing cancels.

        >>> core = recompress([LowRank(torch.diag(torch.tensor([4.0, 3.0])), torch.eye(2))])
        >>> [round(x, 9) for x in core.losses(core.truncate(2))]
        [25.0, 9.0, 0.0]
        """
        wide = self.left.rows.device, torch.float64
        up, down = written.up.to(*wide).mT * written.scale, written.down.to(*wide)  # (r, m), (r, n)
        if self.terms:
            return _left_of(self.terms, up, down)
        b, d = self.left.coordinates(up), self.right.coordinates(down)  # (k, r) each, on the CPU
        inside, whole = (b.mT @ b) * (d.mT @ d), (up @ up.mT).cpu() * (down @ down.mT).cpu()
        rest = self.matrix.to(torch.float64) - b @ d.mT
        dropped = (b * (rest @ d)).sum(0).flip(0).cumsum(0)  # ⟨what is left, the last directions⟩
        again = corners(inside.flip(0, 1))
        within = rest.square().sum() + torch.cat([torch.zeros(1).to(again), 2 * dropped + again]).flip(0)
        outside = torch.cat([torch.zeros(1).to(again), corners(whole - inside)])
        found: list[float] = (within + outside).clamp(min=0).tolist()
        return found

    def basis(self) -> Tensor:
        """An orthonormal basis (m, rank) of the sum's column space."""
        return self.left.times(self.x[:, : self.rank]).mT


def recompress(terms: Sequence[LowRank], most: int | None = None) -> Core:
    """The exact SVD of Σ scaleᵢ·upᵢ@downᵢ, for any mix of ranks, scales, signs and dtypes.

    >>> w = LowRank(torch.ones(3, 1), torch.ones(1, 2))
    >>> recompress([w, w.times(-1.0)]).rank
    0

    Args:
        terms: up (m, rᵢ), down (rᵢ, n), all of one shape (m, n) and on one device; at least one.
        most: No truncation above this rank will be asked for. Where it is far below the ranks' sum and the terms are
            well-conditioned, float32 and an eigensolver then tell the energies to about 1e-6 in half the time.

    Raises:
        SurgeryError: a factor holds NaN or infinity, or the update is beyond all measure with its scale.
    """
    if most is not None and sum(t.rank for t in terms) > max(_LARGE, 4 * most):
        fast = _leading(terms, most)
        if fast is not None:
            return fast
    left, right, core, size = _core(terms, torch.float64)
    if not size < _LARGEST:
        raise SurgeryError(beyond(size))
    x, s, yt = lapack_svd(core)
    return Core(left, right, s, x, yt.mT, core, size)


def _leading(terms: Sequence[LowRank], most: int) -> Core | None:
    """The same from float32 and the squared core; None where columns depend, terms cancel or σ falls too far."""
    left, right, core, size = _core(terms, torch.float32)
    if core.dtype != torch.float32 or not bool(torch.isfinite(core).all()) or not _PLAIN[0] < size < _PLAIN[1]:
        return None
    squares, vectors = torch.linalg.eigh(core @ core.mT)
    s = squares.flip(0).clamp(min=0).to(torch.float64).sqrt()
    x = vectors.flip(1)[:, :most]
    if float(s.square().sum()) < 0.1 * size**2 or s[most - 1] < 0.01 * s[0]:
        return None
    return Core(left, right, s, x, (core.mT @ x) / s[:most].to(x), core, size, terms)


def inner(a: Sequence[LowRank], b: Sequence[LowRank], dtype: torch.dtype = torch.float64) -> float:
    """⟨ΔW_a, ΔW_b⟩ of two sums of terms of one shape, from the factors, with products in `dtype`.

    >>> w = LowRank(torch.ones(3, 1), torch.ones(1, 2))
    >>> inner([w], [w, w.times(-0.5)])
    3.0
    """
    (u, d, g), (v, e, h) = stack(a, dtype), stack(b, dtype)
    products = (u @ v.mT).to(torch.float64) * (d @ e.mT).to(torch.float64)
    return float(g @ products.cpu() @ h)


def distance(exact: LowRank, written: LowRank) -> float:
    """‖exact − written‖_F of two factorings that agree nearly, such as one and its rounding; no digits cancel.

    >>> a = LowRank(torch.ones(3, 1), torch.ones(1, 3))
    >>> distance(a, LowRank(a.up, a.down * 1.5)), distance(a, LowRank(a.up * 2, a.down / 2))
    (1.5, 0.0)

    Args:
        written: A power of two may have gone over from one side to the other. Scales are left aside.
    """
    wide = widened(common(exact.up.dtype, exact.down.dtype))
    exact, (up, down) = exact.to(wide), (written.up.to(wide), written.down.to(wide))
    if not bool(torch.isfinite(up).all() and torch.isfinite(down).all()):
        return math.inf
    sizes = [float(torch.linalg.vector_norm(x.cpu(), dtype=torch.float64)) for x in (exact.up, up, exact.down, down)]
    shift = 2.0 ** round(math.log2(sizes[1] / sizes[0])) if all(sizes) else 1.0
    exact = LowRank(exact.up * shift, exact.down / shift)
    plain = all(_PLAIN[0] < s < 1 / _PLAIN[0] for s in sizes)
    terms = [LowRank(exact.up - up, exact.down), LowRank(up, exact.down - down)]
    return math.sqrt(max(inner(terms, terms, torch.float32 if plain else torch.float64), 0.0))


def beyond(size: float) -> str:
    """What is said of an update that can't be computed with.

    >>> beyond(1e300)
    'its update has a norm of about 1e+300, which is beyond what can be computed with; look at its alpha and weight'
    """
    return (
        f"its update has a norm of about {size:.0e}, which is beyond what can be computed with; look at its alpha and "
        "weight"
    )


def _left_of(terms: Sequence[LowRank], up: Tensor, down: Tensor) -> list[float]:
    """‖Σ terms‖² − 2⟨Σ terms, BA⟩ + ‖BA‖² for the first r rows of Bᵀ (R, m) and A (R, n), all in float64."""
    u, d, scales = stack(terms, torch.float64)
    total = scales @ ((u @ u.mT) * (d @ d.mT)).cpu() @ scales
    inner = scales @ ((u @ up.mT) * (d @ down.mT)).cpu()
    left = total - 2 * inner.cumsum(0) + corners(((up @ up.mT) * (down @ down.mT)).cpu())
    found: list[float] = torch.cat([total[None], left]).clamp(min=0).tolist()
    return found


def _core(terms: Sequence[LowRank], dtype: torch.dtype) -> tuple[Thin, Thin, Tensor, float]:
    """QR of both sides and the core between them, on the CPU, where small matrices are fastest."""
    up, down, scales = stack(terms, dtype)
    left, right = thin_qr(up), thin_qr(down)
    weights = scales * left.norms * right.norms
    size = norm_of(weights.to(torch.float64))
    wide = torch.promote_types(left.r.dtype, right.r.dtype)
    return left, right, (left.r.to(wide) * weights.to(wide)) @ right.r.to(wide).mT, size


def stack(terms: Sequence[LowRank], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Uᵀ (R, m) and Dᵀ (R, n) in `dtype`, and the scales (R,) in float64 on the CPU."""
    scales = torch.cat([torch.full((t.rank,), t.scale, dtype=torch.float64) for t in terms])
    return _rows([t.up.mT for t in terms], dtype), _rows([t.down for t in terms], dtype), scales


def _rows(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    device = parts[0].device if parts[0].device.type != "mps" else torch.device("cpu")  # MPS has no float64
    whole = torch.empty(sum(p.shape[0] for p in parts), parts[0].shape[1], dtype=dtype, device=device)
    start = 0
    for part in parts:
        whole[start : start + part.shape[0]] = part
        start += part.shape[0]
    return whole

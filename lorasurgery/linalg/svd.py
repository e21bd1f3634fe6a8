"""Truncated SVD of an update, exact or randomized, with the certificate of its error.

Both give U, S, Vᵀ with U·S·Vᵀ the projection of ΔW on the columns of U, so that ‖ΔW − USVᵀ‖² = ‖ΔW‖² − Σσ²
holds by Pythagoras, whatever U is (Halko, Martinsson & Tropp 2011, section 5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.blocks import Blocks, blocked, dense
from lorasurgery.linalg.krylov import LEAST, BlockKrylov, Coarse
from lorasurgery.linalg.norms import squared_norm
from lorasurgery.linalg.rank import RankChoice, numerical_rank

SvdMethod = Literal["auto", "randomized", "exact"]

# Passes end when another would lower the squared error by less than this share: 0.05% of the error itself.
GAIN = 1e-3
INFINITE = (
    "the difference is not finite: one of the two checkpoints holds NaN or infinity here; `lorasurgery verify` "
    "says which, --allow-nonfinite stores the tensor whole"
)
_SMALL = 192  # up to this many rows or columns LAPACK is as fast as a sketch


@dataclass(frozen=True)
class TruncatedSVD:
    """U (m, r), S (r,) in float64 and falling, Vᵀ (r, n), and ‖ΔW‖_F² of the whole.

    >>> found = exact_svd(torch.diag(torch.tensor([4.0, 3.0])))
    >>> found.truncate(1).error
    0.6

    Attributes:
        beyond: Where energy or tolerance chose the rank: the same with all directions that are at hand, in case that
            rounding the factors makes another one necessary.
    """

    u: Tensor
    s: Tensor
    vt: Tensor
    total: float
    passes: int = 0
    beyond: TruncatedSVD | None = field(default=None, repr=False)

    def truncate(self, rank: int) -> TruncatedSVD:
        """The first `rank` directions."""
        return TruncatedSVD(self.u[:, :rank], self.s[:rank], self.vt[:rank], self.total, self.passes)

    @property
    def energy(self) -> float:
        """Σσ²/‖ΔW‖²; 1 for a zero matrix."""
        return min(1.0, float(self.s.square().sum()) / self.total) if self.total else 1.0

    @property
    def error(self) -> float:
        """‖ΔW − USVᵀ‖_F/‖ΔW‖_F by Pythagoras."""
        return round(math.sqrt(max(0.0, 1 - self.energy)), 15)


def truncated_svd(
    delta: Tensor | Blocks, choice: RankChoice, *, method: SvdMethod = "auto", seed: int = 0, gain: float = GAIN,
    to_come: float = 0.0,
) -> TruncatedSVD:  # fmt: skip
    """The leading singular directions of ΔW, as many as `choice` asks for and ΔW has.

    >>> found = truncated_svd(torch.diag(torch.tensor([2.0, 1.0, 0.0])), RankChoice(rank=3))
    >>> found.s.tolist()
    [2.0, 1.0]

    Args:
        delta: (m, n), float32 or float64, finite, on any device; in blocks where memory can't hold it.
        method: `exact` is LAPACK or cuSOLVER on the whole matrix; `randomized` is block Krylov iteration
            (Musco & Musco 2015, algorithm 2); `auto` takes the exact one where the sketch would not be smaller, and for
            a given rank makes the sketch from the matrix in bfloat16, where it has that and is far from that rank.
        seed: For the random start; the same seed and kind of device give the same bits.
        gain: Randomized passes go on until one lowers the squared error by less than this share.
        to_come: Passes that the caller adds, to be counted on: half a one where the factors are `fitted`.

    Raises:
        SurgeryError: ΔW holds NaN or infinity.

    Returns:
        Directions with σ above the rounding noise only, so the rank can be lower than asked for, even 0.
    """
    matrix = blocked(delta)
    total = finite(squared_norm(matrix))
    if total == 0:
        return nothing(matrix.shape, matrix.dtype, matrix.device)
    found = None
    if method != "exact" and (method == "randomized" or min(matrix.shape) > _SMALL):
        if matrix.coarse and may_round(choice, method):
            found = randomized_svd(Coarse(matrix), choice, total, seed=seed, gain=gain, to_come=to_come, least=LEAST)
        found = found or randomized_svd(matrix, choice, total, seed=seed, gain=gain, to_come=to_come)
    if found is None:
        found = exact_svd(dense(matrix), total)
    return chosen(found, choice)


def may_round(choice: RankChoice, method: SvdMethod) -> bool:
    """Whether the sketch may be of a rounded matrix: not where its energies choose the rank.

    >>> may_round(RankChoice(rank=8), "auto"), may_round(RankChoice(energy=0.9), "auto")
    (True, False)
    """
    return method == "auto" and choice.directions() is not None


def finite(total: float) -> float:
    """‖ΔW‖² as it is, or the reason why there can be no decomposition.

    >>> finite(4.0)
    4.0

    Raises:
        SurgeryError: it is NaN or infinite.
    """
    if not math.isfinite(total):
        raise SurgeryError(INFINITE)
    return total


def chosen(found: TruncatedSVD, choice: RankChoice) -> TruncatedSVD:
    """The directions that `choice` asks for, as far as they stand above the rounding noise of U's dtype.

    >>> len(chosen(exact_svd(torch.diag(torch.tensor([2.0, 1.0, 1e-9]))), RankChoice(rank=3)).s)
    2
    """
    wanted = choice.choose(found.s.square().tolist(), found.total)
    rank = len(found.s) if wanted is None else wanted
    size = max(found.u.shape[0], found.vt.shape[1])
    noise = numerical_rank(found.s.tolist(), size, torch.finfo(found.u.dtype).eps)
    kept = found.truncate(min(rank, noise))
    return kept if choice.allowed is None else replace(kept, beyond=found.truncate(noise))


def nothing(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> TruncatedSVD:
    """The decomposition of zero: no directions.

    >>> nothing((2, 3), torch.float32, torch.device("cpu")).error
    0.0
    """
    u, v = (torch.empty(side, 0, dtype=dtype, device=device) for side in shape)
    return TruncatedSVD(u, torch.zeros(0, dtype=torch.float64), v.mT, 0.0)


def exact_svd(delta: Tensor, total: float | None = None) -> TruncatedSVD:
    """The full thin SVD by LAPACK or cuSOLVER; `total` is ‖ΔW‖² where it is known already.

    >>> exact_svd(torch.zeros(2, 3)).total
    0.0
    """
    u, s, vt = lapack_svd(delta)
    return TruncatedSVD(u, s.cpu().to(torch.float64), vt, squared_norm(delta) if total is None else total)


def lapack_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """torch.linalg.svd, thin, and in float64 where float32 does not converge.

    >>> lapack_svd(torch.diag(torch.tensor([1.0, 2.0])))[1].tolist()
    [2.0, 1.0]

    Raises:
        SurgeryError: it does not converge there either.
    """
    try:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined,unused-ignore]
        wide = matrix.cpu() if matrix.device.type == "mps" else matrix
        try:
            u, s, vt = (x.to(matrix) for x in torch.linalg.svd(wide.to(torch.float64), full_matrices=False))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined,unused-ignore]
            raise SurgeryError("LAPACK finds no singular values for it; --svd randomized needs none of it") from None
    return u, s, vt


def randomized_svd(
    delta: Tensor | Blocks, choice: RankChoice, total: float, *, seed: int = 0, gain: float = GAIN,
    to_come: float = 0.0, max_passes: int = 60, least: float = 0.0,
) -> TruncatedSVD | None:  # fmt: skip
    """Block Krylov iteration with its stopping rule; None where the sketch would grow to the matrix itself.

    Args:
        total: ‖ΔW‖_F², positive and finite.
        least: None too, and soon, where the error would be lower than this.
    """
    matrix = blocked(delta)
    krylov = BlockKrylov(matrix, _block_size(choice, min(matrix.shape)), seed)
    history: list[list[float]] = []
    rank: int | None = None
    while krylov.passes < max_passes:
        if 2 * (krylov.width + krylov.block) > min(matrix.shape):
            return None
        exhausted = krylov.step()
        history.append(krylov.squares())
        rank = choice.choose(history[-1], total)
        if least and total - sum(history[-1][:rank]) < least**2 * total:
            return None
        if exhausted and rank is None:
            return None  # the asked-for energy lies beyond what float32 can tell
        if exhausted or (rank is not None and _settled(history, rank, total, gain, to_come)):
            break
    u, s, w = krylov.ritz(rank if rank is not None else krylov.width)
    u, vt = (w, u.mT) if krylov.tall else (u, w.mT)
    return TruncatedSVD(u, s, vt, total, krylov.passes)


def _settled(history: list[list[float]], rank: int, total: float, gain: float, to_come: float) -> bool:
    """Whether another pass, after those to come, would add less than `gain` of the squared error at this rank.

    The last pass's gain bounds the next one's; from three passes on, their ratio foretells all that is left,
    with room to spare, for Krylov spaces converge faster than geometrically.
    """
    energies = [sum(squares[:rank]) for squares in history if len(squares) >= rank]
    if len(energies) < 2:
        return False
    rest = total - energies[-1]
    if rest < 1e-5 * total:  # float32 data can't tell it as a difference; the basis's own tail can
        rest = sum(history[-1][rank:])
    last = energies[-1] - energies[-2]
    if last <= gain * rest:
        return True
    if len(energies) < 3 or energies[-2] <= energies[-3]:
        return False
    ratio = last / (energies[-2] - energies[-3])
    return ratio < 1 and last * ratio ** (1 + to_come) / (1 - ratio) <= gain * rest


def _block_size(choice: RankChoice, shorter: int) -> int:
    """As wide as the rank asked for (Musco & Musco 2015, theorem 1); 64 where the rank is not known in advance.

    Up to 32 columns a product takes the time of reading A; GEMMs like multiples of 16.
    """
    rank = choice.directions()
    wide = 64 if rank is None else max(32, min(rank, shorter))
    return -(-wide // 16) * 16


WORKSPACE = 9  # times the bytes of float32 matrices that a decomposition holds at most, they included


def batched_svd(deltas: Tensor, choice: RankChoice) -> list[TruncatedSVD]:
    """The leading singular directions of each matrix of a stack, as `truncated_svd` would choose them.

    >>> found = batched_svd(torch.diag_embed(torch.tensor([[3.0, 4.0], [0.0, 0.0]])), RankChoice(rank=1))
    >>> [(f.s.tolist(), f.error) for f in found]
    [([4.0], 0.6), ([], 0.0)]

    Args:
        deltas: (B, m, n), float32 or float64, on any device; whatever crosses to the CPU does so for all B at once.

    Raises:
        SurgeryError: a matrix holds NaN or infinity.

    Returns:
        B decompositions; U and Vᵀ on the device of `deltas` and in its dtype, views of one tensor each.
    """
    shape = (deltas.shape[1], deltas.shape[2])
    wide = (deltas.cpu() if deltas.device.type == "mps" else deltas).to(torch.float64)  # MPS has no float64
    totals = [finite(t) for t in squared_norms(wide)]
    u, s, v = _by_lapack(deltas) if deltas.dtype == torch.float64 else _by_gram(wide, choice.upper(*shape))
    u, v, s = u.to(deltas.dtype).to(deltas.device), v.to(deltas.dtype).to(deltas.device), s.cpu()
    found = [TruncatedSVD(u[i], s[i], v[i].mT, total) for i, total in enumerate(totals)]
    return [chosen(f, choice) if f.total else nothing(shape, deltas.dtype, deltas.device) for f in found]


def squared_norms(matrices: Tensor) -> list[float]:
    """‖A‖_F² of each matrix of a stack (B, m, n), brought to the CPU at once.

    >>> squared_norms(torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]]))
    [25.0, 1.0]
    """
    found: list[float] = torch.linalg.vector_norm(matrices, dim=(1, 2)).square().tolist()
    return found


def _by_gram(a: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (B, m, count), σ (B, count) falling and V (B, n, count) of a stack (B, m, n) in float64.

    The eigenvectors of the shorter side's Gram matrix are one side's directions, X; the other side is Z = AᵀX, and
    σ = ‖z‖ is more exact than the root of the eigenvalue, for errors of X enter only squared. So U·diag(σ)·Vᵀ is
    XXᵀA to rounding, and the error by Pythagoras holds. A σ of 0 gives a column of zeros in V.
    """
    if a.shape[1] > a.shape[2]:
        v, s, u = _by_gram(a.mT, count)
        return u, s, v
    gram = a @ a.mT  # (B, m, n) @ (B, n, m) -> (B, m, m)
    x = torch.linalg.eigh(gram).eigenvectors[..., -count:].flip(-1)
    del gram
    z = a.mT @ x  # (B, n, m) @ (B, m, count) -> (B, n, count)
    s, order = torch.linalg.vector_norm(z, dim=1).sort(dim=1, descending=True)  # among equals, rounding may turn them
    x = x.take_along_dim(order[:, None], dim=2)
    z = z.take_along_dim(order[:, None], dim=2)
    return x, s, z.mul_(torch.where(s > 0, 1 / s, 0.0)[:, None])


def _by_lapack(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of float64 data, whose last digits a Gram matrix would lose: by LAPACK or cuSOLVER."""
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    return u, s, vt.mT

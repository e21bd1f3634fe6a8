"""Truncated SVDs of many small matrices of one shape at once: a few batched products instead of many small ones.

The Gram matrix squares the condition: in float64 it tells σ from σ₁ down to about 1e-8, in float32 data only those
above 1e-7 mean anything. So float32 loses nothing by it (Golub & Van Loan, Matrix Computations, section 8.6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorasurgery.linalg.rank import RankChoice
from lorasurgery.linalg.svd import TruncatedSVD, chosen, finite, nothing

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

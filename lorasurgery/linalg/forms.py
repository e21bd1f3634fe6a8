"""Updates that are products of other kinds than B·A: Tucker, Hadamard and Kronecker (LyCORIS, arXiv:2309.14859).

Each has an exact form as thin factors, so that a truncation is as good as an SVD of the matrix; where those factors
would be wider than the matrix itself, `dense` is the form to take.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.thin import NOT_FINITE
from lorasurgery.lowrank import LowRank


def tucker(mid: Tensor, down: Tensor) -> Tensor:
    """The wide factor of a Tucker product: Σₙ mid[m, n, …]·down[n, j], flattened to (r, in·k).

    >>> tucker(torch.ones(2, 2, 3, 3), torch.ones(2, 4)).shape
    torch.Size([2, 36])

    Args:
        mid: The core (r, r, *kernel).
        down: (r, in), or (r, in, 1, 1).
    """
    core = mid.flatten(2)  # (r, r, k)
    return torch.einsum("mnk,nj->mjk", core, down.flatten(1)).flatten(1)


def hadamard(one: LowRank, two: LowRank) -> Tensor:
    """(B₁A₁) ∘ (B₂A₂) as a matrix, without the scales (LoHa)."""
    return (one.up @ one.down) * (two.up @ two.down)


def hadamard_factors(one: LowRank, two: LowRank) -> LowRank:
    """The same as factors of rank r₁·r₂: the row-wise and the column-wise Khatri–Rao products.

    >>> a, b = LowRank(torch.tensor([[2.0]]), torch.tensor([[3.0]])), LowRank(torch.tensor([[5.0]]), torch.ones(1, 1))
    >>> hadamard_factors(a, b).dense()
    tensor([[30.]])
    """
    up = torch.einsum("oi,oj->oij", one.up, two.up).flatten(1)  # (out, r₁·r₂)
    down = torch.einsum("ik,jk->ijk", one.down, two.down).flatten(0, 1)  # (r₁·r₂, in)
    return LowRank(up, down)


def kronecker(left: Tensor, right: Tensor) -> Tensor:
    """left ⊗ right as a matrix (a·c, b·d), without the scale (LoKr)."""
    return torch.kron(left.contiguous(), right.contiguous())


def kronecker_factors(left: Tensor, right: Tensor) -> LowRank:
    """The same as factors, σ falling: the SVD of a Kronecker product is that of its two halves.

    >>> kronecker_factors(torch.eye(2), torch.ones(3, 3)).rank
    2

    Raises:
        SurgeryError: a value that is not finite.
    """
    if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise SurgeryError(NOT_FINITE)
    (u, s, vt), (x, t, yt) = (torch.linalg.svd(m.to(torch.float64), full_matrices=False) for m in (left, right))
    i, j = (k[m > torch.finfo(torch.float32).eps * m.max()] for k, m in ((torch.arange(len(s)), s),
                                                                        (torch.arange(len(t)), t)))  # fmt: skip
    values = (s[i][:, None] * t[j]).flatten()
    order = values.argsort(descending=True)
    root = values[order].sqrt()
    up = torch.kron(u[:, i].contiguous(), x[:, j].contiguous())[:, order] * root
    down = root[:, None] * torch.kron(vt[i].contiguous(), yt[j].contiguous())[order]
    return LowRank(up.to(torch.float32), down.to(torch.float32))

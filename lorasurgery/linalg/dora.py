"""DoRA: W' = m·V/‖V‖ with V = W + ΔW, the norm taken for each output feature (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

import torch
from torch import Tensor

from lorasurgery.linalg.norms import row_blocks
from lorasurgery.lowrank import LowRank


def decomposed(weight: Tensor, update: LowRank, magnitude: Tensor, *, by_column: bool) -> Tensor:
    """The merged weight of a DoRA adapter, in the weight's precision.

    >>> w = torch.tensor([[3.0, 0.0]])
    >>> decomposed(w, LowRank(torch.ones(1, 1), torch.tensor([[0.0, 4.0]])), torch.tensor([10.0]), by_column=False)
    tensor([[6., 8.]])

    Args:
        weight: W (m, n), float32 or float64.
        update: ΔW, up (m, r), down (r, n).
        magnitude: (m,), or (n,) where output features are columns (Conv1D, embeddings).
    """
    up, down = update.up.to(weight.dtype), update.down.to(weight.dtype)
    out = torch.empty_like(weight)
    squares = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    wanted = magnitude.to(weight.dtype).flatten()
    for rows in row_blocks(weight):
        out[rows] = torch.addmm(weight[rows], up[rows], down, alpha=update.scale)  # (b, r) @ (r, n) -> (b, n)
        if by_column:
            squares += out[rows].to(torch.float64).square().sum(0)
        else:
            out[rows] *= _ratio(wanted[rows], torch.linalg.vector_norm(out[rows], dim=1))[:, None]
    return out.mul_(_ratio(wanted, squares.sqrt().to(weight.dtype))) if by_column else out


def _ratio(wanted: Tensor, norms: Tensor) -> Tensor:
    return torch.where(norms > 0, wanted / norms, 0.0)  # a direction of zero stays zero

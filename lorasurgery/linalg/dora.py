"""DoRA: W' = m·V/‖V‖ with V = W + ΔW, the norm taken for each output feature (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

import torch
from torch import Tensor

from lorasurgery.linalg.norms import row_blocks
from lorasurgery.lowrank import Update


def decomposed(weight: Tensor, update: Update, magnitude: Tensor, strength: float = 1.0, *, by_column: bool) -> Tensor:
    """W + strength·(W' − W), the merged weight of a DoRA adapter of PEFT's, in the weight's precision.

    >>> from lorasurgery.lowrank import LowRank
    >>> w = torch.tensor([[3.0, 0.0]])
    >>> decomposed(w, LowRank(torch.ones(1, 1), torch.tensor([[0.0, 4.0]])), torch.tensor([10.0]), by_column=False)
    tensor([[6., 8.]])

    Args:
        weight: W (m, n), float32 or float64.
        update: ΔW (m, n).
        magnitude: (m,), or (n,) where output features are columns (Conv1D, embeddings).
        strength: The adapter's weight; any real number.
        by_column: Whether output features are columns.
    """
    update = update.to(weight.dtype)
    out = torch.empty_like(weight)
    squares = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    wanted = magnitude.to(weight.dtype).flatten()
    for rows in row_blocks(weight):
        out[rows] = weight[rows] + update.rows(rows, weight.dtype)
        if by_column:
            squares += out[rows].to(torch.float64).square().sum(0)
        else:
            out[rows] *= _ratio(wanted[rows], torch.linalg.vector_norm(out[rows], dim=1))[:, None]
    if by_column:
        out.mul_(_ratio(wanted, squares.sqrt().to(weight.dtype)))
    return out if strength == 1 else weight.lerp(out, strength)


def rescaled(weight: Tensor, update: Update, magnitude: Tensor, strength: float) -> Tensor:
    """The same as LyCORIS defines it: V·(strength·(m/‖V‖ − 1) + 1), so that strength 0 leaves V = W + ΔW.

    >>> from lorasurgery.lowrank import Dense
    >>> rescaled(torch.tensor([[3.0, 4.0]]), Dense(torch.zeros(1, 2)), torch.tensor([[10.0]]), 0.5)
    tensor([[4.5000, 6.0000]])

    Args:
        weight: W (out, in, *kernel), float32 or float64.
        update: ΔW (out, in·kernel).
        magnitude: (out, 1 …), or (1, in, 1 …): the axis of the norm is where it is not 1.
    """
    value = weight + update.to(weight.dtype).dense().reshape(weight.shape)
    wanted = magnitude.to(weight.dtype).reshape(*magnitude.shape, *[1] * (weight.ndim - magnitude.ndim))
    dims = [i for i, size in enumerate(wanted.shape) if size == 1 and i < value.ndim]
    norms = torch.linalg.vector_norm(value, dim=dims, keepdim=True) if dims else value.abs()
    return value.mul_(strength * (_ratio(wanted, norms) - 1) + 1)


def _ratio(wanted: Tensor, norms: Tensor) -> Tensor:
    return torch.where(norms > 0, wanted / norms, 0.0)  # a direction of zero stays zero

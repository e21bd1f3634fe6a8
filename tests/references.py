"""Definitions written out on dense matrices, for the tests of linalg/ and ops/ to share."""

from __future__ import annotations

import torch
from peft.utils import merge_utils
from torch import Tensor


def best(delta: Tensor, rank: int) -> Tensor:
    """The SVD truncation of a matrix."""
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def knots(dense: list[Tensor], weights: list[float], density: float) -> Tensor:
    """The paper's way: SVD of the dense updates side by side, TIES on the Vᵢᵀ, and back."""
    u, s, vt = torch.linalg.svd(torch.cat(dense, 1).double(), full_matrices=False)
    rank = int((s > 1e-6 * s[0]).sum())
    parts = [v * (1 if w > 0 else -1) for v, w in zip(vt[:rank].split(dense[0].shape[1], 1), weights, strict=True)]
    merged = merge_utils.ties(parts, torch.tensor([abs(w) for w in weights], dtype=torch.float64), density)
    return (u[:, :rank] * s[:rank]) @ merged

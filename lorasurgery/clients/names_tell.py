"""What kind of layer a matrix belongs to, as far as its path tells."""

from __future__ import annotations

from lorasurgery.adapters.model_names.naming import (
    CONV1D_LEAVES,
    CONV1D_MODELS,
    is_embedding,
    is_position_table,
    is_router,
)
from lorasurgery.adapters.model_names.skeleton import Kind


def told_by_name(path: str, model_type: str | None) -> Kind:
    """The kind that a path's own words tell.

    >>> [told_by_name(p, "gpt2") for p in ("transformer.wte", "h.0.attn.c_attn", "lm_head")]
    ['embedding', 'conv1d', 'linear']
    """
    if is_position_table(path) or is_router(path):
        return "other"
    if is_embedding(path):
        return "embedding"
    return "conv1d" if model_type in CONV1D_MODELS and path.rpartition(".")[2] in CONV1D_LEAVES else "linear"

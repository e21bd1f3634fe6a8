"""The names of the ways to blend. No torch here: help and plans use them."""

from __future__ import annotations

from typing import Literal

Elementwise = Literal["ties", "dare-linear", "dare-ties", "magnitude-prune"]
"""Methods whose result is a dense matrix, made entry by entry."""

BlendMethod = Literal["linear", "ties", "dare-linear", "dare-ties", "magnitude-prune", "knots-ties", "cat"]

ELEMENTWISE: tuple[Elementwise, ...] = ("ties", "dare-linear", "dare-ties", "magnitude-prune")
METHODS: tuple[BlendMethod, ...] = ("linear", *ELEMENTWISE, "knots-ties", "cat")

"""Block weights applied: each module's own strength, to a plan of edits (merge) or to the terms of a blend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.image_names.blocks import BlockWeights, check_patterns, names_of, parse_block_weight
from lorasurgery.adapters.model_names.naming import module_of
from lorasurgery.checkpoint.tensor_reader import ModelHeaders
from lorasurgery.errors import MismatchError, UsageError, size_of
from lorasurgery.ops.placement.edits import Contribution, Edit, EditPlan
from lorasurgery.ops.placement.plan import plan_edits

if TYPE_CHECKING:
    pass


class Blocks:
    """The block weights of one call, for all of its adapters.

    Args:
        given: As on the command line.
        adapters: In the order given; a pattern that means none of their modules is wrong usage.
        base: Whose names count too.
        plan: Which module is which tensor of the base.
        known: The adapters with the modules that were left out, which patterns may name too.
    """

    def __init__(
        self, given: Sequence[str], adapters: Sequence[Adapter], base: ModelHeaders | None = None,
        plan: EditPlan | None = None, known: Sequence[Adapter] = (),
    ) -> None:  # fmt: skip
        self.adapters = list(adapters)
        self.pipeline = bool(base and base.parts)
        parsed = [parse_block_weight(text) for text in given]
        tensors = _tensors(plan, self.adapters) if plan else {}
        modules = [[self._names(p, tensors.get((i, p), ())) for p in _paths(a)]
                   for i, a in enumerate(known or self.adapters)]  # fmt: skip
        check_patterns(parsed, modules)
        self._weights = [BlockWeights(parsed, i + 1, modules[i]) for i in range(len(self.adapters))]

    def of(self, adapter: Adapter, path: str, tensor: str = "") -> float:
        """The strength of one module of an adapter, by its own path and its tensor in the base."""
        number = next(i for i, a in enumerate(self.adapters) if a is adapter)
        return self._weights[number].of(self._names(path, (tensor,) if tensor else ()))

    def _names(self, path: str, tensors: Sequence[str]) -> list[str]:
        found = [n for t in tensors for n in names_of(path, module_of(t), pipeline=self.pipeline)]
        return list(dict.fromkeys(found or names_of(path)))


def weighed_plan(
    base: ModelHeaders, adapters: Sequence[Adapter], weights: Sequence[float], given: Sequence[str], *,
    replaces: bool = True,
) -> EditPlan:  # fmt: skip
    """plan_edits, with the strength of every term multiplied by its module's block weight; a term of weight 0 goes.

    A module that a pattern with weight 0 means by its name in the file is not looked for in the base at all.

    Raises:
        UsageError: a pattern that means nothing, a list that does not fit.
        MismatchError: a tensor that can only be taken whole, and as plan_edits.
    """
    left = [_without_zeros(given, i + 1, a) for i, a in enumerate(adapters)] if given else list(adapters)
    plan = plan_edits(base, left, weights, replace=replaces)
    if not given:
        return plan
    blocks = Blocks(given, left, base, plan, adapters)
    for name, edit in list(plan.edits.items()):
        if not (edit.contributions or edit.replacement or edit.rows):
            continue
        _weigh(edit, blocks)
        empty = not (edit.contributions or edit.replacement or edit.rows)
        if empty and edit.source is not None and edit.source.name == name:
            del plan.edits[name]
    return plan


def _without_zeros(given: Sequence[str], number: int, adapter: Adapter) -> Adapter:
    patterns = [item for item in map(parse_block_weight, given) if item.pattern]
    weights = BlockWeights(patterns, number, [])
    out = {path for path in _paths(adapter) if weights.of(names_of(path)) == 0}
    return adapter.without(out) if out else adapter


def _weigh(edit: Edit, blocks: Blocks) -> None:
    weighed = [replace(c, weight=c.weight * blocks.of(c.adapter, _path(c), edit.tensor)) for c in edit.contributions]
    edit.contributions = [c for c in weighed if c.weight]
    edit.rows = [
        replace(r, weight=r.weight * blocks.of(r.adapter, module_of(edit.tensor), edit.tensor)) for r in edit.rows
    ]
    edit.rows = [r for r in edit.rows if r.weight]
    old = edit.replacement
    if old is None or old.adapter is None:
        return
    factor = blocks.of(old.adapter, module_of(old.name), edit.tensor)
    if factor != 1 and (edit.source is None or edit.source.shape != old.info.shape):
        was = size_of(edit.source.shape) if edit.source else "nothing"
        raise MismatchError(
            f"{old.adapter.path}: {old.name} changes the shape from {was} to {size_of(old.info.shape)}, so it can only "
            f"be taken whole; give it a block weight of 1 instead of {factor:g}"
        )
    edit.replacement = replace(old, weight=old.weight * factor) if factor else None


def _path(term: Contribution) -> str:
    return module_of(term.diff) if term.delta is None else term.delta.parameter or term.delta.path


def _paths(adapter: Adapter) -> list[str]:
    whole = [module_of(n) for n in (*adapter.diffs, *adapter.replaced, *adapter.tokens)]
    return list(dict.fromkeys([*(d.parameter or p for p, d in adapter.deltas.items()), *whole]))


def _tensors(plan: EditPlan, adapters: Sequence[Adapter]) -> dict[tuple[int, str], list[str]]:
    """The base's tensors of each module, by the adapter's place and path."""
    places = {id(a): i for i, a in enumerate(adapters)}
    found: dict[tuple[int, str], list[str]] = {}
    for edit in plan.edits.values():
        for term in edit.contributions:
            found.setdefault((places[id(term.adapter)], _path(term)), []).append(edit.tensor)
        if edit.replacement and edit.replacement.adapter:
            key = (places[id(edit.replacement.adapter)], module_of(edit.replacement.name))
            found.setdefault(key, []).append(edit.tensor)
    return found


def check_weights(weights: Sequence[float], adapters: int) -> list[float]:
    """Give every adapter its strength; the n-th weight belongs to the n-th adapter, the rest are 1.

    >>> check_weights([0.5], 2)
    [0.5, 1.0]
    """
    if not adapters:
        raise UsageError("no adapter given; name at least one adapter folder")
    if len(weights) > adapters:
        raise UsageError(f"{len(weights)} weights for {adapters} adapters; the n-th -w belongs to the n-th adapter")
    for weight in weights:
        if not math.isfinite(weight):
            raise UsageError(f"weight {weight} is not a finite number")
    return [float(w) for w in weights] + [1.0] * (adapters - len(weights))

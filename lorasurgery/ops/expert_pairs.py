"""Experts that PEFT holds as one parameter: which tensors of two checkpoints make up each, settled from headers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lorasurgery.adapters.fused import is_turned
from lorasurgery.errors import MismatchError, UsageError
from lorasurgery.ops.pairs import Pair


@dataclass(frozen=True)
class ExpertPair(Pair):
    """All experts of one parameter; `base` and `tuned` are its first tensor's, `name` is what messages call it.

    Args:
        members: The one three-dimensional tensor, or each expert's matrices in order (gate before up).
        turned: The tensor is stored (experts, in, out).
    """

    members: tuple[Pair, ...] = ()
    turned: bool = False

    @property
    def is_stack(self) -> bool:
        """Whether one tensor holds all experts."""
        return len(self.tuned.shape) == 3

    @property
    def tensors(self) -> tuple[Pair, ...]:
        """The tensors on disk."""
        return self.members

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in) of one expert as PEFT holds it."""
        shape = self.tuned.shape
        if self.is_stack:
            return (shape[2], shape[1]) if self.turned else (shape[1], shape[2])
        return shape[0] * (len(self.members) // self.count), shape[1]

    def of(self, expert: int) -> tuple[Pair, ...]:
        """The tensors that one expert's matrix is made of, from top to bottom."""
        if self.is_stack:
            return self.members
        parts = len(self.members) // self.count
        return self.members[expert * parts : (expert + 1) * parts]


def group_experts(pairs: Sequence[Pair], config: dict[str, Any]) -> list[Pair]:
    """Put the tensors of each fused parameter together, in the place of the first of them.

    Raises:
        UsageError: --target or --exclude mean some of a parameter's tensors only.
        MismatchError: an expert is missing, or has another shape than the others.
    """
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        if pair.place is not None and pair.treatment in ("experts", "skipped"):
            groups[pair.place.parameter].append(pair)
    found: list[Pair] = []
    done: set[str] = set()
    for pair in pairs:
        if pair.place is None or pair.treatment != "experts":
            found.append(pair)
        elif pair.place.parameter not in done:
            done.add(pair.place.parameter)
            found.append(_group(pair.place.parameter, groups[pair.place.parameter], config))
    return found


def _group(parameter: str, members: list[Pair], config: dict[str, Any]) -> ExpertPair:
    left_out = [m for m in members if m.treatment == "skipped"]
    if left_out:
        raise UsageError(
            f"--target/--exclude leave out {left_out[0].path}, which is a part of {parameter}: PEFT holds its "
            f"{len(members)} matrices as one parameter, so name {parameter.rpartition('.')[2]} instead"
        )
    first = members[0]
    assert first.place is not None
    if first.place.expert is None:
        turned = is_turned(parameter, first.tuned.shape, config)
        return _pair(first.name, parameter, [first], first.tuned.shape[0], turned)
    ordered = sorted(members, key=lambda m: (m.place.expert, m.place.part) if m.place else ())
    count = 1 + max(m.place.expert or 0 for m in members if m.place)
    _check_complete(parameter, ordered, count, first.place.parts)
    return _pair(parameter, parameter, ordered, count, False)


def _check_complete(parameter: str, ordered: list[Pair], count: int, parts: int) -> None:
    places = [(m.place.expert, m.place.part) for m in ordered if m.place]
    missing = sorted(set(_places(count, parts)) - set(places))
    shapes = {m.tuned.shape for m in ordered}
    if missing or len(shapes) > 1:
        what = f"expert {missing[0][0]} is incomplete" if missing else f"its experts' shapes differ: {sorted(shapes)}"
        raise MismatchError(
            f"{parameter}: {what}, so they are no single parameter; --exclude {parameter} leaves it out"
        )


def _places(count: int, parts: int) -> Iterable[tuple[int, int]]:
    return ((e, p) for e in range(count) for p in range(parts))


def _pair(name: str, parameter: str, members: list[Pair], count: int, turned: bool) -> ExpertPair:
    first = members[0]
    return ExpertPair(
        name, parameter, first.base, first.tuned, "experts", count=count, members=tuple(members), turned=turned
    )

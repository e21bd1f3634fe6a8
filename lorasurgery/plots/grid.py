"""Where each module of a report stands in a picture: its layer across, its kind down. Names only; no matplotlib."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from lorasurgery.module_location import place_of
from lorasurgery.report import ModuleReport

_FEW = 3  # so many numbers (ffn.0 and ffn.2) are names of different things; more of them count alike things
_EXPERT = re.compile(r"\[(\d+)\]$")
# What data passes through first stands left; parts that are not named here keep the file's order.
_FLOW = {"mid": 1, "middle": 1, "bottleneck": 1, "decoder": 2, "up": 2, "output": 2}


@dataclass(frozen=True)
class Column:
    """A layer: the stack that holds it and its number; two where stacks hold stacks (`down_blocks.1.attentions.0`).

    >>> Column("down_blocks", (1, 0)).label
    '1.0'
    """

    stack: str
    numbers: tuple[int, ...]

    @property
    def label(self) -> str:
        """The numbers with points between."""
        return ".".join(map(str, self.numbers))


@dataclass
class Grid:
    """Modules by kind and layer.

    Args:
        columns: Layers, stack by stack.
        kinds: Rows: what follows the layer's number, `*` where a number counts alike modules.
        cells: (kind, column) -> modules; several where the kind has a `*`, none where a layer lacks the kind.
        outside: Modules that stand in no layer.
        dropped: Kinds that were left out as the smallest.
    """

    columns: list[Column] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    cells: dict[tuple[str, Column], list[ModuleReport]] = field(default_factory=dict)
    outside: list[ModuleReport] = field(default_factory=list)
    dropped: int = 0

    def row(self, kind: str) -> list[ModuleReport]:
        """All modules of a kind."""
        return [m for c in self.columns for m in self.cells.get((kind, c), ())]

    def layer(self, column: Column) -> list[ModuleReport]:
        """All modules of a layer."""
        return [m for k in self.kinds for m in self.cells.get((k, column), ())]

    def crowd(self, kind: str) -> tuple[int, int]:
        """The least and the most modules in a cell of this kind."""
        counts = [len(self.cells[kind, c]) for c in self.columns if (kind, c) in self.cells]
        return min(counts), max(counts)


@dataclass(frozen=True)
class _Spot:
    module: ModuleReport
    stack: str
    numbers: tuple[int, ...]
    words: tuple[str, ...]  # of the kind, with * for each of `counts`
    counts: tuple[int, ...]

    @property
    def column(self) -> Column:
        return Column(self.stack, self.numbers)


def grid_of(modules: Sequence[ModuleReport]) -> Grid:
    """Sort modules into layers and kinds.

    >>> grid_of([ModuleReport(f"model.layers.{i}.mlp.up_proj", (8, 4)) for i in range(2)]).kinds
    ['mlp.up_proj']
    """
    grid, spots = Grid(), []
    for module in modules:
        spot = _spot(module)
        if spot:
            spots.append(spot)
        else:
            grid.outside.append(module)
    cells: dict[tuple[str, Column], list[ModuleReport]] = defaultdict(list)
    for spot in _name_numbers(_split_stacks(spots)):
        cells[".".join(spot.words), spot.column].append(spot.module)
    grid.cells = dict(cells)
    grid.kinds = list(dict.fromkeys(kind for kind, _ in cells))
    stacks = {s: i for i, s in enumerate(sorted(dict.fromkeys(c.stack for _, c in cells), key=_flow))}
    grid.columns = sorted({c for _, c in cells}, key=lambda c: (stacks[c.stack], c.numbers))
    return grid


def keep_largest(grid: Grid, most: int, size: Callable[[list[ModuleReport]], float | None]) -> Grid:
    """The `most` kinds of greatest size, in the order they had; layers that had no others go too."""
    ranked = sorted(grid.kinds, key=lambda k: -(size(grid.row(k)) or 0.0))
    kept = set(ranked[:most])
    cells = {key: found for key, found in grid.cells.items() if key[0] in kept}
    return replace(
        grid,
        columns=[c for c in grid.columns if any(column == c for _, column in cells)],
        kinds=[k for k in grid.kinds if k in kept],
        cells=cells,
        dropped=len(grid.kinds) - len(kept),
    )


def _spot(module: ModuleReport) -> _Spot | None:
    name = _EXPERT.sub(r".\1", module.name)
    place = place_of(name)
    if place.layer is None:
        return None
    before = place.stack.count(".") + 1 if place.stack else 0
    counts = tuple(int(p) for p in name.split(".")[before + 1 :] if p.isdecimal())
    return _Spot(module, place.stack, (place.layer,), tuple(place.kind.split(".")), counts)


def _flow(stack: str) -> int:
    return max(_FLOW.get(word, 0) for word in re.split(r"[._]", stack))


def _split_stacks(spots: list[_Spot]) -> list[_Spot]:
    """Take the second number into the layer where most modules share their layer with others of their kind.

    A U-Net's down_blocks.1 holds attentions.0 and attentions.1, Swin's layers.2 holds 18 blocks. The U-Net's
    mid_block.attentions.0 then stands in the stack mid_block, among the same kinds.
    """
    crowd = Counter((s.column, s.words) for s in spots)
    crowded = [s for s in spots if crowd[s.column, s.words] > 1 and _container(s) is not None]
    if 2 * len(crowded) <= len(spots):
        return spots
    containers = {c for s in spots if (c := _container(s)) is not None}
    return [_deeper(s, containers) for s in spots]


def _container(spot: _Spot) -> str | None:
    """The word before a number that comes first in the kind; empty when the number does. Experts are no layers."""
    at = spot.words[:2].index("*") if "*" in spot.words[:2] else None
    if at is None or at == len(spot.words) - 1 or spot.words[0] == "experts":
        return None
    return spot.words[0] if at else ""


def _deeper(spot: _Spot, containers: set[str]) -> _Spot:
    parent, _, last = spot.stack.rpartition(".")
    if last in containers and parent:
        return replace(spot, stack=parent, words=(last, *spot.words))
    if _container(spot) is None:
        return spot
    at = spot.words.index("*")
    return replace(
        spot,
        numbers=(*spot.numbers, spot.counts[0]),
        words=spot.words[:at] + spot.words[at + 1 :],
        counts=spot.counts[1:],
    )


def _name_numbers(spots: list[_Spot]) -> list[_Spot]:
    """Put numbers back into kinds where they are part of a name (`net.0.proj`, `ffn.2`) and count nothing."""
    groups: dict[tuple[str, ...], list[_Spot]] = defaultdict(list)
    for spot in spots:
        groups[spot.words].append(spot)
    named: dict[int, _Spot] = {}
    for group in groups.values():
        crowded = len({s.column for s in group}) < len(group)
        distinct = [len({s.counts[i] for s in group}) for i in range(len(group[0].counts))]
        names = [n == 1 or (crowded and n <= _FEW) for n in distinct]
        for spot in group:
            named[id(spot)] = replace(spot, words=_with_numbers(spot, names))
    return [named[id(s)] for s in spots]


def _with_numbers(spot: _Spot, names: list[bool]) -> tuple[str, ...]:
    numbers = iter(zip(spot.counts, names, strict=True))
    return tuple(
        (str(n) if keep else "*") for n, keep in (next(numbers) if w == "*" else (w, True) for w in spot.words)
    )

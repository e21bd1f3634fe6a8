"""Where each module of a report stands in a picture: its layer across, its kind down. Names only; no matplotlib."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from lorasurgery.module_location import location_of
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
    place = location_of(name)
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
    """The word before a number that comes first in the kind; empty when the number does. Experts are not layers."""
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


LONGEST = 34
_POINTS_A_LETTER = 0.6  # of the type size, in DejaVu Sans, on the wide side


def width_of(text: str, points: float) -> float:
    """About how many inches a line of text takes."""
    return len(text) * points * _POINTS_A_LETTER / 72


def shorten(text: str, most: int = LONGEST) -> str:
    """A name without its middle: its end says what it is, its beginning which one.

    >>> shorten("text_model.encoder.layers.3", 20)
    'text_…coder.layers.3'
    """
    head = most // 4
    return text if len(text) <= most else f"{text[:head]}…{text[-(most - head - 1) :]}"


def short_names(names: Sequence[str]) -> list[str]:
    """Of each name the fewest last parts that no other name ends in; a number keeps the word before it.

    >>> short_names(["self_attn.q_proj", "mlp.up_proj", "attention.output.dense", "output.dense"])
    ['q_proj', 'up_proj', 'attention.output.dense', 'output.dense']
    """
    endings: dict[str, int] = {}
    split = [n.split(".") for n in names]
    for parts in split:
        for i in range(len(parts)):
            ending = ".".join(parts[i:])
            endings[ending] = endings.get(ending, 0) + 1
    return [_shortest(parts, endings) for parts in split]


def _shortest(parts: list[str], endings: dict[str, int]) -> str:
    for i in reversed(range(len(parts))):
        alone = i == len(parts) - 1 and i > 0 and _is_number(parts[i - 1])  # the proj of net.0.proj says too little
        ending = ".".join(parts[i:])
        if endings[ending] == 1 and not alone and not _is_number(parts[i]):
            return ending
    return ".".join(parts)


def _is_number(part: str) -> bool:
    return part == "*" or part.isdecimal()


def kind_labels(grid: Grid) -> list[str]:
    """The rows' names; `×128` says how many modules a cell holds where it holds several."""
    found = []
    for kind, short in zip(grid.kinds, short_names(grid.kinds), strict=True):
        least, most = grid.crowd(kind)
        count = "" if most == 1 else f" ×{most}" if least == most else f" ×{least}–{most}"
        found.append(shorten(short, LONGEST - len(count)) + count)
    return found


def stack_names(stacks: Sequence[str]) -> list[str]:
    """Stacks without the parts that all of them begin or end with.

    >>> stack_names(["encoder.block", "decoder.block"]), stack_names(["model.layers"])
    (['encoder', 'decoder'], ['model.layers'])
    """
    split = [s.split(".") for s in stacks]
    shortest = min(map(len, split)) - 1 if len(split) > 1 else 0
    same_end = _same([s[::-1] for s in split], shortest)
    same_start = _same(split, shortest - same_end)
    return [shorten(".".join(s[same_start : len(s) - same_end])) for s in split]


def _same(split: list[list[str]], most: int) -> int:
    """How many first parts all have alike, at most so many."""
    return next((i for i in range(most) if len({s[i] for s in split}) > 1), max(most, 0))


def numbered_columns(columns: Sequence[Column], inches: float) -> list[int]:
    """Which columns get their number: all where there is room, else every 2nd, 4th, 5th …, again in each stack.

    Args:
        inches: The width of a column.
    """
    widest = max((width_of(c.label, 8.0) for c in columns), default=0.0) + 0.07
    need = max(1, int(-(-widest // inches)))
    step = next((s for s in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100) if s >= need), need)
    starts = [i for i, c in enumerate(columns) if i == 0 or columns[i - 1].stack != c.stack]
    chosen: list[int] = []
    for start, end in zip(starts, [*starts[1:], len(columns) + need], strict=True):
        marks = (
            range(start, min(end - need + 1, len(columns)), step) if end - start >= need else range(start, start + 1)
        )
        chosen += [i for i in marks if not chosen or i - chosen[-1] >= need]
    return chosen


def rows_of_words(spans: Sequence[tuple[float, str]], points: float) -> list[int]:
    """On which line each word goes, so that words centred at the given inches don't touch: the first with room."""
    ends: list[float] = []
    found = []
    for middle, text in spans:
        half = width_of(text, points) / 2 + 0.04
        row = next((i for i, end in enumerate(ends) if end <= middle - half), len(ends))
        ends[row:] = [middle + half, *ends[row + 1 :]]
        found.append(row)
    return found

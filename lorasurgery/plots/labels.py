"""Words on axes: the shortest name that can't be mistaken, and which layers to number so that none touch."""

from __future__ import annotations

from collections.abc import Sequence

from lorasurgery.plots.grid import Column, Grid

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
    """Which columns get their number: all where there is room, else every 2nd, 4th, 5th …, anew in each stack.

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

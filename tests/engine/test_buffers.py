"""Memory that is lent in parts: parts never overlap, and what is given back joins into gaps as wide as before."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasurgery.engine.buffers import Arena

PART = 2 << 20


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 3 * PART), st.integers(0, 5)), max_size=20))
def test_parts_never_overlap(steps: list[tuple[int, int]]) -> None:
    """Whatever is lent and given back in whatever order, nobody's bytes change under them."""
    arena, lent = Arena(8 * PART), []
    for mark, (size, give) in enumerate(steps, 1):
        part = arena.take(size)
        assert part.numel() == size
        part[0] = part[-1] = mark
        lent.append((mark, part))
        if give < len(lent):
            arena.give(lent.pop(give)[1])
        assert all(int(p[0]) == int(p[-1]) == m for m, p in lent)
    for _, part in lent:
        arena.give(part)
    addresses = {arena.take(2 * PART).data_ptr() for _ in range(4)}  # all of it in one gap again
    assert max(addresses) - min(addresses) == 6 * PART


def test_a_view_is_given_back_too() -> None:
    """A part may come back as the matrix it was used as; another's tensor is let go without a word."""
    arena = Arena(PART)
    first = arena.take(PART)
    arena.give(first.view(torch.float32).view(2, -1))
    assert arena.take(PART).data_ptr() == first.data_ptr()
    more = arena.take(5)  # there is no gap left: memory of its own
    arena.give(more)
    assert more.data_ptr() != first.data_ptr()

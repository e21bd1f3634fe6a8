"""Texts from files, written into a model card so that they are read as they stand: no HTML, no headings, no links.

Letters and digits stay; whatever Markdown or HTML could take for its own becomes an entity, which neither takes for
anything but the character. Control characters and those that turn the direction of writing are shown as escapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lorasurgery.errors import plain

_LONGEST = 1000  # characters of one text
# an underscore inside a word is nothing to Markdown, and names of modules are full of them
_SPECIAL = re.compile(r"^\d+(?=[.)])|^[^\w ]|(?<![^\W_])_|_(?![^\W_])|[^\w ./,-]|www(?=\.)", re.IGNORECASE)


def words(text: str) -> str:
    """A text inside a line, a cell or a quotation.

    >>> words("model.layers.0.self_attn.q_proj")
    'model.layers.0.self_attn.q_proj'
    >>> words("<b>|# x")
    '&#60;b&#62;&#124;&#35; x'
    """
    shown = plain(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…").strip()
    shown = _SPECIAL.sub(_entities, shown)
    return re.sub(" {2,}", " ", shown)


def _entities(found: re.Match[str]) -> str:
    return "".join(f"&#{ord(c)};" for c in found[0])


def block(text: str, language: str = "") -> str:
    """Code on lines of its own, between fences longer than any inside.

    >>> print(block("x = 1", "python"))
    ```python
    x = 1
    ```
    """
    lines = [plain(line) for line in text.split("\n")]
    longest = max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}{language}", *lines, fence])


def row(cells: Iterable[str]) -> str:
    """A row of a table, of cells that are Markdown already."""
    return f"| {' | '.join(cells)} |"

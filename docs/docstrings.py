"""How the docstrings of this project are read for the API reference, where they differ from what griffe knows.

Only text is changed, before it is parsed: code after `Example:` and doctests become fenced blocks, and lines that
describe several names at once (`base, tuned: …`, or `FormatError: …. UsageError: …`) become a line for each.
"""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object

_SECTION = re.compile(r"^(Args|Attributes|Raises):\n((?:[ ]{4}.*(?:\n|\Z)|\n(?=[ ]{4}))+)", re.MULTILINE)
_EXAMPLE = re.compile(r"^Example:\n((?:[ ]{4}.*(?:\n|\Z)|\n(?=[ ]{4}))+)", re.MULTILINE)
_DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)
_NEXT_NAME = re.compile(r"(?<=[.;] )(?=[A-Za-z_]\w*: )")


class Docstrings(Extension):
    """The extension that mkdocs.yml names."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = plainer(obj.docstring.value)


def plainer(text: str) -> str:
    """A docstring as griffe's Google parser and Markdown want it.

    >>> print(plainer("Add.\\n\\nArgs:\\n    a, b: Terms. c: A\\n        third."))
    Add.
    <BLANKLINE>
    Args:
        a: Terms.
        b: Terms.
        c: A third.
    """
    text = _SECTION.sub(lambda found: f"{found[1]}:\n{_items(found[2])}" + _end(found[0]), text)
    text = _DOCTEST.sub(lambda found: f"```pycon\n{found[0]}\n```", text)
    return _EXAMPLE.sub(lambda found: f"**Example**\n\n{_fenced(found[1])}" + _end(found[0]), text)


def _fenced(code: str) -> str:
    return f"```python\n{dedent(code).strip()}\n```"


def _end(block: str) -> str:
    return "\n" if block.endswith("\n") else ""


def _items(body: str) -> str:
    """The described names of a section, each on a line of its own."""
    items: list[str] = []
    for line in body.splitlines():
        if re.match(r"[ ]{4}\S", line):
            items.append(line.strip())
        elif items and line.strip():
            items[-1] += " " + line.strip()
    return "\n".join(f"    {one}" for item in items for part in _NEXT_NAME.split(item) for one in _each(part.strip()))


def _each(item: str) -> list[str]:
    """One item for each of the names before its colon."""
    names, colon, says = item.partition(": ")
    if not colon or not re.fullmatch(r"\w+(, \w+)+", names):
        return [item]
    return [f"{name}: {says}" for name in names.split(", ")]

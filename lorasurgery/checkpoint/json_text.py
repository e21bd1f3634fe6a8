"""JSON from files that nobody vouches for: an object, of bounded size and depth, or an error in one line.

Parsing takes memory in proportion to the text (thirty times at most), so the bound on its size bounds both.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

from lorasurgery.checkpoint.operation import note
from lorasurgery.errors import FormatError

MOST = 100_000_000  # bytes: an index of a million tensors; as for headers
MOST_CONFIG = 32_000_000  # an adapter's config: the modules of the largest models, several times
DEEPEST = 64  # what is parsed is written, compared and shown by functions that call themselves
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape that may be half a character


def read_bytes(file: Path, most: int = MOST) -> bytes:
    """All of a regular file that is no larger than `most`; a FIFO or a device would be read for ever.

    Raises:
        FormatError: another kind of file, or a larger one, without the file's name; one that was changed since it was
            read before. OSError: the system's.
    """
    note(file)
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise FormatError("is not a regular file")
    if found.st_size > most:
        raise FormatError(f"has {found.st_size:,} bytes, more than {most:,}; it can't be what its name says")
    with file.open("rb") as opened:
        return opened.read(most)


def parse_object(raw: bytes, where: str, pairs: Any = None) -> dict[str, Any]:
    """The object that a JSON text holds.

    >>> parse_object(b'{"r": 8}', "adapter_config.json")
    {'r': 8}

    Args:
        where: What the text is, for messages. pairs: The json module's object_pairs_hook.

    Raises:
        FormatError: no JSON, something else than an object, nested too deeply, or half a character in it.
    """
    try:
        found = json.loads(raw, object_pairs_hook=pairs)
        if _HALF.search(raw):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise FormatError(f"{where}: holds half of a character, which is no valid Unicode text") from None
    except RecursionError:
        raise FormatError(f"{where}: is nested too deeply") from None
    except ValueError as problem:
        raise FormatError(f"{where}: not JSON ({problem})") from None
    if not isinstance(found, dict):
        raise FormatError(f"{where}: expected a JSON object, found {type(found).__name__}")
    if not is_shallow(found):
        raise FormatError(f"{where}: is nested too deeply")
    return found


def is_shallow(value: Any) -> bool:
    """Whether lists and objects lie in one another no deeper than anything reasonable needs.

    >>> is_shallow([[[]]]), is_shallow(eval("[" * 70 + "]" * 70))
    (True, False)
    """
    level = [value]
    for _ in range(DEEPEST):
        inner = (v for item in level for v in (item.values() if isinstance(item, dict) else item))
        level = [v for v in inner if isinstance(v, (dict, list))]
        if not level:
            return True
    return False

"""One thing that a program would not serve as it is meant, and the commands that fix it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.checkpoint.reader import Checkpoint

Verdict = Literal["rejected", "wrong", "dropped"]

PORTABLE = "lorasurgery convert {path} --to peft --portable -o OUT"
UNDONE = "lorasurgery convert {path} --to peft --portable --base {base} -o OUT"
TO_PEFT = "lorasurgery convert {path} --to peft --base {base} -o OUT"
TO_KOHYA = "lorasurgery convert {path} --to kohya --base {base} -o OUT.safetensors"
TO_DIFFUSERS = "lorasurgery convert {path} --to diffusers --base {base} -o OUT.safetensors"
MERGE = "lorasurgery merge {base} {path} -o OUT, and serve the merged model"


@dataclass(frozen=True)
class Issue:
    """One thing that would not work as meant.

    Args:
        verdict: `rejected` with an error, `wrong` results without one, or `dropped`, wholly or in part.
        what: What it is, in a few words.
        mend: The command or the setting that helps.
    """

    verdict: Verdict
    what: str
    mend: str


@dataclass(frozen=True)
class Setting:
    """What is known of the place where the adapter is to be served.

    Args:
        max_lora_rank: vLLM's setting; None is its default.
        base: The model it is for.
    """

    max_lora_rank: int | None = None
    base: Checkpoint | None = None


Rule = Callable[[Adapter, Setting], Iterator[Issue]]


def briefly(names: list[str]) -> str:
    """The first of several names, and how many more there are.

    >>> briefly(["a", "b", "c"])
    'a and 2 more'
    """
    more = len(names) - 1
    return f"{names[0]} and {more} more" if more else names[0]

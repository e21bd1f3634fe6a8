"""Write docs/architectures.md by trying every class, which takes minutes; given names of classes, print only those."""

from __future__ import annotations

import datetime
import os
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from textwrap import wrap

ROOT = Path(__file__).parents[1]
TARGET = Path(__file__).parent / "architectures.md"
PROCESSES = 2
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
os.environ |= {"PYTHONWARNINGS": "ignore"}  # of the processes that do the work
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from architectures import Architecture, denoisers, every  # noqa: E402
from sweep import CLOSE, Row, Worker  # noqa: E402

INTRO = """\
# Which architectures

Made by `make architectures` on {date} with transformers {transformers}, diffusers {diffusers}, peft {peft} and
torch {torch}; do not edit.

Each model class that transformers' auto classes list, and each of diffusers that loads adapters, is built tiny, with
random weights. A copy is fine-tuned: every weight moves (of diffusers' models those of linear layers and convolutions),
matrices by an update of rank 4. Then `lorasurgery extract` runs at rank 16, which is exact, and the adapter is tried:

- **extract**: it ends well.
- **merge**: `lorasurgery merge BASE ADAPTER` is the tuned model, each weight to {close}.
- **PEFT runs**: loaded with `PeftModel.from_pretrained`, the model's outputs are the tuned model's. A dash means that
  the tiny model takes none of the inputs that were tried; diffusers' models are not run.
- **PEFT merges**: `merge_and_unload` gives the tuned weights.

{counts}
"""
COUNTS = (
    "Of {all} classes {built} could be built. Our merge is the tuned model for {merged} of them. PEFT merges to it, "
    "and runs it where that could be tried, for {works}. For {halved} more it merges another one, but runs the tuned "
    "model where that could be tried. For the other {never} it has another model or none. {told}"
)
TOLD = "Of all of these `extract` warns by name, and `lorasurgery check ADAPTER --for peft` says why."
NOT_TOLD = (
    "For {silent} of these `extract` or `lorasurgery check ADAPTER --for peft` is silent: they are marked *not told*."
)
# What many classes have in common, in few words and in a sentence, by what `check` finds.
COMMON = {
    "merge_and_unload adds": (
        "tied",
        "Layers share one tensor, mostly embedding and head. PEFT's `merge_and_unload` adds their common update once "
        "for each; `lorasurgery merge` adds it once. See [Tied embeddings](formats.md#tied-embeddings).",
    ),
    "no module or parameter of this name": (
        "joined on loading",
        "transformers joins, cuts up or renames these tensors when it loads them, so PEFT's model has no place for "
        "what the adapter says of those on disk; `lorasurgery merge` has.",
    ),
}
# Why a class could not be tried, by what the error says.
UNBUILT = {
    r"ImportError": "they need a package that is not installed here",
    r"million parameters": "too large however small the config",
    r"not made small": "no small config is known here",
    r"does not load": "transformers does not load what it saved",
    "": "their default config, with small numbers, is none that they take",
}


@dataclass
class Notes:
    """Remarks that many rows share, numbered as they come."""

    texts: list[str] = field(default_factory=list)

    def short(self, found: str) -> str:
        """A few words where there are any for it, and the number of the sentence."""
        words, text = next((v for pattern, v in COMMON.items() if pattern in found), ("", found))
        if text not in self.texts:
            self.texts.append(text)
        return f"{words} [{self.texts.index(text) + 1}]".lstrip()


def rows_of(ones: Iterable[Architecture]) -> list[Row]:
    """Try all, each in whichever process is free."""
    free: SimpleQueue[Worker] = SimpleQueue()
    workers = [Worker() for _ in range(PROCESSES)]
    for worker in workers:
        free.put(worker)

    def row(one: Architecture) -> Row:
        worker = free.get()
        try:
            return worker.row(one)
        finally:
            free.put(worker)

    try:
        with ThreadPoolExecutor(PROCESSES) as pool:
            return list(pool.map(row, ones))
    finally:
        for worker in workers:
            worker.close()


def page(rows: list[Row]) -> str:
    """The whole page."""
    versions = {name: version(name).split("+")[0] for name in ("transformers", "diffusers", "peft", "torch")}
    head = INTRO.format(date=datetime.date.today(), close=f"{CLOSE:.0e}", counts=counts(rows), **versions)
    notes = Notes()
    built = [r for r in rows if not r.unbuilt]
    tables = [
        "\n".join([f"## {heading(task)}", "", *table(group, notes)])
        for task, group in groupby(built, key=lambda r: r.one.task)
    ]
    remarks = ["## Remarks", "", *(f"{i}. {text}" for i, text in enumerate(notes.texts, 1))] if notes.texts else []
    return "\n".join([head, *(f"{t}\n" for t in tables), *remarks, "", *unbuilt(rows)])


def heading(task: str) -> str:
    """A task as a heading: its first letter large."""
    return task[:1].upper() + task[1:]


def counts(rows: list[Row]) -> str:
    """The sentences above the tables."""
    built = [r for r in rows if not r.unbuilt]
    works = sum(r.works for r in built)
    halved = sum(bool(r.loads and r.runs is not False and not r.merges) for r in built)
    silent = sum(bool(r.breaches) for r in built)
    text = COUNTS.format(
        all=len(rows), built=len(built), merged=sum(bool(r.merged) for r in built), works=works, halved=halved,
        never=len(built) - works - halved, told=NOT_TOLD.format(silent=silent) if silent else TOLD,
    )  # fmt: skip
    return "\n".join(wrap(text, 120, break_on_hyphens=False))


def table(rows: Iterable[Row], notes: Notes) -> Iterator[str]:
    """One task's classes."""
    yield "| class | extract | merge | PEFT runs | PEFT merges | remark |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        runs = False if row.loads is False else row.runs
        merges = False if row.loads is False else row.merges
        cells = [word(row.extracted), word(row.merged), word(runs), word(merges), ", ".join(remarks(row, notes))]
        yield f"| `{row.one}` | {' | '.join(cells)} |"


def word(value: bool | None) -> str:
    """A cell: yes, no, or a dash where nothing can be said."""
    return "–" if value is None else "yes" if value else "**no**"


def remarks(row: Row, notes: Notes) -> Iterator[str]:
    """What `check` finds, without names; what the user is not told of is said to be so."""
    if not row.works:
        yield from dict.fromkeys(notes.short(reason(f)) for f in row.findings)
    if row.breaches:
        yield f"*not told*: {reason(row.why)}"


def reason(text: str) -> str:
    """What a finding says without the names and numbers in it.

    >>> reason("model.norm and 2 more: modules that it stores whole are not in the file")
    'modules that it stores whole are not in the file'
    """
    text = re.sub(r"^[\w.]+(?: and \d+ more)?: ", "", text)
    text = re.sub(r"\w+(?:\.\w+){2,}", "…", text)
    return re.sub(r" differs by \S+", " differs", text).replace("|", "\\|").rstrip(".")


def unbuilt(rows: list[Row]) -> Iterator[str]:
    """The classes that were not tried, by why."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.unbuilt:
            why = next(why for pattern, why in UNBUILT.items() if re.search(pattern, row.unbuilt))
            found.setdefault(why, []).append(f"`{row.one}`")
    if found:
        yield from ("## Not tried", "")
        yield from (f"- {heading(why)}: {', '.join(names)}." for why, names in found.items())
        yield ""


if __name__ == "__main__":
    everything = every() + denoisers()
    rows = rows_of([one for one in everything if str(one) in (sys.argv[1:] or map(str, everything))])
    for row in rows:
        if not row.unbuilt and row.breaches:
            print(f"{row.one}: {'; '.join(row.breaches)}", file=sys.stderr)
    if len(sys.argv) > 1:
        print(page(rows))
    else:
        TARGET.write_text(page(rows))

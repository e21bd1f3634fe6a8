"""The operations that are stopped, the world they work in, and what is there before and afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import long_runs
from long_runs import hashes
from push_hub import upload
from safetensors.torch import load_file, save_file

from lorasurgery.checkpoint.inplace.recover import FOLDER
from lorasurgery.checkpoint.lock import LOCK
from lorasurgery.engine.atomic_file import PARTIAL
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.merge import merge
from lorasurgery.ops.switch import switch
from lorasurgery.ops.unmerge import unmerge

SHAPES = {"self_attn.q_proj": (64, 256), "mlp.down_proj": (256, 64)}
FILE = ".safetensors"


@dataclass(frozen=True)
class Case:
    """One operation.

    Args:
        work: Called with the world's folder, the place where it writes, and options such as resume.
        start: What that place is a copy of at first.
        adapter: What was merged last when it is done, of those in place.
    """

    work: Callable[..., Any]
    start: str = ""
    file: bool = False
    adapter: str = ""


INSIDE = {
    "merge --in-place": Case(lambda w, o, **m: merge(o, [w / "adapter"], in_place=True, **m), "base", False, "adapter"),
    "unmerge --in-place": Case(lambda w, o, **m: unmerge(o, [w / "adapter"], in_place=True, **m), "merged"),
    "switch": Case(lambda w, o, **m: switch(o, [w / "topic"], **m), "merged", False, "topic"),
    "merge --in-place, one file": Case(
        lambda w, o, **m: merge(o, [w / "adapter"], in_place=True, **m), "base" + FILE, True, "adapter"
    ),
    "unmerge --in-place, one file": Case(
        lambda w, o, **m: unmerge(o, [w / "adapter"], in_place=True, **m), "merged" + FILE, True
    ),
}
OUTSIDE = {
    "merge": Case(lambda w, o, **m: merge(w / "base", [w / "adapter"], o, **m)),
    "merge --undo": Case(lambda w, o, **m: merge(w / "base", [w / "adapter"], o, undo=True, **m)),
    "merge --undo, one file": Case(
        lambda w, o, **m: merge(w / f"base{FILE}", [w / "adapter"], o, undo=True, **m), "", True
    ),
    "merge --overwrite": Case(
        lambda w, o, **m: merge(w / "base", [w / "adapter"], o, **{"overwrite": "resume" not in m} | m), "older"
    ),
    "unmerge": Case(lambda w, o, **m: unmerge(w / "merged", [w / "adapter"], o, **m)),
    "extract": Case(lambda w, o, **m: extract(w / "base", w / "tuned", o, ExtractOptions(RankChoice(rank=8)), **m)),
}
PUSHES = {
    "push": Case(lambda _, o, **__: upload(o), "older"),
    "push, an adapter": Case(lambda _, o, **__: upload(o), "topic"),
}
CASES = INSIDE | OUTSIDE | PUSHES


class World:
    """What long_runs.world() makes, but small, with tokenizers, a second adapter, a merged base and single files.

    Attributes:
        folder: Where the inputs lie; operations are stopped in `place`, beside it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder / "inputs", folder
        with patch.multiple(long_runs, LAYERS=4, SHAPES=SHAPES):
            base, _, adapter = long_runs.world(self.folder)
        for place, text in ((base, "old"), (adapter, "new")):
            (place / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
        tensors = {k: v for s in sorted(base.glob(f"*{FILE}")) for k, v in load_file(s).items()}
        save_file(tensors, base.with_suffix(FILE), {"format": "pt"})
        CASES["extract"].work(self.folder, self.folder / "topic")
        for name in ("merge --in-place", "merge --in-place, one file"):
            self.place(CASES[name], "merged")
            CASES[name].work(self.folder, self.folder / f"merged{FILE if CASES[name].file else ''}")
        merge(base, [adapter], self.folder / "older", undo=True, max_shard_size=100_000)
        self._hashes, self._whole = hashes(self.folder), dict[str, dict[str, str]]()
        self._places = 0

    def place(self, case: Case, name: str = "") -> Path:
        """A new place for an operation, with what the operation begins with."""
        if not name:
            self._places += 1
            (self.root / str(self._places)).mkdir()
        home = self.folder if name else self.root / str(self._places)
        found = home / f"{name or 'out'}{FILE if case.file else ''}"
        if case.start:
            copied(self.folder / case.start, found)
        return found

    def whole(self, name: str) -> dict[str, str]:
        """What an undisturbed run leaves."""
        if name not in self._whole:
            place = self.place(CASES[name])
            CASES[name].work(self.folder, place)
            self._whole[name] = state(place)
            assert not remains(place)
            if CASES[name].start == "older":
                assert self._whole[name] == self.whole(name.split()[0]), "something of the old output is left"
        return self._whole[name]

    def published(self, name: str) -> dict[str, str]:
        """What an undisturbed upload publishes: name -> SHA-256."""
        if name not in self._whole:
            place = self.place(CASES[name])
            CASES[name].work(self.folder, place)
            self._whole[name] = json.loads((place.parent / "hub" / "manifest.json").read_text())
        return self._whole[name]

    def before_merging(self, name: str) -> dict[str, str]:
        """What an operation in place and then unmerge leave: the base."""
        return state(self.place(CASES[f"merge --in-place{', one file' if CASES[name].file else ''}"]))

    def check(self) -> None:
        """See that no input changed."""
        assert hashes(self.folder) == self._hashes


def copied(start: Path, place: Path) -> None:
    """A checkpoint with all that belongs to it, under another name."""
    for old in start.parent.glob(f"{start.name}*"):
        new = place.with_name(place.name + old.name.removeprefix(start.name))
        if old == start or start.suffix == FILE:
            shutil.copytree(old, new) if old.is_dir() else shutil.copy2(old, new)


def state(place: Path) -> dict[str, str]:
    """SHA-256 of every file that is to be seen: no journal, no lock, nothing half-written."""
    home = place.parent  # nothing else lies there
    found = {n: h for n, h in hashes(home).items() if not any(p.startswith(".") for p in n.split("/"))}
    return {n.replace(place.name, "out", 1): h for n, h in found.items()}


def remains(place: Path) -> list[str]:
    """What is hidden there, but for the lock."""
    found = [str(f.relative_to(place.parent)) for f in place.parent.rglob("*")]
    return [n for n in found if (FOLDER in n or n.endswith(PARTIAL)) and LOCK not in n]

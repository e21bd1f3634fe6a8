"""How far one input travels: the files of the package that extract's base, merge's base and convert's adapter pass.

    .venv/bin/python -W ignore tests/routes.py

A stop is a call into a function of the package that is handed the input: its path as it was given, or a Checkpoint or
Adapter opened from it, as an argument or as a field of one. `files` counts the files with a stop; `crossings` the calls,
told apart by caller and callee, that lead from one file to another: a reader who follows the input turns so many pages;
`pairs` the pairs of files that they join. The size of the package and its import circles stand beside.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import models
import torch
from import_graph import PACKAGE, circles
from table import ROWS

import lorasurgery
from lorasurgery.linalg.rank import RankChoice


class Route:
    """Follows one path through the calls of this thread and of those it starts."""

    def __init__(self, path: Path) -> None:
        self.path, self.stops = path, set[tuple[str, str, str, str]]()

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(PACKAGE)):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if any(self._carries(frame.f_locals.get(name), deep=True) for name in names):
            self.stops.add((*_place(frame.f_back), *_place(frame)))

    def _carries(self, value: Any, *, deep: bool) -> bool:
        if isinstance(value, (str, Path)):
            return str(value) == str(self.path)
        kind = type(value).__name__
        if kind in ("Checkpoint", "Adapter"):
            held = value.__dict__.get("weights", value)
            return str(held.__dict__.get("path", held.__dict__.get("folder"))) == str(self.path)
        if deep and isinstance(value, (list, tuple)) and len(value) < 8:
            return any(self._carries(v, deep=False) for v in value)
        fields = getattr(value, "__dict__", None)
        if deep and fields and type(value).__module__.startswith("lorasurgery."):
            return any(self._carries(v, deep=False) for v in fields.values())
        return False

    def follow(self, work: Callable[[], object]) -> tuple[int, int, int]:
        """Run something; returns (files, crossings, pairs of files that they join)."""
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            work()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
        ways = [(stop[0], stop[2]) for stop in self.stops if stop[0] != stop[2]]
        return len({stop[2] for stop in self.stops}), len(ways), len({way for way in ways if way[0]})


def _place(frame: FrameType | None) -> tuple[str, str]:
    """The file and function of the package that a frame lies in, or was called from."""
    while frame is not None and not frame.f_code.co_filename.startswith(str(PACKAGE)):
        frame = frame.f_back
    if frame is None:
        return "", ""
    return Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix(), frame.f_code.co_qualname


def main() -> None:
    """Print the table."""
    files = list(PACKAGE.rglob("*.py"))
    print(f"files {len(files)}, lines {sum(len(f.read_text().splitlines()) for f in files)}")
    for group in circles():
        print("circle:", ", ".join(group))
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        base = models.save(models.make("llama"), top / "base")
        tuned = models.save(models.perturb(models.make("llama"), std=0.1), top / "tuned")
        options = lorasurgery.ExtractOptions(RankChoice(rank=4), client="vllm")
        adapter, merged = top / "adapter", top / "merged"
        kohya = next(row for row in ROWS if "kohya" in row.family).make(top / "kohya", torch.float32, torch.float32)
        todo: dict[str, tuple[Path, Callable[[], object]]] = {
            "extract's base": (base, lambda: lorasurgery.extract(base, tuned, adapter, options)),
            "merge's base": (base, lambda: lorasurgery.merge(base, [adapter], merged)),
            "convert's adapter": (
                kohya.adapter,
                lambda: lorasurgery.convert(
                    kohya.adapter, top / "peft", lorasurgery.ConvertOptions("peft"), base=kohya.base
                ),
            ),
        }  # fmt: skip
        for name, (path, work) in todo.items():
            print("{}: {} files, {} crossings, {} pairs of files".format(name, *Route(path).follow(work)))


if __name__ == "__main__":
    main()

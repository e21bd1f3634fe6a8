"""A checkpoint's own files, with the tensors of the base it was made from: where `switch --base` begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.checkpoint.header import show
from lorasurgery.checkpoint.inside import to_read
from lorasurgery.checkpoint.locate import load_bytes
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import MismatchError
from lorasurgery.ops.factors.sidecars import CONFIG, tokenizer_files
from lorasurgery.ops.placement.edits import Edit, EditPlan, Replacement
from lorasurgery.report import RECORD_NAME


class Rebased(Checkpoint):
    """Reads the base's tensors by the names and places that they have in another checkpoint's files.

    Args:
        merged: Whose files will be written. origin: The base, whose tensors are read.

    Raises:
        MismatchError: the two have other tensors, dtypes or shapes.
    """

    def __init__(self, merged: Checkpoint, origin: Checkpoint) -> None:
        self.__dict__ |= merged.__dict__
        self.__dict__["config"] = origin.config
        self.merged, self.origin = merged, origin
        for name in sorted({*merged.tensors, *origin.tensors}):
            here, there = merged.tensors.get(name), origin.tensors.get(name)
            if here is None or there is None or (here.dtype, here.shape) != (there.dtype, there.shape):
                raise MismatchError(
                    f"{show(str(origin.path))}: {show(name)} is not as in {show(str(merged.path))}, so it is no base "
                    "of what is there; `lorasurgery merge BASE ADAPTER -o OUT` writes a new checkpoint"
                )

    def count(self, done: int) -> None:
        """Bytes read are the base's; see Checkpoint.count."""
        self.origin.count(done)

    def fill(self, name: str, view: memoryview, start: int) -> None:
        """Read bytes of a tensor as the base has it; see Checkpoint.fill."""
        self.origin.fill(name, view, start)

    def put_back(self, plan: EditPlan) -> None:
        """Let the plan write every other tensor too in which the checkpoint differs from the base."""
        source = self._source()
        for name in self._differing(plan):
            info = self.tensors[name]
            source.replaced[name] = name
            plan.edits[name] = Edit(name, info, info.shape, replacement=Replacement(source, name, 1.0))

    def _source(self) -> Adapter:
        """The base, as what brings tensors and a tokenizer."""
        return Adapter(str(self.origin.path), self.origin.folder, self.origin, {}, {})

    def _differing(self, plan: EditPlan) -> Iterator[str]:
        for name in [n for n in self.tensors if n not in plan.edits]:
            pairs = zip(self.merged.chunks(name), self.origin.chunks(name), strict=True)
            if any(bytes(here) != bytes(there) for here, there in pairs):
                yield name

    def small_files(self, adapters: Sequence[Adapter]) -> tuple[dict[str, bytes], dict[str, bytes | None]]:
        """Config and tokenizer by name: what is to be written, and what the base has of it.

        Raises:
            FormatError: a link leads out of either folder. MismatchError: two tokenizers would be mixed.
        """
        if self.is_file or self.origin.is_file:
            return {}, {}
        tokenizer = tokenizer_files([self._source(), *adapters])
        left = sorted(set(tokenizer_files([Adapter("", self.folder, self.merged, {}, {})])) - set(tokenizer))
        if left:
            raise MismatchError(
                f"{show(str(self.folder / left[0]))}: the tokenizer that is to come has no such file, so two would be "
                "mixed; `lorasurgery merge BASE ADAPTER -o OUT` writes a new checkpoint"
            )
        config = to_read(self.origin.folder, CONFIG)
        wanted = {name: _bytes(file) for name, file in {CONFIG: config, **tokenizer}.items()}
        changed = {
            n: data for n, data in wanted.items() if data is not None and data != _bytes(to_read(self.folder, n))
        }
        before = {n: _bytes(to_read(self.origin.folder, n)) for n in (*tokenizer, CONFIG, RECORD_NAME)}
        return changed, {n: data for n, data in before.items() if n == RECORD_NAME or data != wanted[n]}


def _bytes(path: Path) -> bytes | None:
    return load_bytes(path) if path.is_file() else None

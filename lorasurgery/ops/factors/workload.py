"""Modules worked on in any order, on as many ranks as there are, taken in the order given, and kept for --resume."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined,unused-ignore]

from lorasurgery.checkpoint.dtypes import dtype_name, torch_dtype
from lorasurgery.checkpoint.files import ScratchFile, read_back
from lorasurgery.checkpoint.journal import FACTORS, Run
from lorasurgery.checkpoint.writer import as_bytes
from lorasurgery.engine.pipeline import Pipeline
from lorasurgery.errors import SurgeryError
from lorasurgery.lowrank import LowRank
from lorasurgery.ops.factors.factored import ExpertFactors, Factored, Share
from lorasurgery.report import ModuleReport, Progress

T = TypeVar("T")
R = TypeVar("R")


class ModuleJob(Protocol):
    """The work on one module, or on several that are taken together.

    Attributes:
        cost: Bytes of memory that it holds.
        result: What came out, after compute(); of several modules, a list.
    """

    cost: int
    result: Any

    def read(self) -> None:
        """Bring what is needed into memory."""
        ...

    def compute(self) -> None:
        """Make the result."""
        ...


@dataclass
class Workload(Generic[T, R]):
    """One operation over its modules.

    Args:
        run: Its journal: what is in it already is not done again.
        names: Of each item: its key in the journal and in messages, and its bytes.
        sizes: Of each item: its key in the journal and in messages, and its bytes.
        pack: Puts a result beside the output and says where, as JSON.
        unpack: Gets it back.
        take: Called with every item and its result, in order, on the rank that finishes.
        sync: Waits until what was packed is on the disk.
    """

    run: Run
    items: Sequence[T]
    names: Sequence[str]
    sizes: Sequence[int]
    pack: Callable[[R], Any]
    unpack: Callable[[Any], R]
    take: Callable[[T, R], None]
    sync: Callable[[], None]
    progress: Progress | None = None
    _held: dict[int, R] = field(default_factory=dict)
    _next: int = 0
    _done: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def work(
        self, pipeline: Pipeline, step: Callable[..., ModuleJob], groups: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Do this rank's share of what is missing, wait for the others, and take all results on the first rank.

        Args:
            step: Given an item, or all those of a group, the work on it.
            groups: Which items are taken together, by their places; each is in one group. A group of which anything
                is missing is done whole, so that its results are those of a run without a break.

        Raises:
            SurgeryError: naming the module that failed.
        """
        groups = [(i,) for i in range(len(self.items))] if groups is None else groups
        missing = {i for i, name in enumerate(self.names) if name not in self.run.done}
        todo = [g for g in groups if not missing.isdisjoint(g)]
        sizes = [sum(self.sizes[i] for i in g if i in missing) for g in todo]
        mine = self.run.ranks.mine(list(range(len(todo))), sizes)
        self._total = sum(sizes[n] for n in mine)
        pipeline.run(_Job(self, todo[n], missing, step(*(self.items[i] for i in todo[n]))) for n in mine)
        self.run.synced(self.sync)
        done = self.run.gather()
        if self.run.ranks.first:
            self._take_on(lambda name: name in done)

    def finish(self, index: int, result: R) -> None:
        """Note a result, and take what can be taken."""
        alone = self.run.ranks.size == 1  # then the result itself is held until it is taken
        self.run.add(self.names[index], self.pack(result), self.sizes[index], needed=not alone)
        with self._lock:
            self._done += self.sizes[index]
            if self.progress:
                self.progress(self.names[index], self._done, self._total)
            if alone:
                self._held[index] = result
                self._take_on(lambda name: False)
        if self.run.is_due:
            self.run.synced(self.sync)

    def _take_on(self, stored: Callable[[str], bool]) -> None:
        """Take results one after the other, as far as they are there."""
        while self._next < len(self.items):
            i, name = self._next, self.names[self._next]
            if i in self._held:
                self.take(self.items[i], self._held.pop(i))
            elif stored(name):
                self.take(self.items[i], self.unpack(self.run.done[name]))
            else:
                return
            self._next += 1


class _Job:
    """One module, or a group of them, on its way through the stages."""

    def __init__(self, load: Workload[Any, Any], group: Sequence[int], missing: set[int], step: ModuleJob) -> None:
        self.load, self.group, self.missing, self.step, self.cost = load, group, missing, step, step.cost

    def read(self) -> None:
        """The step's own."""
        self._named(self.step.read)

    def compute(self) -> None:
        """The step's own."""
        self._named(self.step.compute)

    def write(self) -> None:
        """Hand the results on that were missing."""
        results = [self.step.result] if len(self.group) == 1 else self.step.result
        for index, result in zip(self.group, results, strict=True):
            if index in self.missing:
                self.load.finish(index, result)
        self.step.result = None

    def _named(self, work: Callable[[], None]) -> None:
        """Name the module that fails; of several, the step itself says which."""
        if len(self.group) == 1:
            with named(self.load.names[self.group[0]]):
                work()
        else:
            work()


@contextmanager
def named(name: str, *others: str) -> Iterator[None]:
    """Put a module's or a file's name before the message of what fails, where it names neither it nor one of `others`.

    Examples:
        ```python
        with named("lm_head.weight"):
            decompose()
        ```
    """
    try:
        yield
    except SurgeryError as problem:
        text = str(problem)
        raise type(problem)(text if any(n in text for n in (name, *others)) else f"{name}: {text}") from None
    except (ArithmeticError, LinAlgError) as problem:
        raise SurgeryError(
            f"{name}: its numbers can't be computed with: they are too large, too small or too nearly dependent"
        ) from problem


class Spill:
    """Writes factors to a scratch file of this rank's own, and reads those of all ranks back.

    Args:
        run: Whose factors they are; its folder must be there.
    """

    def __init__(self, run: Run) -> None:
        self._scratch = ScratchFile(run.new_path(FACTORS), new=True)

    def put(self, found: Factored) -> dict[str, Any]:
        """Write factors; the record says where they are and all else that is known of them."""
        record: dict[str, Any] = {
            "report": found.report.to_dict(), "squares": list(found.squares), "copies": found.copies,
            "lost": list(found.lost), "scale": found.update.scale, "up": self._write(found.update.up),
            "down": self._write(found.update.down),
        }  # fmt: skip
        if found.bias is not None:
            record["bias"] = self._write(found.bias)
        if isinstance(found, ExpertFactors):
            record |= {"experts": found.experts, "shares": [asdict(s) for s in found.shares]}
        return record

    def get(self, record: dict[str, Any]) -> Factored:
        """The factors of a record, whichever rank wrote them.

        Raises:
            FormatError: they are not what was written.
        """
        update = LowRank(self._read(record["up"]), self._read(record["down"]), record["scale"])
        report = ModuleReport(**(record["report"] | {"shape": tuple(record["report"]["shape"])}))
        bias = self._read(record["bias"]) if "bias" in record else None
        common = (report, update, record["squares"], record["copies"], bias)
        if "experts" not in record:
            return Factored(*common, lost=record["lost"])
        shares = tuple(Share(**(s | {"shape": tuple(s["shape"])})) for s in record["shares"])
        return ExpertFactors(*common, experts=record["experts"], shares=shares)

    def sync(self) -> None:
        """Wait until the disk has what was put."""
        self._scratch.sync()

    def close(self) -> None:
        """Close; the file stays until the run ends."""
        self._scratch.close()

    def _write(self, tensor: Tensor) -> list[Any]:
        name, start, _, crc = self._scratch.put(as_bytes(tensor.contiguous()))
        return [name, start, dtype_name(tensor.dtype), list(tensor.shape), crc]

    def _read(self, where: list[Any]) -> Tensor:
        name, start, dtype, shape, crc = where
        tensor = torch.empty(shape, dtype=torch_dtype(dtype))
        view = as_bytes(tensor)
        read_back(self._scratch.path.parent, [name, start, len(view), crc], view)
        return tensor


@contextmanager
def spill(run: Run) -> Iterator[Spill]:
    """A spill that is closed at the end."""
    found = Spill(run)
    try:
        yield found
    finally:
        found.close()

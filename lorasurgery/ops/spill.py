"""Factors that are finished, put beside the output until all are: for --resume, and for rank 0 to put together."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lorasurgery.checkpoint.dtypes import dtype_name, torch_dtype
from lorasurgery.checkpoint.files import ReadFile, WriteFile
from lorasurgery.checkpoint.inside import to_read
from lorasurgery.checkpoint.journal import FACTORS, Run
from lorasurgery.checkpoint.writer import as_bytes
from lorasurgery.errors import FormatError
from lorasurgery.lowrank import LowRank
from lorasurgery.ops.expert_factors import ExpertFactors, Share
from lorasurgery.ops.factored import Factored
from lorasurgery.report import ModuleReport


class Spill:
    """Writes factors to a file of this rank's own, one behind the other, and reads those of all ranks back.

    Args:
        run: Whose factors they are; its folder must be there.
    """

    def __init__(self, run: Run) -> None:
        self._path = run.new_path(FACTORS)
        self._file = WriteFile(self._path, new=True)
        self._place, self._lock = 0, threading.Lock()

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
        self._file.sync()

    def close(self) -> None:
        """Close; the file stays until the run ends."""
        self._file.close()

    def _write(self, tensor: Tensor) -> list[Any]:
        data = as_bytes(tensor.contiguous())
        with self._lock:
            place, self._place = self._place, self._place + len(data)
        self._file.write_at(place, data)
        return [self._path.name, place, dtype_name(tensor.dtype), list(tensor.shape), zlib.crc32(data)]

    def _read(self, where: list[Any]) -> Tensor:
        name, place, dtype, shape, wanted = where
        tensor = torch.empty(shape, dtype=torch_dtype(dtype))
        view = as_bytes(tensor)
        path, got = to_read(self._path.parent, name, odd=True), -1
        with suppress(FileNotFoundError), ReadFile(path) as file:
            got = file.read_all(place, view)
        if got != len(view) or zlib.crc32(view) != wanted:
            what = "was removed" if got < 0 else "is damaged"
            raise FormatError(f"{path}: {what}, so --resume can't; --overwrite starts anew")
        return tensor


@contextmanager
def spill(run: Run) -> Iterator[Spill]:
    """A spill that is closed at the end."""
    found = Spill(run)
    try:
        yield found
    finally:
        found.close()

"""Checkpoint: the tensors of one file, a folder or a sharded index, read one at a time. Knows no LoRA."""

from __future__ import annotations

import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from lorasurgery.checkpoint.files import ReadFile
from lorasurgery.checkpoint.header import Header, TensorInfo, read_header, show
from lorasurgery.checkpoint.header_only import filled_in
from lorasurgery.checkpoint.inplace.recover import refuse_unfinished
from lorasurgery.checkpoint.locate import Located, load_config, locate
from lorasurgery.checkpoint.operation import inputs
from lorasurgery.checkpoint.tensor_reader import ReadsByFill
from lorasurgery.errors import FormatError

_NUMBERS = {"F64": "d", "F32": "f", "F16": "e", "BF16": "f", "I64": "q", "I32": "i"}
_MAX_OPEN = 16  # file descriptors: a checkpoint may have thousands of shards


class _OneFile(Mapping[str, str]):
    """The same file for every tensor."""

    def __init__(self, tensors: Mapping[str, TensorInfo], file: str) -> None:
        self._tensors, self._file = tensors, file

    def __getitem__(self, name: str) -> str:
        if name in self._tensors:
            return self._file
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Checkpoint(ReadsByFill):
    """A checkpoint opened from its headers; tensors are read from disk when asked for.

    Examples:
        ```python
        with Checkpoint.open("llama") as base:
            weight = base.read("model.norm.weight")
        ```

    Attributes:
        path: The reference as given.
        folder: Where config.json lies.
        is_file: Whether a file was given.
        files: shard name -> Header, in order.
        tensors: name -> TensorInfo.
        file_of: name -> shard name.
        index_name: The index's file name, None for a single file.
        parts: Of a diffusers folder, file -> prefix of its tensors' names here (`unet.`), which the file has not.
        indexes: Of a diffusers folder, prefix -> the index of that part.
        bytes_read: Tensor bytes read so far.
        inputs: Where its files are noted as they were when it was opened.
    """

    def __init__(self, path: Path, located: Located) -> None:
        self.path, self.folder, self.is_file = path, located.folder, path.is_file()
        self.index_name = located.index_name
        self.parts, self.indexes = located.parts, located.indexes
        self.inputs = inputs()
        self.files: dict[str, Header] = {name: self._header(located.folder / name) for name in located.files}
        self.tensors: dict[str, TensorInfo] = {}
        self.file_of: Mapping[str, str] = {}
        self.bytes_read = 0
        self._filled_in = {name: filled_in(located.folder / name) for name in located.files}
        self._lock = threading.Lock()
        self._open: OrderedDict[str, ReadFile] = OrderedDict()
        self._place(located.weight_map)

    @classmethod
    def open(cls, path: str | Path, *, unfinished: bool = False) -> Checkpoint:
        """Open a .safetensors file or a checkpoint folder; only headers are read.

        Args:
            unfinished: Open it even if an operation in place was interrupted there and some tensors are new, some old.

        Raises:
            FormatError: missing or broken, in one line.
            UnsupportedError: pickle files.
            MismatchError: an operation in place is not finished.
        """
        path = Path(path)
        try:
            located = locate(path)
            refuse_unfinished(path, own=not unfinished)
            found = cls(path, located)
            found.inputs.watch(lambda: refuse_unfinished(path, own=not unfinished))
            return found
        except OSError as problem:
            raise FormatError(f"{show(str(path))}: {problem.strerror or problem}") from None

    def _header(self, path: Path) -> Header:
        with suppress(OSError):  # which reading meets again, and names
            self.inputs.note(path)
        return read_header(path)

    def _place(self, weight_map: dict[str, str] | None) -> None:
        """Settle which shard serves each tensor: the index decides; what it doesn't list is kept all the same."""
        if len(self.files) == 1 and not self.parts and weight_map is None:  # 10⁵ names need not be held twice
            ((file, header),) = self.files.items()
            self.tensors, self.file_of = header.tensors, _OneFile(header.tensors, file)
            return
        file_of: dict[str, str] = {}
        self.file_of = file_of
        for file, header in self.files.items():
            prefix = self.parts.get(file, "")
            for info in header.tensors.values():
                info = replace(info, name=prefix + info.name) if prefix else info
                name = info.name
                if weight_map is not None and weight_map.get(name, file) != file:
                    continue
                if name in self.tensors:
                    raise FormatError(
                        f"{show(str(self.folder / file))}: {show(name)} is also in {self.file_of[name]}; "
                        "the index must say which of them counts"
                    )
                self.tensors[name], file_of[name] = info, file
        for name, file in (weight_map or {}).items():
            if name not in self.tensors:
                raise FormatError(f"{show(str(self.folder / file))}: has no {show(name)}, which the index promises")

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json beside the weights; {} when it is missing or empty, for names and shapes often suffice."""
        return load_config(self.folder / "config.json")

    def config_of(self, part: str) -> dict[str, Any]:
        """config.json of a part of a diffusers folder, such as `unet`; {} when it has none."""
        return load_config(self.folder / part / "config.json")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def fill(self, name: str, view: memoryview, start: int) -> None:
        """Read `len(view)` bytes of a tensor, from its byte `start` on, into memory that is already there.

        Raises:
            FormatError: the file changed, can't be read, ends too soon, or only its header is here.
        """
        file = self.readable(name)
        try:  # reads, not a memory map: a file cut short is an error here, not a crash
            done = file.read_all(self.tensors[name].start + start, view)
        except OSError as problem:
            raise FormatError(f"{self.where(name)}: cannot be read ({problem.strerror})") from None
        if done < len(view):
            raise FormatError(f"{self.where(name)}: the file ends inside this tensor; it was cut while in use")
        self.count(done)

    def readable(self, name: str) -> ReadFile:
        """The file that a tensor lies in.

        Raises:
            FormatError: it can't be opened, is no longer what it was, or only its header is here.
        """
        here = self._filled_in[self.file_of[name]]
        if here is not None and name.removeprefix(self.parts.get(self.file_of[name], "")) not in here:
            raise FormatError(f"{self.where(name)}: only the header of this file was fetched, not its tensors")
        return self.file(self.file_of[name])

    def expect(self, name: str) -> None:
        """Let the system read a tensor into its cache while we do something else, where it takes such advice."""
        info = self.tensors[name]
        self.readable(name).expect(info.start, info.nbytes)

    def count(self, done: int) -> None:
        """Count bytes of tensors that were read, here or by the system for us."""
        with self._lock:
            self.bytes_read += done

    def number(self, name: str) -> float:
        """Read a tensor of one element, without torch: an alpha, for instance.

        Raises:
            FormatError: more than one element, or no number of a plain kind.
        """
        info = self.tensors[name]
        kind = _NUMBERS.get(info.dtype)
        if kind is None or prod(info.shape) != 1:
            raise FormatError(f"{self.where(name)}: is {info.dtype} {list(info.shape)}; expected a single number")
        raw = bytearray(info.nbytes)
        self.fill(name, memoryview(raw), 0)
        raw = bytearray(2) + raw if info.dtype == "BF16" else raw  # a bfloat16 is the upper half of a float32
        return float(struct.unpack(f"<{kind}", raw)[0])

    def file(self, name: str) -> ReadFile:
        """A shard, open for reading from any thread; it closes when nobody holds it any more."""
        with self._lock:
            if name in self._open:
                self._open.move_to_end(name)
                return self._open[name]
            if len(self._open) >= _MAX_OPEN:
                self._open.popitem(last=False)
            path = self.folder / name
            try:
                file = ReadFile(path)
            except OSError as problem:
                raise FormatError(f"{show(str(path))}: {problem.strerror}") from None
            self.inputs.compare(path, os.fstat(file.fileno()))
            self._open[name] = file
            return file

    def where(self, name: str) -> str:
        """A tensor, for messages: its file and name."""
        return f"{show(str(self.folder / self.file_of[name]))}: {show(name)}"

    def close(self) -> None:
        """Close all file descriptors; reading again opens them again."""
        with self._lock:
            self._open.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

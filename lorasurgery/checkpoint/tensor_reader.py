"""What it takes to plan a change of a model and to read its tensors, whatever they are read from. Knows no files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorasurgery.checkpoint.header import Header, TensorInfo
from lorasurgery.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 16 << 20


class TensorReader(Protocol):
    """Tensors read by name: those of a checkpoint, or those it had before its last merge."""

    @property
    def path(self) -> Path:
        """The checkpoint, for messages."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name -> dtype and shape."""
        ...

    def fill(self, name: str, view: memoryview, start: int) -> None:
        """Read `len(view)` bytes of a tensor, from its byte `start` on, into memory that is already there."""
        ...

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[memoryview]:
        """Yield one tensor's bytes in pieces; each piece is reused for the next."""
        ...

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory of its own, on the CPU."""
        ...


class ModelHeaders(Protocol):
    """What is known of a model before any tensor is read; see Checkpoint for what each attribute holds."""

    @property
    def path(self) -> Path:
        """The checkpoint, for messages."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name -> dtype and shape."""
        ...

    @property
    def files(self) -> Mapping[str, Header]:
        """Shard -> its header."""
        ...

    @property
    def file_of(self) -> Mapping[str, str]:
        """Tensor -> shard."""
        ...

    @property
    def parts(self) -> Mapping[str, str]:
        """Of a diffusers folder, shard -> prefix of its tensors' names."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        ...

    def config_of(self, part: str) -> dict[str, Any]:
        """config.json of a part of a diffusers folder."""
        ...


class ReadsByFill:
    """`read`, `raw` and `chunks` of whatever can fill memory with some bytes of a tensor."""

    tensors: dict[str, TensorInfo]

    def fill(self, name: str, view: memoryview, start: int) -> None:
        """Read bytes of a tensor; see TensorReader."""
        raise NotImplementedError

    def where(self, name: str) -> str:
        """A tensor, for messages: its file and name."""
        raise NotImplementedError

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory of its own, on the CPU, with the dtype and shape of its header.

        Raises:
            FormatError: the file changed or ends too soon.
            UnsupportedError: torch has no such dtype.
        """
        from lorasurgery.checkpoint.dtypes import torch_dtype

        info = self.tensors[name]
        try:
            dtype = torch_dtype(info.dtype)
        except UnsupportedError as problem:
            raise UnsupportedError(f"{self.where(name)}: {problem}") from None
        return self.raw(name).view(dtype).reshape(info.shape)

    def raw(self, name: str) -> Tensor:
        """Read one tensor's bytes as a 1-D uint8 tensor."""
        import torch

        info = self.tensors[name]
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        self.fill(name, buffer.numpy().data, 0)
        return buffer

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[memoryview]:
        """Yield one tensor's bytes in pieces, for copying byte for byte; each piece is reused for the next."""
        info = self.tensors[name]
        buffer = bytearray(min(size, info.nbytes))
        for start in range(info.start, info.end, size):
            piece = memoryview(buffer)[: min(size, info.end - start)]
            self.fill(name, piece, start - info.start)
            yield piece

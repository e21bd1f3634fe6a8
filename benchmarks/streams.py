"""Checkpoint folders written and read one tensor at a time, whatever their size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

SHARD = 2_000_000_000  # maximum bytes per shard, as on the Hub
Shapes = dict[str, tuple[int, ...]]


class Writer(AbstractContextManager["Writer"]):
    """A folder of bfloat16 shards with their index; headers are written first, tensors in any order."""

    def __init__(self, folder: Path, shapes: Shapes, shard: int = SHARD) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._stack, self._places = ExitStack(), {}
        groups = list(_groups(shapes, shard))
        index: dict[str, str] = {}
        for i, names in enumerate(groups, 1):
            file = "model.safetensors" if len(groups) == 1 else f"model-{i:05}-of-{len(groups):05}.safetensors"
            self._start(folder / file, {n: shapes[n] for n in names})
            index |= dict.fromkeys(names, file)
        if len(groups) > 1:
            total = {"total_size": sum(map(_bytes, shapes.values()))}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": total, "weight_map": index}))

    def _start(self, path: Path, shapes: Shapes) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + _bytes(shape)]}
            end += _bytes(shape)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file: BinaryIO = self._stack.enter_context(path.open("wb"))
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            self._places[name] = (file, 8 + len(text) + header[name]["data_offsets"][0])

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place."""
        file, offset = self._places.pop(name)
        file.seek(offset)
        file.write(tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().data)

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        if self._places and _[0] is None:
            raise ValueError(f"never written: {sorted(self._places)}")


class Weights:
    """The tensors of a folder's safetensors files by name, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self.shapes: Shapes = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            header.pop("__metadata__", None)
            self._files |= dict.fromkeys(header, path)
            self.shapes |= {name: tuple(entry["shape"]) for name, entry in header.items()}

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def __contains__(self, name: str) -> bool:
        return name in self._files


def folder_bytes(folder: Path) -> int:
    """Return the bytes of a folder's safetensors files."""
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * torch.Size(shape).numel()


def _groups(shapes: Shapes, limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + _bytes(shape) > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += _bytes(shape)
    yield names

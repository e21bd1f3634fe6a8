"""What will be written, settled before the first byte: files, tensors, header bytes, shards and the index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from math import prod
from typing import Any

from lorasurgery.checkpoint.header import DTYPE_BITS
from lorasurgery.errors import UsageError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor to be written.

    >>> PlannedTensor("w", "BF16", (2, 3)).nbytes
    12
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class PlannedFile:
    """A safetensors file to be written: its tensors in the order of their data, and its metadata.

    The order is kept as given, unless a tensor would then lie across its own item size; in that case wider
    dtypes come first, as the safetensors library orders them.

    Args:
        prefix: What the tensors' names begin with here but not in the file (a part of a diffusers folder).
    """

    name: str
    tensors: tuple[PlannedTensor, ...]
    metadata: dict[str, str]
    prefix: str = ""

    def __post_init__(self) -> None:
        offset = 0
        for tensor in self.tensors:
            if offset % max(DTYPE_BITS[tensor.dtype] // 8, 1):
                wide_first = sorted(self.tensors, key=lambda t: -DTYPE_BITS[t.dtype])
                object.__setattr__(self, "tensors", tuple(wide_first))
                return
            offset += tensor.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return sum(t.nbytes for t in self.tensors)

    def header(self) -> bytes:
        """The file's first bytes: length and JSON, padded to 8 bytes, as the safetensors library writes it.

        >>> PlannedFile("a", (PlannedTensor("w", "U8", (2,)),), {}).header()[8:60]
        b'{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
        """
        raw = bytearray(8)  # the length comes last; a table of 10⁵ entries, or a list of them, would be far larger
        raw += b"{"
        for number, entry in enumerate(self._entries()):
            raw += (b"," if number else b"") + entry.encode()
        raw += b"}"
        raw += b" " * (-len(raw) % 8)
        raw[:8] = (len(raw) - 8).to_bytes(8, "little")
        return bytes(raw)

    def _entries(self) -> Iterator[str]:
        """The fields of the header's JSON."""
        if self.metadata:
            yield f'"__metadata__":{json.dumps(self.metadata, ensure_ascii=False, separators=(",", ":"))}'
        offset = 0
        for t in self.tensors:
            end = offset + t.nbytes
            name, shape = encode_basestring(t.name.removeprefix(self.prefix)), ",".join(map(str, t.shape))
            yield f'{name}:{{"dtype":"{t.dtype}","shape":[{shape}],"data_offsets":[{offset},{end}]}}'
            offset = end


def split_shards(files: Sequence[PlannedFile], max_shard_size: int) -> list[PlannedFile]:
    """Deal the tensors into shards of at most `max_shard_size` bytes, in order; a larger tensor has its own.

    >>> w = [PlannedTensor(n, "U8", (6,)) for n in "abc"]
    >>> [f.name for f in split_shards([PlannedFile("x", tuple(w), {})], 12)]
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    prefixes = list(dict.fromkeys(f.prefix for f in files))
    if len(prefixes) > 1:
        return [new for p in prefixes for new in split_shards([f for f in files if f.prefix == p], max_shard_size)]
    folder, _, stem = _stem(files[0].name if files and prefixes[0] else "model.safetensors").rpartition("/")
    place, prefix = f"{folder}/{stem}" if folder else stem, prefixes[0] if prefixes else ""
    metadata = files[0].metadata if files else {}
    groups: list[list[PlannedTensor]] = [[]]
    room = max_shard_size
    for tensor in (t for f in files for t in f.tensors):
        if tensor.nbytes > room and groups[-1]:
            groups.append([])
            room = max_shard_size
        groups[-1].append(tensor)
        room -= tensor.nbytes
    if len(groups) == 1:
        return [PlannedFile(f"{place}.safetensors", tuple(groups[0]), metadata, prefix)]
    names = [f"{place}-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    return [PlannedFile(name, tuple(group), metadata, prefix) for name, group in zip(names, groups, strict=True)]


def _stem(name: str) -> str:
    """A weight file's name without its shard number.

    >>> _stem("unet/diffusion_pytorch_model-00001-of-00002.safetensors")
    'unet/diffusion_pytorch_model'
    """
    return re.sub(r"(-\d+-of-\d+)?\.safetensors$", "", name)


def index_json(files: Sequence[PlannedFile]) -> dict[str, Any]:
    """The index of several shards: total_size in bytes and weight_map, tensor -> shard."""
    weight_map = {t.name.removeprefix(f.prefix): f.name.rpartition("/")[2] for f in files for t in f.tensors}
    total = sum(t.nbytes for f in files for t in f.tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def parse_size(text: str) -> int:
    """A size as people type it: 5GB is decimal, 5GiB binary, a bare number bytes.

    >>> parse_size("1.5GB"), parse_size("2KiB")
    (1500000000, 2048)

    Raises:
        UsageError: no such size, or nothing left of it.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)", text.strip(), re.IGNORECASE)
    unit = match[2].upper() if match else "?"
    unit = unit if unit.endswith("B") or not unit else unit + "B"
    if match is None or unit not in _UNITS or (size := int(float(match[1]) * _UNITS[unit])) < 1:
        raise UsageError(f"size {text!r}: expected a number with KB, MB, GB (or KiB, MiB, GiB), such as 5GB")
    return size

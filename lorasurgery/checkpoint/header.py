"""The header of a safetensors file, checked whole before anything in it is trusted. No tensor data, no torch.

Layout: 8 bytes little-endian length N, N bytes of JSON, then the tensors without gaps. Every claim of the JSON
is held against the file's size, so that later rooms can read at the offsets given here without another look.
"""

from __future__ import annotations

import stat
import struct
import sys
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from lorasurgery.checkpoint.json_text import parse
from lorasurgery.errors import FormatError, UnsupportedError

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
MAX_NDIM = 64
MAX_NAME, MAX_DOTS = 1000, 64  # of a tensor's name, of which each part may be looked at for itself
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAGIC = {
    b"PK\x03\x04": "a zip archive, as torch.save writes (a pickle inside)",
    b"\x80\x02": "a pickle",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a git-lfs pointer, not the weights; run `git lfs pull`",
    b"\x89HDF": "an HDF5 file",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it; start and end are offsets in the file.

    Examples:
        >>> TensorInfo("w", "BF16", (2, 3), 80, 92).nbytes
        12
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.end - self.start

    @property
    def is_float(self) -> bool:
        """Whether the values are floating-point numbers an update can be added to."""
        return self.dtype in FLOAT_DTYPES


@dataclass(frozen=True)
class Header:
    """A checked header: tensors in the order of their offsets, metadata, and the file's size in bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int


def read_header(path: str | Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        FormatError: naming the file, the tensor, what was expected and what was found.
    """
    path = Path(path)
    where = show(str(path))
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a FIFO would block for ever on open
            raise FormatError(f"{where}: is not a regular file")
        with path.open("rb") as file:
            size = found.st_size
            first = file.read(32)
            length = _header_length(first, size, where)
            file.seek(8)
            raw = file.read(length)
    except OSError as problem:
        raise FormatError(f"{where}: {problem.strerror or problem}") from None
    if len(raw) != length:
        raise FormatError(f"{where}: ends inside its header; download or copy it again")
    return parse_header(raw, size, where)


def parse_header(raw: bytes, size: int, where: str) -> Header:
    """Check a header's JSON against the size of the file it stands in.

    >>> raw = b'{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    >>> parse_header(raw, 8 + len(raw) + 2, "w.safetensors").tensors["w"].shape
    (2,)

    Args:
        raw: The JSON bytes, padding included.
        size: Size of the whole file in bytes.
        where: The file's name for messages.

    Raises:
        FormatError: for every claim that doesn't hold.
    """
    table = _load(raw, where)
    metadata = _metadata(table.pop("__metadata__", {}), where)
    start = 8 + len(raw)
    entries = ((name, table.pop(name)) for name in list(table))  # each goes when it is understood: there may be 10⁶
    infos = [_info(n, e, start, where) for n, e in entries]
    infos.sort(key=attrgetter("start", "end"))
    end = start
    for info in infos:
        if info.start != end:
            what = "overlaps the tensor before it" if info.start < end else f"leaves a gap of {info.start - end} bytes"
            raise FormatError(
                f"{where}: {show(info.name)}: begins at byte {info.start} but {end} was expected; it {what}"
            )
        end = info.end
    if end > size:
        raise FormatError(
            f"{where}: {show(infos[-1].name) if infos else 'header'}: the tensors end at byte {end} but the file has "
            f"{size}; it is cut short, download or copy it again"
        )
    if end < size:
        raise FormatError(f"{where}: {size - end} bytes follow the last tensor, which the header does not describe")
    return Header({info.name: info for info in infos}, metadata, size)


def refuse_pickle(path: Path) -> None:
    """Refuse pickle files by name: opening one can run any code.

    Raises:
        UnsupportedError: with the way to convert.
    """
    if path.suffix in PICKLE_SUFFIXES:
        raise UnsupportedError(
            f"{show(str(path))}: a pickle file, which can run code when it is opened; where you trust it, convert it: "
            "torch.load(path, weights_only=True), then safetensors.torch.save_file (or save_pretrained)"
        )


def show(name: str) -> str:
    """A name for a one-line message: as it is when plain, escaped and cut when not.

    >>> show("a.weight"), show("a\\nb")
    ('a.weight', "'a\\\\nb'")
    """
    cut = name if len(name) <= 300 else name[:300] + "…"
    return cut if cut.isprintable() else ascii(cut)


def _header_length(first: bytes, size: int, where: str) -> int:
    for magic, what in _MAGIC.items():  # a length can begin like one (640 is 80 02), so the brace after it decides
        if first.startswith(magic) and first[8:9] != b"{":
            raise FormatError(f"{where}: is {what}, not a safetensors file")
    if size < 8:
        raise FormatError(f"{where}: has {size} bytes, too few for a safetensors header; download or copy it again")
    (length,) = struct.unpack("<Q", first[:8])
    if length > MAX_HEADER:
        raise FormatError(f"{where}: claims a header of {length} bytes (at most {MAX_HEADER}); not a safetensors file")
    if 8 + length > size:
        raise FormatError(
            f"{where}: claims a header of {length} bytes but the file has {size}; it is cut short or not safetensors"
        )
    return int(length)


def _load(raw: bytes, where: str) -> dict[str, Any]:
    if raw[:1] != b"{":
        raise FormatError(f"{where}: the header does not begin with '{{'; not a safetensors file")
    table = parse(raw, f"{where}: the header", strict=True, made=_Packing())
    if not isinstance(table, dict):  # the header itself looks like a tensor's entry, and `dtype` like a tensor
        raise FormatError(f"{where}: dtype: {_NO_ENTRY}")
    return table


def _metadata(found: Any, where: str) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise FormatError(f"{where}: __metadata__ must be an object of strings")
    for text in (*found, *found.values()):
        _check_text(text, where)
    return found


_NO_ENTRY = "expected an object with dtype, shape and data_offsets"


class _Entry(NamedTuple):
    """A tensor's entry that says what it may: its offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    first: int
    end: int


class _EntryError(Exception):
    """What is wrong with an entry."""


class _Packing:
    """Turns entries into few bytes as they are parsed; what is wrong with the others is said when their name is known.

    Dozens of tensors have the same shape, and so one tuple.
    """

    def __init__(self) -> None:
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}

    def __call__(self, found: dict[str, Any]) -> Any:
        try:
            dtype, shape, first, end = _checked(found)
        except _EntryError:
            return found
        return _Entry(dtype, self._shapes.setdefault(shape, shape), first, end)


def _info(name: str, entry: Any, start: int, where: str) -> TensorInfo:
    _check_text(name, where)
    if len(name) > MAX_NAME or name.count(".") > MAX_DOTS:
        raise FormatError(f"{where}: {show(name)}: is a name of {len(name):,} characters, which no tensor has")
    try:
        found = entry if isinstance(entry, _Entry) else _checked(entry)
    except _EntryError as problem:
        raise FormatError(f"{where}: {show(name)}: {problem}") from None
    return TensorInfo(name, found.dtype, found.shape, start + found.first, start + found.end)


def _checked(entry: Any) -> _Entry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _EntryError(_NO_ENTRY)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _EntryError(f"unknown dtype {show(str(dtype))}")
    if not _whole_numbers(shape) or len(shape) > MAX_NDIM:
        raise _EntryError(f"shape must be a list of at most {MAX_NDIM} whole numbers, found {show(str(shape))}")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _EntryError(f"data_offsets must be two rising whole numbers, found {show(str(offsets))}")
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
    length = offsets[1] - offsets[0]
    if bits != 8 * length:
        raise _EntryError(
            f"{dtype} of shape {show(str(shape))} takes {bits / 8 if bits % 8 else bits // 8} bytes "
            f"but its offsets span {length}"
        )
    return _Entry(sys.intern(dtype), tuple(shape), offsets[0], offsets[1])


def _whole_numbers(value: Any) -> bool:
    # 2**63 bounds the arithmetic: a shape of huge integers must not cost time
    if not isinstance(value, list):
        return False
    for v in value:  # noqa: SIM110 — for every tensor of 10⁶, and a generator takes three times as long
        if type(v) is not int or not 0 <= v < 1 << 63:
            return False
    return True


def _check_text(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError(f"{where}: {text[:300]!a} is not valid Unicode text") from None

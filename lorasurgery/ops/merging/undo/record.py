"""What an undo record says, held against what this program writes: a record may come with a downloaded checkpoint."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from lorasurgery._version import __version__
from lorasurgery.adapters.adapter import Adapter
from lorasurgery.checkpoint.files import read_all_back
from lorasurgery.checkpoint.fingerprint import sha256_of
from lorasurgery.checkpoint.header import DTYPE_BITS, show
from lorasurgery.checkpoint.inside import LEADS_OUT, is_inside, leads_out
from lorasurgery.checkpoint.journal import UNDO_FOLDER
from lorasurgery.checkpoint.json_text import parse_object
from lorasurgery.checkpoint.locate import load_object
from lorasurgery.checkpoint.plan import PlannedFile, PlannedTensor
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.checkpoint.writer import TensorFile
from lorasurgery.errors import FormatError
from lorasurgery.hub.reference import cached_reference

_LARGEST = 1 << 30  # bytes of one stretch; those that are written have some megabytes
_KINDS = {"changed", "resized", "added"}
_HOWS = {"steps", "difference", "whole"}


def parsed(raw: bytes, version: int, room: int) -> dict[str, Any]:
    """`about` of a record, when all in it is of the right kind and in its bounds.

    Args:
        version: Of the format.
        room: Bytes of the record's data.

    Raises:
        ValueError: it is damaged.
        KeyError: it is damaged.
        TypeError: it is damaged.
        AttributeError: it is damaged.
        RecursionError: it is damaged.
    """
    try:
        about = parse_object(raw, "about", strict=True)
    except FormatError as problem:
        raise ValueError from problem
    if about["format"] != version:
        return about  # which the caller says by its number
    if not about["adapters"]:
        raise ValueError
    for adapter in about["adapters"]:
        _all_text(adapter["name"], adapter["sha256"], adapter.get("hub", ""))
        if type(adapter["weight"]) not in (int, float) or not math.isfinite(adapter["weight"]):
            raise ValueError
    _all_text(*about["block_weights"])
    for name, data in about["files"].items():
        _check_file(name, data)
    for kept in about["tensors"].values():
        _check_tensor(kept, room)
    return about


def _check_file(name: str, data: Any) -> None:
    """A file that undoing writes: below the checkpoint's folder, none of its weights and nothing hidden."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    if not is_inside(name) or hidden or name.lower().endswith(".safetensors"):
        raise ValueError
    if data is not None:
        _all_text(data)


def _check_tensor(kept: dict[str, Any], room: int) -> None:
    """The stretches follow one another from a tensor's first byte to its last."""
    _all_text(kept["after"])
    if kept["kind"] not in _KINDS or not _all_counts(*kept["shape"]):
        raise ValueError
    size = prod(kept["shape"]) * DTYPE_BITS[kept["dtype"]] // 8
    end = 0
    for start, length, place, packed, before, after, how in kept["stretches"]:
        _all_text(before, after)
        if not _all_counts(start, length, place, packed) or how not in _HOWS or start != end or length > _LARGEST:
            raise ValueError
        if place + packed > room:
            raise ValueError
        end += length
    if end != size and not (kept["kind"] == "added" and end == 0):
        raise ValueError


def _all_text(*values: Any) -> None:
    for value in values:
        if not isinstance(value, str):
            raise TypeError
        value.encode()  # half a character could not be shown


def _all_counts(*values: Any) -> bool:
    return all(type(v) is int and 0 <= v < 1 << 62 for v in values)


FOLDER = UNDO_FOLDER
_FORMAT, _MOST_ABOUT = 1, 1 << 28


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some bytes of one tensor, as they lie in it, and what is kept of them.

    Args:
        start: In the tensor as it was.
        size: In the tensor as it was.
        place: In the record's data (in a scratch file while it is written).
        length: In the record's data (in a scratch file while it is written).
        before: SHA-256 of the bytes; after is empty where the tensor has another size now.
        after: SHA-256 of the bytes; after is empty where the tensor has another size now.
        how: `steps` (corrections to round(W' − Δ)), `difference` (of all bits), or `whole` (the old bytes).
    """

    start: int
    size: int
    place: Any
    length: int
    before: str
    after: str
    how: str

    def listed(self) -> list[Any]:
        """As JSON."""
        return [self.start, self.size, self.place, self.length, self.before, self.after, self.how]


@dataclass(frozen=True, slots=True)
class Kept:
    """One tensor before the merge.

    Args:
        kind: `changed`, `resized` (it had another shape or dtype), or `added` (it was not there).
        stretches: In the order of the bytes.
        after: SHA-256 of all bytes of a resized tensor as it is now.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    stretches: tuple[Stretch, ...] = ()
    after: str = ""


@dataclass(frozen=True)
class Merged:
    """An adapter that was merged, without a word on where it lay: records travel with their checkpoints.

    Args:
        name: The last one of its path.
        sha256: Of what it is.
        weight: Its strength.
        hub: `org/name@commit` of one that came from the Hub.
    """

    name: str
    sha256: str
    weight: float
    hub: str = ""

    def listed(self) -> dict[str, Any]:
        """As JSON."""
        return {key: value for key, value in vars(self).items() if value != ""}


@dataclass(frozen=True)
class UndoRecord:
    """All that one merge needs to be undone.

    Args:
        tensors: Those that it touched.
        files: Other files that it changed: name -> the bytes before, None for one that was not there.
        path: Where the record lies; None while it is made.
        weights: Its tensors, likewise.
    """

    adapters: list[Merged]
    block_weights: list[str]
    tensors: dict[str, Kept] = field(default_factory=dict)
    files: dict[str, bytes | None] = field(default_factory=dict)
    path: Path | None = None
    weights: Checkpoint | None = None

    def data(self, stretch: Stretch) -> bytes:
        """What is kept of a stretch.

        Raises:
            FormatError: the file was cut.
        """
        assert self.weights is not None
        raw = bytearray(stretch.length)
        self.weights.fill("data", memoryview(raw), stretch.place)
        return bytes(raw)

    @property
    def names(self) -> str:
        """The adapters, for a message."""
        return ", ".join(a.name for a in self.adapters)


def undo_folder(checkpoint: Path) -> Path:
    """Where the records of a checkpoint lie: in its folder, or beside its file.

    >>> undo_folder(Path("m/model.safetensors")).as_posix()
    'm/model.safetensors.lorasurgery-undo'
    """
    return checkpoint.with_name(f"{checkpoint.name}.{FOLDER}") if is_file(checkpoint) else checkpoint / FOLDER


def is_file(checkpoint: Path) -> bool:
    """Whether a checkpoint is one file, there already or not."""
    return checkpoint.is_file() or (checkpoint.suffix == ".safetensors" and not checkpoint.is_dir())


def stack(checkpoint: Path) -> list[Path]:
    """The records of a checkpoint, the first merge first.

    Raises:
        FormatError: one is a link that leads out of the checkpoint's folder, or all of them lie behind one.
    """
    folder = undo_folder(checkpoint)
    found = sorted(folder.glob("[0-9]*.safetensors")) if folder.is_dir() else []
    for record in found:
        if leads_out(record, folder.parent):
            raise FormatError(f"{show(str(record))}: {LEADS_OUT}; put the record itself beside its checkpoint")
    return found


def next_name(existing: int) -> str:
    """The name of the next record.

    >>> next_name(0)
    '0001.safetensors'
    """
    return f"{existing + 1:04}.safetensors"


def read_undo_record(path: Path) -> UndoRecord:
    """Open a record; what it keeps is read when it is asked for.

    Raises:
        FormatError: it is none, or damaged.
    """
    weights = Checkpoint.open(path)
    where = show(str(path))
    if set(weights.tensors) != {"about", "data"} or weights.tensors["about"].nbytes > _MOST_ABOUT:
        raise FormatError(f"{where}: is not an undo record; it should hold `about` and `data`")
    raw = b"".join(bytes(piece) for piece in weights.chunks("about"))
    try:
        about = parsed(raw, _FORMAT, weights.tensors["data"].nbytes)
        if about["format"] != _FORMAT:
            raise FormatError(f"{where}: is of format {about['format']!r}, which this version does not know")
        record = UndoRecord(
            [_merged(a) for a in about["adapters"]], list(about["block_weights"]),
            {n: _kept(k) for n, k in about["tensors"].items()},
            {n: None if v is None else base64.b64decode(v) for n, v in about["files"].items()}, path,
            weights,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise FormatError(f"{where}: is a damaged undo record") from None
    return record


def _merged(raw: dict[str, Any]) -> Merged:
    return Merged(raw["name"], raw["sha256"], raw["weight"], raw.get("hub", ""))


def _kept(raw: dict[str, Any]) -> Kept:
    stretches = tuple(Stretch(*s) for s in raw["stretches"])
    return Kept(raw["kind"], raw["dtype"], tuple(raw["shape"]), stretches, raw["after"])


def planned_record(
    record: UndoRecord, tensors: Iterable[tuple[str, Kept]], name: str
) -> tuple[PlannedFile, bytearray]:  # fmt: skip
    """The file of a record, and its `about`.

    Args:
        record: What is known without the tensors.
        tensors: Those that the merge touched, their stretches in scratch files. Each goes into `about` as it comes, so
            that the objects of very many small ones are never in memory together.
    """
    end = 0
    about = bytearray(_json({
        "format": _FORMAT, "version": __version__, "adapters": [a.listed() for a in record.adapters],
        "block_weights": record.block_weights,
    })[:-1] + b',"tensors":{')  # fmt: skip
    for number, (tensor, kept) in enumerate(tensors):
        listed = []
        for s in kept.stretches:
            listed.append(replace(s, place=end).listed())
            end += s.length
        about += b"," if number else b""
        about += _json(tensor) + b":" + _json({
            "kind": kept.kind, "dtype": kept.dtype, "shape": list(kept.shape), "after": kept.after, "stretches": listed,
        })  # fmt: skip
    files = {n: None if v is None else base64.b64encode(v).decode() for n, v in record.files.items()}
    about += b'},"files":' + _json(files) + b"}"
    planned = (PlannedTensor("about", "U8", (len(about),)), PlannedTensor("data", "U8", (end,)))
    return PlannedFile(name, planned, {"format": FOLDER}), about


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def write_planned(file: TensorFile, about: bytearray, tensors: Iterable[tuple[str, Kept]], folder: Path) -> None:
    """Fill the file of a record from the scratch files in a folder.

    Args:
        tensors: As given to planned_record(), once more.
    """
    places = (s.place for _, kept in tensors for s in kept.stretches)
    file.write("about", [memoryview(about)])
    file.write("data", read_all_back(folder, places))


def merged_adapter(adapter: Adapter, given: str, weight: float) -> Merged:
    """An adapter as a record names it."""
    path = os.path.abspath(given)  # noqa: PTH100 — without `.` and `..`, and links as they were given
    return Merged(Path(path).name, digest(adapter), weight, str(cached_reference(path) or ""))


def digest(adapter: Adapter) -> str:
    """SHA-256 of all that decides an adapter's update: its weight files, and what its config makes of them."""
    found = hashlib.sha256()
    members = adapter.members.values() or (adapter,)
    for one in members:
        for name in sorted(one.weights.files):
            found.update(bytes.fromhex(sha256_of(one.weights.folder / name)))
        config = one.weights.folder / "adapter_config.json"
        meaning = {k: v for k, v in load_object(config).items() if k not in _PROSE} if config.is_file() else {}
        found.update(json.dumps(meaning, sort_keys=True).encode())
    return found.hexdigest()


_PROSE = {"base_model_name_or_path", "inference_mode", "revision", "peft_version", "auto_mapping"}


def top_record(checkpoint: Path) -> UndoRecord | None:
    """The record of the last merge, None where there is none."""
    found = stack(checkpoint)
    return read_undo_record(found[-1]) if found else None

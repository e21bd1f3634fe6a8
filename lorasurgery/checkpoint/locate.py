"""Which files make up a checkpoint: one file, a folder, the shards an index names, or a diffusers folder's parts."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasurgery.checkpoint.header import PICKLE_SUFFIXES, refuse_pickle, show
from lorasurgery.checkpoint.inside import is_inside, leads_out
from lorasurgery.checkpoint.json_text import MOST, MOST_CONFIG, parse_object
from lorasurgery.checkpoint.regular import read_bytes
from lorasurgery.errors import FormatError

INDEX_SUFFIX = ".safetensors.index.json"
_SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
PIPELINE = "model_index.json"
_SHARD = re.compile(r"-\d+-of-(\d{1,9})\.safetensors$")


@dataclass(frozen=True)
class Located:
    """The files of a checkpoint in order, and the index that names them (None for a single file).

    Args:
        parts: Of a diffusers folder: file -> prefix of its tensors' names, `unet.` for what lies in unet/. The other
            fields then hold the names with folder and prefix.
        indexes: Of a diffusers folder: prefix -> index, for the parts that have one.
    """

    folder: Path
    files: list[str]
    weight_map: dict[str, str] | None = None
    index_name: str | None = None
    parts: dict[str, str] = field(default_factory=dict)
    indexes: dict[str, str] = field(default_factory=dict)


def locate(path: Path) -> Located:
    """Find a checkpoint's files the way transformers does: model.safetensors, then the index, then a sole file.

    Raises:
        FormatError: nothing there, or more than one answer.
        UnsupportedError: only pickle files.
    """
    if path.is_file():
        refuse_pickle(path)
        if path.suffix == ".json":
            raise FormatError(f"{show(str(path))}: is an index or a config; give its folder, {show(str(path.parent))}")
        return Located(path.parent, [path.name])
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        raise FormatError(f"{show(str(path))}: is not a regular file")
    text = str(path)
    hub = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    hint = f"; download it first: hf download {text} --local-dir DIR" if hub else ""
    raise FormatError(f"{show(text)}: is neither a file nor a folder{hint}")


def _in_folder(folder: Path) -> Located:
    names = sorted(f.name for f in folder.iterdir())
    return _pipeline(folder, names) if PIPELINE in names else _plain(folder, names)


def _plain(folder: Path, names: list[str]) -> Located:
    for name in _SINGLE:
        if name in names:
            return Located(folder, [name])
    where = show(str(folder))
    indexes = [n for n in names if n.endswith(INDEX_SUFFIX)]
    if len(indexes) > 1:
        raise FormatError(
            f"{where}: has {len(indexes)} indexes ({', '.join(map(show, indexes))}); keep the one that is meant"
        )
    if indexes:
        weight_map = read_index(folder / indexes[0])
        return Located(folder, list(dict.fromkeys(weight_map.values())), weight_map, indexes[0])
    files = [n for n in names if n.endswith(".safetensors") and not n.startswith(".") and n not in _ADAPTER]
    if len(files) == 1:
        _refuse_shard(where, files[0])
        return Located(folder, files)
    if files:
        raise FormatError(
            f"{where}: has {len(files)} safetensors files and no index to say which belong together "
            f"({', '.join(map(show, files[:3]))}{' …' if len(files) > 3 else ''}); give one file, or restore "
            f"model{INDEX_SUFFIX}"
        )
    raise _nothing(folder, names)


def _refuse_shard(where: str, name: str) -> None:
    """A sole shard is what a download or an output that was cut short begins with."""
    found = _SHARD.search(name)
    if found and int(found[1]) > 1:
        raise FormatError(
            f"{where}: has {show(name)}, one of {int(found[1])} shards, and no index; the others are missing, or not "
            "all of it was written yet"
        )


def _pipeline(folder: Path, names: list[str]) -> Located:
    """A diffusers folder: every part that has safetensors weights; parts without are not weights, or pickles."""
    files: list[str] = []
    weight_map: dict[str, str] = {}
    parts: dict[str, str] = {}
    indexes: dict[str, str] = {}
    for name in names:
        inside = folder / name
        if not inside.is_dir() or not any(f.suffix == ".safetensors" for f in inside.iterdir()):
            continue
        # a part is not a pipeline: a link back to the folder would have us look for ever
        found, prefix = _plain(inside, sorted(f.name for f in inside.iterdir())), f"{name}."
        files += [f"{name}/{file}" for file in found.files]
        parts |= {f"{name}/{file}": prefix for file in found.files}
        weight_map |= {prefix + tensor: f"{name}/{file}" for tensor, file in (found.weight_map or {}).items()}
        if found.index_name:
            indexes[prefix] = f"{name}/{found.index_name}"
    if not files:
        raise FormatError(f"{show(str(folder))}: has {PIPELINE} but no part with safetensors files")
    return Located(folder, files, weight_map or None, parts=parts, indexes=indexes)


def _nothing(folder: Path, names: list[str]) -> FormatError:
    for name in names:
        if name.endswith(PICKLE_SUFFIXES):
            refuse_pickle(folder / name)
    if any(n in names for n in _ADAPTER):
        return FormatError(f"{show(str(folder))}: is an adapter, not a checkpoint; it has no model weights")
    return FormatError(f"{show(str(folder))}: no safetensors files here")


def read_index(file: Path) -> dict[str, str]:
    """Read an index's weight_map (tensor -> shard) and check that every shard lies in the index's folder.

    Raises:
        FormatError: not JSON, names twice, a shard outside the folder, or a missing shard.
    """
    where = show(str(file))
    weight_map = load_object(file, strict=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise FormatError(f"{where}: expected a weight_map from tensor names to shard names")
    if not weight_map:
        raise FormatError(f"{where}: its weight_map is empty")
    for shard in sorted(set(weight_map.values())):
        _check_shard(file.parent, shard, where)
    return weight_map


def _check_shard(folder: Path, shard: str, where: str) -> None:
    if not is_inside(shard):
        raise FormatError(
            f"{where}: shard {show(shard)} points outside the checkpoint's folder; a shard is a plain file name"
        )
    path = folder / shard
    if leads_out(path, folder):
        raise FormatError(f"{where}: shard {show(shard)} is a link that leads outside the checkpoint's folder")
    refuse_pickle(path)
    if path.suffix != ".safetensors":  # it would be written where another file of the folder belongs
        raise FormatError(f"{where}: shard {show(shard)} is not named as a safetensors file")
    try:
        found = path.exists()
    except OSError as problem:
        raise FormatError(f"{where}: shard {show(shard)}: {problem.strerror}") from None
    if not found:
        raise FormatError(f"{where}: shard {show(shard)} is missing; download or copy it again")


def exists(path: str | Path) -> bool:
    """Whether there is something of this name; a name that no system can have is simply not there.

    >>> exists("x" * 5000), exists(".")
    (False, True)
    """
    return os.path.exists(path)  # noqa: PTH110 — a Path would raise where a name is too long for the system


def load_config(file: Path) -> dict[str, Any]:
    """config.json; {} when it is missing or empty, for names and shapes often suffice.

    Raises:
        FormatError: no JSON object, or a word of another kind than it has in every model.
    """
    if not file.is_file() or not file.stat().st_size:
        return {}
    found = load_object(file, most=MOST_CONFIG)
    kind, architectures = found.get("model_type"), found.get("architectures")
    if not isinstance(kind, (str, type(None))):
        raise FormatError(f"{show(str(file))}: model_type is {kind!r}; expected a name")
    if architectures and not (isinstance(architectures, list) and all(isinstance(a, str) for a in architectures)):
        raise FormatError(f"{show(str(file))}: architectures is {architectures!r}; expected a list of names")
    return found


def load_bytes(file: Path, most: int = MOST) -> bytes:
    """All of a regular file that is no larger than `most`; see regular.read_bytes.

    Raises:
        FormatError: unreadable, larger, or another kind of file; with its name.
    """
    where = show(str(file))
    try:
        return read_bytes(file, most)
    except OSError as problem:
        raise FormatError(f"{where}: {problem.strerror or problem}") from None
    except FormatError as problem:
        raise FormatError(f"{where}: {problem}") from None


def load_object(file: Path, *, most: int = MOST, strict: bool = False) -> dict[str, Any]:
    """Read a JSON file that must hold an object; see json_text.parse.

    Raises:
        FormatError: unreadable, larger than `most`, not JSON, or something else than an object.
    """
    return parse_object(load_bytes(file, most), show(str(file)), strict=strict)

"""How something was made: its inputs with revisions and hashes, and a record of it beside the result.

The record holds nothing of the machine (no times, of paths the last names): the same operation writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from lorasurgery._version import __version__
from lorasurgery.adapters.formats import is_adapter, open_adapter
from lorasurgery.adapters.peft.config import read_config
from lorasurgery.adapters.peft.read import CONFIG_NAME, WEIGHTS_NAME, is_peft
from lorasurgery.checkpoint.fingerprint import sha256_of
from lorasurgery.checkpoint.header import show
from lorasurgery.checkpoint.json_text import pretty_pieces
from lorasurgery.checkpoint.locate import load_object, locate
from lorasurgery.checkpoint.modes import Modes
from lorasurgery.engine.atomic_file import write_atomic
from lorasurgery.errors import FormatError, OutputError, SurgeryError, UsageError
from lorasurgery.hub.reference import cached_reference
from lorasurgery.ops.provenance.card_reader import license_of
from lorasurgery.report import RECORD_NAME, Report, Source, plain

_HASHED_WHOLE = 256 * 10**6  # bytes of one input: more would cost a large operation a second reading
_KEPT = ("totals", "modules", "full", "left_out", "warnings")


def describe(given: Any, warnings: list[str]) -> list[Source]:
    """Say what inputs are, for whoever finds the result later.

    Args:
        given: A path, several, or None; references on the Hub are given as the folders they were fetched to.
        warnings: Gets what of them can't be read.
    """
    if given is None:
        return []
    if isinstance(given, Sequence) and not isinstance(given, str):
        return [source for item in given for source in describe(item, warnings)]
    path = Path(given)
    with suppress(SurgeryError, OSError):
        return [_source(path, warnings)]
    return []


def _source(path: Path, warnings: list[str]) -> Source:
    adapter = _adapter_at(path)
    if adapter:
        folder, names = adapter.folder, adapter.files
    else:
        located = locate(path)
        folder, names = located.folder, located.files
    hub = cached_reference(path.absolute())
    source = Source(
        hub.repo if hub else path.absolute().name,
        "adapter" if adapter else "checkpoint",
        revision=hub.revision if hub else None,
        base_model=_base_of(adapter.config) if adapter else hub.repo if hub else None,
        license=license_of(adapter.home if adapter else folder, warnings),
    )
    whole = sum((folder / name).stat().st_size for name in names) <= _HASHED_WHOLE
    source.files = [_file(folder / name, name, whole=whole) for name in names]
    return source


class _Found(NamedTuple):
    """An adapter's weight files, the folder they lie in, its config, and the folder that is its home."""

    folder: Path
    files: list[str]
    config: Mapping[str, Any]
    home: Path


def _adapter_at(path: Path) -> _Found | None:
    """What is known of an adapter without its tensors' names: the operation has looked at them all already."""
    if is_peft(path):
        folder = path if path.is_dir() else path.parent
        return _Found(folder, [WEIGHTS_NAME], read_config(folder / CONFIG_NAME).raw, folder)
    if not is_adapter(path):
        return None
    adapter = open_adapter(path)
    return _Found(adapter.weights.folder, list(adapter.weights.files), adapter.config, adapter.folder)


def _base_of(config: Mapping[str, Any]) -> str | None:
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str):
        return None
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if is_local(name) else name


def without_folders(text: str) -> str:
    """The same text with the folders of absolute paths cut off: they concern this machine alone.

    >>> without_folders("/home/me/llama, see https://host/a/b and org/name")
    'llama, see https://host/a/b and org/name'
    """
    return re.sub(r"(?<![\w:/.])/(?:[^\s/,;:()]+/)+", "", text)


def _file(path: Path, name: str, *, whole: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "bytes": path.stat().st_size}
    blob = path.resolve().name  # the Hub's cache names large files by their SHA-256
    if re.fullmatch(r"[0-9a-f]{64}", blob):
        found["sha256"] = blob
    elif whole:
        found["sha256"] = sha256_of(path)
    else:
        with path.open("rb") as file:
            start = file.read(8)
            found["header_sha256"] = hashlib.sha256(start + file.read(int.from_bytes(start, "little"))).hexdigest()
    return found


def record(report: Report, call: str) -> None:
    """Write the record of an operation into its output folder; a single file has none.

    Raises:
        OutputError: it can't be written; the result itself is whole.
    """
    out = Path(report.output)
    if not out.is_dir():
        return
    data = record_bytes(report, call)
    where = out / RECORD_NAME
    try:
        write_atomic(where, data, mode=Modes.of([out], out).file)
    except OSError as problem:
        with suppress(OSError):
            where.unlink()
        raise OutputError(f"{where}: cannot be written ({problem.strerror}); the rest of {out} is whole") from None
    report.bytes_written += len(data)


def record_bytes(report: Report, call: str) -> bytes:
    """The record of an operation as it is written."""
    kept = {key: getattr(report, key) for key in _KEPT}
    kept["totals"] = plain(report.totals)
    kept["warnings"] = [without_folders(_by_last_names(text, report.inputs)) for text in report.warnings]
    table = {
        "command": report.command, "call": call, "version": __version__, "sources": report.sources or [], **kept
    }  # fmt: skip
    raw = BytesIO()
    raw.writelines(piece.encode() for piece in pretty_pieces(table))
    raw.write(b"\n")
    return raw.getvalue()


def _by_last_names(text: str, inputs: Sequence[str]) -> str:
    """The same with inputs and their folders called by their last names, relative ones too."""
    paths = {p for i in inputs if Path(i).exists() for p in (Path(i), Path(i).parent) if len(p.parts) > 1}
    for path in sorted(paths, key=lambda p: -len(str(p))):
        text = text.replace(str(path), path.name)
    return text


def read_record(folder: Path, warnings: list[str]) -> dict[str, Any]:
    """The record beside a result; {} where there is none, or one that this program can't have written.

    Args:
        warnings: Gets a line where it counts as none.
    """
    file = folder / RECORD_NAME
    if not os.path.lexists(file):
        return {}
    try:
        found = load_object(file, strict=True)
        try:
            check_record(found)
        except FormatError as problem:
            raise FormatError(f"{show(str(file))}: {problem}") from None
    except FormatError as problem:
        warnings.append(f"{problem}; the record counts as none, so how this was made is not known")
        return {}
    return found


COLUMNS = ("rank", "alpha", "delta_norm", "error", "energy", "retention", "noise", "effective_rank")
"""Numbers of a module that a model card shows."""

_MODULE: dict[str, Any] = {"name": str, "shape": [int], **{f"{name}?": float for name in COLUMNS}}
_FILE = {"name": str, "bytes": int, "sha256?": str, "header_sha256?": str}
_SOURCE = {"name": str, "kind": str, "revision?": str, "base_model?": str, "license?": str, "files": [_FILE]}
_TOTALS = {"tensors_touched?": int, "retention?": float, "noise?": float, "error?": float, "energy?": float,
           "weights?": [float]}  # fmt: skip
RECORD: dict[str, Any] = {
    "command": str, "call": str, "version": str, "sources": [_SOURCE], "totals": _TOTALS, "modules": [_MODULE],
    "full": [{"name": str, "shape": [int]}], "left_out": [{"name": str, "shape": [int]}], "warnings": [str],
}  # fmt: skip
"""Field -> kind: a type, a list of one kind, or an object of fields; ? ends the name of one that may be missing."""

_WORDS = {str: "text", int: "a whole number of at least 0", float: "a finite number", list: "a list", dict: "an object"}


def check_record(found: Any, kind: Any = RECORD, where: str = "") -> None:
    """Hold a record against what this program writes.

    >>> check_record({"name": "a", "bytes": "8"}, {"name": str, "bytes": int})
    Traceback (most recent call last):
        ...
    lorasurgery.errors.FormatError: bytes is '8'; expected a whole number of at least 0

    Raises:
        FormatError: a field is missing or of another kind; names the field.
    """
    if isinstance(kind, dict):
        _expect(isinstance(found, dict), found, dict, where)
        for name, inner in kind.items():
            key = name.removesuffix("?")
            if key in found:
                check_record(found[key], inner, f"{where}.{key}" if where else key)
            elif key == name:
                raise FormatError(f"{where or 'it'} has no {key}")
    elif isinstance(kind, list):
        _expect(isinstance(found, list), found, list, where)
        for number, item in enumerate(found):
            check_record(item, kind[0], f"{where}[{number}]")
    else:
        _expect(_is(found, kind), found, kind, where)


def _is(value: Any, kind: type) -> bool:
    if kind is str:
        return isinstance(value, str)
    if kind is int:
        return type(value) is int and 0 <= value < 1 << 62
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _expect(holds: bool, found: Any, kind: type, where: str) -> None:
    if not holds:
        raise FormatError(f"{where or 'it'} is {repr(found)[:80]}; expected {_WORDS[kind]}")


HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_KEY = "base_model_name_or_path"


def check_base_model(name: str | None) -> None:
    """Refuse what is not a name on the Hub.

    Raises:
        UsageError: with what is expected.
    """
    if name is not None and not HUB_NAME.fullmatch(name):
        raise UsageError(f"--base-model {show(name)}: expected the base's name on the Hub, as org/name")


def is_local(name: Any) -> bool:
    """Whether a base is named as only this machine knows it: by a path.

    >>> is_local("/home/me/llama"), is_local("../llama"), is_local("meta-llama/Llama-3.2-1B"), is_local(None)
    (True, True, False, False)
    """
    return isinstance(name, str) and bool(name) and (not HUB_NAME.fullmatch(name) or Path(name).exists())


def local_bases(files: Mapping[str, Path]) -> list[str]:
    """A sentence for each config among some files that would tell of this machine's folders."""
    return [
        f"{name}: names the base by a path of this machine ({show(config[_KEY])}), which is published with it; "
        "`lorasurgery push … --base-model ORG/NAME` writes the name that the Hub knows into what is sent"
        for name, config in _configs(files)
        if is_local(config.get(_KEY))
    ]


def with_base_model(files: Mapping[str, Path], base_model: str | None) -> dict[str, bytes]:
    """The configs among some files with another name for the base; the files stay."""
    if base_model is None:
        return {}
    return {
        name: (json.dumps(config | {_KEY: base_model}, indent=2, ensure_ascii=False) + "\n").encode()
        for name, config in _configs(files)
    }


def _configs(files: Mapping[str, Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, file in files.items():
        if name.rpartition("/")[2] == CONFIG_NAME:
            yield name, load_object(file)

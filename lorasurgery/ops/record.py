"""How something was made: its inputs with revisions and hashes, and a record of it beside the result.

The record holds nothing of the machine (no times, of paths the last names): the same operation writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lorasurgery._version import __version__
from lorasurgery.adapters.formats import is_adapter, open_adapter
from lorasurgery.adapters.peft.config import read_config
from lorasurgery.adapters.peft.read import CONFIG_NAME, WEIGHTS_NAME, is_peft
from lorasurgery.checkpoint.files import WriteFile, sync_folder
from lorasurgery.checkpoint.header import show
from lorasurgery.checkpoint.journal import new_token, partial_of
from lorasurgery.checkpoint.locate import load_object, locate
from lorasurgery.checkpoint.modes import Modes
from lorasurgery.errors import FormatError, OutputError, SurgeryError
from lorasurgery.hub.reference import cached_reference
from lorasurgery.ops.base_name import is_local
from lorasurgery.ops.card_reader import license_of
from lorasurgery.ops.record_check import check_record
from lorasurgery.report import RECORD_NAME, Report, Source

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


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read a megabyte at a time."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            digest.update(buffer[:got])
    return digest.hexdigest()


def record(report: Report, call: str) -> None:
    """Write the record of an operation into its output folder; a single file has none.

    Raises:
        OutputError: it can't be written; the result itself is whole.
    """
    out = Path(report.output)
    if not out.is_dir():
        return
    data = record_bytes(report, call)
    partial = partial_of(out / RECORD_NAME, new_token())
    try:
        with WriteFile(partial, mode=Modes.of([out], out).file, new=True) as file:
            file.write_at(0, memoryview(data))
            file.truncate(len(data))
            file.sync()
        partial.replace(out / RECORD_NAME)
        sync_folder(out)
    except OSError as problem:
        where = out / RECORD_NAME
        for left in (partial, where):
            with suppress(OSError):
                left.unlink()
        raise OutputError(f"{where}: cannot be written ({problem.strerror}); the rest of {out} is whole") from None
    report.bytes_written += len(data)


def record_bytes(report: Report, call: str) -> bytes:
    """The record of an operation as it is written."""
    found = report.to_dict()
    kept = {key: found[key] for key in _KEPT if key in found}
    kept["warnings"] = [without_folders(_by_last_names(text, report.inputs)) for text in report.warnings]
    sources = [source.to_dict() for source in report.sources or ()]
    table = {"command": report.command, "call": call, "version": __version__, "sources": sources, **kept}
    return (json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


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

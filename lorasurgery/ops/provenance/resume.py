"""What the result of an operation depends on, so that --resume goes on only with the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery._version import __version__
from lorasurgery.checkpoint.journal import Run
from lorasurgery.engine.ranks import Ranks

if TYPE_CHECKING:
    import torch

_KINDS = (".safetensors", ".json", ".model", ".txt", ".jinja", ".py")
_SMALL = 64 << 20  # bytes of a JSON file that are hashed whole


def start_run(
    command: str, out: Path, inputs: Iterable[str | Path], options: Any, device: torch.device, *, resume: bool,
    ranks: Ranks,
) -> Run:  # fmt: skip
    """The run of an operation, which `--resume` can go on with.

    Args:
        inputs: Local paths; of each the sizes, times and hashed headers of its files are noted.
        options: Whatever decides the result; noted as its repr.
    """
    import torch

    capability = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else torch.version.cuda
    about: dict[str, Any] = {
        "command": command,
        "version": f"lorasurgery {__version__}, torch {torch.__version__} ({capability})",
        "device": device.type,
        "options": repr(options),
    }
    for path in map(Path, inputs):
        about.setdefault(f"input {path.name}", []).append(_identity(path))
    return Run(out, about, resume=resume, ranks=ranks)


def _identity(path: Path) -> list[list[Any]]:
    """[name, bytes, times of change, SHA-256 of the header] of each file that can matter.

    Devices and inodes are left out: a restart of the machine may renumber them.
    """
    if path.is_file():
        return [_file(path, path.name)]
    files = sorted(f for f in path.rglob("*") if f.suffix in _KINDS and f.is_file() and not f.name.startswith("."))
    return [_file(f, str(f.relative_to(path))) for f in files]


def _file(path: Path, name: str) -> list[Any]:
    found = path.stat()
    return [name, found.st_size, found.st_mtime_ns, found.st_ctime_ns, _header_hash(path)]


def _header_hash(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little") if path.suffix == ".safetensors" else _SMALL
        return hashlib.sha256(start + file.read(min(length, _SMALL * 8))).hexdigest()[:32]

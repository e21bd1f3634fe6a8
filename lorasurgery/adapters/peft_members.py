"""A folder of PEFT adapters, one for each part of an image model: unet/, transformer/, text_encoder/ …

PEFT adapts one model at a time, so an adapter of a pipeline is a folder for each of its parts, named as diffusers names
them. Opened together they are one adapter, whose paths begin with the part's name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lorasurgery.adapters.adapter import Adapter, Delta
from lorasurgery.adapters.components import FOLDER_NAMES
from lorasurgery.adapters.peft import WEIGHTS_NAME, is_peft, read_peft
from lorasurgery.checkpoint.locate import Located
from lorasurgery.checkpoint.reader import Checkpoint


def members(path: Path) -> list[str]:
    """The parts that have an adapter of their own in a folder."""
    return [name for name in FOLDER_NAMES if (path / name).is_dir() and is_peft(path / name)]


def is_peft_members(path: Path) -> bool:
    """Tell whether a folder holds PEFT adapters by part."""
    return path.is_dir() and not is_peft(path) and bool(members(path))


def read_peft_members(path: Path) -> Adapter:
    """Open the adapters of all parts as one.

    Raises:
        SurgeryError: as read_peft does for each.
    """
    found = {name: read_peft(path / name) for name in members(path)}
    files = {f"{name}/{WEIGHTS_NAME}": f"{name}." for name in found}
    together = Adapter(
        path=str(path), folder=path, weights=Checkpoint(path, Located(path, list(files), parts=files)), deltas={},
        replaced={}, members=found,
    )  # fmt: skip
    for name, member in found.items():
        _join(together, f"{name}.", member)
    return together


def _join(together: Adapter, prefix: str, member: Adapter) -> None:
    together.deltas |= {prefix + path: _prefixed(delta, prefix) for path, delta in member.deltas.items()}
    together.replaced |= {prefix + name: prefix + key for name, key in member.replaced.items()}
    together.tokens |= {prefix + name: (prefix + key, rows) for name, (key, rows) in member.tokens.items()}
    together.added |= {prefix + name for name in member.added}


def _prefixed(delta: Delta, prefix: str) -> Delta:
    return replace(
        delta, path=prefix + delta.path, down=prefix + delta.down, up=prefix + delta.up,
        bias=delta.bias and prefix + delta.bias, magnitude=delta.magnitude and prefix + delta.magnitude,
        parameter=delta.parameter and prefix + delta.parameter,
    )  # fmt: skip

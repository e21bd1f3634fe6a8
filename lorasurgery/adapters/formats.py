"""The table of adapter formats: who can read a path. A new format is one file and one row here."""

from __future__ import annotations

from pathlib import Path

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.peft.read import is_peft, is_peft_members, read_peft, read_peft_members
from lorasurgery.adapters.single_file.read import is_loose, read_loose
from lorasurgery.checkpoint.header import refuse_pickle
from lorasurgery.errors import FormatError

_FORMATS = ((is_peft, read_peft), (is_peft_members, read_peft_members), (is_loose, read_loose))


def is_adapter(path: Path) -> bool:
    """Whether a path is an adapter of any format in the table.

    Raises:
        FormatError: a file whose header can't be read.
    """
    return any(detect(path) for detect, _ in _FORMATS)


def open_adapter(reference: str | Path) -> Adapter:
    """Open an adapter folder or file of any format in the table.

    Raises:
        FormatError: nothing there, or not an adapter.
        UnsupportedError: a known format that is not read.
    """
    path = Path(reference)
    if not path.exists():
        hint = f"; download it first: hf download {reference} --local-dir DIR" if _like_hub(str(reference)) else ""
        raise FormatError(f"{reference}: is neither a file nor a folder{hint}")
    if path.is_file():
        refuse_pickle(path)
    for detect, read in _FORMATS:
        if detect(path):
            return read(path)
    if path.is_dir():
        raise FormatError(
            f"{path}: no adapter_config.json with adapter_model.safetensors here, and no adapter in one file, so it is "
            "not an adapter"
        )
    raise FormatError(f"{path}: holds no LoRA factors, so it is not an adapter")


def _like_hub(reference: str) -> bool:
    return reference.count("/") == 1 and not reference.startswith((".", "/", "~"))

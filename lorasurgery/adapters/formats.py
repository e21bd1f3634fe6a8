"""The table of adapter formats: who can read a path. A new format is one file and one row here."""

from __future__ import annotations

from pathlib import Path

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.peft import is_peft, read_peft
from lorasurgery.checkpoint.header import read_header, refuse_pickle
from lorasurgery.errors import FormatError, UnsupportedError

_FORMATS = ((is_peft, read_peft),)

# Keys by which other communities' files are known, so that they can be refused by name.
_FOREIGN = {
    ".lora_down.": "a kohya LoRA",
    ".hada_w1_a": "a LyCORIS LoHa",
    ".lokr_w": "a LyCORIS LoKr",
    ".oft_": "an OFT adapter",
    ".lora.down.": "an old diffusers LoRA",
    ".lora_linear_layer.": "an old diffusers LoRA",
}


def open_adapter(reference: str | Path) -> Adapter:
    """Open an adapter folder or file of any format in the table.

    Raises:
        FormatError: nothing there, or not an adapter. UnsupportedError: a known format that is not read.
    """
    path = Path(reference)
    if not path.exists():
        hint = f"; download it first: hf download {reference} --local-dir DIR" if _like_hub(str(reference)) else ""
        raise FormatError(f"{reference}: is neither a file nor a folder{hint}")
    for detect, read in _FORMATS:
        if detect(path):
            return read(path)
    if path.is_dir():
        raise FormatError(f"{path}: no adapter_config.json with adapter_model.safetensors here, so it is no adapter")
    refuse_pickle(path)
    raise _foreign(path)


def _foreign(path: Path) -> FormatError | UnsupportedError:
    names = read_header(path).tensors
    for part, what in _FOREIGN.items():
        if any(part in name for name in names):
            return UnsupportedError(f"{path}: is {what}; lorasurgery reads PEFT's folders, so convert it to PEFT first")
    if any(".lora_A." in name for name in names):
        return UnsupportedError(
            f"{path}: LoRA factors without PEFT's adapter_config.json, so alpha is unknown; give the adapter's folder"
        )
    return FormatError(f"{path}: holds no LoRA factors, so it is no adapter")


def _like_hub(reference: str) -> bool:
    return reference.count("/") == 1 and not reference.startswith((".", "/", "~"))

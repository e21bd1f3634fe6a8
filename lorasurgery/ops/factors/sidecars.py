"""Config and tokenizer files that go along with a checkpoint, and the few words in config.json that must change."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.checkpoint.header import show
from lorasurgery.checkpoint.inside import files_below, is_link, leads_out
from lorasurgery.checkpoint.locate import load_object
from lorasurgery.checkpoint.operation import note
from lorasurgery.errors import some
from lorasurgery.report import RECORD_NAME

if TYPE_CHECKING:
    from lorasurgery.checkpoint.output import Output
    from lorasurgery.checkpoint.reader import Checkpoint

CONFIG = "config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data",
            ".ot", ".tflite", ".npz", ".pkl", ".index.json", ".lorasurgery-partial")  # fmt: skip
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
              "chat_template.json")  # fmt: skip
_ABOUT = {"README.md", RECORD_NAME}  # they tell of another model
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
           "F8_E5M2": "float8_e5m2"}  # fmt: skip


def carried_files(folder: Path, adapters: Sequence[Adapter] = (), *, parts: Collection[str] = ()) -> dict[str, Path]:
    """The files that make the weights a model again: name in the output -> source.

    Everything in the folder goes along but weights, hidden files, the model card and the record, which would describe
    another model. An adapter's tokenizer wins over the base's, for it knows the tokens that were added.

    Args:
        parts: Of a diffusers folder, the weight files that are rewritten; what lies in other folders is copied
            whatever it is.
    """
    rewritten = {file.rpartition("/")[0] for file in parts}
    found = {name: file for name, file in files_below(folder)[0].items() if _goes_along(name, rewritten)}
    for file in found.values():
        note(file)
    own = tokenizer_files(adapters)
    if own:  # one tokenizer's files, never a mixture of two
        found = {n: f for n, f in found.items() if n not in _TOKENIZER} | own
    return found


def tokenizer_files(adapters: Sequence[Adapter]) -> dict[str, Path]:
    """The tokenizer of the last adapter that brings one: name -> source. A part that leads elsewhere makes it none."""
    found = (tokenizer_in(adapter.folder) for adapter in reversed(adapters))
    return next(filter(None, found), {})


def tokenizer_in(folder: Path) -> dict[str, Path]:
    """The tokenizer in a folder: name -> source. A part that leads elsewhere makes it none."""
    own = {n: folder / n for n in _TOKENIZER if (folder / n).is_file()}
    for file in own.values():
        note(file)
    return {} if _leading_out(folder) else own


def _goes_along(name: str, rewritten: Collection[str]) -> bool:
    folder, _, last = name.rpartition("/")
    hidden = name.startswith(".") or "/." in name
    weights = last.endswith(_WEIGHTS) and (not rewritten or folder in rewritten)
    return not hidden and not weights and name not in _ABOUT


def _leading_out(folder: Path) -> list[str]:
    return [n for n in _TOKENIZER if is_link(folder / n) and leads_out(folder / n, folder)]


def not_followed(base: Checkpoint | None, adapters: Sequence[Adapter]) -> list[str]:
    """Sentences on links that lead out of a folder whose files go along: what lies elsewhere is nobody's to hand on.

    Args:
        base: Whose files go along; None where none do.
    """
    places: dict[Path, list[str]] = {}
    if base is not None and not base.is_file:
        rewritten = {file.rpartition("/")[0] for file in base.parts}
        places[base.folder] = [n for n in files_below(base.folder)[1] if _goes_along(n, rewritten)]
    places |= {adapter.folder: _leading_out(adapter.folder) for adapter in adapters}
    return [
        f"{show(str(folder))}: not taken along: {some([show(n) for n in names])}; a link that leads out of its folder "
        "is not followed, so put the file itself there"
        for folder, names in places.items()
        if names
    ]


def patched_config(
    config: dict[str, Any], *, untied: bool = False, vocab_size: int | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """A copy of config.json with what the new weights make untrue set right, text_config included.

    >>> patched_config({"tie_word_embeddings": True, "vocab_size": 8}, untied=True, vocab_size=9)
    {'tie_word_embeddings': False, 'vocab_size': 9}
    """
    new = dict(config)
    if untied:
        new["tie_word_embeddings"] = False
    if vocab_size is not None and "vocab_size" in new:
        new["vocab_size"] = vocab_size
    if dtype is not None:
        for key in ("dtype", "torch_dtype"):
            if key in new:
                new[key] = _DTYPES[dtype]
    if isinstance(config.get("text_config"), dict):
        new["text_config"] = patched_config(config["text_config"], vocab_size=vocab_size, dtype=dtype)
        if untied and "tie_word_embeddings" in config["text_config"]:
            new["text_config"]["tie_word_embeddings"] = False
    return new


def write_carried(
    output: Output, files: dict[str, Path], config: dict[str, Any], new: dict[str, Any], dtype: str | None = None
) -> None:
    """Copy the files byte for byte; config.json is rewritten only when a word in it changed."""
    for name, source in files.items():
        part = load_object(source) if dtype and name.endswith(f"/{CONFIG}") else {}
        if name == CONFIG and new != config:
            output.write_bytes(name, _json(new))
        elif part != patched_config(part, dtype=dtype):
            output.write_bytes(name, _json(patched_config(part, dtype=dtype)))
        else:
            output.copy_file(name, source)


def _json(config: dict[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()

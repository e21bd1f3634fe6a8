"""What headers, index and config say of each other, without reading a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.naming import BaseNames
from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.checkpoint.header import show
from lorasurgery.checkpoint.locate import load_object
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import UnsupportedError, some
from lorasurgery.places import place_of


def findings_in_checkpoint(model: Checkpoint) -> list[str]:
    """What does not agree: index and files, config and shapes."""
    return [*_in_index(model), *_in_config(model), *_unreadable(model)]


def _in_index(model: Checkpoint) -> Iterator[str]:
    for name in [model.index_name] if model.index_name else model.indexes.values():
        index = load_object(model.folder / name)
        listed = set(index.get("weight_map", {}))
        prefix = next((p for p, n in model.indexes.items() if n == name), "")
        here = {n.removeprefix(prefix): i for n, i in model.tensors.items() if n.startswith(prefix)}
        missing = sorted(set(here) - listed)
        if missing:
            yield f"{name}: does not list {some(missing)}, which the files hold; loaders pass over them"
        metadata = index.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        found = sum(i.nbytes for i in here.values())
        if total is not None and total != found:
            yield f"{name}: says {total} bytes of tensors but the files hold {found}"
    if model.index_name:
        stray = sorted(
            f.name
            for f in model.folder.glob("*.safetensors")
            if f.name not in model.files and not f.name.startswith(".")
        )
        if stray:
            yield f"{some(stray)}: lies beside the shards, but the index does not name it"


def _in_config(model: Checkpoint) -> Iterator[str]:
    config = model.config
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    settings: dict[str, Any] = {**config, **(text or {})}
    names = BaseNames(model.tensors, config, str(model.path))
    embedding = names.input_embedding
    vocabulary = settings.get("vocab_size")
    if embedding and not model.parts and isinstance(vocabulary, int):
        rows = model.tensors[embedding].shape[0]
        if rows < vocabulary:  # more are common: tables are padded
            yield f"config.json: vocab_size is {vocabulary} but {show(embedding)} has {rows} rows"
    yield from _in_layers(model, settings.get("num_hidden_layers"))


def _in_layers(model: Checkpoint, said: Any) -> Iterator[str]:
    """Whether there are as many layers as the config says, and none is missing in between."""
    if not isinstance(said, int):
        return
    stacks: dict[str, set[int]] = {}
    for name in model.tensors:
        place = place_of(name.removesuffix(".weight"))
        if place.layer is not None:
            stacks.setdefault(place.stack, set()).add(place.layer)
    most = max((max(found) + 1 for found in stacks.values()), default=0)
    if 0 < most < said:
        yield f"config.json: num_hidden_layers is {said} but the files hold {most}"
    for stack, found in stacks.items():
        gaps = most - len(found)
        if gaps and max(found) + 1 == most <= said:  # the first few are looked for, not all up to a far number
            first = [str(n) for n in islice((n for n in range(most) if n not in found), 3)]
            more = f" and {gaps - 3} more" if gaps > 3 else ""
            yield f"{stack}: layers {', '.join(first)}{more} are missing"


def _unreadable(model: Checkpoint) -> Iterator[str]:
    strange = set()
    for info in model.tensors.values():
        try:
            torch_dtype(info.dtype)
        except UnsupportedError:
            strange.add(info.dtype)
    if strange:
        yield f"dtypes {', '.join(sorted(strange))}: can be copied, but nothing here can compute with them"


def findings_in_adapter(adapter: Adapter) -> list[str]:
    """What of an adapter's file has no meaning, and scales that no training gives."""
    used = {name for d in adapter.deltas.values() for name in (*d.names, d.bias, d.magnitude) if name}
    used |= {*adapter.replaced.values(), *adapter.diffs.values(), *(key for key, _ in adapter.tokens.values())}
    left = sorted(n for n in set(adapter.weights.tensors) - used if not n.endswith((".alpha", ".dora_scale")))
    found = [f"{some(left)}: belong to no update"] if left and adapter.format == "peft" and not adapter.members else []
    zero = [path for path, d in adapter.deltas.items() if d.scale == 0]
    return found + ([f"{some(zero)}: the scale is 0, so nothing would change"] if zero else [])

"""Projections that one side keeps apart and the other fused: q, k, v in `qkv_proj`, gate and up in `gate_up_proj`.

Only where the order of rows is certain (Phi-3's layout: all of q, then k, then v; gate above up). Rows that are
interleaved by head, as GPT-NeoX, Falcon and BLOOM have them in `query_key_value`, are an error that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorasurgery.adapters.model_names.cuts import Cut, as_range
from lorasurgery.adapters.model_names.naming import BaseNames
from lorasurgery.errors import MismatchError, UnsupportedError, size_of

_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_gate_proj": ("up_proj", "gate_proj"),
}
_QKV = _PARTS["qkv_proj"]
_INTERLEAVED = "query_key_value"
_OUTPUTS = ("o_proj", "out_proj", "dense")
_SCRAMBLED = frozenset(("codegen",))  # its qkv_proj is cut by accelerator cores first, and v comes before k


@dataclass(frozen=True)
class Rows:
    """Rows of an update and the tensor they are added to; None means all of them, on either side.

    Args:
        rows: In the order of the tensor's rows, which may be another than the update's.
    """

    tensor: str
    rows: slice | list[int] | None = None
    into: slice | None = None


def projection_rows(names: BaseNames, path: str, shape: tuple[int, int], where: str) -> list[Rows]:
    """Where the update of a module goes that the base keeps fused, or apart; nothing when it does neither.

    Args:
        shape: (out, in) of the update.
        where: The adapter, for messages.

    Raises:
        MismatchError: the rows don't add up.
        UnsupportedError: their order in the base, or the adapter, is not known.
    """
    stem, _, leaf = path.rpartition(".")
    prefix = f"{stem}." if stem else ""
    _refuse_interleaved(names, prefix, leaf, path, where)
    if leaf in _PARTS:
        return _apart(names, prefix, _PARTS[leaf], path, shape, where)
    for fused, parts in _PARTS.items():
        tensor = names.find(prefix + fused) if leaf in parts else None
        if tensor is not None:
            _refuse_scrambled(names, tensor, path, where)
            into = _place(names, prefix, tensor, parts, leaf, shape)
            if into is None:
                raise MismatchError(
                    f"{where}: {path} is an update of {size_of(shape)}, which is no {leaf} of {tensor} in "
                    f"{names.where} ({size_of(names.tensors[tensor].shape)}); is this the adapter's base "
                    "model?"
                )
            return [Rows(tensor, into=into)]
    return []


def library_rows(names: BaseNames, memory: str, shape: tuple[int, ...]) -> list[Rows]:
    """Where the rows of a tensor in memory are on disk, by the library's own conversion; nothing where it is not known.

    Args:
        memory: Its name.
        shape: Of the update.
    """
    parts = cuts_of(names, memory)
    if any((cut.height, *names.tensors[disk].shape[1:]) != shape for disk, cut in parts):
        return []
    found = [_on_disk(disk, cut, names.tensors[disk].shape[0]) for disk, cut in parts]
    return [rows for rows in found if rows] if all(found) else []


def cuts_of(names: BaseNames, memory: str) -> list[tuple[str, Cut]]:
    """The tensors on disk that the library cuts one in memory from, or joins to it; its first parts may be a wrapper's.

    Args:
        memory: Its name, in a model with a head or in its body.
    """
    for name in (memory, *names.unwrapped(memory)):
        if name in names.cuts:
            return names.cuts[name]
    longer = [n for n in names.cuts if n.endswith(f".{memory}")]
    return names.cuts[longer[0]] if len(longer) == 1 else []


def _on_disk(disk: str, cut: Cut, height: int) -> Rows | None:
    """A cut as rows that are added; None where they are scattered so that no slice means them."""
    order = sorted(range(len(cut.rows)), key=cut.rows.__getitem__)
    there = as_range([cut.rows[i] for i in order])
    if not isinstance(there, range):
        return None
    into = None if there == range(height) else slice(there.start, there.stop, there.step)
    if isinstance(cut.rows, range):
        whole = len(cut.into) == cut.height
        return Rows(disk, None if whole else slice(cut.into.start, cut.into.stop), into)
    return Rows(disk, [cut.into[i] for i in order], into)


def _apart(
    names: BaseNames, prefix: str, parts: Sequence[str], path: str, shape: tuple[int, int], where: str
) -> list[Rows]:
    """The base has a matrix for each part: the update's rows go to them in turn."""
    tensors = [names.find(prefix + part) for part in parts]
    found = [t for t in tensors if t is not None]
    if not found:
        return []
    heights = [names.tensors[t].shape[0] for t in found]
    fits = len(found) == len(parts) and sum(heights) == shape[0]
    if not fits or any(names.tensors[t].shape[1:] != shape[1:] for t in found):
        raise MismatchError(
            f"{where}: {path} is an update of {size_of(shape)} but {', '.join(found)} in {names.where} have "
            f"{' + '.join(map(str, heights))} rows; is this the adapter's base model?"
        )
    starts = [sum(heights[:i]) for i in range(len(heights))]
    return [Rows(t, slice(s, s + h)) for t, s, h in zip(found, starts, heights, strict=True)]


def _place(
    names: BaseNames, prefix: str, tensor: str, parts: Sequence[str], leaf: str, shape: tuple[int, int]
) -> slice | None:
    """The rows of the fused tensor that are this part; None when the update can't be it."""
    height, *rest = names.tensors[tensor].shape
    if tuple(rest) != shape[1:]:
        return None
    if len(parts) == 2:
        start = parts.index(leaf) * shape[0]
        return slice(start, start + shape[0]) if height == 2 * shape[0] else None
    query = _query_rows(names, prefix)
    if query is None:
        query = shape[0] if leaf == "q_proj" else height - 2 * shape[0]
    other, odd = divmod(height - query, 2)
    sizes = (query, other, other)
    at = _QKV.index(leaf)
    if odd or other < 1 or query < 1 or sizes[at] != shape[0]:
        return None
    return slice(sum(sizes[:at]), sum(sizes[: at + 1]))


def _query_rows(names: BaseNames, prefix: str) -> int | None:
    """How many rows are the queries': by config.json's heads, else as many as the output projection takes in."""
    text = names.config.get("text_config")
    config = names.config | (text if isinstance(text, dict) else {})
    heads, width, size = (config.get(k) for k in ("num_attention_heads", "head_dim", "hidden_size"))
    if isinstance(heads, int) and heads > 0:
        if isinstance(width, int):
            return heads * width
        if isinstance(size, int):
            return size // heads * heads
    for leaf in _OUTPUTS:
        output = names.find(prefix + leaf)
        if output is not None and len(names.tensors[output].shape) == 2:
            return names.tensors[output].shape[1]
    return None


def _refuse_interleaved(names: BaseNames, prefix: str, leaf: str, path: str, where: str) -> None:
    fused = names.find(prefix + _INTERLEAVED) if leaf in (*_QKV, "qkv_proj") else None
    apart = next((t for t in map(names.find, (prefix + p for p in _QKV)) if t), None) if leaf == _INTERLEAVED else None
    if fused or apart:
        raise UnsupportedError(
            f"{where}: {path} would be a part of {fused or apart} in {names.where}, but the rows of {_INTERLEAVED} are "
            "interleaved by head in an order that differs from model to model; convert the adapter with the model's "
            "own code"
        )


def _refuse_scrambled(names: BaseNames, tensor: str, path: str, where: str) -> None:
    kind = names.config.get("model_type")
    if kind in _SCRAMBLED:
        raise UnsupportedError(
            f"{where}: {path} would be a part of {tensor} in {names.where}, whose rows {kind} keeps in an order of its "
            "own; convert the adapter with the model's own code"
        )

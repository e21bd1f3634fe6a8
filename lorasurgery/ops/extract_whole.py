"""What has no factors, as PEFT takes it: modules_to_save, or a tensor that it loads into the model by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.adapters.peft import PREFIX
from lorasurgery.adapters.peft_write import PeftLayout
from lorasurgery.clients.peft import saved_names
from lorasurgery.ops.extract_parts import Piece, pairs_in_memory
from lorasurgery.ops.pairs import Pair

if TYPE_CHECKING:
    from lorasurgery.ops.extract_write import AdapterDraft


Pieces = tuple[Piece, ...]


def whole_tensors(draft: AdapterDraft, layout: PeftLayout) -> dict[str, Pieces]:
    """Adapter key -> rows of tuned tensors, for all that is stored whole; the layout learns how PEFT will load it.

    A module is saved with all its tensors, which PEFT asks for, and can be switched with the adapter. What can't be
    saved so (a parameter of a module that has others in it, a module that no name means alone, a bias beside factors)
    is loaded into the base's own tensor.
    """
    keys: dict[str, Pieces] = {}
    by_itself = {m for m in draft.host.saved if _has_all(draft, m)}
    alone = [p for p in pairs_in_memory(draft.full) if draft.host.saver_of(p.path) not in by_itself]
    saved = {p.path for p in alone if _is_savable(draft, p)}
    targets = [path for path in layout.ranks if path not in layout.parameters]
    layout.saved, unnamed = saved_names(saved | by_itself, draft.host.paths | saved, targets)
    saved -= unnamed
    for module in sorted(saved | by_itself):
        keys |= _module_tensors(draft, module)
    for pair in alone:
        if pair.path not in saved:
            keys[_plain_key(draft, pair)] = _pieces(draft, pair)
            if pair.leaf == "bias":
                layout.bias = "lora_only" if layout.bias != "all" and _has_factors(draft, pair.path) else "all"
        elif PREFIX + _name(pair) not in keys:
            keys[PREFIX + _name(pair)] = _pieces(draft, pair)
    return keys


def _pieces(draft: AdapterDraft, pair: Pair) -> Pieces:
    return draft.cut_in_memory.get(_name(pair), (Piece(pair.tuned.name),))


def _name(pair: Pair) -> str:
    return f"{pair.path}.{pair.leaf}" if pair.path != pair.leaf else pair.leaf


def _is_savable(draft: AdapterDraft, pair: Pair) -> bool:
    """Whether PEFT can keep a copy of the pair's module beside the base's: one that stands alone, without factors."""
    host, path = draft.host, pair.path
    if path == pair.leaf or host.holds_modules(path) or host.stands_twice(path) or _has_factors(draft, path):
        return False
    if _is_shared(draft, pair):  # a copy would be one layer's alone
        return False
    if pair.leaf == "bias" and _is_matrix(draft, pair.path):
        return any(p.path == pair.path and p.leaf == "weight" for p in pairs_in_memory(draft.full))
    return pair.leaf in ("weight", "bias") and _has_all(draft, pair.path)


def _is_shared(draft: AdapterDraft, pair: Pair) -> bool:
    """Whether other layers hold the same tensor in memory, and none of them one of its own on disk."""
    if draft.host.skeleton is not None:
        return any(n not in draft.in_memory for n in draft.host.others_of(_name(pair)))
    return pair.base is not None and bool(draft.names.tied_paths(pair.base.name)) and not draft.has_head


def _has_all(draft: AdapterDraft, module: str) -> bool:
    """Whether the tuned checkpoint has every tensor that PEFT asks for of a module; a new one it has by itself."""
    wanted = draft.host.tensors_of(module)
    return bool(wanted) and all(_source(draft, name) for name in wanted)


def _module_tensors(draft: AdapterDraft, module: str) -> dict[str, Pieces]:
    """Every parameter and buffer of a module, changed or not."""
    found = {PREFIX + name: _source(draft, name) for name in draft.host.tensors_of(module)}
    return {key: pieces for key, pieces in found.items() if pieces}


def _source(draft: AdapterDraft, name: str) -> Pieces:
    """The tuned tensor of a name in memory, or of one that shares it."""
    names = (name, *draft.host.others_of(name))
    cut = next((draft.cut_in_memory[n] for n in names if n in draft.cut_in_memory), ())
    return cut or next(((Piece(draft.in_memory[n]),) for n in names if n in draft.in_memory), ())


def _plain_key(draft: AdapterDraft, pair: Pair) -> str:
    """The key under which PEFT's model itself has the tensor, layers of its own in between."""
    inside = ".base_layer" * (1 if _has_factors(draft, pair.path) else len(draft.wrapped(pair.path)))
    return PREFIX + (f"{pair.path}{inside}.{pair.leaf}" if pair.path != pair.leaf else pair.leaf)


def _has_factors(draft: AdapterDraft, path: str) -> bool:
    return path in draft.factored


def _is_matrix(draft: AdapterDraft, path: str) -> bool:
    cut = draft.cut_in_memory.get(f"{path}.weight")
    if cut is not None:
        return len(draft.tuned.tensors[cut[0].tensor].shape) >= 2
    name = draft.names.find(path)
    return name is not None and len(draft.base.tensors[name].shape) >= 2

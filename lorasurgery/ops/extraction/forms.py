"""What form PEFT can take each change in: factors where it has a layer for them, else the tensor whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from lorasurgery.adapters.model_names.library import Installed, installed_model
from lorasurgery.adapters.model_names.naming import module_of
from lorasurgery.adapters.model_names.renames import memory_name, model_types
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.clients.client import Client
from lorasurgery.clients.host import Host
from lorasurgery.ops.extraction.options import Selection
from lorasurgery.ops.extraction.pairs import FACTORED, Pair, Treatment

_EXPERT = re.compile(r"\.experts\.")


def host_of(base: Checkpoint, tuned: Checkpoint, pairs: Sequence[Pair], *, ask: bool = True) -> Host:
    """The model that the adapter is for: the tuned one's class, with which the base is loaded too.

    Args:
        ask: Ask the library that has the class, where it is installed (it imports torch).
    """
    config = tuned.config if tuned.config.get("architectures") or "_class_name" in tuned.config else base.config
    types = model_types(config)
    names = {memory_name(name, types) for side in (base, tuned) for name in side.tensors}
    names |= {_name(p) for p in pairs}
    model = _fitting(installed_model(config), tuned) if ask else None
    cuts = model.cuts({name: info.shape for name, info in tuned.tensors.items()}) if model is not None else {}
    return Host(config, frozenset(names), model, cuts)


def _fitting(model: Installed | None, tuned: Checkpoint) -> Installed | None:
    """The model, unless config.json is not that of this file: then what it says of names would be of another model."""
    if model is None:
        return None
    alone = [name for name in tuned.tensors if model.name_of(name) is None and not _EXPERT.search(name)]
    cut = model.cuts({name: tuned.tensors[name].shape for name in alone})
    strange = [name for name in alone if name not in cut]
    return model if 2 * len(strange) <= len(tuned.tensors) else None


def fit_pairs(pairs: Sequence[Pair], host: Host, selection: Selection) -> list[Pair]:
    """Give each pair its path in the model in memory, and a form that PEFT has a place for.

    Where nothing is known of the model beyond its names, the pairs stay as names tell them.
    """
    if host.skeleton is not None:
        pairs = [_placed(p, host) for p in pairs]
    whole: Treatment = "full" if "auto" in selection.full else "left out"
    return [_formed(p, host, whole) for p in pairs]


def _name(pair: Pair) -> str:
    """A pair's name in memory."""
    return f"{pair.path}.{pair.leaf}" if pair.path != pair.leaf else pair.leaf


def _placed(pair: Pair, host: Host) -> Pair:
    """The pair under the name that the model has it by; experts are placed by their own rules."""
    if pair.place is None and pair.tuned.name in host.cuts:
        # no name in memory would be right for all of it, and of names that only look alike none is
        path, leaf = module_of(pair.name), pair.name.rpartition(".")[2]
        return replace(pair, path=path, leaf=leaf, cuts=host.cuts[pair.tuned.name])
    found = host.find(_name(pair), pair.tuned.name) if pair.place is None else None
    if found is None or found == _name(pair):
        return pair
    return replace(pair, path=module_of(found), leaf=found.rpartition(".")[2], called=pair.called or pair.path)


def _formed(pair: Pair, host: Host, whole: Treatment) -> Pair:
    if pair.treatment == "skipped" or pair.why == "--full" or pair.place is not None:
        return pair
    if pair.cuts:
        return _cut_formed(pair, host, whole)
    saver = host.saver_of(pair.path)
    if saver is not None:
        return replace(pair, treatment="full", why=f"in {saver}, which PEFT stores whole for {host.task}")
    shared = [module_of(n) for n in host.others_of(_name(pair))]
    closed = next((path for path in (pair.path, *shared) if host.kind(path) == "other"), None)
    kind = "other" if closed else host.kind(pair.path)
    comparable = pair.base is not None and pair.base.shape == pair.tuned.shape
    if kind is None or pair.leaf != "weight" or not comparable:
        return pair
    rank = len(pair.tuned.shape)
    if kind in ("linear", "conv1d", "embedding") and rank == 2:
        return replace(pair, treatment=kind, why="") if pair.treatment in ("full", "left out", *FACTORED) else pair
    if kind == "conv" and pair.treatment in ("conv", "full", "left out"):
        return replace(pair, treatment="conv", why="") if "_class_name" in host.config else pair
    if pair.treatment in FACTORED:
        return replace(pair, treatment=whole, why=host.why_not(closed or pair.path))
    return pair


def _cut_formed(pair: Pair, host: Host, whole: Treatment) -> Pair:
    """Factors where all modules that the tensor's rows go to are linear layers: cutting B's rows is exact."""
    paths = [module_of(cut.memory) for cut in pair.cuts]
    comparable = pair.base is not None and pair.base.shape == pair.tuned.shape
    linear = all(host.kind(p) == "linear" and host.saver_of(p) is None for p in paths)
    weights = all(cut.memory.endswith(".weight") for cut in pair.cuts)
    if linear and weights and comparable and len(pair.tuned.shape) == 2:
        return replace(pair, treatment="linear", why="") if pair.treatment in ("full", "left out", *FACTORED) else pair
    if pair.treatment in FACTORED:
        return replace(pair, treatment=whole, why=host.why_not(paths[0]))
    return pair


def narrowed(pairs: Sequence[Pair], client: Client) -> list[Pair]:
    """The pairs in forms that the client takes; the others are measured and left out, and the report says so."""
    return [_narrowed(pair, client) for pair in pairs]


def _narrowed(pair: Pair, client: Client) -> Pair:
    refused = pair.treatment in FACTORED and pair.treatment not in client.factors
    refused |= pair.treatment == "full" and not client.takes_whole(pair.path)
    if not refused:
        return pair
    return replace(pair, treatment="left out", why=f"{client.name} takes no {_called(pair)}")


def _called(pair: Pair) -> str:
    return "tensor stored whole" if pair.treatment == "full" else f"LoRA of {pair.treatment} weights"

"""From an adapter's files into a model in memory. Everything is checked and read before the model is touched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from lorasurgery.adapters.adapter import Adapter, Delta
from lorasurgery.adapters.formats import open_adapter
from lorasurgery.checkpoint.operation import Operation
from lorasurgery.errors import MismatchError, UnsupportedError, nearest, size_of
from lorasurgery.hub.pull import here
from lorasurgery.nn.linear import LoRALayer, factored
from lorasurgery.nn.model import M, activate_first
from lorasurgery.nn.modules import check_called, check_new, freeze, inner, layer_at, modules_of


def load_adapter(model: M, path: str | Path, name: str = "default", *, trainable: bool = False) -> M:
    """Put an adapter from disk on a model: factors on its layers, tensors stored whole in place of the model's.

    Examples:
        ```python
        load_adapter(model, "style", "style")       # the first one acts at once
        load_adapter(model, "topic", "topic")
        set_adapter(model, {"style": 0.7, "topic": 0.3})
        ```

    Args:
        model: Changed in place; its own parameters are frozen, never written to.
        path: A PEFT adapter's folder, or `org/name[@revision]` on the Hub, with factors for linear layers and
            embeddings, and tensors stored whole. Its lora_dropout is for training, which here has none.
        name: What set_adapter calls it.
        trainable: Whether the factors, and the parameters stored whole, are trained.

    Returns:
        The model.

    Raises:
        FormatError: no adapter there, or one that was changed while it was read.
        UsageError: the name is taken, or the model is merged.
        UnsupportedError: a variant that is not held in memory.
        MismatchError: a module or a shape that the model lacks. In each case the model is as it was.
    """
    check_new(model, name)
    with Operation(writes=False) as operation:
        adapter = open_adapter(here(path))
        _refuse_variants(adapter)
        modules = modules_of(model)
        _check_names(adapter, modules)
        for delta in adapter.deltas.values():
            _check_delta(adapter, delta, modules)
        places = _places(adapter, modules)
        factors = {delta.path: adapter.load(delta) for delta in adapter.deltas.values()}
        whole = {place: adapter.load_replaced(key) for place, key in places.items()}
        operation.inputs.check()

    freeze(modules)
    for where, update in factors.items():
        layer = layer_at(modules, where)
        assert isinstance(layer, LoRALayer)
        layer.add(name, update, trainable=trainable)
    for (where, leaf), tensor in whole.items():
        layer_at(modules, where).add_whole(name, leaf, tensor, trainable=trainable)
    activate_first(model, name)
    return model


def _refuse_variants(adapter: Adapter) -> None:
    """Raise UnsupportedError for what has no place in memory here, with what does have one."""
    where = adapter.path
    if adapter.format != "peft":
        raise UnsupportedError(
            f"{where}: is in {adapter.format}'s format; `lorasurgery convert {where} -o OUT --to peft` makes one that "
            "loads here"
        )
    if adapter.members:
        parts = ", ".join(adapter.members)
        raise UnsupportedError(f"{where}: holds adapters for several models ({parts}); load each folder into its own")
    for name in adapter.tokens:
        raise UnsupportedError(_refusal(where, name, "single rows (trainable_token_indices)"))
    for name in adapter.diffs:
        raise UnsupportedError(_refusal(where, name, "a vector that is added"))
    for delta in adapter.deltas.values():
        if delta.magnitude:
            advice = "`lorasurgery convert --portable --base BASE` makes plain LoRA of it"
            raise UnsupportedError(_refusal(where, delta.path, "DoRA", advice))
        what = _variant(delta)
        if what:
            raise UnsupportedError(_refusal(where, delta.path, what))


def _refusal(where: str, name: str, what: str, advice: str = "`lorasurgery merge` writes it into a checkpoint") -> str:
    return f"{where}: {name} is {what}, which lorasurgery.nn does not hold; {advice}"


def _variant(delta: Delta) -> str:
    """What an update is, when it is more than B·A on a linear layer or an embedding."""
    if delta.kind == "conv":
        return "a convolution"
    return delta.special or ("an update with a bias of its own (lora_bias)" if delta.bias else "")


def _check_names(adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """Refuse an adapter with a module or a tensor that the model has not."""
    missing = [path for path in adapter.deltas if path not in modules]
    known: Sequence[str] = list(modules)
    if not missing:
        tensors = {name for name, _ in _tensors(modules)}
        missing, known = [name for name in adapter.replaced if name not in tensors], sorted(tensors)
    if missing:
        total = len(adapter.deltas) + len(adapter.replaced)
        raise MismatchError(
            f"{adapter.path}: {len(missing)} of {total} names are not in the model: {', '.join(missing[:3])}"
            f"{' …' if len(missing) > 3 else ''}; nothing was changed"
            + (nearest(missing[0], known) or "; is this the adapter's base model?")
        )


def _check_delta(adapter: Adapter, delta: Delta, modules: Mapping[str, nn.Module]) -> None:
    try:
        kind, shape = factored(inner(modules[delta.path]))
    except UnsupportedError as problem:
        raise UnsupportedError(f"{adapter.path}: {delta.path}: {problem}") from None
    if delta.kind != kind:
        raise MismatchError(f"{adapter.path}: {delta.path} has {delta.kind} factors but is {kind} in the model")
    if delta.shape != shape:
        raise MismatchError(
            f"{adapter.path}: {delta.path} is an update of {size_of(delta.shape)} (out × in) but the model's layer is "
            f"{size_of(shape)}; is this the adapter's base model?"
        )
    check_called(modules, delta.path)


def _places(adapter: Adapter, modules: Mapping[str, nn.Module]) -> dict[tuple[str, str], str]:
    """(module, its parameter or buffer) -> the tensor of the adapter that replaces it.

    modules_to_save trains a copy for one module. What else is stored whole belongs to the tensor itself, so it
    reaches every module that shares it; so does a copy that the adapter promises to tie.
    """
    tensors = dict(_tensors(modules))
    sharers: dict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        sharers[id(tensor)].append(name)
    found: dict[tuple[str, str], str] = {}
    for key in adapter.replaced:
        alone = key in adapter.added and not adapter.tied
        others = [] if alone else [n for n in sharers[id(tensors[key])] if n not in adapter.replaced]
        for name in [key, *others]:
            _check_whole(adapter, key, name, tensors[name], modules)
            path, _, leaf = name.rpartition(".")
            found[path, leaf] = key
    return found


def _check_whole(adapter: Adapter, key: str, name: str, tensor: Tensor, modules: Mapping[str, nn.Module]) -> None:
    shape = adapter.weights.tensors[adapter.replaced[key]].shape
    if shape != tuple(tensor.shape):
        raise MismatchError(
            f"{adapter.path}: {key} is {size_of(shape)} but {name} in the model is {size_of(tensor.shape)}; make "
            "the model that size first (resize_token_embeddings, num_labels), if it is the adapter's base"
        )
    module = inner(modules[name.rpartition(".")[0]])
    if module is inner(modules[""]) or type(module).forward is nn.Module.forward:
        raise UnsupportedError(
            _refusal(adapter.path, name, "a tensor of the model itself or of a module that has no forward")
        )


def _tensors(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by its name in the model as it was; shared ones under each of their names."""
    for path, module in modules.items():
        plain, prefix = inner(module), f"{path}." if path else ""
        for name, tensor in [*plain.named_parameters(recurse=False), *plain.named_buffers(recurse=False)]:
            yield prefix + name, tensor

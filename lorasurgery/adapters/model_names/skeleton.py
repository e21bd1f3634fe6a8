"""A model as it is in memory, without weights: its modules, their kinds, and which parameters share one tensor."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

LayerKind = Literal["linear", "conv1d", "embedding", "conv", "other"]


_PLAIN = ("FalconLinear",)  # subclasses with a forward of their own that computes just what the layer's would


@dataclass(frozen=True)
class Module:
    """One module.

    Args:
        kind: What PEFT's LoRA would see in it; `other` is all that it has no layer for.
        name: Its class, for messages.
        leaves: Its own parameters and persistent buffers, not its children's.
        container: Whether it has children.
        twice: Whether the same object stands at several paths; PEFT would put its layer at one of them.
    """

    kind: LayerKind
    name: str
    leaves: tuple[str, ...]
    container: bool
    twice: bool = False


@dataclass(frozen=True)
class Skeleton:
    """All modules of one model, by their paths in memory.

    Args:
        modules: path -> Module, the root's own parameters under "".
        shared: Parameter names that are one tensor in memory, group by group, the input embedding's name first.
        source: Where this is known from, such as `transformers 5.23.0`.
        closed: Why PEFT takes no adapter for this class at all; empty where it does.
    """

    modules: dict[str, Module]
    shared: tuple[tuple[str, ...], ...]
    source: str
    closed: str = ""

    @cached_property
    def names(self) -> frozenset[str]:
        """Every parameter and persistent buffer."""
        return frozenset(f"{p}.{leaf}" if p else leaf for p, m in self.modules.items() for leaf in m.leaves)

    @cached_property
    def group_of(self) -> dict[str, tuple[str, ...]]:
        """Parameter -> all names of its tensor, for those that have several."""
        return {name: group for group in self.shared for name in group}

    def inside(self, path: str) -> list[str]:
        """The parameters and persistent buffers of a module and of all in it."""
        module = self.modules[path]
        if not module.container:
            return sorted(f"{path}.{leaf}" for leaf in module.leaves)
        return sorted(n for n in self.names if n.startswith(f"{path}."))


def skeleton_from(model: nn.Module, source: str) -> Skeleton:
    """Read the modules of a model, on any device, the meta device too.

    >>> from torch import nn
    >>> skeleton_from(nn.Sequential(nn.Linear(2, 3)), "example").modules["0"].kind
    'linear'
    """
    seen = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    modules = {p: _module(m, seen[id(m)] > 1) for p, m in model.named_modules(remove_duplicate=False)}
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    try:
        first, closed = _input_embedding(model), ""
    except NotImplementedError:
        ties = isinstance(getattr(model, "_tied_weights_keys", None), dict)
        first, closed = None, "its class does not say which is its input embedding, which PEFT asks for" if ties else ""
    shared = [tuple(sorted(names, key=lambda n: n != first)) for names in owners.values() if len(names) > 1]
    return Skeleton(modules, tuple(shared), source, closed)


def _module(module: nn.Module, twice: bool) -> Module:
    own = [name for name, value in module._parameters.items() if value is not None]
    own += [n for n, v in module._buffers.items() if v is not None and n not in module._non_persistent_buffers_set]
    return Module(
        "other" if twice else kind_of(module), type(module).__name__, tuple(own), bool(module._modules), twice
    )


def kind_of(module: nn.Module) -> LayerKind:
    """What PEFT's LoRA sees in a module (peft 0.21.2, tuners/lora/layer.py, dispatch_default).

    A subclass whose forward does something of its own is `other`: PEFT would add B·A to what that gives, or feed the
    layer's inputs to A as they are. Scaled embeddings are the exception that PEFT knows.
    """
    from torch import nn

    kinds: tuple[tuple[type[nn.Module], LayerKind], ...] = (
        (nn.Embedding, "embedding"), (nn.Conv1d, "conv"), (nn.Conv2d, "conv"), (nn.Conv3d, "conv"),
        (nn.Linear, "linear"),
    )  # fmt: skip
    for known, kind in kinds:
        if isinstance(module, known):
            plain = type(module).forward is known.forward or type(module).__name__ in _PLAIN
            plain |= kind == "embedding" and hasattr(module, "embed_scale")
            grouped = kind == "conv" and module.groups != 1
            return kind if plain and not grouped else "other"
    return "conv1d" if _is_conv1d(module) else "other"


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' linear layer whose weight is stored (in, out)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _input_embedding(model: nn.Module) -> str | None:
    """The name of the input embedding's weight, as the model itself has it."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except AttributeError:  # no such method, or a model that has none
        return None
    return next((f"{path}.weight" for path, module in model.named_modules() if module is table), None)

"""A module of a model with adapters on it: tensors stored whole, which adapters are on, merging. Knows no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lorasurgery.errors import UsageError
from lorasurgery.linalg.rounding import round_to
from lorasurgery.lowrank import widened


class AdaptedModule(nn.Module):
    """A frozen module, and the tensors that adapters put in place of its own (PEFT's modules_to_save and bias).

    Examples:
        >>> layer = AdaptedModule(nn.LayerNorm(2))
        >>> layer.add_whole("default", "bias", torch.ones(2))
        >>> layer.active = {"default": 0.5}
        >>> layer.bias
        tensor([0.5000, 0.5000])

    It stands where the original stood: an attribute that it has not is the original's, and `weight` and `bias` are
    the tensors that stand in for them. Merging puts new tensors into the original and keeps the old ones beside
    them, so unmerging restores every bit, and tensors that were shared are shared again; the merged ones are extra
    memory, and the state_dict() of a merged model holds them.

    Attributes:
        original: The module as it was, frozen.
        active: adapter -> weight; names that nothing here belongs to count for nothing.
        whole: adapter -> {name of the original's parameter or buffer: what replaces it}. A weight w other than 1
            means W + w·(R − W), as in `lorasurgery merge`.
    """

    original: nn.Module

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        for parameter in original.parameters(recurse=False):
            parameter.requires_grad_(False)
        self.active: dict[str, float] = {}
        self.whole = nn.ModuleDict()
        self._kept: dict[str, Tensor] = {}
        self.training = original.training
        self.original = original  # last, for from now on it is asked for what is missing here

    @property
    def adapters(self) -> set[str]:
        """The names of the adapters that something here belongs to."""
        return set(self.whole)

    @property
    def merged(self) -> bool:
        """Whether the original holds merged tensors now."""
        return bool(self._kept)

    def add_whole(self, name: str, leaf: str, tensor: Tensor, *, trainable: bool = False) -> None:
        """Hold the tensor that replaces the original's `leaf` in adapter `name`; buffers are never trained."""
        own = self.own(leaf)
        learns = trainable and isinstance(own, nn.Parameter) and tensor.is_floating_point()
        new = nn.Parameter(tensor.to(own.device), requires_grad=learns)
        self.whole[name] = nn.ParameterDict({**self.whole_of(name), leaf: new})

    def whole_of(self, name: str) -> Mapping[str, Tensor]:
        """The replacing tensors of one adapter."""
        return cast("Mapping[str, Tensor]", self.whole[name]) if name in self.whole else {}

    def own(self, leaf: str) -> Tensor:
        """The original's own parameter or buffer, merged or not."""
        found: Tensor = self._kept[leaf] if leaf in self._kept else getattr(self.original, leaf)
        return found

    def conflict(self, weights: Mapping[str, float]) -> tuple[str, str, str] | None:
        """Two adapters that would replace one tensor with different values, and its name."""
        holders: dict[str, str] = {}
        for name in weights:
            for leaf, new in self.whole_of(name).items():
                first = holders.setdefault(leaf, name)
                old = self.whole_of(first)[leaf]
                if weights[first] != weights[name] or old.dtype != new.dtype or not torch.equal(old, new):
                    return first, name, leaf
        return None

    def replacements(self) -> dict[str, Tensor]:
        """What stands in for the original's tensors at the active weights, not yet rounded to their dtypes."""
        found = {}
        for name, weight in self.active.items():
            for leaf, new in self.whole_of(name).items():
                found[leaf] = _towards(self.own(leaf), new, weight)
        return found

    def substitutes(self) -> dict[str, Tensor]:
        """The same, rounded, as the forward pass takes them; none while the original itself holds them."""
        found = {} if self.merged else self.replacements()
        return {leaf: round_to(new, self.own(leaf).dtype) for leaf, new in found.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's forward, with the replaced tensors in place of its own."""
        found = self.substitutes()
        if not found:
            return self.original(*args, **kwargs)
        return functional_call(self.original, found, args, kwargs, tie_weights=False)

    def merge(self) -> None:
        """Put W + w(R − W), with every active update added, into the original; rounded once from float32.

        Raises:
            UsageError: merged already.
            SurgeryError: the result is not finite.
        """
        if self.merged:
            raise UsageError("merged already; unmerge first")
        with torch.no_grad():
            new = self.merged_tensors()
        for leaf, value in new.items():
            old = self._kept[leaf] = self.own(leaf)
            # a new Parameter, never a write into the old one, which another module may share
            setattr(self.original, leaf, nn.Parameter(value, False) if isinstance(old, nn.Parameter) else value)

    def unmerge(self) -> None:
        """Put the original's own tensors back, the very same; nothing happens when it is not merged."""
        for leaf, old in self._kept.items():
            setattr(self.original, leaf, old)
        self._kept.clear()

    def merged_tensors(self) -> dict[str, Tensor]:
        """New values of the original's tensors, with the active adapters in them."""
        return {leaf: new.detach().clone() for leaf, new in self.substitutes().items()}

    def extra_repr(self) -> str:
        """Which adapters are held, with the weights of those that are on."""
        state = ", merged" if self.merged else ""
        return f"adapters={sorted(self.adapters)}, active={self.active}{state}"

    def __getattr__(self, name: str) -> Any:
        """What is not here is the original's; the forward of some models asks a layer for its weight or its size."""
        if name.startswith("__") or "original" not in self.__dict__.get("_modules", ()):
            return super().__getattr__(name)  # half built, as copy and pickle make it
        try:
            return super().__getattr__(name)
        except AttributeError:
            held = any(name in self.whole_of(a) for a in self.active)
            return self.substitutes()[name] if held and not self.merged else getattr(self.original, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedModule:
        """Moving or casting the module takes the tensors along that wait for unmerge."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for old in self._kept.values():
            old.data = fn(old.data)
        return self


def _towards(old: Tensor, new: Tensor, weight: float) -> Tensor:
    """W + w·(R − W) in float32 or better; R itself at weight 1, and where it counts something."""
    if weight == 1 or not new.is_floating_point():
        return new
    start = old.to(widened(old.dtype))
    return start + weight * (new.to(start.dtype) - start)

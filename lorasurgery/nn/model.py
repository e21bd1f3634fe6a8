"""What is done to a whole model: putting adapters on, choosing among them, merging, counting. Knows no files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from lorasurgery.adapters.model_names.patterns import any_match, check_patterns
from lorasurgery.errors import MismatchError, SurgeryError, UsageError
from lorasurgery.nn.adapted import AdaptedModule
from lorasurgery.nn.linear import LoRALinear, check_rank, is_conv1d
from lorasurgery.nn.modules import (
    check_called,
    check_known,
    check_new,
    check_unmerged,
    freeze,
    inner,
    layer_at,
    layers_of,
    modules_of,
)

M = TypeVar("M", bound=nn.Module)


def apply_lora(
    model: M, target_modules: str | Sequence[str], r: int = 8, alpha: float = 8, *, name: str = "default"
) -> M:
    """Freeze a model and put a trainable LoRA, which begins as zero, on its linear layers (arXiv:2106.09685).

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), "1", r=2, alpha=4)
        >>> trainable_parameters(model)
        (10, 33)

    Args:
        model: Changed in place; its outputs are not.
        target_modules: As `--target` takes them: a suffix (`q_proj`), a regular expression on the whole path, a
            preset (`attention`, `mlp`, `all-linear`), or several.
        r: h = Wx + (alpha/r)·B(Ax), A (r, in) Gaussian, B (out, r) zero.
        alpha: h = Wx + (alpha/r)·B(Ax), A (r, in) Gaussian, B (out, r) zero.
        name: A second adapter needs one of its own, and waits for set_adapter.

    Returns:
        The model.

    Raises:
        UsageError: a pattern without a match, a rank without meaning, a name that is taken, a merged model.
        UnsupportedError: a layer whose weight is read without calling it.
    """
    check_rank(r, alpha)
    check_new(model, name)
    modules = modules_of(model)
    layers = [p for p, m in modules.items() if p and (isinstance(inner(m), nn.Linear) or is_conv1d(inner(m)))]
    patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    check_patterns("target_modules", patterns, layers)
    chosen = [p for p in layers if any_match(patterns, p)]
    if not chosen:
        raise UsageError("target_modules is empty; name at least one layer")
    for path in chosen:
        check_called(modules, path)
    freeze(modules)
    for path in chosen:
        layer = layer_at(modules, path)
        assert isinstance(layer, LoRALinear)
        layer.init(name, r, alpha)
    activate_first(model, name)
    return model


def set_adapter(model: nn.Module, active: str | Sequence[str] | Mapping[str, float] | None) -> None:
    """Choose which adapters act: one, several at once, several with weights, or none.

    Examples:
        ```python
        set_adapter(model, {"style": 0.7, "topic": -0.3})
        ```

    Args:
        active: A name, names, name -> weight, or None. Updates are added with their weights; a tensor stored whole
            becomes W + w·(R − W). It does not change what is trainable.

    Raises:
        UsageError: an unknown name, a weight that is not finite, a merged model.
        MismatchError: two of the adapters replace one tensor with different values.
    """
    layers = layers_of(model)
    check_unmerged(layers)
    names = [active] if isinstance(active, str) else active or ()
    weights = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    for name, weight in weights.items():
        check_known(layers, name)
        if not math.isfinite(weight):
            raise UsageError(f"adapter {name}: its weight is {weight!r}; expected a finite number")
    weights = {name: float(weight) for name, weight in weights.items() if weight}
    for path, layer in layers.items():
        found = layer.conflict(weights)
        if found:
            raise MismatchError(
                f"{path}.{found[2]}: adapters {found[0]} and {found[1]} both replace it with different values; "
                "set one of them at a time"
            )
    for layer in layers.values():
        layer.active = dict(weights)


def merge(model: nn.Module) -> None:
    """Put the active adapters, with their weights, into the model's own tensors: W' = round(W + Σ w·(α/r)·BA).

    Formed in float32 or better and rounded once, as `lorasurgery merge` does. The old tensors are kept for
    unmerge, so memory grows by the merged ones. Tensors that modules share are merged for each module on its own.

    Raises:
        UsageError: merged already, or no adapter is active.
        SurgeryError: the result is not finite; nothing changed.
    """
    layers = layers_of(model)
    check_unmerged(layers)
    if not any(layer.adapters & layer.active.keys() for layer in layers.values()):
        raise UsageError("no adapter is active, so there is nothing to merge; set_adapter chooses one")
    path = ""
    try:
        for path, layer in layers.items():  # noqa: B007 (the error names it)
            layer.merge()
    except BaseException as problem:
        unmerge_layers(layers)
        if isinstance(problem, SurgeryError):
            raise type(problem)(f"{path}: {problem}") from None
        raise


def unmerge(model: nn.Module) -> None:
    """Put the model's own tensors back, bit for bit; the adapters are active as before the merge.

    Raises:
        UsageError: the model is not merged.
    """
    layers = layers_of(model)
    if not any(layer.merged for layer in layers.values()):
        raise UsageError("the model is not merged")
    unmerge_layers(layers)


def unmerge_layers(layers: Mapping[str, AdaptedModule]) -> None:
    """Put every layer's own tensors back, in layers that are merged."""
    for layer in layers.values():
        layer.unmerge()


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Count the parameters that are trained, and all of them.

    Examples:
        >>> trainable_parameters(LoRALinear(nn.Linear(4, 3), r=2))
        (14, 29)
    """
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, learns in counts if learns), sum(n for n, _ in counts)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters are trained, in PEFT's words.

    Examples:
        >>> print_trainable_parameters(LoRALinear(nn.Linear(4, 3), r=2))
        trainable params: 14 || all params: 29 || trainable%: 48.2759
    """
    learns, total = trainable_parameters(model)
    print(f"trainable params: {learns:,} || all params: {total:,} || trainable%: {100 * learns / max(total, 1):.4f}")


def activate_first(model: nn.Module, name: str) -> None:
    """The first adapter of a model acts at once, as in PEFT; a later one waits for set_adapter."""
    layers = layers_of(model)
    if {a for layer in layers.values() for a in layer.adapters} == {name}:
        set_adapter(model, name)

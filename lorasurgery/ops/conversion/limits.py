"""What a conversion refuses by name: meanings that the new format has no words for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorasurgery.adapters.adapter import Delta
from lorasurgery.adapters.image_names.components import beside_denoiser, class_of, has_known_originals, takes_adapters
from lorasurgery.adapters.image_names.translate import NewModule
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.clients.client import CLIENTS
from lorasurgery.errors import UnsupportedError

if TYPE_CHECKING:
    from lorasurgery.ops.conversion.options import Conversion


def check_place(
    base: Checkpoint | None, to: str, adapter: str, instead: str = "merge the adapter into its base instead"
) -> list[str]:
    """Refuse a base that no client loads an adapter of this format into; what comes back is a warning.

    Args:
        base: The adapter's model, if one is given.
        to: The format.
        adapter: What the message begins with.
        instead: The next move that it ends with.

    Raises:
        UnsupportedError: a VAE or a ControlNet for ComfyUI and kohya, or a denoiser of which those programs' names are
            not known; a class that has no load_lora_adapter.
    """
    name = _denoiser(base)
    if not name or to == "peft":
        return []
    beside, where = beside_denoiser(name), f"{adapter}: its base is {name}"
    if to != "diffusers" and beside:
        raise UnsupportedError(f"{where}, {beside}, which no file of the {to} format has a place for; {instead}")
    if to != "diffusers" and not has_known_originals(name):
        raise UnsupportedError(f"{where}, whose names in the {to} format are not known here; {instead}")
    if to == "diffusers" and not takes_adapters(name):
        raise UnsupportedError(f"{where}, which diffusers loads no adapter into (no load_lora_adapter); {instead}")
    if beside:
        return [f"{name} is {beside}: load the file by its own load_lora_adapter; a pipeline puts it elsewhere"]
    return []


def _denoiser(base: Checkpoint | None) -> str:
    """The diffusers class of a base, or of a pipeline's denoiser; empty where no config names one."""
    if base is None:
        return ""
    parts = {prefix.removesuffix(".") for prefix in base.parts.values()} & {"unet", "transformer"}
    return class_of(base.config_of(min(parts)) if parts else base.config)


def check_sayable(plan: Conversion) -> None:
    """Refuse by name what the new format, or with --portable some server, can't say.

    Raises:
        UnsupportedError: the module or tensor, the reason and the next move.
    """
    adapter = plan.adapter
    for delta in adapter.deltas.values():
        for problem in _problems(plan, delta):
            raise UnsupportedError(f"{adapter.path}: {delta.path} {problem}")
    for name, problem in _whole_problems(plan):
        raise UnsupportedError(f"{adapter.path}: {name} {problem}")


def _whole_problems(plan: Conversion) -> Iterator[tuple[str, str]]:
    """What is said of tensors that are not factors: stored whole, single rows, differences of vectors."""
    adapter, options, merge = plan.adapter, plan.options, "merge the adapter into its base instead"
    peft = adapter.format == "peft"
    for name in adapter.tokens:
        yield (
            name,
            f"is replaced in single rows (trainable_token_indices), which can be merged but not converted; {merge}",
        )
    for name in sorted(adapter.replaced, key=lambda n: n.endswith(".bias")):  # a bias may only go with its weight
        if options.portable:
            yield name, f"is stored whole, which not every server takes; {merge}"
        if peft and CLIENTS[options.to].whole == "none":
            yield (
                name,
                f"is stored whole, which the {options.to} format has no place for; {merge}, or leave such tensors out "
                f"with extract --for {options.to}",
            )
        elif peft and options.to != "peft" and plan.base is None:
            yield name, f"is stored whole; with --base BASE it becomes a difference, as the {options.to} format says it"
        if not peft and options.to in ("peft", "diffusers"):
            yield name, "is set whole; only --to kohya or comfyui can say that"
    for name in sorted(adapter.diffs):
        beside = name.endswith(".bias") and name.removesuffix(".bias") in adapter.deltas
        if options.portable:
            yield name, f"is a difference of a vector, which not every reader takes; {merge}"
        if not beside and options.to in ("peft", "diffusers"):
            yield (
                name,
                (
                    f"is a difference of a vector that has no LoRA beside it, which the {options.to} format has no "
                    "place for; --to kohya keeps it, or merge the adapter into its base"
                ),
            )


def _problems(plan: Conversion, delta: Delta) -> list[str]:
    found, options = [], plan.options
    if delta.merge_only:
        found.append(f"{delta.merge_only}: it can be merged but not converted")
    if delta.kind == "embedding" and "embedding" not in CLIENTS[options.to].factors:
        found.append(f"adapts an embedding, which the {options.to} format has no place for; merge it instead")
    if delta.magnitude and options.portable and delta.path not in plan.undone:
        found.append(
            "is DoRA, which not every server takes; with --base BASE it becomes plain LoRA, and what is lost is told"
        )
    if options.portable and delta.bias:
        found.append("has a bias, which not every server takes; merge the adapter into its base instead")
    return found


def check_whole(plan: Conversion, target: NewModule) -> None:
    """Refuse what has no rows of its own, and so can't be taken apart or put together.

    Raises:
        UnsupportedError: a convolution, or DoRA beside rows without a magnitude.
    """
    adapter, one = plan.adapter, target.pieces[0]
    sources = [adapter.deltas[s] for s in target.sources]
    whole = len(target.pieces) == 1 and one.start == 0 and one.height == sources[0].shape[0]
    if not whole and any(d.kernel for d in sources):
        raise UnsupportedError(f"{adapter.path}: {target.path} would take a convolution apart, which is not done")
    missing = any(p.source is None for p in target.pieces)
    with_norm = [d for d in sources if d.magnitude and d.path not in plan.undone]
    if with_norm and (missing or len(with_norm) < len(sources)):
        raise UnsupportedError(
            f"{adapter.path}: {with_norm[0].path} is DoRA, but {target.path} also holds rows without a magnitude; "
            "merge the adapter into its base instead"
        )

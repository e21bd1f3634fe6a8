"""From a model in memory to a PEFT adapter folder, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorasurgery.adapters.peft.read import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from lorasurgery.adapters.peft.write import PeftLayout, factor_keys
from lorasurgery.checkpoint.dtypes import dtype_name
from lorasurgery.checkpoint.operation import Operation
from lorasurgery.checkpoint.output import Output, check_output
from lorasurgery.checkpoint.plan import PlannedFile, PlannedTensor
from lorasurgery.clients.peft import saved_names, task_type
from lorasurgery.errors import UsageError
from lorasurgery.nn.adapted import AdaptedModule
from lorasurgery.nn.linear import LoRALayer, is_conv1d
from lorasurgery.nn.modules import check_known, inner, layers_of, modules_of


def save_adapter(model: nn.Module, path: str | Path, name: str = "default", *, overwrite: bool = False) -> None:
    """Write one adapter as a folder that PeftModel.from_pretrained and `lorasurgery merge` take.

    Examples:
        ```python
        save_adapter(model, "adapter")
        PeftModel.from_pretrained(base, "adapter")
        ```

    Factors are written as they are held, in float32 or float64, with their own ranks and alphas; tensors stored
    whole in their own dtype. A weight given to set_adapter is not part of the adapter. A merged model may be saved.

    Args:
        path: The folder; it appears whole or not at all.
        overwrite: Replace an adapter that is there already.

    Raises:
        UsageError: no adapter of this name, or a file's name.
        OutputError: the folder can't be written.
    """
    layers = layers_of(model)
    check_known(layers, name)
    out = Path(path)
    if out.suffix == ".safetensors":
        raise UsageError(f"{out}: an adapter is a folder (config and weights); give a folder name")
    with Operation("save_adapter", alone=True):
        check_output(out, [], overwrite)
        _save(model, layers, out, name, overwrite=overwrite)


def _save(model: nn.Module, layers: Mapping[str, AdaptedModule], out: Path, name: str, *, overwrite: bool) -> None:
    layout = _layout(model)
    tensors: dict[str, Tensor] = {}
    saved: set[str] = set()
    for where, layer in layers.items():
        if isinstance(layer, LoRALayer) and name in layer.lora_A:
            tensors |= _factors(where, layer, name, layout)
        tensors |= _whole(where, layer, name, layout, saved)
    layout.saved, _ = saved_names(saved, layout.paths, layout.ranks)  # PEFT loads the others by their names
    with Output(out, overwrite=overwrite) as output:
        _write(output, tensors, layout)


def _layout(model: nn.Module) -> PeftLayout:
    config: Any = getattr(model, "config", None)  # of a transformers model; others have none
    modules = modules_of(model)
    return PeftLayout(
        paths=set(modules) - {""},
        base_model=str(getattr(config, "_name_or_path", "")),
        task=task_type({"architectures": list(getattr(config, "architectures", None) or ())}),
    )


def _factors(path: str, layer: LoRALayer, name: str, layout: PeftLayout) -> dict[str, Tensor]:
    update = layer.factors(name)
    layout.add(path, update.rank, update.scale * update.rank)
    layout.fan_in_fan_out |= is_conv1d(layer.original)
    a, b = factor_keys(path, layer.kind)
    return {a: update.down, b: update.up}


def _whole(path: str, layer: AdaptedModule, name: str, layout: PeftLayout, saved: set[str]) -> Mapping[str, Tensor]:
    """Tensors stored whole, under the keys that PEFT loads them by."""
    held = {leaf: tensor.detach() for leaf, tensor in layer.whole_of(name).items()}
    if not held:
        return {}
    if isinstance(layer, LoRALayer) and name in layer.lora_A:
        if "bias" in held:
            layout.bias = "lora_only" if layout.bias == "none" else layout.bias
        return {f"{PREFIX}{path}.base_layer.{leaf}": tensor for leaf, tensor in held.items()}
    if set(held) == {"bias"}:
        layout.bias = "all"
    elif not any(inner(layer).children()):
        saved.add(path)
        held = _own(layer) | held  # modules_to_save wants every tensor of the module, changed or not
    return {f"{PREFIX}{path}.{leaf}": tensor for leaf, tensor in held.items()}


def _own(layer: AdaptedModule) -> dict[str, Tensor]:
    leaves = layer.original.state_dict()
    return {leaf: layer.own(leaf).detach() for leaf in leaves}


def _write(output: Output, tensors: Mapping[str, Tensor], layout: PeftLayout) -> None:
    planned = [PlannedTensor(key, dtype_name(t.dtype), tuple(t.shape)) for key, t in sorted(tensors.items())]
    file = PlannedFile(WEIGHTS_NAME, tuple(planned), {"format": "pt"})
    with output.tensor_file(file) as writer:
        for item in file.tensors:
            writer.write(item.name, tensors[item.name].cpu())
    output.write_bytes(CONFIG_NAME, (json.dumps(layout.config(), indent=2) + "\n").encode())
    output.commit(last=CONFIG_NAME)

"""What a PEFT adapter stores whole, as differences from the base, which kohya's and ComfyUI's files can say."""

from __future__ import annotations

import torch
from torch import Tensor

from lorasurgery.adapters.image_names.dictionary import Slot
from lorasurgery.checkpoint.dtypes import torch_dtype
from lorasurgery.errors import MismatchError
from lorasurgery.ops.convert_options import Conversion


def differences(plan: Conversion, leaf: str) -> dict[str, Tensor]:
    """Module path -> tuned − base of all its tensors named `leaf` that are stored whole, in float32 or --dtype.

    Raises:
        MismatchError: a tensor that the base has not, or in another shape.
    """
    dtype = torch_dtype(plan.options.dtype or "F32")
    own = {n.rpartition(".")[0]: n for n in plan.adapter.replaced if n.endswith(f".{leaf}")}
    return {path: _difference(plan, path, name, leaf).to(dtype) for path, name in own.items()}


def _difference(plan: Conversion, path: str, name: str, leaf: str) -> Tensor:
    assert plan.base is not None and plan.translator is not None and plan.translator.dictionary is not None
    value = plan.adapter.load_replaced(name).float()
    slots = plan.translator.dictionary.find(plan.translator.places[path], leaf)
    if not slots:
        raise MismatchError(f"{plan.adapter.path}: {name} is stored whole, and {plan.base.path} has no such tensor")
    for slot in slots:
        rows = slot.rows or slice(None)
        before = _before(plan, slot)
        if before.shape != value[rows].shape:
            raise MismatchError(
                f"{plan.adapter.path}: {name} is {list(value[rows].shape)} but {slot.tensor} of {plan.base.path} is "
                f"{list(before.shape)}, so their difference can't be said; merge the adapter into its base instead"
            )
        value[rows] -= before
    return value


def _before(plan: Conversion, slot: Slot) -> Tensor:
    assert plan.base is not None
    tensor = plan.base.read(slot.tensor).to(torch.float32)
    tensor = tensor.T if slot.transposed else tensor
    return tensor if slot.into is None else tensor[slot.into]

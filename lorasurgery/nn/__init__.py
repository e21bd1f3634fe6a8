"""LoRA in memory, as small as it can be said: h = Wx + (α/r)·B(Ax), and what an adapter's files mean in a model.

For reading, checking and small experiments; to train at large use PEFT, which reads and writes the same files.
There is no dropout, no sharding and no quantized merge, and a variant that is not held is refused by name.

Examples:
    ```python
    model = apply_lora(model, ["q_proj", "v_proj"], r=8, alpha=16)   # and train it
    save_adapter(model, "adapter")                                   # PEFT and `lorasurgery merge` take it
    load_adapter(other, "adapter", "mine")
    set_adapter(other, {"mine": 0.7})
    ```
"""

from lorasurgery.nn.adapted import AdaptedModule
from lorasurgery.nn.linear import LoRAEmbedding, LoRALinear
from lorasurgery.nn.load import load_adapter
from lorasurgery.nn.model import (
    apply_lora,
    merge,
    print_trainable_parameters,
    set_adapter,
    trainable_parameters,
    unmerge,
)
from lorasurgery.nn.save import save_adapter

__all__ = [
    "AdaptedModule",
    "LoRAEmbedding",
    "LoRALinear",
    "apply_lora",
    "load_adapter",
    "merge",
    "print_trainable_parameters",
    "save_adapter",
    "set_adapter",
    "trainable_parameters",
    "unmerge",
]

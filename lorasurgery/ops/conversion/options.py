"""What a conversion is asked for, and what is settled of it before a tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.image_names.translate import NewModule, Translator
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import UsageError

To = Literal["peft", "kohya", "diffusers", "comfyui"]


FORMATS: tuple[To, ...] = get_args(To)


@dataclass(frozen=True)
class ConvertOptions:
    """What comes out.

    Args:
        to: The format.
        portable: One rank for all (zero-padded), alpha = r, the scale in the factors: what every reader takes.
        dtype: safetensors name of what factors are written in; None keeps the adapter's own.
        rank: Of what has no LoRA factors of its own. None keeps all that LoHa, LoKr and whole differences have, and
            the rank of the factors for DoRA that becomes plain LoRA.
    """

    to: To
    portable: bool = False
    dtype: str | None = None
    rank: int | None = None

    def check(self) -> None:
        """Raise UsageError for what is not a format or dtype."""
        if self.to not in FORMATS:
            raise UsageError(f"--to {self.to}: expected one of {', '.join(FORMATS)}")
        if self.dtype not in (None, "F32", "BF16", "F16"):
            raise UsageError("--dtype: an adapter is written as float32, bfloat16 or float16")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank {self.rank}: expected a whole number of at least 1")


@dataclass
class Conversion:
    """What is settled before a tensor is read.

    Args:
        adapter: The source.
        targets: Modules of the new file, by the adapter's.
        translator: None where PEFT stays PEFT, so that no name changes.
        kernels: Of convolutions, by the adapter's path; LoHa and LoKr may hold them flat, and the base tells.
        base: The adapter's model, if one is given.
        matched: How many of the adapter's tensors the base has; None without a base.
    """

    adapter: Adapter
    options: ConvertOptions
    targets: list[NewModule] = field(default_factory=list)
    translator: Translator | None = None
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    base: Checkpoint | None = None
    matched: int | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def undone(self) -> frozenset[str]:
        """The modules whose DoRA becomes plain LoRA: what is portable has none, and a base is there to tell."""
        if not self.options.portable or self.base is None:
            return frozenset()
        return frozenset(path for path, delta in self.adapter.deltas.items() if delta.magnitude)

    def name(self, target: NewModule) -> str:
        """The target's name in the file."""
        return self.translator.new.name(target.part, target.path) if self.translator else target.path

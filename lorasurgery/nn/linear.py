"""Linear layers and embeddings with low-rank updates: h = Wx + Σ w·(α/r)·B(Ax) (LoRA, arXiv:2106.09685, section 4.1).

Factors are held in float32 (float64 for float64 weights), as PEFT holds them, and the result has the layer's dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from lorasurgery.adapters.adapter import Kind
from lorasurgery.errors import UnsupportedError, UsageError
from lorasurgery.linalg.rounding import add_updates
from lorasurgery.lowrank import LowRank, widened
from lorasurgery.nn.adapted import AdaptedModule


class LoRALayer(AdaptedModule):
    """A layer with a weight matrix, and factors lora_A (r, in), lora_B (out, r) by adapter.

    Attributes:
        scaling: adapter -> α/r, or α/√r with rsLoRA.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.kind, self.shape = factored(original)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}

    @property
    def adapters(self) -> set[str]:
        """The names of the adapters that something here belongs to."""
        return super().adapters | set(self.lora_A)

    @property
    def across(self) -> bool:
        """Whether the weight is stored (in, out): embeddings and GPT-2's Conv1D."""
        return not isinstance(self.original, nn.Linear)

    def add(self, name: str, factors: LowRank, *, trainable: bool = False) -> None:
        """Hold adapter `name`'s factors, up (out, r) and down (r, in); they act once the name is active."""
        wide = factors.to(self.own("weight").device, widened(factors.up.dtype))
        self.lora_A[name] = nn.Parameter(wide.down, requires_grad=trainable)
        self.lora_B[name] = nn.Parameter(wide.up.contiguous(), requires_grad=trainable)
        self.scaling[name] = factors.scale

    def factors(self, name: str) -> LowRank:
        """Adapter `name`'s update as lora_B (out, r) and lora_A (r, in), detached."""
        return LowRank(self.lora_B[name].detach(), self.lora_A[name].detach(), self.scaling[name])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's result plus every active update's."""
        result = super().forward(*args, **kwargs)
        if self.merged:
            return result
        dtype = result.dtype
        for name, weight in self.active.items():
            if name in self.lora_A:
                term = self.through(self.lora_A[name], self.lora_B[name], *args, **kwargs)
                result = result + term * (self.scaling[name] * weight)
        return result.to(dtype)

    def through(self, A: Tensor, B: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """B·A at this input, in the factors' dtype."""
        raise NotImplementedError

    def merged_tensors(self) -> dict[str, Tensor]:
        """New values of the original's tensors, with the active adapters in them."""
        found = super().merged_tensors()
        terms = [self.factors(n).times(w) for n, w in self.active.items() if n in self.lora_A]
        if terms:
            own = self.own("weight")
            if not own.is_floating_point() or tuple(own.shape) not in (self.shape, self.shape[::-1]):
                raise UnsupportedError(f"its weight is quantized ({own.dtype}), so nothing can be added; dequantize it")
            start = self.replacements().get("weight", own)
            found["weight"] = add_updates(start, [t.transposed if self.across else t for t in terms], own.dtype)[0]
        return found


class LoRALinear(LoRALayer):
    """h = Wx + (α/r)·B(Ax): a frozen linear layer with a trainable low-rank update that begins as zero.

    Examples:
        >>> layer = LoRALinear(nn.Linear(4, 3), r=2, alpha=4)
        >>> x = torch.randn(5, 4)
        >>> torch.equal(layer(x), layer.original(x)), layer.scaling
        (True, {'default': 2.0})

    A is Gaussian with standard deviation 1/r, from torch's global generator, and B is zero (PEFT's
    init_lora_weights="gaussian"). There is no dropout.

    Args:
        original: nn.Linear, or transformers' Conv1D, whose weight is stored (in, out); it is frozen.
        r: Rank; 0 makes a layer without any adapter, for add().
        alpha: The update is scaled by alpha/r.
        name: The adapter's.

    Raises:
        UnsupportedError: another kind of layer.
        UsageError: a rank or alpha without meaning.
    """

    def __init__(self, original: nn.Module, r: int = 8, alpha: float = 8, *, name: str = "default") -> None:
        super().__init__(original)
        if self.kind != "linear":
            raise UnsupportedError(f"LoRALinear: a {type(original).__name__} is not a linear layer")
        if r:
            self.init(name, r, alpha)
            self.active = {name: 1.0}

    def init(self, name: str, r: int, alpha: float) -> None:
        """Begin adapter `name`: A Gaussian, B zero, both trainable."""
        check_rank(r, alpha)
        weight, (out, into) = self.own("weight"), self.shape
        like = torch.empty(0, dtype=widened(weight.dtype), device=weight.device)
        down = nn.init.normal_(like.new_empty(r, into), std=1 / r)
        self.add(name, LowRank(like.new_zeros(out, r), down, alpha / r), trainable=True)

    def through(self, A: Tensor, B: Tensor, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """B(Ax)."""
        return linear(linear(x.to(A.dtype), A), B)  # (…, in) -> (…, r) -> (…, out)


class LoRAEmbedding(LoRALayer):
    """A frozen nn.Embedding whose rows get (α/r)·(BA)ᵀ added; A (r, vocabulary), B (dim, r), as PEFT has them.

    Examples:
        >>> layer = LoRAEmbedding(nn.Embedding(5, 3))
        >>> layer.add("default", LowRank(torch.ones(3, 1), torch.arange(5.0)[None], 2.0))
        >>> layer.active = {"default": 1.0}
        >>> (layer(torch.tensor([4])) - layer.original(torch.tensor([4]))).round().tolist()
        [[8.0, 8.0, 8.0]]
    """

    def through(self, A: Tensor, B: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """B·A[:, tokens], looked up by the original's own forward, which may scale rows or shift positions."""
        rows: Tensor = functional_call(self.original, {"weight": A.T}, args, kwargs)
        return rows @ B.T  # (…, r) @ (r, dim)


def factored(module: nn.Module) -> tuple[Kind, tuple[int, int]]:
    """What kind of factors a layer takes, and the shape (out, in) of B·A.

    >>> factored(nn.Linear(4, 3)), factored(nn.Embedding(5, 3))
    (('linear', (3, 4)), ('embedding', (3, 5)))

    Raises:
        UnsupportedError: a layer that takes none.
    """
    if isinstance(module, nn.Linear):
        return "linear", (module.out_features, module.in_features)
    if is_conv1d(module):
        into, out = module.weight.shape  # type: ignore[misc]
        return "linear", (int(out), int(into))
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        return "embedding", (module.embedding_dim, module.num_embeddings)
    what = "an Embedding with max_norm" if isinstance(module, nn.Embedding) else f"a {type(module).__name__}"
    raise UnsupportedError(f"{what} takes no factors here; nn.Linear, Conv1D and nn.Embedding do")


def is_conv1d(module: nn.Module) -> bool:
    """Tell transformers' Conv1D, a linear layer with its weight stored (in, out), without importing transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def layer_for(module: nn.Module) -> AdaptedModule:
    """The layer that can stand in a module's place, without any adapter yet."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return LoRALinear(module, r=0)
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        return LoRAEmbedding(module)
    return AdaptedModule(module)


def check_rank(r: int, alpha: float) -> None:
    """Raise UsageError for a rank or an alpha without meaning."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise UsageError(f"r is {r!r}; expected a whole number of at least 1")
    if not math.isfinite(alpha):
        raise UsageError(f"alpha is {alpha!r}; expected a finite number")

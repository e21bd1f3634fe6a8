"""From an adapter's module path to the base's tensor on disk, from names, shapes and config.json alone.

Adapters use the module paths a model has in memory; checkpoints keep their names on disk. A path that finds
no tensor is an error that names it: silently changing nothing is the field's commonest bug.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from lorasurgery.adapters.model_names.cuts import Cut
from lorasurgery.adapters.model_names.library import library_cuts, library_names
from lorasurgery.adapters.model_names.renames import disk_names, memory_name, model_types
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.checkpoint.tensor_reader import TensorReader
from lorasurgery.errors import MismatchError, nearest

# transformers' models whose linear layers are Conv1D, stored (in, out)
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
CONV1D_LEAVES = {"c_attn", "c_proj", "c_fc", "q_attn"}
_EMBEDDING = re.compile(
    r"(?:.*\.)?(?:(?!proj_to_)[a-z_]*embeddings?|[a-z_]*embed_tokens|embed_positions|embed_in|pos_embed|wte|wpe|shared|relative_attention_bias"
    r"|embed|embedding_table|cond_type_embed|embed_image_indicator)"  # diffusers' tables
)
# Look-up tables whose forward takes no token ids (an offset is added inside), so no LoRA can run on them.
_POSITIONS = re.compile(r"(?:.*\.)?embed_positions")
# Routers of mixtures of experts are modules of their own kind, which PEFT can store whole but not factor.
_ROUTERS = re.compile(r"(?:.*\.)?(?:mlp|block_sparse_moe|feed_forward|mixer)\.(?:gate|router)")
# Buffers that a model recomputes: they come and go between library versions and hold nothing that was trained.
_BUFFERS = re.compile(r".*\.(position_ids|inv_freq|masked_bias|attn\.bias|token_type_ids|num_batches_tracked)")
_HEADS = re.compile(r"(?:.*\.)?(?:lm_head|embed_out|output_projection)|(?:.*\.)?predictions\.decoder|output")
# What libraries put before a model's own names, and what models with a head put before their body's.
_WRAPPERS = {
    "base_model", "model", "module", "_orig_mod", "transformer", "backbone", "decoder", "encoder", "language_model",
    "bert", "roberta", "distilbert", "electra", "gpt_neox", "vit", "deit", "beit", "dinov2", "esm", "rwkv",
}  # fmt: skip
_MOST_WRAPPERS = 8  # that lie in one another
_INPUTS = ("embed_tokens", "wte", "shared", "word_embeddings", "tok_embeddings", "embed_in", "word_embedding")


def is_embedding(path: str) -> bool:
    """Tell an embedding table's module path from a linear layer's.

    >>> [is_embedding(p) for p in ("model.embed_tokens", "h.wte", "embed_out", "layer.0.dense")]
    [True, True, False, False]
    """
    return _EMBEDDING.fullmatch(path) is not None


def is_position_table(path: str) -> bool:
    """Tell OPT's and BART's learned positions, which are looked up with an offset and so can't carry a LoRA."""
    return _POSITIONS.fullmatch(path) is not None


def is_router(path: str) -> bool:
    """Tell a mixture of experts' router.

    >>> is_router("model.layers.0.mlp.gate"), is_router("model.layers.0.mlp.gate_proj")
    (True, False)
    """
    return _ROUTERS.fullmatch(path) is not None


def is_buffer(name: str) -> bool:
    """Tell a buffer that models recompute, by its tensor's name.

    >>> is_buffer("model.layers.0.self_attn.rotary_emb.inv_freq"), is_buffer("model.norm.weight")
    (True, False)
    """
    return _BUFFERS.fullmatch(name) is not None


def is_head(path: str) -> bool:
    """Tell an output head (lm_head and its kin), which may share its tensor with the input embedding."""
    return _HEADS.fullmatch(path) is not None


def module_of(tensor: str) -> str:
    """A tensor's module path: its name without `.weight`, or without its last part for other tensors.

    >>> module_of("model.norm.weight"), module_of("h.0.c_fc.bias"), module_of("cls_token")
    ('model.norm', 'h.0.c_fc', 'cls_token')
    """
    return tensor.rpartition(".")[0] or tensor


class NoTensorError(MismatchError):
    """An adapter's path that no tensor of the base answers to."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass
class BaseNames:
    """The base's tensors, ready to be looked up by an adapter's paths.

    Args:
        tensors: name -> TensorInfo, as the checkpoint's headers give them.
        config: config.json, or {}.
        where: The base as the user named it, for messages.
    """

    tensors: Mapping[str, TensorInfo]
    config: dict[str, Any]
    where: str

    def find(self, path: str, leaf: str = "weight", shapes: tuple[tuple[int, ...], ...] = ()) -> str | None:
        """The base's tensor for a module path: by exact name, by a known rename, then by unique suffix (and shape)."""
        name = f"{path}.{leaf}" if leaf else path
        if name in self.tensors:
            return self.tensors[name].name  # the string that is there already: there may be 10⁵
        for candidate in self.renamed(name):
            if self._fits(candidate, shapes):
                return candidate
        parts = name.split(".")
        # the adapter's path is the longer one: `transformer.h.0…` on disk as `h.0…`
        for candidate in self.unwrapped(name):
            if candidate in self.tensors and self._fits(candidate, shapes):
                return candidate
        longer = self._by_ending(len(parts)).get(name, []) if len(parts) > 1 else []
        longer = [n for n in longer if self._fits(n, shapes)]
        return longer[0] if len(longer) == 1 else None

    def renamed(self, name: str) -> list[str]:
        """The base's tensors that a family is known to call so in memory, the likeliest first."""
        found = [n for n in disk_names(name) if n in self.tensors]
        return found + [n for n in self._by_memory.get(name, []) if n not in found]

    @cached_property
    def _by_memory(self) -> dict[str, list[str]]:
        types = model_types(self.config)
        table: dict[str, list[str]] = defaultdict(list)
        for name in self.tensors:
            table[memory_name(name, types)].append(name)
        return table

    @cached_property
    def by_library(self) -> BaseNames | None:
        """The same tensors by the names that transformers itself knows for them: a last resort before an error."""
        table = library_names(self._shapes, self.config)
        return _LibraryNames(self.tensors, self.config, self.where, table) if table else None

    @cached_property
    def cuts(self) -> dict[str, list[tuple[str, Cut]]]:
        """Name in memory -> tensors that transformers cuts it from, or joins to it: a last resort before an error."""
        return library_cuts(self._shapes, self.config)

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    def missing(self, path: str, adapter: str, more: Sequence[str] = (), total: int = 1) -> NoTensorError:
        """The error for an adapter's paths that no tensor of the base answers to, with the nearest names.

        Args:
            path: The first of them; `more` are the others, out of `total` modules.
        """
        known = [module_of(n) for n in self.tensors]
        said, verb = [path, *more], "match" if more else "matches"
        return NoTensorError(
            path,
            f"{adapter}: {len(said)} of {total} modules {verb} no tensor in {self.where}: {', '.join(said[:3])}"
            f"{' …' if len(said) > 3 else ''}; nothing was changed"
            + (nearest(path, known) or "; is this the adapter's base model?"),
        )

    def may_be_new(self, name: str) -> bool:
        """Whether a tensor of this name could be a module that the base lacks (a fresh head), not a misspelt one."""
        parent = module_of(name).rpartition(".")[0]
        known = not parent or self._is_wrapper(parent) or any(n.startswith(f"{parent}.") for n in self.tensors)
        return known and ".".join(name.split(".")[-2:]) not in self._by_suffix

    def is_conv1d(self, path: str) -> bool:
        """Whether a linear layer's weight is stored (in, out), as GPT-2's Conv1D is."""
        return self._has_conv1d and path.rpartition(".")[2] in CONV1D_LEAVES

    def tied_source(self, path: str) -> str | None:
        """The tensor that stands for a module which shares its weight and so has none on disk.

        An output head shares the input embedding; T5's and BART's `encoder.embed_tokens` share `shared`.
        """
        if is_head(path):
            return self.input_embedding if self.find(path) is None and self.ties else None
        match = re.fullmatch(r"(.*?)(?:encoder|decoder)\.embed_tokens", path)
        return self.find(f"{match[1]}shared") if match and self.find(path) is None else None

    @property
    def ties(self) -> bool:
        """What config.json says of tie_word_embeddings (text_config's word counts too); True when silent."""
        text = self.config.get("text_config")
        for config in (self.config, text if isinstance(text, dict) else {}):
            if "tie_word_embeddings" in config:
                return bool(config["tie_word_embeddings"])
        return True

    def tied_paths(self, tensor: str) -> list[str]:
        """The other module paths that share an embedding tensor in memory, so an update must reach them too."""
        if tensor != self.input_embedding:
            return []
        path = module_of(tensor)
        stem = path.removesuffix("shared")
        paths = [f"{stem}{side}.embed_tokens" for side in ("encoder", "decoder")] if stem != path else []
        has_head = any(is_head(module_of(n)) for n in self.tensors)
        return paths + (self._head_path() if self.ties and not has_head else [])

    def _head_path(self) -> list[str]:
        architectures = self.config.get("architectures") or []
        causal = any(isinstance(a, str) and a.endswith(("LMHeadModel", "ForCausalLM", "ForConditionalGeneration"))
                     for a in architectures)  # fmt: skip
        return ["lm_head"] if causal else []

    @cached_property
    def input_embedding(self) -> str | None:
        """The token embedding's tensor name; None when no name tells it."""
        for leaf in _INPUTS:
            found = [n for n in self.tensors if n == f"{leaf}.weight" or n.endswith(f".{leaf}.weight")]
            found = [n for n in found if len(self.tensors[n].shape) == 2]
            if found:
                return min(found, key=len)
        return None

    def unwrapped(self, name: str) -> Iterator[str]:
        """A name without its first parts, as long as those may be missing on disk."""
        parts = name.split(".")
        for i in range(1, min(len(parts) - 1, _MOST_WRAPPERS)):
            if not self._is_wrapper(parts[i - 1]):
                return
            yield ".".join(parts[i:])

    def _is_wrapper(self, part: str) -> bool:
        """Whether a leading part of a path may be missing on disk; a misspelt prefix must not pass for one."""
        kind = str(self.config.get("model_type", "")).replace("-", "_")
        return part in _WRAPPERS or (len(part) > 2 and part in kind)

    @cached_property
    def _has_conv1d(self) -> bool:
        if "model_type" in self.config:
            return self.config["model_type"] in CONV1D_MODELS
        # Without a config the fused projection tells: (n, 3n) is Conv1D, (3n, n) would be Linear.
        return any(
            n.endswith("c_attn.weight") and len(t.shape) == 2 and t.shape[1] == 3 * t.shape[0]
            for n, t in self.tensors.items()
        )

    @cached_property
    def _by_suffix(self) -> dict[str, list[str]]:
        table: dict[str, list[str]] = defaultdict(list)
        for name in self.tensors:
            table[".".join(name.split(".")[-2:])].append(name)
        return table

    def _by_ending(self, count: int) -> dict[str, list[str]]:
        """Tensors by the last `count` parts of their names."""
        if count not in self._endings:
            table: dict[str, list[str]] = defaultdict(list)
            for name in self.tensors:
                if name.count(".") >= count:
                    table[".".join(name.rsplit(".", count)[1:])].append(name)
            self._endings[count] = table
        return self._endings[count]

    @cached_property
    def _endings(self) -> dict[int, dict[str, list[str]]]:
        return {}

    def _fits(self, name: str, shapes: tuple[tuple[int, ...], ...]) -> bool:
        return not shapes or self.tensors[name].shape in shapes


@dataclass
class _LibraryNames(BaseNames):
    """Names by transformers' own table."""

    table: dict[str, list[str]]

    def renamed(self, name: str) -> list[str]:
        return next((self.table[n] for n in (name, *self.unwrapped(name)) if n in self.table), [])


def count_parameters(model: Checkpoint) -> int:
    """How many parameters a checkpoint has; tied tensors are on the disk once, and count once."""
    return sum(prod(info.shape) for name, info in model.tensors.items() if info.is_float and not is_buffer(name))


def commonest_dtype(model: TensorReader) -> str:
    """The floating dtype that takes the most bytes; F32 where there is none."""
    sizes: Counter[str] = Counter()
    for info in model.tensors.values():
        if info.is_float:
            sizes[info.dtype] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else "F32"

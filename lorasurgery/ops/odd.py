"""What a person should know of a file before trusting it: things that are allowed, but seldom meant."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.model_names.naming import BaseNames, commonest_dtype, is_head, module_of
from lorasurgery.checkpoint.header import PICKLE_SUFFIXES
from lorasurgery.checkpoint.journal import PARTIAL
from lorasurgery.checkpoint.locate import load_object
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import some
from lorasurgery.module_location import place_of
from lorasurgery.ops.placement.quantized import scale_of

_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
_LOUD, _FAINT = 8.0, 0.01  # scales beyond these are more often a mistake in alpha than meant


def odd_in_checkpoint(model: Checkpoint) -> list[str]:
    """Sentences on what is odd about a checkpoint, as headers, config and folder tell it."""
    return [*_tensors(model), *_folder(model.folder, model.is_file), *_config(model), *_index(model)]


def _tensors(model: Checkpoint) -> Iterator[str]:
    empty = [t.name for t in model.tensors.values() if not prod(t.shape)]
    if empty:
        yield f"{len(empty)} tensors hold no elements ({some(empty)})"
    main = commonest_dtype(model)
    scaled = [t.name for t in model.tensors.values() if scale_of(model, t)]
    other = [t.name for t in model.tensors.values() if t.is_float and t.dtype != main and len(t.shape) > 1]
    other = [name for name in other if name not in scaled]
    if other and not model.parts:
        yield f"{len(other)} matrices are not {main} like the rest ({some(other)})"
    if scaled:
        yield f"{len(scaled)} weights are quantized and mean something only with their scales ({some(scaled)})"
    integers = [t.name for t in model.tensors.values() if not t.is_float and len(t.shape) > 1 and _is_weight(t.name)]
    if integers:
        yield f"{len(integers)} weights are stored as integers, packed or quantized ({some(integers)})"
    bare = [name for name, header in model.files.items() if "format" not in header.metadata]
    if bare:
        yield f"the header of {some(bare)} does not say format=pt, which older versions of transformers ask for"


def _is_weight(name: str) -> bool:
    return name.rpartition(".")[2] in ("weight", "qweight", "weight_packed")


def _folder(folder: Path, is_file: bool) -> Iterator[str]:
    if is_file:
        return
    names = sorted(f.name for f in folder.iterdir())
    pickles = [n for n in names if n.endswith(PICKLE_SUFFIXES) and n != "training_args.bin"]
    if pickles:
        yield f"pickle files lie beside the weights and are never read ({some(pickles)})"
    remains = [n for n in names if n.endswith(PARTIAL)]
    if remains:
        yield f"the remains of an interrupted run lie here ({some(remains)})"


def _config(model: Checkpoint) -> Iterator[str]:
    if model.is_file or model.parts:
        return
    config = model.config
    if not config:
        yield "there is no config.json: names and shapes must tell all"
        return
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(text, dict)
    yield from _embedding(model, text, config)
    said = config.get("dtype") or config.get("torch_dtype")
    if isinstance(said, str) and said in _STORED and _STORED[said] != commonest_dtype(model):
        yield f"config.json says {said} but the weights are {commonest_dtype(model)}"
    layers = text.get("num_hidden_layers")
    found = {place_of(n).stack: place_of(n).layer for n in sorted(model.tensors, key=_layer)}
    deepest = max((1 + (n or 0) for stack, n in found.items() if stack), default=0)
    if type(layers) is int and deepest and deepest < layers:
        yield f"config.json says {layers} layers but no more than {deepest} are here"


def _layer(name: str) -> int:
    return place_of(name).layer or 0


def _embedding(model: Checkpoint, text: dict[str, object], config: dict[str, object]) -> Iterator[str]:
    names = BaseNames(model.tensors, model.config, str(model.path))
    table = names.input_embedding
    rows, said = (model.tensors[table].shape[0] if table else None), text.get("vocab_size")
    if type(said) is int and rows is not None and rows != said:
        yield f"config.json says a vocabulary of {said} but {table} has {rows} rows"
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    heads = [n for n in model.tensors if is_head(module_of(n)) and n.endswith(".weight")]
    if tied is True and heads and table and model.tensors[heads[0]].shape == model.tensors[table].shape:
        yield f"config.json ties the head to the embedding, so {heads[0]} will not be used"


def _index(model: Checkpoint) -> Iterator[str]:
    if not model.index_name:
        return
    index = load_object(model.folder / model.index_name)
    listed = index.get("weight_map")
    unlisted = [n for n in model.tensors if isinstance(listed, dict) and n not in listed]
    if unlisted:
        yield f"{len(unlisted)} tensors are in the shards but not in the index ({some(unlisted)})"
    said = index["metadata"].get("total_size") if isinstance(index.get("metadata"), dict) else None
    if type(said) is int and said != model.nbytes:
        yield f"the index says {said:,} bytes but the tensors take {model.nbytes:,}"


def odd_in_adapter(adapter: Adapter, model: Checkpoint | None = None) -> list[str]:
    """Sentences on what is odd about an adapter; with its model also where it is as large as the weight itself."""
    return [*_scales(adapter), *_shapes(adapter), *_folder(adapter.folder, Path(adapter.path).is_file()),
            *_base(adapter, model)]  # fmt: skip


def _scales(adapter: Adapter) -> Iterator[str]:
    zero = [d.path for d in adapter.deltas.values() if not d.scale]
    if zero:
        yield f"alpha is 0 in {len(zero)} modules, so they change nothing ({some(zero)})"
    far = [d.path for d in adapter.deltas.values() if d.scale and not _FAINT <= abs(d.scale) <= _LOUD]
    if far:
        scale = adapter.deltas[far[0]].scale
        yield f"the scale of {len(far)} modules is unusual ({some(far)}: {scale:g}); is alpha meant so?"
    if any(d.scale < 0 for d in adapter.deltas.values()):
        yield "alpha is negative in some modules, so they take the update away"


def _shapes(adapter: Adapter) -> Iterator[str]:
    wide = [d.path for d in adapter.deltas.values() if d.form == "lora" and d.rank > min(d.shape)]
    if wide:
        yield f"the rank is above the matrix's own in {len(wide)} modules ({some(wide)}); rerank makes them smaller"
    dtypes = {adapter.weights.tensors[n].dtype for d in adapter.deltas.values() for n in d.names}
    if len(dtypes) > 1:
        yield f"factors are stored in several dtypes ({', '.join(sorted(dtypes))})"
    whole = sum(adapter.weights.tensors[key].nbytes for key in adapter.replaced.values())
    if adapter.deltas and whole > adapter.weights.nbytes / 2:
        yield f"{whole / adapter.weights.nbytes:.0%} of the file are tensors stored whole, not factors"


def _base(adapter: Adapter, model: Checkpoint | None) -> Iterator[str]:
    name = adapter.config.get("base_model_name_or_path")
    if isinstance(name, str) and Path(name).is_absolute():
        yield f"the base model is named by a path of one machine ({name}); others can't find it"
    if model and adapter.weights.nbytes > model.nbytes / 2:
        yield "the adapter is more than half as large as the model"

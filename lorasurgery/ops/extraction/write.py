"""What extract writes: factors, modules cut from one tensor or joined from several, and tensors stored whole."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lorasurgery.adapters.model_names.align import PairNames
from lorasurgery.adapters.model_names.cuts import Cut
from lorasurgery.adapters.model_names.fused import expert_place, wants_parameter
from lorasurgery.adapters.model_names.naming import BaseNames, is_head, module_of
from lorasurgery.adapters.peft.read import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from lorasurgery.adapters.peft.write import PeftLayout, factor_keys, with_kernel
from lorasurgery.checkpoint.dtypes import dtype_name, torch_dtype
from lorasurgery.checkpoint.output import Output
from lorasurgery.checkpoint.plan import PlannedFile, PlannedTensor
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.clients.host import Host
from lorasurgery.clients.peft import saved_names
from lorasurgery.clients.peft_load import PeftLoad, Problem
from lorasurgery.hub.reference import cached_reference
from lorasurgery.lowrank import LowRank
from lorasurgery.ops.extraction.pairs import Pair
from lorasurgery.ops.factors.factored import Factored, Scaling, file_bytes, fit, hold, too_small
from lorasurgery.report import ModuleReport

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lorasurgery.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class TunedRows:
    """Rows of a tensor of the tuned checkpoint, in this order; None means all of them."""

    tensor: str
    rows: range | tuple[int, ...] | None = None


Pieces = tuple[TunedRows, ...]


def whole_tensors(draft: AdapterDraft, layout: PeftLayout) -> dict[str, Pieces]:
    """Adapter key -> rows of tuned tensors, for all that is stored whole; the layout learns how PEFT will load it.

    A module is saved with all its tensors, which PEFT asks for, and can be switched with the adapter. What can't be
    saved so (a parameter of a module that has others in it, a module that no name means alone, a bias beside factors)
    is loaded into the base's own tensor.
    """
    keys: dict[str, Pieces] = {}
    by_itself = {m for m in draft.host.saved if _has_all(draft, m)}
    alone = [p for p in pairs_in_memory(draft.full) if draft.host.saver_of(p.path) not in by_itself]
    saved = {p.path for p in alone if _is_savable(draft, p)}
    targets = [path for path in layout.ranks if path not in layout.parameters]
    layout.saved, unnamed = saved_names(saved | by_itself, draft.host.paths | saved, targets)
    saved -= unnamed
    for module in sorted(saved | by_itself):
        keys |= _module_tensors(draft, module)
    for pair in alone:
        if pair.path not in saved:
            keys[_plain_key(draft, pair)] = _pieces(draft, pair)
            if pair.leaf == "bias":
                layout.bias = "lora_only" if layout.bias != "all" and _has_factors(draft, pair.path) else "all"
        elif PREFIX + _name(pair) not in keys:
            keys[PREFIX + _name(pair)] = _pieces(draft, pair)
    return keys


def _pieces(draft: AdapterDraft, pair: Pair) -> Pieces:
    return draft.cut_in_memory.get(_name(pair), (TunedRows(pair.tuned.name),))


def _name(pair: Pair) -> str:
    return f"{pair.path}.{pair.leaf}" if pair.path != pair.leaf else pair.leaf


def _is_savable(draft: AdapterDraft, pair: Pair) -> bool:
    """Whether PEFT can keep a copy of the pair's module beside the base's: one that stands alone, without factors."""
    host, path = draft.host, pair.path
    if path == pair.leaf or host.holds_modules(path) or host.stands_twice(path) or _has_factors(draft, path):
        return False
    if _is_shared(draft, pair):  # a copy would be one layer's alone
        return False
    if pair.leaf == "bias" and _is_matrix(draft, pair.path):
        return any(p.path == pair.path and p.leaf == "weight" for p in pairs_in_memory(draft.full))
    return pair.leaf in ("weight", "bias") and _has_all(draft, pair.path)


def _is_shared(draft: AdapterDraft, pair: Pair) -> bool:
    """Whether other layers hold the same tensor in memory, and none of them one of its own on disk."""
    if draft.host.skeleton is not None:
        return any(n not in draft.in_memory for n in draft.host.others_of(_name(pair)))
    return pair.base is not None and bool(draft.names.tied_paths(pair.base.name)) and not draft.has_head


def _has_all(draft: AdapterDraft, module: str) -> bool:
    """Whether the tuned checkpoint has every tensor that PEFT asks for of a module; a new one it has by itself."""
    wanted = draft.host.tensors_of(module)
    return bool(wanted) and all(_source(draft, name) for name in wanted)


def _module_tensors(draft: AdapterDraft, module: str) -> dict[str, Pieces]:
    """Every parameter and buffer of a module, changed or not."""
    found = {PREFIX + name: _source(draft, name) for name in draft.host.tensors_of(module)}
    return {key: pieces for key, pieces in found.items() if pieces}


def _source(draft: AdapterDraft, name: str) -> Pieces:
    """The tuned tensor of a name in memory, or of one that shares it."""
    names = (name, *draft.host.others_of(name))
    cut = next((draft.cut_in_memory[n] for n in names if n in draft.cut_in_memory), ())
    return cut or next(((TunedRows(draft.in_memory[n]),) for n in names if n in draft.in_memory), ())


def _plain_key(draft: AdapterDraft, pair: Pair) -> str:
    """The key under which PEFT's model itself has the tensor, layers of its own in between."""
    inside = ".base_layer" * (1 if _has_factors(draft, pair.path) else len(draft.wrapped(pair.path)))
    return PREFIX + (f"{pair.path}{inside}.{pair.leaf}" if pair.path != pair.leaf else pair.leaf)


def _has_factors(draft: AdapterDraft, path: str) -> bool:
    return path in draft.factored


def _is_matrix(draft: AdapterDraft, path: str) -> bool:
    cut = draft.cut_in_memory.get(f"{path}.weight")
    if cut is not None:
        return len(draft.tuned.tensors[cut[0].tensor].shape) >= 2
    name = draft.names.find(path)
    return name is not None and len(draft.base.tensors[name].shape) >= 2


@dataclass
class AdapterDraft:
    """Factors in PEFT's orientation (on the CPU), and the pairs that will be stored whole.

    Args:
        host: The model in memory that it is for.
        factors: (pair, its factors), in the order found.
        full: pairs whose tuned tensor is stored whole.
        dropped: modules that a budget left without any direction.
    """

    base: Checkpoint
    tuned: Checkpoint
    host: Host
    rslora: bool
    dtype: str | None
    factors: list[tuple[Pair, Factored]] = field(default_factory=list)
    full: list[Pair] = field(default_factory=list)
    dropped: list[ModuleReport] = field(default_factory=list)

    def factor_dtype(self, pair: Pair) -> torch.dtype:
        """What factors are written in: --dtype, else the tuned weight's; 8-bit floats hold no factors, so BF16."""
        name = self.dtype or pair.tuned.dtype
        return torch_dtype("BF16" if name.startswith("F8") else name)

    def pad(self) -> None:
        """Zero-pad every module to the largest rank."""
        ranks = room_to_pad(self.factors, self.full)
        self.factors = [(pair, f.pad(r, self.rslora)) for (pair, f), r in zip(self.factors, ranks, strict=True)]

    def hold(self, budget: int, scaling: Scaling, *, uniform: bool) -> None:
        """Keep memory near the budget while modules come in."""
        cut = hold([f for _, f in self.factors], budget, scaling, uniform=uniform)
        if cut is not None:
            self._keep(cut)

    def spend(self, budget: int, scaling: Scaling, *, uniform: bool) -> None:
        """Cut the factors so that the file takes at most `budget` bytes, all else in it counted.

        A module that is left without factors may be saved whole, with all its tensors, because of its bias: where that
        is more than the budget, every module keeps a direction.

        Raises:
            SurgeryError: the budget is too small, and what would be enough.
        """
        counted = [
            (pair, replace(f, copies=1 + len(aliases_of(self, pair)), surplus=surplus(pair)))
            for pair, f in self.factors
        ]
        dropped, whole = self.dropped, [f for _, f in counted]
        files = [_Folder(replace(self, factors=counted)).file]
        for least in ([], [1] * len(whole)):
            self.factors, self.dropped = counted, list(dropped)
            self._keep(fit(whole, files, budget, scaling, uniform=uniform, least=least))
            if uniform:
                self._narrow(budget, scaling)
            if self._size(uniform) <= budget:
                return
        overhead, needed = file_bytes(files) - sum(f.cost * f.rank for f in whole), sum(f.cost for f in whole)
        raise too_small(budget, overhead, max(needed, self._size(uniform) - overhead))

    def _narrow(self, budget: int, scaling: Scaling) -> None:
        """Give all a lower rank as long as they are too many: modules that are joined add their ranks up."""
        while self._size(True) > budget and self.factors[0][1].rank > 1:
            rank = self.factors[0][1].rank
            rank = max(1, min(rank - 1, rank * budget // self._size(True)))
            self._keep([f.cut(rank, scaling) for _, f in self.factors])

    def _size(self, uniform: bool) -> int:
        """Bytes of the file, with all modules at one rank where that is wanted."""
        found = replace(self)
        if uniform:
            found.pad()
        return file_bytes([_Folder(found).file])

    def scales(self, scaling: Scaling) -> list[float]:
        """The scale of each module's factors in the file; of those that are joined in memory, that of the whole."""
        found = {id(f): scaling(f.rank)[1] for _, f in self.factors}
        found |= scales_of_parts(self.parts, scaling)
        return [found[id(f)] for _, f in self.factors]

    def _keep(self, modules: list[Factored]) -> None:
        self.dropped += [line for f in modules if not f.rank for line in f.reports]
        self.factors = [(pair, f) for (pair, _), f in zip(self.factors, modules, strict=True) if f.rank]

    def wrapped(self, module: str) -> list[str]:
        """The parameters of a module that have factors of their own, the outermost first (docs/formats.md)."""
        found = [p.path for p, _ in self.factors if p.treatment == "experts" and module_of(p.path) == module]
        return sorted(found, key=lambda p: not p.endswith(".down_proj"))

    @property
    def has_head(self) -> bool:
        """Whether an output head has a tensor of its own, whatever the config says of tying."""
        heads = [p.path for p, _ in self.factors] + [p.path for p in self.full]
        return any(map(is_head, heads)) or any(is_head(module_of(n)) for n in self.tuned.tensors)

    def has_own(self, path: str) -> bool:
        """Whether a module that shares its tensor in memory is stored with one of its own."""
        return f"{path}.weight" in self.in_memory

    @property
    def factored(self) -> set[str]:
        """Paths of the modules with factors, those that share a table with one too."""
        own = {p.path for p, _ in self.factors if p.treatment != "experts" and not p.cuts} | set(self.parts)
        return own | {path for p, _ in self.factors for path in aliases_of(self, p)}

    @property
    def parts(self) -> dict[str, list[CutFactors]]:
        """The modules cut from one tensor on disk or joined from several -> the factors they have a share in."""
        return parts_of_modules(self.factors, self.full)

    @property
    def config(self) -> dict[str, Any]:
        """Both checkpoints' config.json, for what the architecture's name tells."""
        return self.base.config | self.tuned.config

    @cached_property
    def in_memory(self) -> dict[str, str]:
        """Name in memory -> tensor of the tuned checkpoint."""
        whole = {memory: name for memory, name in self._names.tuned.items() if name not in self.host.cuts}
        names = {self.host.find(memory, name) or memory: name for memory, name in whole.items()}
        return names | {f"{p.path}.{p.leaf}": p.tuned.name for p in self.full if p.path != p.leaf}

    @cached_property
    def _names(self) -> PairNames:
        return PairNames.of(self.base, self.tuned)

    @property
    def memory_names(self) -> tuple[tuple[Checkpoint, dict[str, str]], ...]:
        """Of each side, name in memory -> tensor on disk."""
        return (self.tuned, self._names.tuned), (self.base, self._names.base)

    @cached_property
    def cut_in_memory(self) -> dict[str, tuple[TunedRows, ...]]:
        """Name in memory -> what it is put together from, for tensors that are not loaded as they are."""
        return pieces_in_memory(self.host.cuts)

    @property
    def names(self) -> BaseNames:
        """The base's names, for what is tied to what."""
        return BaseNames(self.base.tensors, self.base.config, str(self.base.path))


class _Folder:
    """The files that a draft becomes: the planned tensors, the factors by key, and what is copied whole."""

    def __init__(self, draft: AdapterDraft) -> None:
        self.layout = PeftLayout(
            paths=_all_paths(draft),
            leaves=_all_parameters(draft),
            rslora=draft.rslora,
            base_model=_base_name(draft.base),
            revision=_base_revision(draft.base),
            task=draft.host.task,
            fan_in_fan_out=any(pair.treatment == "conv1d" for pair, _ in draft.factors),
        )
        factors = _factor_tensors(draft, self.layout)
        self.factors = factors.sources
        self.whole = whole_tensors(draft, self.layout)
        planned = factors.planned
        for key, pieces in self.whole.items():
            info, shape = draft.tuned.tensors[pieces[0].tensor], shape_of(draft.tuned, pieces)
            planned.append(PlannedTensor(key, (draft.dtype or info.dtype) if info.is_float else info.dtype, shape))
        self.file = PlannedFile(WEIGHTS_NAME, tuple(sorted(planned, key=lambda t: t.name)), {"format": "pt"})


def write_adapter(draft: AdapterDraft, tuned: Checkpoint, output: Output) -> list[Problem]:
    """Write adapter_model.safetensors and, last, adapter_config.json.

    Returns:
        What PEFT would not run, or not merge, as it is meant.
    """
    folder = _Folder(draft)
    with output.tensor_file(folder.file) as writer:
        for item in folder.file.tensors:
            source = folder.factors.get(item.name)
            if source is None:
                source = _whole(tuned, folder.whole[item.name], item)
            writer.write(item.name, source.tensor() if isinstance(source, _OwnFactor) else source)
    config = folder.layout.config()
    output.write_bytes(CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())
    output.commit(last=CONFIG_NAME)
    problems = PeftLoad(config, [t.name for t in folder.file.tensors], draft.host).problems()
    called = {pair.path: pair.called or pair.path for pair, _ in draft.factors}
    return [replace(p, full=next((called[n] for n in p.names if n in called), "")) for p in problems]


def _whole(tuned: Checkpoint, pieces: tuple[TunedRows, ...], planned: PlannedTensor) -> Tensor:
    return put_together(tuned, pieces).to(torch_dtype(planned.dtype))


@dataclass(frozen=True, slots=True)
class _OwnFactor:
    """One of the two tensors of a module that is on disk by itself, made when it is written.

    Args:
        turned: Whether the file's factors are those of the transposed update.
        kernel: Of a convolution.
        index: 0 for lora_A, 1 for lora_B.
    """

    found: Factored
    turned: bool
    kernel: tuple[int, ...]
    index: int

    def tensor(self) -> Tensor:
        return _own_factors(self.found, self.turned, self.kernel)[self.index]


def _own_factors(found: Factored, turned: bool, kernel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    factors = found.update.transposed if turned else found.update
    return with_kernel(factors.down.contiguous(), factors.up.contiguous(), kernel)


@dataclass
class _FactorTensors:
    """The file's factors: each as it is planned, and where it comes from, by its key."""

    planned: list[PlannedTensor] = field(default_factory=list)
    sources: dict[str, Tensor | _OwnFactor] = field(default_factory=dict)

    def add(self, key: str, tensor: Tensor, source: _OwnFactor | None = None) -> None:
        self.planned.append(PlannedTensor(key, dtype_name(tensor.dtype), tuple(tensor.shape)))
        self.sources[key] = tensor if source is None else source


def _factor_tensors(draft: AdapterDraft, layout: PeftLayout) -> _FactorTensors:
    tensors = _FactorTensors()
    for pair, found in draft.factors:
        if pair.cuts:
            continue
        if pair.treatment == "experts":
            _add_experts(tensors, draft, pair, found, layout)
            continue
        aliases = aliases_of(draft, pair)
        layout.tied |= bool(aliases)
        for path in [pair.path, *aliases]:
            kind = "embedding" if _is_table(draft, pair, path) else "linear"
            turned = (kind == "embedding") != (pair.treatment == "embedding")
            kernel = pair.tuned.shape[2:] if pair.treatment == "conv" else ()
            made = _own_factors(found, turned, kernel)
            for index, (key, tensor) in enumerate(zip(factor_keys(path, kind), made, strict=True)):
                tensors.add(key, tensor, _OwnFactor(found, turned, kernel, index))
            _note(draft, layout, path, found.rank, found.report.alpha or 0.0, kind)
    for path, parts in draft.parts.items():
        update, alpha = joined(parts, rslora=draft.rslora)
        a, b = factor_keys(path, "linear")
        tensors.add(a, update.down)
        tensors.add(b, update.up)
        _note(draft, layout, path, update.rank, alpha, "linear")
    return tensors


def _note(draft: AdapterDraft, layout: PeftLayout, path: str, rank: int, alpha: float, kind: str) -> None:
    """Tell the layout of a module with factors, or of its weight where PEFT must be told of that."""
    as_parameter = kind == "linear" and wants_parameter(path, draft.config)
    layout.add(f"{path}.weight" if as_parameter else path, rank, alpha, parameter=as_parameter)


def _is_table(draft: AdapterDraft, pair: Pair, path: str) -> bool:
    """Whether a module looks rows up; the others that share its table multiply by it."""
    kind = draft.host.kind(path)
    if kind is None:
        return pair.treatment == "embedding" and not is_head(path)
    return kind == "embedding"


def _add_experts(tensors: _FactorTensors, draft: AdapterDraft, pair: Pair, found: Factored, layout: PeftLayout) -> None:
    """PEFT wraps the module once for each parameter; the keys say only how deep inside the factors are."""
    module = module_of(pair.path)
    inside = ".base_layer" * draft.wrapped(module).index(pair.path)
    a, b = factor_keys(module + inside, "linear")
    tensors.add(a, found.update.down)
    tensors.add(b, found.update.up)
    layout.add(pair.path, found.rank, found.report.alpha or 0.0, parameter=True)


def aliases_of(draft: AdapterDraft, pair: Pair) -> list[str]:
    """Modules that share the pair's table in memory; PEFT adapts each on its own, so each gets the update."""
    if pair.leaf != "weight" or pair.treatment not in ("embedding", "linear") or pair.base is None:
        return []
    if draft.host.skeleton is not None:
        others = [module_of(n) for n in draft.host.others_of(f"{pair.path}.weight")]
        return [p for p in others if not draft.has_own(p)]
    if pair.treatment != "embedding":
        return []
    return [p for p in draft.names.tied_paths(pair.base.name) if not (is_head(p) and draft.has_head)]


def _all_paths(draft: AdapterDraft) -> set[str]:
    names = draft.names
    paths = {module_of(n) for n in _all_parameters(draft)}
    paths |= {p.path for p, _ in draft.factors if p.treatment != "experts"} | {p.path for p in draft.full}
    paths |= {module_of(name) for name in draft.cut_in_memory}
    tied = names.tied_paths(names.input_embedding) if names.input_embedding else ()
    return set(draft.host.paths).union(paths, tied)  # of equal strings, the host's are kept


def _all_parameters(draft: AdapterDraft) -> set[str]:
    """Every parameter's name in memory, the experts' matrices as the one that holds them."""
    found = set()
    for side, names in draft.memory_names:
        for memory, name in names.items():
            place = expert_place(memory, side.tensors[name].shape, draft.config)
            found.add(place.parameter if place else memory)
    return found


def _base_name(base: Checkpoint) -> str:
    """As PEFT names it: the repository on the Hub, or the path as given.

    config.json's _name_or_path would be another model, the one that this base was itself made from.
    """
    hub = cached_reference(base.folder)
    return hub.repo if hub else str(base.path)


def _base_revision(base: Checkpoint) -> str | None:
    """The commit on the Hub; PEFT's AutoPeftModel loads the base at it."""
    hub = cached_reference(base.folder)
    return hub.revision if hub else None


CutFactors = tuple[Cut, Factored]


def pieces_in_memory(cuts: Mapping[str, tuple[Cut, ...]]) -> dict[str, tuple[TunedRows, ...]]:
    """Name in memory -> what its tensor is put together from, top to bottom."""
    found: dict[str, list[tuple[int, TunedRows]]] = defaultdict(list)
    for disk, own in cuts.items():
        for cut in own:
            found[cut.memory].append((cut.into.start, TunedRows(disk, cut.rows)))
    return {m: tuple(p for _, p in sorted(pieces, key=lambda x: x[0])) for m, pieces in found.items()}


def put_together(tuned: Checkpoint, pieces: Sequence[TunedRows]) -> Tensor:
    """The tensor in memory."""
    from torch import cat

    whole = [(tuned.read(p.tensor), p.rows) for p in pieces]
    parts = [t if rows is None else t[list(rows)] for t, rows in whole]
    return parts[0] if len(parts) == 1 else cat(parts)


def shape_of(tuned: Checkpoint, pieces: Sequence[TunedRows]) -> tuple[int, ...]:
    """The shape in memory."""
    first = tuned.tensors[pieces[0].tensor].shape
    if pieces[0].rows is None:
        return first
    return (sum(len(p.rows or ()) for p in pieces), *first[1:])


def pairs_in_memory(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs by their names in memory: each cut for itself, and what is joined once."""
    found: dict[str, Pair] = {}
    for pair in pairs:
        for cut in pair.cuts:
            path, leaf = module_of(cut.memory), cut.memory.rpartition(".")[2]
            found.setdefault(cut.memory, replace(pair, path=path, leaf=leaf, cuts=()))
        if not pair.cuts:
            found[f"{pair.path} {pair.leaf}"] = pair
    return list(found.values())


def parts_of_modules(factors: Sequence[tuple[Pair, Factored]], whole: Sequence[Pair]) -> dict[str, list[CutFactors]]:
    """Module path in memory -> the factors it has a share in.

    Args:
        whole: What is stored whole; a module of which a part is has no factors.
    """
    stored = {cut.memory for pair in whole for cut in pair.cuts}
    found: dict[str, list[CutFactors]] = defaultdict(list)
    for pair, factored in factors:
        for cut in pair.cuts:
            if cut.memory not in stored:
                found[module_of(cut.memory)].append((cut, factored))
    return dict(found)


def scales_of_parts(parts: Mapping[str, Sequence[CutFactors]], scaling: Scaling) -> dict[int, float]:
    """id of factors -> their scale: that of the rank of the module they are joined in, one for all that meet somewhere.

    Args:
        parts: By module, as `parts_of_modules` gives them.
    """
    found: dict[int, float] = {}
    for own in parts.values():
        whole = scaling(sum(f.rank for _, f in own))[1]
        found |= {id(f): min(whole, found.get(id(f), whole)) for _, f in own}
    while True:
        before = dict(found)
        for own in parts.values():
            least = min(found[id(f)] for _, f in own)
            found |= {id(f): least for _, f in own}
        if found == before:
            return found


def joined(parts: Sequence[CutFactors], *, rslora: bool) -> tuple[LowRank, float]:
    """One module's factors and alpha: the downs one above the other, the ups' own rows in blocks along the diagonal."""
    import torch

    (cut, first), rank = parts[0], sum(f.rank for _, f in parts)
    up, at = first.update.up.new_zeros(cut.height, rank), 0
    for cut, factored in parts:
        one = factored.update
        up[cut.into.start : cut.into.stop, at : at + one.rank] = one.up[list(cut.rows)]
        at += one.rank
    downs = torch.cat([f.update.down for _, f in parts]).to(up.dtype)
    alpha = (first.report.alpha or 0.0) * ((rank / first.rank) ** (0.5 if rslora else 1.0) if first.rank else 1.0)
    return LowRank(up.contiguous(), downs.contiguous(), first.update.scale), float(f"{alpha:.15g}")


def surplus(pair: Pair) -> int:
    """Numbers more that one direction takes in the file than the pair's own factors have: downs in each, and zeros."""
    if not pair.cuts:
        return 0
    rows, columns = pair.matrix
    return (len(pair.cuts) - 1) * columns + sum(cut.height for cut in pair.cuts) - rows


def room_to_pad(factors: Sequence[tuple[Pair, Factored]], whole: Sequence[Pair]) -> list[int]:
    """How many directions each pair's factors must have so that all modules come out with one rank."""
    modules = parts_of_modules(factors, whole)
    totals = {id(parts[0][1]): sum(f.rank for _, f in parts) for parts in modules.values()}
    later = {id(f) for parts in modules.values() for _, f in parts[1:]}
    top = max([f.rank for _, f in factors] + list(totals.values()), default=0)
    ranks = []
    for _, factored in factors:
        own = factored.rank
        ranks.append(own if id(factored) in later else own + top - totals.get(id(factored), own))
    return ranks

"""Which tensors of a checkpoint an operation touches and how, settled from headers before any tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.model_names.naming import BaseNames, NoTensorError, is_embedding, is_head, module_of
from lorasurgery.adapters.model_names.projections import cuts_of
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.checkpoint.same import same_tensors
from lorasurgery.checkpoint.tensor_reader import ModelHeaders
from lorasurgery.errors import MismatchError, UnsupportedError, size_of
from lorasurgery.ops.placement.edits import Edit, EditPlan, Replacement, RowReplacement
from lorasurgery.ops.placement.image import Placer
from lorasurgery.ops.placement.peft import PeftPlacer
from lorasurgery.ops.placement.quantized import scale_of

_COMPUTABLE = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


def plan_edits(
    base: ModelHeaders, adapters: Sequence[Adapter], weights: Sequence[float], *, replace: bool = True
) -> EditPlan:
    """Match every tensor of every adapter to the base; each is applied, replaced or an error.

    Args:
        base: The checkpoint the adapters apply to.
        weights: One strength per adapter; an adapter with weight 0 contributes nothing.
        replace: False leaves replaced tensors alone and lists them as unrestored (unmerge).

    Raises:
        MismatchError: a path or shape that does not fit.
        UnsupportedError: quantized weights.
    """
    planner = _Planner(base, replace)
    for adapter, weight in zip(adapters, weights, strict=True):
        if weight != 0:
            planner.add(adapter, weight)
    return planner.finish()


class _Planner:
    def __init__(self, base: ModelHeaders, replace: bool) -> None:
        self.names = BaseNames(base.tensors, base.config, str(base.path))
        self.plan = EditPlan()
        self.placer = Placer(base, self.plan, replace)
        self.peft = PeftPlacer(self.names, self.plan, self.placer, replace)
        self.replace = replace

    def add(self, adapter: Adapter, weight: float) -> None:
        if adapter.format != "peft":
            self.placer.check(adapter)
        steps: list[Callable[[], None]] = [partial(self._replace, adapter, n, weight) for n in adapter.replaced]
        steps += [partial(self._replace_rows, adapter, n, weight) for n in adapter.tokens]
        steps += [partial(self.placer.add_diff, adapter, n, weight) for n in adapter.diffs]
        steps += [partial(self.peft.add, adapter, d, weight) for d in adapter.deltas.values()]
        missing = []
        for step in steps:
            try:
                step()
            except NoTensorError as problem:
                missing.append(problem.path)
        if missing:
            raise self.names.missing(missing[0], adapter.path, missing[1:], len(steps))

    def finish(self) -> EditPlan:
        for edit in self.plan.edits.values():
            self._check_tensor(edit)
        return self.plan

    # Replaced tensors

    def _replace(self, adapter: Adapter, name: str, weight: float) -> None:
        if not self.replace:
            self.plan.unrestored.append(name)
            return
        path, leaf = module_of(name), name[len(module_of(name)) + 1 :]
        target = self._tensor(adapter, path, leaf)
        shared = self.names.tied_source(path) if target is None and leaf == "weight" else None
        if shared is not None and self._same_as_shared(adapter, name, shared):
            return
        if target is None and shared is None and self._replace_cut(adapter, name, weight):
            return
        if target is None and shared is None and not self._is_fresh(adapter, name):
            raise self.names.missing(name, adapter.path)
        self._set_replacement(adapter, name, target or name, shared, weight)
        if target is not None and target == self.names.input_embedding and name in adapter.added:
            self._keep_head(adapter, target)

    def _tensor(self, adapter: Adapter, path: str, leaf: str) -> str | None:
        """The base's tensor that a whole tensor replaces; transformers' own table is asked last."""
        if adapter.format != "peft":
            return self.placer.tensor(adapter, path, leaf)
        found = self.names.find(path, leaf)
        library = self.names.by_library if found is None and self.names.tied_source(path) is None else None
        return library.find(path, leaf) if library else found

    def _replace_cut(self, adapter: Adapter, name: str, weight: float) -> bool:
        """Replace the rows of the tensors that the library cuts this one from, or joins to it."""
        parts = cuts_of(self.names, name) if adapter.format == "peft" else []
        key = adapter.replaced[name]
        info = adapter.weights.tensors[key]
        for disk, cut in parts:
            edit, expected = (
                self._edit(disk, self.names.tensors[disk]),
                (cut.height, *self.names.tensors[disk].shape[1:]),
            )
            if info.shape != expected:
                raise MismatchError(
                    f"{adapter.path}: {name} has shape {list(info.shape)} but {disk} in {self.names.where} has "
                    f"{list(expected)} for it"
                )
            part = None if len(cut.into) == cut.height else slice(cut.into.start, cut.into.stop)
            edit.rows.append(RowReplacement(adapter, key, cut.rows, weight, part))
        self.plan.matched += bool(parts)
        return bool(parts)

    def _is_fresh(self, adapter: Adapter, name: str) -> bool:
        """A whole module that the base lacks, such as a new head, under the very name the config gives it."""
        path, saved = module_of(name), adapter.config.get("modules_to_save") or []
        named = any(path == m or path.endswith(f".{m}") for m in saved)
        return name in adapter.added and named and self.names.may_be_new(name)

    def _same_as_shared(self, adapter: Adapter, name: str, shared: str) -> bool:
        """A tied module's copy is passed over when the shared tensor's own copy already says the same."""
        if adapter.tied or name not in adapter.added:
            has_own = any(self.names.find(module_of(n)) == shared for n in adapter.replaced)
            return has_own or module_of(name) in adapter.deltas
        return False

    def _set_replacement(self, adapter: Adapter, name: str, target: str, shared: str | None, weight: float) -> None:
        replacement = Replacement(adapter.weights, adapter.replaced[name], weight, adapter, name)
        source = self.names.tensors.get(shared or target)
        edit = self._edit(target, source, replacement.info.shape)
        if edit.replacement is not None:
            self._check_conflict(edit.replacement, replacement)
        self._check_replacement(edit, replacement, adapter)
        edit.replacement, edit.shape = replacement, replacement.info.shape
        self.plan.matched += 1
        if source is not None and source.shape != edit.shape and is_embedding(module_of(target)):
            self.plan.vocab_size = edit.shape[0]
        if is_head(module_of(target)) and not adapter.tied and self.names.ties:
            self.plan.untied = True

    def _keep_head(self, adapter: Adapter, embedding: str) -> None:
        """PEFT trains a copy of a tied embedding, so the head keeps the base's: write it as its own tensor."""
        grown = self.plan.edits[embedding].shape != self.names.tensors[embedding].shape
        for path in self.names.tied_paths(embedding):
            if is_head(path) and not adapter.tied and not grown:
                self.plan.untied = True
                self._edit(f"{path}.weight", self.names.tensors[embedding])

    def _check_replacement(self, edit: Edit, new: Replacement, adapter: Adapter) -> None:
        if edit.source is None or edit.source.shape == new.info.shape:
            return
        where, old, now = adapter.path, list(edit.source.shape), list(new.info.shape)
        table = len(old) == 2 and old[1:] == now[1:]
        if not table and new.name not in adapter.added:
            raise MismatchError(f"{where}: {new.name} has shape {now} but {self.names.where} has {old}")
        if new.weight != 1:
            raise MismatchError(
                f"{where}: {new.name} changes the shape from {old} to {now}, so it can only be taken whole; "
                f"use weight 1 instead of {new.weight:g}"
            )

    def _check_conflict(self, old: Replacement, new: Replacement) -> None:
        same = old.weight == new.weight and same_tensors(old.weights, old.info, new.weights, new.info)
        if not same:
            raise MismatchError(
                f"{old.where} and {new.where} both replace {new.name} with different values; "
                "merge them one after the other to let the later one win"
            )

    def _replace_rows(self, adapter: Adapter, name: str, weight: float) -> None:
        if not self.replace:
            self.plan.unrestored.append(name)
            return
        path, (key, rows) = module_of(name), adapter.tokens[name]
        target = self.names.find(path)
        if target is None:
            shared = self.names.tied_source(path)
            if shared is not None and any(self.names.find(module_of(n)) == shared for n in adapter.tokens):
                return  # a tied head: the embedding's own rows say the same
            raise self.names.missing(path, adapter.path)
        edit, info = self._edit(target, self.names.tensors[target]), adapter.weights.tensors[key]
        if edit.shape[1:] != info.shape[1:] or max(rows) >= edit.shape[0]:
            raise MismatchError(
                f"{adapter.path}: {key} replaces rows up to {max(rows)} of width {info.shape[1]} but {target} is "
                f"{size_of(edit.shape)}"
            )
        edit.rows.append(RowReplacement(adapter, key, rows, weight))
        self.plan.matched += 1

    # Shared

    def _edit(self, name: str, source: TensorInfo | None, shape: tuple[int, ...] | None = None) -> Edit:
        return self.plan.edit(name, source, shape)

    def _check_tensor(self, edit: Edit) -> None:
        if edit.source is None or not (edit.contributions or edit.replacement or edit.rows):
            return
        whole = edit.replacement is not None and edit.replacement.weight == 1
        whole = whole and not (edit.contributions or edit.rows)
        if edit.source.dtype not in _COMPUTABLE and not whole:
            raise UnsupportedError(
                f"{self.names.where}: {edit.source.name} is {edit.source.dtype}, a quantized weight; "
                "an adapter can only be merged into floating-point weights, so dequantize the checkpoint first"
            )
        scale = scale_of(self.placer.base, edit.source)
        if scale:
            raise UnsupportedError(
                f"{self.names.where}: {edit.source.name} is stored with a separate scale ({scale}); "
                "scaled checkpoints are not merged, so dequantize it to bfloat16 first"
            )

"""Which tensors of a checkpoint an operation touches and how, settled from headers before any tensor is read."""

from __future__ import annotations

from collections.abc import Sequence

from lorasurgery.adapters.adapter import Adapter, Delta
from lorasurgery.adapters.naming import BaseNames, is_embedding, is_head, module_of
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import MismatchError, UnsupportedError
from lorasurgery.ops.edits import Contribution, Edit, EditPlan, Replacement, RowReplacement, size_of
from lorasurgery.ops.experts import expert_targets
from lorasurgery.ops.placing import Placer
from lorasurgery.ops.quantized import scale_of

_COMPUTABLE = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


def plan_edits(
    base: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float], *, replace: bool = True
) -> EditPlan:
    """Match every tensor of every adapter to the base; each is applied, replaced or an error.

    Args:
        base: The checkpoint the adapters apply to.
        weights: One strength per adapter; an adapter with weight 0 contributes nothing.
        replace: False leaves replaced tensors alone and lists them as unrestored (unmerge).

    Raises:
        MismatchError: a path or shape that does not fit. UnsupportedError: quantized weights.
    """
    planner = _Planner(base, replace)
    for adapter, weight in zip(adapters, weights, strict=True):
        if weight != 0:
            planner.add(adapter, weight)
    return planner.finish()


class _Planner:
    def __init__(self, base: Checkpoint, replace: bool) -> None:
        self.names = BaseNames(base.tensors, base.config, str(base.path))
        self.plan = EditPlan()
        self.placer = Placer(base, self.plan, replace)
        self.replace = replace

    def add(self, adapter: Adapter, weight: float) -> None:
        if adapter.format != "peft":
            self.placer.check(adapter)
        for name in adapter.replaced:
            self._replace(adapter, name, weight)
        for name in adapter.tokens:
            self._replace_rows(adapter, name, weight)
        for name in adapter.diffs:
            self.placer.add_diff(adapter, name, weight)
        for delta in adapter.deltas.values():
            if delta.kind == "experts":
                self._add_experts(adapter, delta, weight)
            else:
                self._add_delta(adapter, delta, weight)

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
        target = self.names.find(path, leaf) if adapter.format == "peft" else self.placer.tensor(adapter, path, leaf)
        shared = self.names.tied_source(path) if target is None and leaf == "weight" else None
        if shared is not None and self._same_as_shared(adapter, name, shared):
            return
        if target is None and shared is None and name not in adapter.added:
            raise self.names.missing(name, adapter.path)
        self._set_replacement(adapter, name, target or name, shared, weight)
        if target is not None and target == self.names.input_embedding and name in adapter.added:
            self._keep_head(adapter, target)

    def _same_as_shared(self, adapter: Adapter, name: str, shared: str) -> bool:
        """A tied module's copy is passed over when the shared tensor's own copy already says the same."""
        if adapter.tied or name not in adapter.added:
            has_own = any(self.names.find(module_of(n)) == shared for n in adapter.replaced)
            return has_own or module_of(name) in adapter.deltas
        return False

    def _set_replacement(self, adapter: Adapter, name: str, target: str, shared: str | None, weight: float) -> None:
        replacement = Replacement(adapter, name, weight)
        source = self.names.tensors.get(shared or target)
        edit = self._edit(target, source, replacement.info.shape)
        if edit.replacement is not None:
            self._check_conflict(edit, replacement)
        self._check_replacement(edit, replacement)
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

    def _check_replacement(self, edit: Edit, new: Replacement) -> None:
        if edit.source is None or edit.source.shape == new.info.shape:
            return
        where, old, now = new.adapter.path, list(edit.source.shape), list(new.info.shape)
        table = len(old) == 2 and old[1:] == now[1:]
        if not table and new.name not in new.adapter.added:
            raise MismatchError(f"{where}: {new.name} has shape {now} but {self.names.where} has {old}")
        if new.weight != 1:
            raise MismatchError(
                f"{where}: {new.name} changes the shape from {old} to {now}, so it can only be taken whole; "
                f"use weight 1 instead of {new.weight:g}"
            )

    def _check_conflict(self, edit: Edit, new: Replacement) -> None:
        old = edit.replacement
        assert old is not None
        same = old.info.dtype == new.info.dtype and old.info.shape == new.info.shape and old.weight == new.weight
        if not same or _bytes(old) != _bytes(new):
            raise MismatchError(
                f"{old.adapter.path} and {new.adapter.path} both replace {new.name} with different values; "
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

    # Low-rank updates

    def _add_delta(self, adapter: Adapter, delta: Delta, weight: float) -> None:
        if adapter.format != "peft":
            return self.placer.add(adapter, delta, weight)
        shapes = _fitting_shapes(delta)
        target = self.names.find(delta.path, shapes=shapes)
        if target is None and delta.kind == "linear":
            target = self.names.find(delta.path, "in_proj_weight", shapes)
        source = self.names.tensors.get(target) if target else None
        if target is None:
            shared = self.names.tied_source(delta.path)
            if shared is not None and self._shared_has_it(adapter, delta, shared):
                return None
            if shared is None and self.placer.knows(delta.path):
                return self.placer.add(adapter, delta, weight)
            if shared is None or not is_head(delta.path):
                raise self.names.missing(delta.path, adapter.path)
            target, source = f"{delta.path}.weight", self.names.tensors[shared]
        if delta.magnitude and not self.replace:
            self.plan.unrestored.append(f"{delta.path}.weight")  # the norm it was divided by is gone
            return None
        if is_head(delta.path) and self.names.ties and not adapter.tied:
            self.plan.untied = True
        edit = self._edit(target, source)
        if any(c.adapter is adapter and not c.bias for c in edit.contributions):
            raise MismatchError(f"{adapter.path}: two modules of the adapter mean {target} in {self.names.where}")
        transposed = self._orientation(adapter, delta, edit)
        edit.contributions.append(Contribution(adapter, delta, weight, transposed))
        self.plan.matched += 1
        if delta.bias:
            self._add_bias(adapter, delta, weight, target)
        return None

    def _add_experts(self, adapter: Adapter, delta: Delta, weight: float) -> None:
        if delta.magnitude:
            raise UnsupportedError(
                f"{adapter.path}: {delta.path} is DoRA on fused experts, which PEFT does not do either"
            )
        for target in expert_targets(self.names, adapter, delta):
            edit = self._edit(target.tensor, self.names.tensors[target.tensor])
            edit.contributions.append(
                Contribution(adapter, delta, weight, target.transposed, expert=target.expert, rows=target.rows)
            )
        self.plan.matched += 1

    def _shared_has_it(self, adapter: Adapter, delta: Delta, shared: str) -> bool:
        if not adapter.tied:
            return False
        return any(self.names.find(p) == shared for p in adapter.deltas if p != delta.path)

    def _orientation(self, adapter: Adapter, delta: Delta, edit: Edit) -> bool:
        if delta.kind == "conv":
            self._check_conv(adapter, delta, edit)
            return False
        conv1d = self.names.is_conv1d(delta.path)
        flipped = delta.shape[::-1]
        if delta.kind == "embedding" or conv1d:
            fits, transposed = edit.shape == flipped, True
        else:
            transposed = edit.shape != delta.shape and edit.shape == flipped and adapter.fan_in_fan_out
            fits = edit.shape == delta.shape or transposed
        if not fits:
            expected = flipped if delta.kind == "embedding" or conv1d else delta.shape
            raise MismatchError(
                f"{adapter.path}: {delta.path} is an update of {size_of(expected)} but {edit.tensor} in "
                f"{self.names.where} is {size_of(edit.shape)}; is this the adapter's base model?"
            )
        return transposed

    def _add_bias(self, adapter: Adapter, delta: Delta, weight: float, target: str) -> None:
        name = f"{module_of(target)}.bias"
        if name not in self.names.tensors:
            raise MismatchError(f"{adapter.path}: {delta.bias} needs a bias but {self.names.where} has no {name}")
        edit = self._edit(name, self.names.tensors[name])
        if edit.shape != (delta.shape[0],):
            raise MismatchError(
                f"{adapter.path}: {delta.bias} has {delta.shape[0]} entries but {name} has {size_of(edit.shape)}"
            )
        edit.contributions.append(Contribution(adapter, delta, weight, transposed=False, bias=True))

    def _check_conv(self, adapter: Adapter, delta: Delta, edit: Edit) -> None:
        if edit.shape == delta.weight_shape:
            return
        grouped = edit.shape[:1] + edit.shape[2:] == delta.weight_shape[:1] + delta.weight_shape[2:]
        if grouped and delta.weight_shape[1] % edit.shape[1] == 0:
            raise UnsupportedError(
                f"{adapter.path}: {delta.path} is a grouped convolution ({size_of(edit.shape)}), whose dense factors "
                "have no merged form; PEFT does not merge it either"
            )
        raise MismatchError(
            f"{adapter.path}: {delta.path} is an update of {size_of(delta.weight_shape)} but {edit.tensor} is "
            f"{size_of(edit.shape)}"
        )

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


def _fitting_shapes(delta: Delta) -> tuple[tuple[int, ...], ...]:
    if delta.kind == "linear":
        return (delta.shape, delta.shape[::-1])
    return (delta.weight_shape,) if delta.kind == "conv" else (delta.shape[::-1],)


def _bytes(replacement: Replacement) -> bytes:
    weights = replacement.adapter.weights
    return b"".join(bytes(chunk) for chunk in weights.chunks(replacement.info.name))

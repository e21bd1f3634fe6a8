"""A base's modules by every name an adapter may call them: dotted or underscored, the original's or diffusers'.

It is made from the base's headers alone. The way from underscores back to dots is ambiguous as text and certain with
the base's own names; a fused module of one side finds its parts on the other.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorasurgery.adapters.image_names.components import Part, PartPath, checkpoint_place
from lorasurgery.adapters.image_names.dialects import Dialect, dialect, family_of
from lorasurgery.checkpoint.header import TensorInfo
from lorasurgery.errors import nearest

_LEAF = re.compile(r"\.(weight|bias|scale)$|_(weight|bias)$")
_TEXT = re.compile(r"^text_model\.")


@dataclass(frozen=True)
class BaseRows:
    """Rows of an update and the base's tensor they are added to.

    Args:
        tensor: The base's tensor.
        rows: Rows of the update that belong to it; None is all of them.
        into: Rows of the tensor that they are added to; None is all of them.
        transposed: The tensor is stored (in, out).
    """

    tensor: str
    rows: slice | None = None
    into: slice | None = None
    transposed: bool = False


@dataclass(frozen=True)
class _Atom:
    """A run of rows of one tensor, the smallest thing that both sets of names agree on."""

    module: str
    start: int
    height: int


@dataclass
class Side:
    """One part of the model: its modules with their tensors, and its atoms."""

    names: Dialect
    tensors: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    atoms: dict[str, _Atom] = field(default_factory=dict)
    underscored: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


class Dictionary:
    """The base's modules, to be looked up by an adapter's names.

    Examples:
        ```python
        Dictionary(base.tensors, pipeline=False).find(adapter_place("lora_unet_mid_block_attentions_0_proj_in"))
        ```

    Args:
        tensors: name -> TensorInfo.
        pipeline: The base is a diffusers folder.
        config: Gives a component folder's config.json.
    """

    def __init__(
        self, tensors: Mapping[str, TensorInfo], *, pipeline: bool,
        config: Callable[[str], dict[str, Any]] = lambda _: {},
    ) -> None:  # fmt: skip
        self.tensors = tensors
        grouped: dict[tuple[Part, str], list[str]] = defaultdict(list)
        for name in tensors:
            grouped[checkpoint_place(name, pipeline=pipeline)].append(name)
        self.sides: dict[Part, Side] = {}
        for (part, prefix), names in grouped.items():
            said = config(prefix[:-1])
            layers = said.get("layers_per_block") if prefix else None
            layers = layers if isinstance(layers, int) and 0 < layers < 9 else None
            side = self._side(names, prefix, layers, ours="_class_name" in said)
            t5 = part == "te2" and any(p.startswith("encoder.block.") for p in side.tensors)
            self.sides["te3" if t5 else part] = side

    def _side(self, names: Iterable[str], prefix: str, layers: int | None, *, ours: bool) -> Side:
        modules: dict[str, dict[str, str]] = defaultdict(dict)
        for name in names:
            module, leaf = split_leaf(name.removeprefix(prefix))
            modules[_TEXT.sub("", module)][leaf] = name
        family = family_of(modules)
        spoken = dialect(family, _blocks(modules) if family == "sd3" else layers)
        if ours and sum(spoken.row(m) is not None for m in modules) > len(modules) // 2:
            spoken = dialect("plain")  # a class of diffusers that has kept the original's names, as Wan-Animate 2's
        side = Side(spoken, modules)
        for module, tensors in modules.items():
            self._add_atoms(side, module, tensors)
        atoms = (atom.partition("#")[0] for atom in side.atoms)  # a part of norm_out.linear goes by its name
        for module in (*modules, *atoms, *side.names.originals(side.atoms, aliases=True)):
            side.underscored[module.replace(".", "_")].add(module)
        return side

    def _add_atoms(self, side: Side, module: str, tensors: dict[str, str]) -> None:
        shape = self.tensors[tensors.get("weight") or next(iter(tensors.values()))].shape
        spelling = side.names.spell(module)
        height, width = (shape[0], shape[1] if len(shape) > 1 else 1) if shape else (1, 1)
        start = 0
        for atom, rows in zip(spelling.atoms, spelling.heights(height, width), strict=True):
            side.atoms[atom] = _Atom(module, start, rows)
            start += rows

    def find(self, place: PartPath, leaf: str = "weight") -> tuple[BaseRows, ...]:
        """The base's tensors behind a module's name, with the rows that belong to each; empty when there are none.

        A name that could be two modules is not a name either; `hint` says so.
        """
        found = list(self._matches(place, leaf).values())
        return found[0] if len(found) == 1 else ()

    def path_of(self, place: PartPath) -> str | None:
        """The dotted path that a name with underscores stands for, as diffusers or the base calls it."""
        found = list(self._matches(place, "weight") or self._matches(place, "bias"))
        return found[0] if len(found) == 1 else None

    def _matches(self, place: PartPath, leaf: str) -> dict[str, tuple[BaseRows, ...]]:
        """Every module that a name may mean: path -> slots; all but one are of other parts, or spelt alike."""
        found: dict[str, tuple[BaseRows, ...]] = {}
        for side in self._sides(place.part):
            for path in self._dotted(side, place):
                slots = self._slots(side, path, leaf)
                if slots and slots not in found.values():
                    found[path if path not in found else slots[0].tensor] = slots
        return found

    def hint(self, place: PartPath) -> str:
        """The tail of an error line for a name that is not found: the nearest names, or that the part is missing."""
        several = [slots[0].tensor for slots in self._matches(place, "weight").values()]
        if len(several) > 1:
            return f"; it may be {' or '.join(several)}, and nothing tells which"
        sides = self._sides(place.part)
        known = {
            n for side in sides for short, full in side.underscored.items() for n in (full if place.dotted else {short})
        }
        path = place.path.removeprefix("text_model_" if not place.dotted else "text_model.")
        close = nearest(path, known)
        if not close and place.part not in self.sides and place.part != "any":
            what = "denoiser (U-Net or transformer)" if place.part == "denoiser" else f"text encoder {place.part[2:]}"
            return f"; it has no {what}: give the whole model, or leave the part out with --block-weight 'PREFIX*=0'"
        return close or "; is this the adapter's base model?"

    def _sides(self, part: Part) -> list[Side]:
        if part == "any" or part not in self.sides:
            rest = list(self.sides.values()) if part == "any" else [self.sides[k] for k in ("any",) if k in self.sides]
            return [self.sides["te3"], *rest] if part == "te2" and "te3" in self.sides else rest
        return [self.sides[part]]

    def _dotted(self, side: Side, place: PartPath) -> list[str]:
        if place.dotted:
            return [_TEXT.sub("", place.path)]
        found = side.underscored.get(place.path.removeprefix("text_model_"), set())
        spelt = {side.names.spell(p).atoms: p for p in sorted(found)}
        return list(spelt.values())

    def _slots(self, side: Side, path: str, leaf: str) -> tuple[BaseRows, ...]:
        """All the atoms of a name, runs of neighbours put together; none when the base lacks one of them."""
        atoms = [side.atoms.get(a) for a in side.names.spell(path).atoms]
        if _is_other_upsampler(side, path):
            return ()
        runs: list[list[Any]] = []  # [module, start in the update, start in the tensor, height]
        place = 0
        for atom in atoms:
            if atom is not None and atom.module == "text_projection" and leaf == "weight":
                return self._projection(side)
            if atom is None or leaf not in side.tensors[atom.module]:
                return ()
            if runs and runs[-1][0] == atom.module and sum(runs[-1][2:4]) == atom.start:
                runs[-1][3] += atom.height
            else:
                runs.append([atom.module, place, atom.start, atom.height])
            place += atom.height
        return tuple(self._slot(side.tensors[m][leaf], *run, whole=len(runs) == 1) for m, *run in runs)

    def _projection(self, side: Side) -> tuple[BaseRows, ...]:
        """CLIP's text_projection: a linear layer in transformers, a bare parameter (in, out) in the original."""
        tensors = side.tensors["text_projection"]
        bare = "weight" not in tensors
        return (BaseRows(tensors["" if bare else "weight"], transposed=bare),)

    def _slot(self, tensor: str, place: int, start: int, height: int, *, whole: bool) -> BaseRows:
        shape = self.tensors[tensor].shape
        into = None if height == (shape[0] if shape else 1) else slice(start, start + height)
        return BaseRows(tensor, None if whole else slice(place, place + height), into)


def _is_other_upsampler(side: Side, path: str) -> bool:
    """Whether a name gives an upsampler the number it would have in a level of the other kind.

    The original counts it after the level's attention: 2 where there is one, else 1.
    """
    if not (path.startswith("output_blocks.") and path.endswith(".conv")):
        return False
    level, _, found = side.names.spell(path).atoms[0].partition(".upsamplers")
    attends = any(atom.startswith(f"{level}.attentions.") for atom in side.atoms)
    return bool(found) and path.endswith(".1.conv") == attends


def _blocks(modules: Iterable[str]) -> int:
    numbers = [re.match(r"(?:joint|transformer)_blocks\.(\d{1,6})\.", m) for m in modules]
    return 1 + max((int(n[1]) for n in numbers if n), default=0)


def split_leaf(name: str) -> tuple[str, str]:
    """A tensor's module and what it is of it.

    >>> split_leaf("resblocks.0.attn.in_proj_weight"), split_leaf("norm.query_norm.scale"), split_leaf("v_pred")
    (('resblocks.0.attn.in_proj', 'weight'), ('norm.query_norm', 'weight'), ('v_pred', ''))
    """
    match = _LEAF.search(name)
    if match is None:
        return name, ""
    leaf = match[1] or match[2]
    return name[: match.start()], "weight" if leaf == "scale" else leaf

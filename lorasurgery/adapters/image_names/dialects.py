"""Translating module paths of image models between the original checkpoints' names and diffusers'.

Both sets are spelt out in atoms: the diffusers modules, or parts of one. A fused module is several atoms, so that
splitting, joining and swapping rows are all the same question: which atoms, in which order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from lorasurgery.adapters.image_names.dialect_tables import FLUX, HUNYUAN, OPENCLIP, WAN, Row, Split, sd3, unet

Family = Literal["unet", "flux", "hunyuan", "sd3", "wan", "openclip", "plain"]
_TABLES = {"flux": FLUX, "hunyuan": HUNYUAN, "wan": WAN, "openclip": OPENCLIP, "plain": ()}
# Qwen-Image and its kin have one set of names, diffusers', in which some words are those of Flux's original.
_QWEN_HEADS = {"img_in", "txt_in"}
_QWEN_INNER = {"img_mlp.net", "txt_mlp.net", "img_mod.1", "txt_mod.1"}
_SLOTS = {"n": r"(?P<n>\d+)", "m": r"(?P<m>\d+)", "rest": r"(?P<rest>.+)"}


@dataclass(frozen=True)
class Spelling:
    """What a module's rows are made of: atoms from top to bottom, and how its height is shared among them."""

    atoms: tuple[str, ...]
    split: Split = "even"

    def heights(self, height: int, width: int) -> list[int]:
        """Rows of each atom.

        >>> Spelling(("q", "k", "v", "mlp"), "wide-last").heights(7 * 8, 8)
        [8, 8, 8, 32]
        """
        count = len(self.atoms)
        if self.split == "even":
            return [height // count] * count
        return [width] * (count - 1) + [height - width * (count - 1)]


class Dialect:
    """The two sets of names of one family of models.

    >>> Dialect("flux").spell("single_blocks.3.linear1").atoms[-1]
    'single_transformer_blocks.3.proj_mlp'
    >>> Dialect("flux").originals(["transformer_blocks.0.attn.to_q"])
    {'double_blocks.0.img_attn.qkv'}

    Args:
        layers: Of a U-Net: ResNets a level. Of SD3: its blocks. None where it is not known; other families don't ask.
    """

    def __init__(self, family: Family, layers: int | None = None) -> None:
        self.family = family
        self._rows: tuple[Row, ...] = _TABLES.get(family, ())
        if family == "unet":
            self._rows = unet(layers or 2)
        elif family == "sd3":
            self._rows = sd3(layers or 0)
        # diffusers has the scale above the shift where the original has the shift above
        swapped = [row.parts for row in self._rows if "#" in row.parts[0]]
        self._swapped = {parts[0].partition("#")[0]: Spelling(parts[::-1]) for parts in swapped}

    @cached_property
    def _by_head(self) -> dict[str, list[tuple[re.Pattern[str], Row]]]:
        return _index((row.original, row) for row in self._rows)

    @cached_property
    def _by_part(self) -> dict[str, list[tuple[re.Pattern[str], Row]]]:
        return _index((part, row) for row in self._rows for part in row.parts)

    def row(self, original: str) -> tuple[Row, dict[str, str]] | None:
        """The row of an original name, and what its placeholders stand for."""
        return _look_up(self._by_head, original)

    def spell(self, path: str) -> Spelling:
        """The atoms of a module, by whichever of its names; a name in no table stands for itself."""
        if path in self._swapped:
            return self._swapped[path]
        found = self.row(path)
        if found is None:
            return Spelling((path,))
        row, values = found
        return Spelling(tuple(_fill(part, values) for part in row.parts), row.split)

    def originals(self, atoms: Iterable[str], *, aliases: bool = False) -> set[str]:
        """The original names of the modules that hold any of these atoms."""
        found = set()
        for atom in atoms:
            for pattern, row in self._by_part.get(_head(atom), []):
                match = pattern.fullmatch(atom)
                if match and (aliases or not row.alias):
                    found.add(_fill(row.original, match.groupdict()))
        return found


@lru_cache(maxsize=16)
def dialect(family: Family, layers: int | None = None) -> Dialect:
    """One dialect, made once."""
    return Dialect(family, layers)


def family_of(paths: Iterable[str]) -> Family:
    """Tell a model's family from its module paths, in either set of names.

    >>> family_of(["input_blocks.1.1.proj_in"]), family_of(["blocks.0.self_attn.q"])
    ('unet', 'wan')
    """
    known, heads, inner = list(paths), set(), set()
    for path in known:
        parts = path.split(".")
        heads.add(parts[0])
        inner.add(".".join(parts[2:4]))
        inner.add(parts[2] if len(parts) > 2 else "")
    if "transformer_blocks" in heads and (heads & _QWEN_HEADS or inner & _QWEN_INNER):
        return "plain"
    if heads & {"input_blocks", "middle_block", "output_blocks", "down_blocks", "mid_block", "up_blocks"}:
        return "unet"
    if "joint_blocks" in heads or ("transformer_blocks" in heads and heads & {"pos_embed"}):
        return "sd3"
    if heads & {"double_blocks", "single_blocks", "single_transformer_blocks"}:
        native = inner & {"img_attn_qkv", "img_mlp.fc1", "txt_attn_qkv", "txt_mlp.fc1"}
        refiner = any("token_refiner." in path for path in known)  # diffusers' and ComfyUI's HunyuanVideo
        return "hunyuan" if native or refiner else "flux"
    if "transformer_blocks" in heads:
        return "flux" if inner & {"attn.add_q_proj", "ff_context.net", "norm1_context.linear"} else "plain"
    if "blocks" in heads:
        return "wan" if inner & {"self_attn", "cross_attn", "attn1", "attn2"} else "plain"
    return "openclip" if any(path.startswith("transformer.resblocks.") for path in known) else "plain"


def _index(items: Iterable[tuple[str, Row]]) -> dict[str, list[tuple[re.Pattern[str], Row]]]:
    found: dict[str, list[tuple[re.Pattern[str], Row]]] = {}
    for template, row in items:
        pattern = re.escape(template)
        for name, slot in _SLOTS.items():
            pattern = pattern.replace(rf"\{{{name}\}}", slot)
        found.setdefault(_head(template), []).append((re.compile(pattern), row))
    return found


def _head(path: str) -> str:
    """Up to the first number, by which most rows are told apart at once."""
    return re.split(r"\.(?:\d|\{)", path, maxsplit=1)[0]


def _look_up(table: dict[str, list[tuple[re.Pattern[str], Row]]], path: str) -> tuple[Row, dict[str, str]] | None:
    for pattern, row in table.get(_head(path), []):
        match = pattern.fullmatch(path)
        if match:
            return row, match.groupdict()
    return None


def _fill(template: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        template = template.replace(f"{{{name}}}", value)
    return template

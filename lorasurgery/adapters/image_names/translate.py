"""From one set of an image model's names to another: which modules a file of another format has, and whose rows.

Names alone: a module that is fused on one side is several on the other, and what is missing is filled with zeros. A
base, where one is given, turns underscores back into dots and knows the height of what the adapter lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from lorasurgery.adapters.adapter import Adapter, Format
from lorasurgery.adapters.image_names.components import Part, PartPath, adapter_place, text_path
from lorasurgery.adapters.image_names.dialects import Dialect, Family, dialect, family_of
from lorasurgery.adapters.image_names.dictionary import Dictionary, Side
from lorasurgery.errors import MismatchError, UnsupportedError

Sizes = Mapping[str, tuple[int, int]]
_GIVE = "give --base, whose names tell"
TEXT: tuple[Part, ...] = ("te1", "te2", "te3")


@dataclass(frozen=True)
class ModuleRows:
    """Rows of a target module: those of a source module, or zeros where no source has them.

    Args:
        height: How many.
        source: The adapter's module path; None for zeros.
        start: The first of its rows.
    """

    height: int
    source: str | None = None
    start: int = 0

    @property
    def rows(self) -> slice:
        """The rows of the source."""
        return slice(self.start, self.start + self.height)


@dataclass(frozen=True)
class NewModule:
    """One module of the new file.

    Args:
        part: Of the model.
        path: Dotted, inside the part, in the new format's naming.
        pieces: From the first row to the last; neighbours of one source are put together.
    """

    part: Part
    path: str
    pieces: tuple[ModuleRows, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """The adapter's modules it is made of, each once."""
        return tuple(dict.fromkeys(p.source for p in self.pieces if p.source is not None))


@dataclass(frozen=True)
class _Known:
    """A module of the adapter, as the tables know it."""

    part: Part
    path: str
    atoms: tuple[str, ...]
    heights: tuple[int, ...]


class Translator:
    """The modules of one adapter by the names of another format.

    Examples:
        ```python
        Translator(adapter, "diffusers", Dictionary(base.tensors, pipeline=False)).targets(sizes)
        ```

    Args:
        adapter: Its module paths are translated.
        to: The new format.
        dictionary: The base's names, if one is given.
        home: The part that a PEFT adapter without prefixes is for; None is told from its names.
    """

    def __init__(
        self, adapter: Adapter, to: Format, dictionary: Dictionary | None = None, home: Part | None = None
    ) -> None:
        self.adapter, self.to, self.dictionary, self.home = adapter, to, dictionary, home
        paths = [*adapter.deltas, *(n.rpartition(".")[0] for n in (*adapter.diffs, *adapter.replaced))]
        self.places = {path: self._place(path) for path in dict.fromkeys(paths)}
        self._dialects: dict[Part, Dialect] = {}

    def targets(self, sizes: Sizes) -> list[NewModule]:
        """The new file's modules.

        Args:
            sizes: (rows, columns) of the updates to translate, by the adapter's module path.

        Raises:
            MismatchError: a module that the base does not have.
            UnsupportedError: names that only a base can tell.
        """
        held: dict[tuple[Part, str], ModuleRows] = {}
        for source, size in sizes.items():
            known, start = self._know(source, size), 0
            for atom, height in zip(known.atoms, known.heights, strict=True):
                if (known.part, atom) in held:
                    other = held[known.part, atom].source
                    raise MismatchError(f"{self.adapter.path}: {other} and {source} are the same module, {atom}")
                held[known.part, atom] = ModuleRows(height, source, start)
                start += height
        found: dict[tuple[Part, str], NewModule] = {}
        for part, atom in held:
            path = self._new_path(part, atom)
            if (part, path) not in found:
                pieces = [self._piece(held, part, a) for a in self.names(part).spell(path).atoms]
                found[part, path] = NewModule(part, path, _together(self._filled(part, path, pieces, held)))
        return list(found.values())

    def names(self, part: Part) -> Dialect:
        """The tables for a part of the model: the base's family, or the family that the adapter's own names tell."""
        if part not in self._dialects:
            side = self._side(part)
            own = [p.path for p in self.places.values() if p.part == part and p.dotted]
            self._dialects[part] = side.names if side else dialect("plain" if part != "denoiser" else family_of(own))
        return self._dialects[part]

    @property
    def family(self) -> Family:
        """Of the denoiser; of a base that has none, plain."""
        return self.names("denoiser").family

    @cached_property
    def new(self) -> NewNames:
        """The new file's way to name modules."""
        return NewNames(self.to, self.family, self.is_sdxl)

    @property
    def is_sdxl(self) -> bool:
        """Whether a U-Net is SDXL's: a second text encoder, several transformer blocks in a row, or its embedding."""
        side = self._side("denoiser")
        if side is not None:
            return any(m.startswith(("label_emb", "add_embedding")) for m in side.tensors)
        paths = [p.path for p in self.places.values() if p.part == "denoiser"]
        return any(p.part == "te2" for p in self.places.values()) or any("transformer_blocks.1." in p for p in paths)

    # The adapter's modules

    def _place(self, path: str) -> PartPath:
        found = self._at_home(path) or adapter_place(path)
        if found is None and self.home is not None:
            found = PartPath(self.home, path)
        if found is None:
            raise UnsupportedError(f"{self.adapter.path}: {path} {self._unknown(path)}")
        t5 = found.part == "te2" and found.path.startswith(("encoder.block.", "encoder_block_"))
        part: Part = "te3" if t5 else found.part
        if part == "any":
            part = self._part_of(found, path)
        path = found.path.removeprefix("text_model." if found.dotted else "text_model_")
        return PartPath(part, path if part != "denoiser" else found.path, found.dotted)

    def _at_home(self, path: str) -> PartPath | None:
        """The place of a module that the base has by this very name: no part of it is a prefix then."""
        if self.home is None or self.dictionary is None:
            return None
        place = PartPath(self.home, path)
        return place if self.dictionary.path_of(place) == path else None

    def _unknown(self, path: str) -> str:
        if path.startswith("first_stage_model."):
            return (
                f"is the VAE's, for which no {self.to} file has a place; extract with --exclude 'first_stage_model.*'"
            )
        unless = "" if self.dictionary else ", unless --base BASE tells more"
        return f"is of no image model that lorasurgery knows; only PEFT's format fits it{unless}"

    def _part_of(self, place: PartPath, path: str) -> Part:
        """LyCORIS's own prefix names no part: the one whose modules the base has, else the denoiser."""
        if self.dictionary is not None:
            for part, side in self.dictionary.sides.items():
                if part != "any" and self.dictionary.path_of(PartPath(part, place.path, place.dotted)) and side:
                    return part
        return "denoiser"

    def _know(self, source: str, size: tuple[int, int]) -> _Known:
        place = self.places[source]
        path = self._dotted(source, place)
        spelling = self.names(place.part).spell(path)
        if spelling.split == "wide-last" and size[1] == 1 and self.dictionary is None:
            raise UnsupportedError(
                f"{self.adapter.path}: {source} is a vector of several modules' rows; {_GIVE} how many"
            )
        side = self._side(place.part)
        known = [side.atoms.get(a) for a in spelling.atoms] if side else []
        found = [a.height for a in known if a]
        heights = found if known and len(found) == len(known) else spelling.heights(*size)
        if sum(heights) != size[0]:
            raise MismatchError(
                f"{self.adapter.path}: {source} is an update of {size[0]} rows but {path} has {sum(heights)}; is this "
                "the adapter's base model?"
            )
        return _Known(place.part, path, spelling.atoms, tuple(heights))

    def _dotted(self, source: str, place: PartPath) -> str:
        found = place.path if place.dotted else None
        if place.part in TEXT and (self.dictionary is None or place.part in self.lacking):
            found = found or text_path(place.path)
        elif self.dictionary is not None:
            found = self.dictionary.path_of(place)
            if found is None:
                hint = self.dictionary.hint(place)
                raise MismatchError(f"{self.adapter.path}: {source} matches no module of the base{hint}")
        if found is None:
            raise UnsupportedError(
                f"{self.adapter.path}: {source} has underscores where its model has dots or underscores; {_GIVE} them "
                "apart"
            )
        return found

    @cached_property
    def lacking(self) -> frozenset[Part]:
        """Text encoders that the base does not have; a Flux checkpoint is often the transformer alone."""
        places = self.places.values()
        if self.dictionary is None:
            return frozenset()
        return frozenset({p.part for p in places if p.part in TEXT} - {
            p.part for p in places if p.part in TEXT and self.dictionary.path_of(p)
        })  # fmt: skip

    def _side(self, part: Part) -> Side | None:
        if self.dictionary is None or part in self.lacking:
            return None
        sides = self.dictionary.sides
        return sides.get(part) or (sides.get("any") if part == "denoiser" or len(sides) == 1 else None)

    # The new file's modules

    def _new_path(self, part: Part, atom: str) -> str:
        """The module that holds an atom, in the new naming."""
        names = self.names(part)
        plain = atom.partition("#")[0]
        if part != "denoiser" or self.new.naming == "diffusers":
            return plain
        found = names.originals([atom])
        if len(found) > 1:
            return self._upsampler(part, atom, found)
        if not found and self.dictionary is None:
            raise UnsupportedError(
                f"{self.adapter.path}: the original's name of {atom} can't be told from it; {_GIVE} it"
            )
        return found.pop() if found else plain

    def _upsampler(self, part: Part, atom: str, found: set[str]) -> str:
        """The original numbers an upsampler after its level's attention, so whether there is one decides."""
        level = atom.partition(".upsamplers")[0]
        side = self._side(part)
        known = set(side.tensors) | set(side.atoms) if side else {p.path for p in self.places.values()}
        place = 2 if any(name.startswith(f"{level}.attentions.") for name in known) else 1
        return next(name for name in sorted(found) if name.endswith(f".{place}.conv"))

    def _piece(self, held: Mapping[tuple[Part, str], ModuleRows], part: Part, atom: str) -> ModuleRows | None:
        if (part, atom) in held:
            return held[part, atom]
        side = self._side(part)
        return ModuleRows(side.atoms[atom].height) if side and atom in side.atoms else None

    def _filled(
        self, part: Part, path: str, pieces: list[ModuleRows | None], held: Mapping[tuple[Part, str], ModuleRows]
    ) -> list[ModuleRows]:
        """Rows that no source has are zero; in a module of equal parts their height is that of the others."""
        even = self.names(part).spell(path).split == "even"
        height = next(p.height for p in pieces if p is not None)
        if any(p is None for p in pieces) and not even:
            raise UnsupportedError(
                f"{self.adapter.path}: {path} also holds modules that the adapter has no update for; {_GIVE} their size"
            )
        return [p or ModuleRows(height) for p in pieces]


def _together(pieces: list[ModuleRows]) -> tuple[ModuleRows, ...]:
    found: list[ModuleRows] = []
    for piece in pieces:
        last = found[-1] if found else None
        follows = last and last.source == piece.source and (piece.source is None or last.rows.stop == piece.start)
        if last and follows:
            found[-1] = ModuleRows(last.height + piece.height, last.source, last.start)
        else:
            found.append(piece)
    return tuple(found)


Naming = Literal["original", "diffusers"]
_KOHYA = {"denoiser": "lora_unet_", "te1": "lora_te1_", "te2": "lora_te2_", "te3": "lora_te3_"}
_COMFYUI = {
    "denoiser": "diffusion_model.",
    "te1": "text_encoders.clip_l.transformer.",
    "te2": "text_encoders.clip_g.transformer.",
    "te3": "text_encoders.t5xxl.transformer.",
}
_FOLDER = {"te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_2"}


@dataclass(frozen=True)
class NewNames:
    """The names of one format for one model.

    >>> NewNames("kohya", "unet", sdxl=True).name("te1", "encoder.layers.0.mlp.fc1")
    'lora_te1_text_model_encoder_layers_0_mlp_fc1'

    Args:
        to: The format.
        family: The denoiser's.
        sdxl: Whether a U-Net is SDXL's.
    """

    to: Format
    family: Family
    sdxl: bool = False

    @property
    def naming(self) -> Naming:
        """How the file names the denoiser: sd-scripts names SD 1 and 2 as diffusers does, all else originally."""
        if self.to in ("diffusers", "peft"):
            return "diffusers"
        return "original" if self.to == "comfyui" or self.family != "unet" or self.sdxl else "diffusers"

    def name(self, part: Part, path: str) -> str:
        """A module's whole name; sd-scripts numbers text encoders only where there are several."""
        clip = part in ("te1", "te2") and not path.startswith("text_projection")
        if self.to == "kohya":
            alone = part == "te1" and self.family == "unet" and not self.sdxl
            path = f"text_model.{path}" if clip else path
            return ("lora_te_" if alone else _KOHYA[part]) + path.replace(".", "_")
        if self.to == "comfyui":
            return _COMFYUI[part] + (f"text_model.{path}" if clip else path)
        if self.to == "diffusers" or self._has_projection(part):
            path = f"text_model.{path}" if clip else path
        return f"{self.folder(part)}.{path}"

    def folder(self, part: Part) -> str:
        """diffusers' name for a part, the folder it lies in; T5 is Flux's second encoder and SD3's third."""
        if part == "denoiser":
            return "unet" if self.family == "unet" else "transformer"
        return "text_encoder_3" if part == "te3" and self.family == "sd3" else _FOLDER[part]

    def _has_projection(self, part: Part) -> bool:
        """Whether a text encoder is a CLIPTextModelWithProjection, which alone kept `text_model` in transformers 5."""
        return part == "te2" or self.family == "sd3"

"""Block weights: strengths by a glob or a prefix of a module's path, or by block of SD's and SDXL's U-Net (LBW).

Facts: which numbers a list of 12, 17, 20 or 26 has, and that blocks without a number keep their strength, is
sd-scripts' (networks/svd_merge_lora.py at 48d368f, LAYER12 to LAYER26 and get_lbw_block_index); the presets' names and
numbers are those of hako-mikan's sd-webui-lora-block-weight (scripts/lora_block_weight.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lorasurgery.adapters.image_names.components import adapter_place, checkpoint_place
from lorasurgery.adapters.image_names.dialects import dialect
from lorasurgery.errors import UsageError, nearest

_IN, _OUT = [f"IN{i:02}" for i in range(12)], [f"OUT{i:02}" for i in range(12)]
LISTS: dict[int, tuple[str, ...]] = {
    12: ("BASE", *(_IN[i] for i in (4, 5, 7, 8)), "MID", *_OUT[:6]),
    17: ("BASE", *(_IN[i] for i in (1, 2, 4, 5, 7, 8)), "MID", *_OUT[3:]),
    20: ("BASE", *_IN[:9], "MID", *_OUT[:9]),
    26: ("BASE", *_IN, "MID", *_OUT),
}
_LENGTHS = {"SD": (17, 26), "SDXL": (12, 20)}
# For SD by the 17 blocks above. For SDXL, which the presets' author gives none for, the same halves of its 12 blocks:
# S is IN04-05 and OUT03-05, D is IN07-08 and OUT00-02.
_PRESETS = {
    "NONE": ("00000000000000000", "000000000000"), "ALL": ("11111111111111111", "111111111111"),
    "INS": ("11110000000000000", "111000000000"), "IND": ("10001110000000000", "100110000000"),
    "INALL": ("11111110000000000", "111110000000"), "MIDD": ("10001111111100000", "100111111000"),
    "OUTD": ("10000000111100000", "100000111000"), "OUTS": ("10000000000011111", "100000000111"),
    "OUTALL": ("10000000111111111", "100000111111"), "ALL0.5": ("", ""),
}  # fmt: skip
PRESETS = tuple(_PRESETS)
_LONGEST = 4096  # characters of one block weight
_LEVEL = re.compile(
    r"(?P<level>(?:down|up)_blocks[._]\d+)[._](?P<kind>resnets|attentions|downsamplers|upsamplers)[._](?P<n>\d+)"
)
_NUMBERED = re.compile(r"(?:^|[._])(?P<side>input|output)_blocks[._](?P<n>\d{1,6})(?:[._]|$)")
# What SD 1 and 2 have and SDXL has not, and the other way about.
_SD_ONLY = re.compile(
    r"(?:down|up)_blocks[._]3[._]|(?:input|output)_blocks[._](?:9|10|11)[._]|down_blocks[._]0[._]attentions"
)
_SDXL_ONLY = re.compile(r"transformer_blocks[._][1-9]|label_emb|add_embedding")


@dataclass(frozen=True)
class BlockWeight:
    """One --block-weight as it was given.

    Args:
        adapter: The number of the adapter it is for, from 1; 0 is all.
        pattern: A glob or a prefix; empty for a preset or a list.
        weight: Its strength.
        numbers: Of a list, in its order; empty for a preset.
        preset: Its name.
    """

    given: str
    adapter: int = 0
    pattern: str = ""
    weight: float = 1.0
    numbers: tuple[float, ...] = ()
    preset: str = ""


def parse_block_weight(text: str) -> BlockWeight:
    """Read `[N:]PATTERN=W`, `[N:]PRESET` or `[N:]W,W,…`.

    >>> parse_block_weight("2:lora_unet_down_*=0.5").adapter, parse_block_weight("MIDD").preset
    (2, 'MIDD')

    Raises:
        UsageError: none of them, or a list of no known length.
    """
    match = re.fullmatch(r"(?:(\d{1,9}):)?(.+)", text.strip())
    number, rest = (int(match[1] or 0), match[2]) if match else (0, "")
    if len(text) > _LONGEST:
        raise UsageError(f"--block-weight: {len(text):,} characters are more than any name of a module has")
    if match and match[1] and not number:
        raise UsageError(f"--block-weight {text}: adapters are counted from 1")
    if "=" in rest:
        pattern, _, value = rest.rpartition("=")
        return BlockWeight(text, number, pattern.strip(), _number(value, text))
    if rest.upper() in _PRESETS:
        return BlockWeight(text, number, preset=rest.upper())
    if "," not in rest:
        raise UsageError(
            f"--block-weight {text}: expected PATTERN=W, numbers with commas, or one of {', '.join(PRESETS)}"
            + nearest(rest.upper(), PRESETS)
        )
    numbers = tuple(_number(part, text) for part in rest.split(","))
    if len(numbers) not in LISTS:
        raise UsageError(f"--block-weight: {len(numbers)} numbers; SD takes 17 or 26, SDXL 12 or 20")
    return BlockWeight(text, number, numbers=numbers)


def _number(text: str, given: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"--block-weight {given}: {text.strip()!r} is not a finite number")
    return value


def names_of(path: str, tensor: str = "", *, pipeline: bool = False) -> tuple[str, ...]:
    """Every name that a pattern may call a module by: the file's and the base's, with and without the part's prefix.

    >>> names_of("lora_unet_mid_block_proj", "model.diffusion_model.middle_block.proj")
    ('lora_unet_mid_block_proj', 'mid_block_proj', 'model.diffusion_model.middle_block.proj', 'middle_block.proj')
    """
    place = adapter_place(path)
    found = [path, place.path if place else path]
    if tensor:
        found += [tensor, tensor.removeprefix(checkpoint_place(tensor, pipeline=pipeline)[1])]
    return tuple(dict.fromkeys(found))


def block_of(names: Collection[str]) -> str:
    """The block of a U-Net, by its original number, that a module of these names lies in; empty when in none.

    >>> block_of(["lora_unet_down_blocks_1_attentions_0_proj_in"]), block_of(["unet.mid_block.resnets.0.conv1"])
    ('IN04', 'MID')
    >>> block_of(["lora_te_text_model_encoder_layers_0_mlp_fc1"]), block_of(["output_blocks.3.1.proj_in"])
    ('BASE', 'OUT03')
    """
    for name in names:
        place = adapter_place(name)
        if place is not None and place.part in ("te1", "te2", "te3"):
            return "BASE"
        if re.search(r"(?:^|[._])(?:mid_block|middle_block)(?:[._]|$)", name):
            return "MID"
        numbered = _NUMBERED.search(_original(name))
        if numbered:
            return f"{'IN' if numbered['side'] == 'input' else 'OUT'}{int(numbered['n']):02}"
    return ""


def _original(name: str) -> str:
    """The start of a module's original name, where diffusers' says a level: the table of names translates."""
    match = _LEVEL.search(name)
    if match is None:
        return "input_blocks.0.0" if re.search(r"(?:^|[._])conv_in$", name) else name
    leaf = {"attentions": ".norm", "resnets": ".conv1"}.get(match["kind"], ".conv")
    level = re.sub(r"_(\d+)$", r".\1", match["level"])
    found = dialect("unet").originals([f"{level}.{match['kind']}.{match['n']}{leaf}"])
    return min(found, default=name)


def model_of(names: Iterable[str]) -> str:
    """SD, SDXL, `U-Net` where both fit, or empty for other models."""
    known = list(names)
    if not any(block_of([n]) not in ("", "BASE") for n in known):
        return ""
    sdxl = any(_SDXL_ONLY.search(n) or n.startswith(("lora_te2_", "text_encoder_2.")) for n in known)
    return "SDXL" if sdxl else "SD" if any(_SD_ONLY.search(n) for n in known) else "U-Net"


class BlockWeights:
    """All block weights for one adapter, ready to say a module's.

    Examples:
        ```python
        BlockWeights([parse_block_weight("lora_unet_mid_*=0")], 1, modules).of(names_of("lora_unet_mid_block_proj"))
        ```

    Args:
        given: In the order of the command line.
        number: Of the adapter, from 1.
        modules: The names of each of its modules.

    Raises:
        UsageError: a list or preset that does not fit the model, or several of them.
    """

    def __init__(self, given: Sequence[BlockWeight], number: int, modules: Sequence[Sequence[str]]) -> None:
        mine = [g for g in given if g.adapter in (0, number)]
        self.patterns = [g for g in mine if g.pattern]
        lists = [g for g in mine if not g.pattern]
        if len(lists) > 1:
            raise UsageError(f"--block-weight {lists[1].given}: one list or preset for an adapter, not two")
        self.blocks = _blocks(lists[0], model_of(n for names in modules for n in names)) if lists else {}

    def of(self, names: Sequence[str]) -> float:
        """A module's strength: that of the most specific pattern, else its block's, else 1."""
        meant = [(_literal(g.pattern), i, g.weight) for i, g in enumerate(self.patterns) if means(g.pattern, names)]
        if meant:
            return max(meant)[2]
        return self.blocks.get(block_of(names), 1.0) if self.blocks else 1.0


def means(pattern: str, names: Sequence[str]) -> bool:
    """Whether a glob is one of a module's names, or a prefix that ends where a part of the path ends.

    >>> means("layers.1", ["layers.1.q"]), means("layers.1", ["layers.10.q"]), means("*.q", ["layers.10.q"])
    (True, False, True)
    >>> means("input_blocks.4*", ["input_blocks_4_1_proj_in"])
    True
    """
    for name in names:
        asked = pattern if "." in name else pattern.replace(".", "_")
        if any(c in asked for c in "*?["):
            if fnmatchcase(name, asked):
                return True
        elif name == asked or (name.startswith(asked) and (asked[-1] in "._" or name[len(asked)] in "._")):
            return True
    return False


def _literal(pattern: str) -> int:
    """How much of a pattern is not a wildcard: the more, the more specific."""
    return len(re.sub(r"\[[^]]*\]|[*?]", "", pattern))


def _blocks(given: BlockWeight, model: str) -> dict[str, float]:
    """Strength by block, of a preset or a list."""
    if not model:
        raise UsageError(
            f"--block-weight {given.given}: the adapter has no blocks of SD's or SDXL's U-Net; give PATTERN=W"
        )
    numbers = given.numbers or _preset(given.preset, model)
    fitting = _LENGTHS.get(model, tuple(LISTS))
    if len(numbers) not in fitting:
        raise UsageError(
            f"--block-weight: {len(numbers)} numbers, but {model} takes {' or '.join(map(str, fitting))} "
            f"({', '.join(LISTS[fitting[0]])} …)"
        )
    return dict(zip(LISTS[len(numbers)], numbers, strict=True))


def _preset(name: str, model: str) -> tuple[float, ...]:
    if name == "ALL0.5":
        return (0.5,) * (12 if model == "SDXL" else 17)
    return tuple(float(digit) for digit in _PRESETS[name][model == "SDXL"])


def check_patterns(given: Sequence[BlockWeight], modules: Sequence[Sequence[Sequence[str]]]) -> None:
    """See that every pattern means a module of an adapter it is for.

    Args:
        modules: For each adapter, the names of each module.

    Raises:
        UsageError: with the nearest names; or for an adapter that was not given.
    """
    for item in given:
        if item.adapter > len(modules):
            raise UsageError(
                f"--block-weight {item.given}: there are {len(modules)} adapters, so none is number {item.adapter}"
            )
        if not item.pattern:
            continue
        asked = modules[item.adapter - 1 : item.adapter] if item.adapter else modules
        known = [names for one in asked for names in one]
        if not any(means(item.pattern, names) for names in known):
            every = {n for names in known for n in names}
            stem = re.sub(r"[*?].*", "", item.pattern.lstrip("*.")) or item.pattern
            raise UsageError(
                f"--block-weight {item.given}: matches no module"
                + (nearest(stem, every) or nearest(stem, {n.rpartition(".")[2] for n in every}))
            )

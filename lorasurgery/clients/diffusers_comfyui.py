"""What diffusers 0.42.1 and ComfyUI reject, get wrong or drop of an image model's adapter.

Each of diffusers' rules is run in tests/ops/test_check.py; ComfyUI's were read in the files that docs/formats.md names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from lorasurgery.adapters.adapter import Adapter, Delta
from lorasurgery.adapters.image_names.components import Part, adapter_place, beside_denoiser, class_of, takes_adapters
from lorasurgery.adapters.magnitude import LycorisMagnitude, PeftMagnitude
from lorasurgery.clients.issue import MERGE, TO_DIFFUSERS, TO_KOHYA, Issue, Rule, Setting, briefly

Model = Literal["unet", "flux", "sd3", "wan", "other"]
_MODELS: tuple[tuple[Model, str], ...] = (
    ("unet", r"(?:^|[._])(?:input_blocks|output_blocks|middle_block|down_blocks|up_blocks|mid_block)(?:[._]|$)"),
    ("flux", r"(?:^|[._])(?:double_blocks|single_blocks|single_transformer_blocks)[._]"),
    ("sd3", r"(?:^|[._])joint_blocks[._]"),
    ("wan", r"(?:^|[._])blocks[._]\d+[._](?:self_attn|cross_attn|attn1|attn2|ffn)"),
)
_NAMED = re.compile(r"\.lora_[AB]\.[^.]+\.weight$")
# U-Nets' attention under diffusers' names, which ComfyUI knows only with `processor.` in front of them.
_ATTENTION = re.compile(r"\.to_(?:q|k|v|out\.0)$")


def model_of(adapter: Adapter) -> Model:
    """The family of image models that an adapter's names belong to.

    Wan and U-Nets of diffusers, kohya and the original authors have different names, and each tells.
    """
    paths = list(adapter.deltas) + list(adapter.diffs) + list(adapter.replaced)
    for model, pattern in _MODELS:
        if any(re.search(pattern, path) for path in paths):
            return model
    return "other"


def _part(path: str) -> Part | None:
    place = adapter_place(path)
    return place.part if place else None


def _diffusers_folder(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """load_lora_weights reads one file, whose keys begin with the part's name."""
    if adapter.format == "peft":
        yield Issue(
            "rejected", "a PEFT folder, where one file with the part's name in its keys is expected", TO_DIFFUSERS
        )


def _diffusers_class(adapter: Adapter, setting: Setting) -> Iterator[Issue]:
    """Models whose class has no load_lora_adapter: most VAEs, and denoisers that no pipeline adapts."""
    name = class_of(setting.base.config) if setting.base else ""
    if name and not takes_adapters(name):
        yield Issue("rejected", f"the base is {name}, which has no load_lora_adapter", MERGE)


def _comfyui_class(adapter: Adapter, setting: Setting) -> Iterator[Issue]:
    """LoraLoader patches the denoiser and the text encoders, and nothing beside them."""
    name = class_of(setting.base.config) if setting.base else ""
    if name and beside_denoiser(name):
        yield Issue("dropped", f"the base is {name}, {beside_denoiser(name)}, which is not patched", MERGE)


def _diffusers_prefix(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """Keys that do not begin with a part's name are passed over, unless the model's converter knows them."""
    model = model_of(adapter)
    if adapter.format == "comfyui" and model in ("unet", "flux", "sd3"):
        yield Issue(
            "dropped", f"the original's names are not translated for this model ({_first(adapter)})", TO_DIFFUSERS
        )
    if adapter.format == "kohya" and model == "sd3":
        yield Issue("dropped", f"kohya's names are not translated for this model ({_first(adapter)})", TO_DIFFUSERS)
    if adapter.format == "kohya" and model == "unet" and any(p.startswith("lycoris_") for p in adapter.deltas):
        yield Issue(
            "dropped", f"LyCORIS's own names are not translated for this model ({_first(adapter)})", TO_DIFFUSERS
        )
    named = [k for k in adapter.weights.tensors if _NAMED.search(k)]
    if adapter.format == "diffusers" and named:
        yield Issue("dropped", f"keys that carry the adapter's name ({briefly(named)}) are not loaded", TO_DIFFUSERS)


def _diffusers_forms(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """What is not lora_A and lora_B: DoRA of kohya's files, LyCORIS's products and whole differences."""
    if adapter.format == "peft":
        return
    dora = [d.path for d in adapter.deltas.values() if isinstance(d.magnitude, LycorisMagnitude)]
    if dora:
        yield Issue("wrong", f"dora_scale is filtered out ({briefly(dora)}), so plain LoRA runs", MERGE)
    flat = [d.path for d in adapter.deltas.values() if _flat_magnitude(d)]
    if flat:
        yield Issue(
            "rejected",
            f"a convolution's lora_magnitude_vector that is no (1, out, 1, 1) ({briefly(flat)})",
            MERGE,
        )
    special = {d.special for d in adapter.deltas.values() if d.special}
    for what in sorted(special):
        paths = [p for p, d in adapter.deltas.items() if d.special == what]
        yield Issue("rejected", f"{what} ({briefly(paths)})", TO_DIFFUSERS)


def _diffusers_vectors(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """Differences of norms and biases; Flux's converter leaves biases out, the others stop."""
    if adapter.format == "peft":
        return
    keys = [*adapter.diffs.values(), *adapter.replaced.values()]
    flux = model_of(adapter) == "flux"
    left = [k for k in keys if flux and (k.endswith(".diff_b") or adapter.format == "diffusers")]
    if left:
        yield Issue("dropped", f"differences or values of vectors ({briefly(left)})", MERGE)
    if len(left) < len(keys):
        rest = briefly([k for k in keys if k not in left])
        yield Issue("rejected", f"differences or values of vectors ({rest})", MERGE)


def _diffusers_alpha(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """alpha has one place in each kind of file: a tensor in kohya's, the header in diffusers'."""
    tensors = [k for k in adapter.weights.tensors if k.endswith(".alpha")]
    plain = "alpha" in adapter.metadata and adapter.format == "diffusers" and not adapter.config
    if plain and any(d.scale != 1 for d in adapter.deltas.values()):
        yield Issue("wrong", "the header's plain alpha is ignored", TO_DIFFUSERS)
    if adapter.format == "diffusers" and tensors and (model_of(adapter) != "flux" or adapter.config):
        yield Issue("rejected", f"alpha tensors beside lora_A and lora_B ({briefly(tensors)})", TO_DIFFUSERS)


def _diffusers_alphas(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """U-Nets' files: alphas by module are looked up under names that no module has, so the commonest holds for all."""
    if adapter.format != "kohya" or model_of(adapter) != "unet":
        return
    alphas: dict[Part | None, set[float | None]] = {}
    for path, delta in adapter.deltas.items():
        if delta.stores_factors:
            told = f"{path}.alpha" in adapter.weights.tensors
            alphas.setdefault(_part(path), set()).add(delta.alpha if told else None)
    if any(len(found) > 1 for found in alphas.values()):
        yield Issue("wrong", "alphas differ from module to module: the commonest is taken for all", TO_DIFFUSERS)


def _diffusers_wan(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """Wan's converter for kohya's names asks every block for one set of modules, with alphas, and for no other."""
    if adapter.format != "kohya" or model_of(adapter) != "wan":
        return
    leaves = [f"{a}_{p}" for a in ("self_attn", "cross_attn") for p in "qkvo"] + ["ffn_0", "ffn_2"]
    if any("k_img" in p for p in adapter.deltas) and any("v_img" in p for p in adapter.deltas):
        leaves += ["cross_attn_k_img", "cross_attn_v_img"]
    blocks = {m[1] for p in adapter.deltas if (m := re.search(r"blocks_(\d+)_", p))}
    asked = {f"lora_unet_blocks_{b}_{leaf}" for b in range(len(blocks)) for leaf in leaves}
    alphas = all(f"{p}.alpha" in adapter.weights.tensors for p in adapter.deltas)
    if asked != set(adapter.deltas) or not alphas:
        yield Issue("rejected", "Wan under kohya's names, but not all of each block with alphas, or more", TO_DIFFUSERS)


def _flat_magnitude(delta: Delta) -> bool:
    if not delta.kernel or not isinstance(delta.magnitude, PeftMagnitude):
        return False
    return len(delta.magnitude.shape) != 2 + len(delta.kernel)


def _diffusers_text(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """Of text encoders only CLIP's take part: T5 is never adapted."""
    parts: set[Part] = {"te3"} if model_of(adapter) == "unet" else {"te2", "te3"}
    if model_of(adapter) == "sd3":
        parts = {"te3"}
    paths = [p for p in adapter.deltas if _part(p) in parts]
    if paths and adapter.format != "peft":
        yield Issue("dropped", f"text encoders that diffusers does not adapt ({briefly(paths)})", MERGE)


def _comfyui_folder(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """One file is read, adapter_config.json never; most models have no `base_model.model.` in their table of names."""
    if adapter.format == "peft":
        yield Issue("rejected", "a PEFT folder, where one file is read and the config is not", TO_KOHYA)


def _comfyui_alpha(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """comfy/lora.py, load_lora: alpha is a tensor or there is none; the header is not looked at."""
    if adapter.format == "peft":
        return
    stored = {k.removesuffix(".alpha") for k in adapter.weights.tensors if k.endswith(".alpha")}
    unseen = [p for p, d in adapter.deltas.items() if d.scale != 1 and p not in stored]
    if unseen:
        what = f"alpha of {briefly(unseen)} is in the header only, which is not read"
        yield Issue("wrong", f"{what}: strength 1 means {_scale(adapter, unseen)}", TO_KOHYA)


def _comfyui_names(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """comfy/lora.py, model_lora_keys_unet and model_lora_keys_clip: the names each model knows."""
    paths = list(adapter.deltas)
    if adapter.format == "diffusers" and model_of(adapter) == "unet":
        lost = [p for p in paths if p.startswith("unet.") and _ATTENTION.search(p) and not _old(adapter, p)]
        if lost:
            yield Issue("dropped", f"attention under diffusers' names ({briefly(lost)})", TO_KOHYA)
    text = [p for p in paths if p.startswith("text_encoder") and ".text_model.encoder." not in p]
    if adapter.format == "diffusers" and text:
        yield Issue("dropped", f"text encoder keys without text_model ({briefly(text)})", TO_KOHYA)
    third = [p for p in paths if p.startswith("text_encoder_3.")]
    if third:
        yield Issue("dropped", f"text_encoder_3 ({briefly(third)})", TO_KOHYA)


def _comfyui_parts(adapter: Adapter, _: Setting) -> Iterator[Issue]:
    """Tensors that no class in comfy/weight_adapter asks for, and DoRA by another norm than it was trained with."""
    if adapter.format == "peft":
        return
    bias = [d.path for d in adapter.deltas.values() if d.bias and d.bias.endswith(".lora_B.bias")]
    if bias:
        yield Issue("dropped", f"lora_B.bias ({briefly(bias)})", TO_KOHYA)
    magnitude = [d.path for d in adapter.deltas.values() if isinstance(d.magnitude, PeftMagnitude)]
    if magnitude:
        yield Issue("dropped", f"lora_magnitude_vector ({briefly(magnitude)}), so plain LoRA runs", MERGE)
    rows = [d.path for d in adapter.deltas.values() if d.magnitude and not d.magnitude.by_input]
    if rows and not magnitude:
        yield Issue(
            "wrong",
            f"DoRA on the output axis ({briefly(rows)}) is divided by the base's norm, not the sum's",
            MERGE,
        )
    if any(k.endswith(".lokr_t1") for k in adapter.weights.tensors):
        yield Issue("rejected", "LoKr whose first side has a core (lokr_t1)", TO_KOHYA)


def _old(adapter: Adapter, path: str) -> bool:
    """Keys as diffusers wrote them before PEFT (`processor.to_q_lora.up.weight`), which ComfyUI knows."""
    return "_lora." in adapter.deltas[path].names[0]


def _scale(adapter: Adapter, paths: list[str]) -> str:
    return f"{1 / adapter.deltas[paths[0]].scale:.3g} times the update" if adapter.deltas[paths[0]].scale else "more"


def _first(adapter: Adapter) -> str:
    return briefly(list(adapter.deltas) or list(adapter.diffs) or list(adapter.replaced))


DIFFUSERS: tuple[Rule, ...] = (
    _diffusers_folder, _diffusers_class, _diffusers_prefix, _diffusers_forms, _diffusers_vectors, _diffusers_alpha,
    _diffusers_alphas, _diffusers_text, _diffusers_wan,
)  # fmt: skip
COMFYUI: tuple[Rule, ...] = (_comfyui_folder, _comfyui_class, _comfyui_alpha, _comfyui_names, _comfyui_parts)

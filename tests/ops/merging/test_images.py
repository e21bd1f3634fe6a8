"""Adapters of image models merged into pipelines and single files, against diffusers and the dense formula."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import images
import pytest
import spellings
import torch
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from worlds import PARTS, World, fuse

from lorasurgery.ops.merge import merge

Weights = dict[str, Tensor]
KINDS = list(PARTS)


def parts(folder: Path) -> dict[str, Weights]:
    """The weights of every part of a diffusers folder."""
    return {d.name: load_file(f) for d in folder.iterdir() if d.is_dir() for f in d.glob("*.safetensors")}


def close(found: Weights, wanted: Weights, atol: float = 1e-6) -> None:
    """All tensors of `found` are those of `wanted`."""
    assert found.keys() <= wanted.keys()
    assert [k for k in found if not torch.allclose(found[k], wanted[k], rtol=0, atol=atol)] == []


def changed(found: Weights, base: Weights) -> int:
    """How many tensors differ."""
    return sum(not torch.equal(found[k], base[k]) for k in base)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kohya_file_merges_into_a_pipeline_as_diffusers_fuses_it(
    kind: str, worlds: Callable[[str], World], tmp_path: Path
) -> None:
    """U-Net or transformer and text encoders of one file go to their folders; every tensor is diffusers'."""
    world = worlds(kind)
    merge(world.base, [world.kohya], tmp_path / "merged")
    before, merged = parts(world.base), parts(tmp_path / "merged")
    for part in PARTS[kind]:
        close(merged[part], world.fused[part])
        assert changed(merged[part], before[part]) == changed(
            {k: world.fused[part][k] for k in before[part]}, before[part]
        )
        assert changed(merged[part], before[part]) > 0
    assert changed(merged["vae"], before["vae"]) == 0


def parts_of_single(kind: str, file: Path) -> dict[str, Weights]:
    """A single file's parts by diffusers' names, through diffusers' own converters."""
    weights = load_file(file)

    def inside(prefix: str) -> Weights:
        return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}

    found = {PARTS[kind][0]: images.diffusers_names(kind, inside("model.diffusion_model."))}
    first = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}.get(kind)
    if first:
        found["text_encoder"] = {k.removeprefix("text_model."): v for k, v in inside(first).items()}
    if kind == "sdxl":
        second = convert_open_clip_checkpoint(images.text_encoder(True), weights, "conditioner.embedders.1.model.")
        found["text_encoder_2"] = {k.removeprefix("text_model."): v for k, v in second.items()}
    return found


def without_text_model(weights: Weights) -> Weights:
    """CLIP's tensors without the prefix that transformers 5 has given up."""
    return {k.removeprefix("text_model."): v for k, v in weights.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kohya_file_merges_into_a_single_file_as_diffusers_fuses_it(
    kind: str, worlds: Callable[[str], World], tmp_path: Path
) -> None:
    """The same into the original's one file, which diffusers' converters then turn into the fused parts.

    Flux's file has no text encoder, so its adapter is taken without one.
    """
    world, file = worlds(kind), worlds(kind).kohya
    if kind == "flux":
        weights = {k: v for k, v in load_file(file).items() if k.startswith("lora_unet_")}
        file = spellings.save(weights, tmp_path / "transformer.safetensors")
    merge(world.single, [file], tmp_path / "merged.safetensors")
    merged, before = (parts_of_single(kind, f) for f in (tmp_path / "merged.safetensors", world.single))
    for part, weights in merged.items():
        close(weights, without_text_model(world.fused[part]))
        assert changed(weights, before[part]) > 0


def test_what_diffusers_leaves_out_of_a_kohya_flux_file_is_the_dense_formula(
    worlds: Callable[[str], World], tmp_path: Path
) -> None:
    """Embedders, final layer and its modulation, which diffusers 0.42.1 ignores with a warning, are W + ½·up @ down."""
    world, pieces = worlds("flux"), spellings.native("flux", lambda _: True)
    file = spellings.save(spellings.kohya(pieces, "lora_unet_"), tmp_path / "all.safetensors")
    wanted = images.original(images.denoiser("flux"))
    for name, one in pieces.items():
        wanted[f"{name}.weight"] = wanted[f"{name}.weight"] + one.delta
    merge(world.base, [file], tmp_path / "merged")
    close(parts(tmp_path / "merged")["transformer"], images.diffusers_names("flux", wanted))
    merge(world.single, [file], tmp_path / "merged.safetensors")
    close({f"model.diffusion_model.{k}": v for k, v in wanted.items()}, load_file(tmp_path / "merged.safetensors"))


# Other spellings of the same


def everything(_: str) -> bool:
    """All matrices."""
    return True


def attention(name: str) -> bool:
    """Attention's projections, all that the oldest files hold."""
    return name.endswith(("to_q", "to_k", "to_v", "to_out.0"))


def streams(name: str) -> bool:
    """Attention of Flux's double blocks."""
    return name.startswith("double_blocks") and name.endswith(("attn.qkv", "attn.proj"))


Spelling = Callable[[spellings.Pieces], dict[str, Tensor]]
SPELLINGS: dict[str, tuple[str, Callable[[str], bool], Spelling, str]] = {
    "diffusers with alpha in the header": ("sdxl", everything, lambda p: spellings.keys(spellings.split(p), "unet."), "unet"),
    "diffusers with the scale in the factors":
        ("sdxl", everything, lambda p: spellings.keys(spellings.split(p), "unet.", baked=True), ""),
    "an adapter name left in the keys":
        ("sdxl", everything, lambda p: spellings.keys(spellings.split(p), "unet.", baked=True, down="lora_A.default.weight",
                                                      up="lora_B.default.weight"), ""),
    "diffusers' attention processors": ("sdxl", attention, lambda p: spellings.processors(spellings.split(p)), ""),
    "lora.down": ("sdxl", everything, lambda p: spellings.keys(spellings.split(p), "unet.", baked=True,
                                                               down="lora.down.weight", up="lora.up.weight"), ""),
    "lora_linear_layer":
        ("sdxl", everything, lambda p: spellings.keys(spellings.split(p), "unet.", baked=True,
                                                      down="lora_linear_layer.down.weight",
                                                      up="lora_linear_layer.up.weight"), ""),
    "kohya's keys with diffusers' names": ("sdxl", everything, lambda p: spellings.kohya(spellings.split(p), "lora_unet_"), ""),
    "ComfyUI": ("sdxl", everything, lambda p: spellings.keys(p, "diffusion_model.", alpha=True), ""),
    "the checkpoint's own names": ("sdxl", everything, lambda p: spellings.keys(p, "model.diffusion_model.", alpha=True), ""),
    "SimpleTuner": ("sdxl", everything, lambda p: spellings.kohya(spellings.split(p), "lycoris_"), ""),
    "Flux, diffusers": ("flux", everything, lambda p: spellings.keys(spellings.split(p), "transformer."), "transformer"),
    "Flux, ComfyUI": ("flux", everything, lambda p: spellings.keys(p, "diffusion_model.", alpha=True), ""),
    "Flux, BFL's bare names": ("flux", everything, lambda p: spellings.keys(p, baked=True), ""),
    "Flux, diffusers' bare names": ("flux", everything, lambda p: spellings.keys(spellings.split(p), baked=True), ""),
    "Flux, OneTrainer": ("flux", everything, lambda p: spellings.kohya(spellings.split(p), "lora_transformer_"), ""),
    "Flux, SimpleTuner": ("flux", everything, lambda p: spellings.kohya(spellings.split(p), "lycoris_"), ""),
    "Flux, XLabs": ("flux", streams, spellings.xlabs, ""),
    "Wan, ComfyUI": ("wan", everything, lambda p: spellings.keys(p, "diffusion_model.", alpha=True), ""),
    "Wan, diffusers": ("wan", everything, lambda p: spellings.keys(spellings.split(p), "transformer."), "transformer"),
    "Wan-Fun": ("wan", everything, lambda p: spellings.kohya(p, "lora_unet__"), ""),
    "SD3, diffusers": ("sd3", everything, lambda p: spellings.keys(spellings.split(p), "transformer."), "transformer"),
    "SD3, ComfyUI": ("sd3", everything, lambda p: spellings.keys(p, "diffusion_model.", alpha=True), ""),
    "HunyuanVideo, diffusers": ("hunyuan", everything, lambda p: spellings.keys(spellings.split(p), "transformer."), "transformer"),
    "HunyuanVideo, ComfyUI": ("hunyuan", everything, lambda p: spellings.keys(p, "diffusion_model.", alpha=True), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_merges_to_the_weights_of_the_kohya_file(name: str, tmp_path: Path) -> None:
    """Into diffusers' folder and the original's file alike, ½·up @ down is added, under whatever names it comes."""
    kind, only, spell, part = SPELLINGS[name]
    pieces, model = spellings.native(kind, only), images.denoiser(kind)
    metadata = spellings.header(part) if part else None
    file = spellings.save(spell(pieces), tmp_path / "adapter.safetensors", metadata)
    wanted = images.original(model)
    bare = spellings.save(wanted, tmp_path / "bare.safetensors")
    images.quiet(model.save_pretrained, tmp_path / "folder")
    for path, one in pieces.items():
        wanted[f"{path}.weight"] = wanted[f"{path}.weight"] + one.delta
    merge(bare, [file], tmp_path / "merged.safetensors")
    close(wanted, load_file(tmp_path / "merged.safetensors"))
    report = merge(tmp_path / "folder", [file], tmp_path / "merged")
    close(load_file(tmp_path / "merged/diffusion_pytorch_model.safetensors"), images.diffusers_names(kind, wanted))
    assert report.totals["adapter_tensors_matched"] >= len(pieces)


def spelt(worlds: Callable[[str], World], spelling: str, file: Path) -> Path:
    """SDXL's kohya file, text encoders included, in another spelling."""
    found: dict[str, Tensor] = {}
    for key, value in load_file(worlds("sdxl").kohya).items():
        path, _, leaf = key.partition(".")
        prefix = path[:9]
        if prefix in ("lora_te1_", "lora_te2_"):
            found[CLIP[spelling](prefix, path[9:], leaf)] = value
    return spellings.save({k: v for k, v in found.items() if k}, file)


def dotted(path: str) -> str:
    """CLIP's names with their dots."""
    for name in ("text_model", "encoder", "layers", "0", "1", "self_attn", "mlp"):
        path = path.replace(f"{name}_", f"{name}.", 1)
    return path


FOLDER = {"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
COMFY = {"lora_te1_": "text_encoders.clip_l.transformer", "lora_te2_": "text_encoders.clip_g.transformer"}
OLD = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def old(prefix: str, path: str, leaf: str) -> str:
    """diffusers' text encoders before PEFT; of attention the names were those of the U-Net, and no `processor`."""
    block, _, name = dotted(path).rpartition(".")
    side = leaf.removeprefix("lora_")
    if leaf == "alpha" or name not in OLD:
        return f"{FOLDER[prefix]}.{block}.{name}.{'alpha' if leaf == 'alpha' else 'lora_linear_layer.' + side}"
    return f"{FOLDER[prefix]}.{block}.{OLD[name]}_lora.{side}"


PEFT_LEAF = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "alpha": "alpha"}
CLIP: dict[str, Callable[[str, str, str], str]] = {
    "diffusers": lambda p, path, leaf: f"{FOLDER[p]}.{dotted(path)}.{PEFT_LEAF[leaf]}",
    "diffusers, transformers 5": lambda p, path, leaf: f"{FOLDER[p]}.{dotted(path)[11:]}.{PEFT_LEAF[leaf]}",
    "diffusers before PEFT": old,
    "ComfyUI": lambda p, path, leaf: f"{COMFY[p]}.{dotted(path)}.{leaf}",
}  # fmt: skip


@pytest.mark.parametrize("spelling", CLIP)
def test_text_encoders_in_every_spelling(spelling: str, worlds: Callable[[str], World], tmp_path: Path) -> None:
    """SDXL's two text encoders under each of their names are what diffusers fuses from kohya's."""
    world, file = worlds("sdxl"), spelt(worlds, spelling, tmp_path / "adapter.safetensors")
    merge(world.base, [file], tmp_path / "merged")
    merge(world.single, [file], tmp_path / "merged.safetensors")
    folder, single = parts(tmp_path / "merged"), parts_of_single("sdxl", tmp_path / "merged.safetensors")
    for part in ("text_encoder", "text_encoder_2"):
        close(folder[part], world.fused[part])
        close(single[part], without_text_model(world.fused[part]))


def loaded(world: World) -> object:
    """A pipeline with the kohya file loaded, not fused."""
    pipe = images.pipeline(world.kind)
    images.quiet(pipe.load_lora_weights, str(world.kohya), adapter_name="default")  # type: ignore[attr-defined]
    return pipe


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_what_diffusers_itself_saves_merges_to_the_same(
    kind: str, worlds: Callable[[str], World], tmp_path: Path
) -> None:
    """save_lora_weights, with and without its metadata, and save_lora_adapter of the U-Net alone."""
    world = worlds(kind)
    pipe = loaded(world)
    held = {p: getattr(pipe, p) for p in PARTS[kind]}
    layers = {f"{p}_lora_layers": get_peft_model_state_dict(m) for p, m in held.items()}
    metadata = _collate_lora_metadata(held)
    pipe.save_lora_weights(tmp_path / "whole", **layers, **metadata)  # type: ignore[attr-defined]
    merge(world.base, [tmp_path / "whole"], tmp_path / "merged")
    for part in PARTS[kind]:
        close(parts(tmp_path / "merged")[part], world.fused[part])
    held["unet"].save_lora_adapter(tmp_path / "unet")
    for base, name in ((world.base, "merged-unet"), (world.base / "unet", "merged-part")):
        merge(base, [tmp_path / "unet"], tmp_path / name)
        found = parts(tmp_path / name)["unet"] if base == world.base else load_file(tmp_path / name / UNET)
        close(found, world.fused["unet"])


UNET = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_a_peft_folder_of_one_component(kind: str, worlds: Callable[[str], World], tmp_path: Path) -> None:
    """PEFT's folder of a U-Net or transformer merges into that part's folder, the pipeline and the single file alike."""
    world, part = worlds(kind), PARTS[kind][0]
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_out", "proj_mlp"],
                        init_lora_weights=False)  # fmt: skip
    model = get_peft_model(images.denoiser(kind), config)
    model.save_pretrained(tmp_path / "adapter")
    wanted = model.merge_and_unload().state_dict()
    merge(world.base / part, [tmp_path / "adapter"], tmp_path / "part")
    merge(world.base, [tmp_path / "adapter"], tmp_path / "pipeline")
    merge(world.single, [tmp_path / "adapter"], tmp_path / "merged.safetensors")
    close(load_file(tmp_path / "part" / UNET), wanted)
    close(parts(tmp_path / "pipeline")[part], wanted)
    close(parts_of_single(kind, tmp_path / "merged.safetensors")[part], wanted)


def test_a_text_encoders_peft_folder(worlds: Callable[[str], World], tmp_path: Path) -> None:
    """PEFT's folder of a text encoder merges into that encoder's folder."""
    config = LoraConfig(r=4, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    model = get_peft_model(images.text_encoder(True), config)
    model.save_pretrained(tmp_path / "adapter")
    merge(worlds("sdxl").base / "text_encoder_2", [tmp_path / "adapter"], tmp_path / "merged")
    close(load_file(tmp_path / "merged/model.safetensors"), model.merge_and_unload().state_dict())


def test_biases_of_bfl_files(tmp_path: Path) -> None:
    """`lora_B.bias` beside bare native names is added to the bias, times the scale, whole or split over q, k and v."""
    model, pieces = images.denoiser("flux"), spellings.native("flux", lambda n: "attn" in n or "linear1" in n)
    weights, wanted = spellings.keys(pieces, baked=True), images.original(model)
    for path, one in pieces.items():
        bias = torch.randn(one.up.shape[0])
        weights[f"{path}.lora_B.bias"] = bias
        wanted[f"{path}.weight"] = wanted[f"{path}.weight"] + one.delta
        wanted[f"{path}.bias"] = wanted[f"{path}.bias"] + bias
    file = spellings.save(weights, tmp_path / "adapter.safetensors")
    bare = spellings.save(images.original(model), tmp_path / "bare.safetensors")
    images.quiet(model.save_pretrained, tmp_path / "folder")
    merge(bare, [file], tmp_path / "merged.safetensors")
    close(wanted, load_file(tmp_path / "merged.safetensors"))
    merge(tmp_path / "folder", [file], tmp_path / "merged")
    close(load_file(tmp_path / "merged" / UNET), images.diffusers_names("flux", wanted))


def test_xlabs_single_blocks(tmp_path: Path) -> None:
    """XLabs' `qkv_lora` and `proj_lora` of single blocks are linear1's upper rows and linear2, as diffusers reads them."""
    pieces = spellings.split(spellings.native("flux", lambda n: n.startswith("single_blocks.0.linear")))
    qkv = spellings.piece("qkv", (96, 32))
    out = pieces["single_transformer_blocks.0.proj_out"]
    stem = "single_blocks.0.processor"
    weights = {f"{stem}.qkv_lora.down.weight": qkv.down, f"{stem}.qkv_lora.up.weight": qkv.up,
               f"{stem}.proj_lora.down.weight": out.down, f"{stem}.proj_lora.up.weight": out.up}  # fmt: skip
    file = spellings.save(weights, tmp_path / "adapter.safetensors")
    wanted = fuse("flux", file)["transformer"]
    images.quiet(images.denoiser("flux").save_pretrained, tmp_path / "folder")
    merge(tmp_path / "folder", [file], tmp_path / "merged")
    close(load_file(tmp_path / "merged" / UNET), wanted)

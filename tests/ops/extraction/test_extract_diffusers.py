"""extract on models of diffusers: merge, PEFT and the model's own load_lora_adapter give the tuned weights back."""

from __future__ import annotations

import inspect
import json
import shutil
import warnings
from pathlib import Path

import diffusers
import diffusers_models as small
import pytest
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lorasurgery.adapters.image_names.components import takes_adapters
from lorasurgery.adapters.image_names.dialects import dialect
from lorasurgery.errors import UnsupportedError
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.check import check
from lorasurgery.ops.convert import ConvertOptions, convert
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.merge import merge

RANK_16 = ExtractOptions(RankChoice(rank=16))
# One of each kind: convolutions in one to three dimensions, transposed, of layers of its own, and none; Sequentials with
# a Dropout first; names of no table; the original's names in diffusers; what stands beside a denoiser.
KINDS = (
    "UNet2DConditionModel", "FluxTransformer2DModel", "WanTransformer3DModel", "QwenImageTransformer2DModel",
    "AceStepTransformer1DModel", "WanAnimateTransformer3DModel", "WanAnimate2Transformer3DModel", "PriorTransformer",
    "ControlNetModel", "AutoencoderKL",
)  # fmt: skip
# Depthwise convolutions are stored whole, which a diffusers file can't say; NO_ADAPTERS have no load_lora_adapter.
DEPTHWISE = (
    "SanaTransformer2DModel", "SanaVideoTransformer3DModel", "SanaControlNetModel", "UVit2DModel", "DreamLiteUNetModel",
)  # fmt: skip
NO_ADAPTERS = ("AutoencoderKLWan", "UNet2DModel")
pytestmark = pytest.mark.filterwarnings("ignore")


def assert_tuned(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def extracted(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The tuned weights, which extract, merge and PEFT's own merge were seen to give back."""
    tuned = small.save_pair(name, folder)
    if tuned is None:
        pytest.skip(f"{name} is not made small here")
    report = extract(folder / "base", folder / "tuned", folder / "x", RANK_16, device="cpu")
    assert not report.left_out
    merge(folder / "base", [folder / "x"], folder / "m", device="cpu", allow_loss=True)
    assert_tuned(small.load(name, folder / "m").state_dict(), tuned)
    assert check(folder / "x", "peft").totals["serves"]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(small.load(name, folder / "base"), folder / "x")
    assert not [w for w in told if "adapter keys" in str(w.message)]
    assert_tuned(model.merge_and_unload().state_dict(), tuned)
    return tuned


def goes_into_diffusers(name: str, folder: Path) -> None:
    tuned = extracted(name, folder)
    convert(folder / "x", folder / "d.safetensors", ConvertOptions("diffusers"), base=folder / "base")
    assert check(folder / "d.safetensors", "diffusers").totals["serves"]
    weights = load_file(folder / "d.safetensors")
    model = small.load(name, folder / "base")
    model.load_lora_adapter(weights, prefix=min(weights).partition(".")[0])
    model.fuse_lora()
    assert_tuned({k.replace(".base_layer.", "."): v for k, v in model.state_dict().items()}, tuned)


@pytest.mark.parametrize("name", KINDS)
def test_merge_peft_and_diffusers_give_the_tuned_model_back(name: str, tmp_path: Path) -> None:
    """extract, then merge, PEFT's merge and diffusers' fuse_lora of the converted file: the tuned weights to 1e-4."""
    goes_into_diffusers(name, tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_modules_with_ranks_of_their_own(name: str, tmp_path: Path) -> None:
    """--energy gives each module its own rank, also where one module's path ends another's; PEFT merges what merge does."""
    if small.save_pair(name, tmp_path) is None:
        pytest.skip(f"{name} is not made small here")
    options = ExtractOptions(RankChoice(energy=0.8))
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x", options, device="cpu")
    merge(tmp_path / "base", [tmp_path / "x"], tmp_path / "m", device="cpu", allow_loss=True)
    model = PeftModel.from_pretrained(small.load(name, tmp_path / "base"), tmp_path / "x")
    assert_tuned(model.merge_and_unload().state_dict(), small.load(name, tmp_path / "m").state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(small.adapter_classes()) - set(KINDS) - set(DEPTHWISE)))
def test_every_class_with_adapters(name: str, tmp_path: Path) -> None:
    """The same for every class of diffusers that has load_lora_adapter and can be made small."""
    goes_into_diffusers(name, tmp_path)


@pytest.mark.parametrize(
    "name", ["SanaTransformer2DModel", *(pytest.param(n, marks=pytest.mark.slow) for n in DEPTHWISE[1:])]
)
def test_depthwise_convolutions_are_stored_whole(name: str, tmp_path: Path) -> None:
    """PEFT can't merge a LoRA of a grouped convolution: it is kept whole, PEFT has the tuned model, convert refuses."""
    extracted(name, tmp_path)
    with pytest.raises(UnsupportedError, match=r"\.weight is stored whole, which the diffusers format has no place"):
        convert(tmp_path / "x", tmp_path / "d.safetensors", ConvertOptions("diffusers"), base=tmp_path / "base")


@pytest.mark.parametrize("name", NO_ADAPTERS)
def test_a_class_that_loads_no_adapter_is_refused(name: str, tmp_path: Path) -> None:
    """Of a model without load_lora_adapter, PEFT has the tuned weights and convert says that diffusers has no place."""
    extracted(name, tmp_path)
    with pytest.raises(UnsupportedError, match=f"its base is {name}, which diffusers loads no adapter into"):
        convert(tmp_path / "x", tmp_path / "d.safetensors", ConvertOptions("diffusers"), base=tmp_path / "base")
    findings = check(tmp_path / "x", "diffusers", base=tmp_path / "base").totals["findings"]
    assert [f for f in findings if f["verdict"] == "rejected" and name in f["what"] and "merge" in f["mend"]]


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
def test_what_stands_beside_a_denoiser_has_no_place_elsewhere(to: str, tmp_path: Path) -> None:
    """Web UIs load no LoRA into a ControlNet, so their formats refuse it; diffusers' comes with a warning."""
    small.save_pair("FluxControlNetModel", tmp_path)
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x", RANK_16, device="cpu")
    with pytest.raises(UnsupportedError, match="FluxControlNetModel, a ControlNet, which no file"):
        convert(tmp_path / "x", tmp_path / "k.safetensors", ConvertOptions(to), base=tmp_path / "base")  # type: ignore[arg-type]
    findings = check(tmp_path / "x", "comfyui", base=tmp_path / "base").totals["findings"]
    assert [f for f in findings if f["verdict"] == "dropped" and "a ControlNet" in f["what"]]
    report = convert(tmp_path / "x", tmp_path / "d.safetensors", ConvertOptions("diffusers"), base=tmp_path / "base")
    assert any("its own load_lora_adapter" in w for w in report.warnings)


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel", "QwenImageTransformer2DModel"])
def test_what_is_stored_whole_becomes_a_difference(name: str, to: str, tmp_path: Path) -> None:
    """Norms and biases go along to kohya's and ComfyUI's files; merge has the tuned model."""
    small.save_pair(name, tmp_path)
    model, generator = small.load(name, tmp_path / "tuned"), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x", RANK_16, device="cpu")
    with pytest.raises(UnsupportedError, match="is stored whole; with base=BASE it becomes a difference"):
        convert(tmp_path / "x", tmp_path / "k.safetensors", ConvertOptions(to))  # type: ignore[arg-type]
    convert(tmp_path / "x", tmp_path / "k.safetensors", ConvertOptions(to), base=tmp_path / "base")  # type: ignore[arg-type]
    merge(tmp_path / "base", [tmp_path / "k.safetensors"], tmp_path / "m", device="cpu", allow_loss=True)
    assert_tuned(small.load(name, tmp_path / "m").state_dict(), small.load(name, tmp_path / "tuned").state_dict())


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
def test_names_that_are_not_known_are_not_written(to: str, tmp_path: Path) -> None:
    """A denoiser whose names in ComfyUI and kohya stand in no table is refused: as a folder, a pipeline, by extract."""
    small.save_pair("SanaTransformer2DModel", tmp_path)
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x", RANK_16, device="cpu")
    said = f"SanaTransformer2DModel, whose names in the {to} format are not known here"
    with pytest.raises(UnsupportedError, match=said):
        convert(tmp_path / "x", tmp_path / "k.safetensors", ConvertOptions(to), base=tmp_path / "base")  # type: ignore[arg-type]
    options = ExtractOptions(RankChoice(rank=16), client=to)
    with pytest.raises(UnsupportedError, match=said):
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "e.safetensors", options, device="cpu")
    assert not (tmp_path / "e.safetensors").exists()
    pipeline = tmp_path / "pipeline"
    shutil.copytree(tmp_path / "base", pipeline / "transformer")
    (pipeline / "model_index.json").write_text(
        json.dumps({"_class_name": "SanaPipeline", "transformer": ["diffusers", "SanaTransformer2DModel"]})
    )
    with pytest.raises(UnsupportedError, match=said):
        convert(tmp_path / "x", tmp_path / "k.safetensors", ConvertOptions(to), base=pipeline)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "family", "same"),
    [("UNet2DConditionModel", "unet", set()), ("FluxTransformer2DModel", "flux", set()),
     ("HunyuanVideoTransformer3DModel", "hunyuan", set()), ("SD3Transformer2DModel", "sd3", {"context_embedder"}),
     ("WanTransformer3DModel", "wan", {"patch_embedding"})],
)  # fmt: skip
def test_every_name_for_comfyui_stands_in_a_table(name: str, family: str, same: set[str], tmp_path: Path) -> None:
    """extract --for comfyui writes no name but those of the family's table, and what both sets call the same."""
    small.save_pair(name, tmp_path)
    options = ExtractOptions(RankChoice(rank=4), client="comfyui")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x.safetensors", options, device="cpu")
    keys = [k for k in load_file(tmp_path / "x.safetensors") if ".lora_" in k]
    paths = {k.removeprefix("diffusion_model.").partition(".lora_")[0] for k in keys}
    assert paths
    assert {p for p in paths if dialect(family, 2).row(p) is None} == same  # type: ignore[arg-type]


def test_classes_without_adapters_are_diffusers_own() -> None:
    """The table of classes without load_lora_adapter is diffusers' own, class by class."""
    kinds = {n: getattr(diffusers, n, None) for n in dir(diffusers) if n[0].isupper()}
    models = {
        n: c for n, c in kinds.items() if inspect.isclass(c) and issubclass(c, ModelMixin) and c is not ModelMixin
    }
    assert {n for n in models if takes_adapters(n)} == {n for n, c in models.items() if issubclass(c, PeftAdapterMixin)}


def a_pair(folder: Path, names: dict[str, tuple[int, ...]], config: dict[str, object] | None) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator) for n, s in names.items()}
    tuned = {n: t + 0.1 for n, t in base.items()}
    for side, tensors in (("base", base), ("tuned", tuned)):
        (folder / side).mkdir()
        save_file(tensors, folder / side / "model.safetensors")
        if config is not None:
            (folder / side / "config.json").write_text(json.dumps(config))
    return folder / "base", folder / "tuned"


@pytest.mark.parametrize(
    ("config", "name", "factored"),
    [({"_class_name": "SomeTransformer2DModel"}, "patch.proj", True),
     ({"architectures": ["ViTModel"], "model_type": "vit"}, "patch.proj", False), (None, "patch.proj", False),
     (None, "model.diffusion_model.input_blocks.0.0", True), (None, "transformer_blocks.0.conv", True),
     (None, "first_stage_model.decoder.conv_in", True)],
    ids=str,
)  # fmt: skip
def test_whose_convolutions_become_factors(
    config: dict[str, object] | None, name: str, factored: bool, tmp_path: Path
) -> None:
    """An image model's do, told by its config or its names; a language or vision model's are stored whole."""
    base, tuned = a_pair(tmp_path, {f"{name}.weight": (8, 4, 3, 3), f"{name}.bias": (8,)}, config)
    report = extract(base, tuned, tmp_path / "x", RANK_16, device="cpu")
    assert [m.kind for m in report.modules] == (["conv"] if factored else [])


def test_a_transposed_convolution_is_stored_whole(tmp_path: Path) -> None:
    """Its bias is as long as its second axis, which tells it from a convolution; PEFT has no LoRA for it."""
    names = {"up.weight": (8, 4, 2, 2), "up.bias": (4,), "down.weight": (8, 4, 2, 2), "down.bias": (8,)}
    base, tuned = a_pair(tmp_path, names, {"_class_name": "SomeUNet"})
    report = extract(base, tuned, tmp_path / "x", RANK_16, device="cpu")
    assert [m.name for m in report.modules] == ["down"]
    assert "up.weight" in {m.name for m in report.full}

"""What a merge of an image model's adapter must not lose, pass over or put elsewhere."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import images
import loose
import pytest
import spellings
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from worlds import World

from lorasurgery.adapters.image_names.components import adapter_place
from lorasurgery.adapters.image_names.dictionary import BaseRows, Dictionary
from lorasurgery.adapters.single_file.keys import parse_key
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.cli.main import main
from lorasurgery.errors import SurgeryError
from lorasurgery.ops.merge import merge
from lorasurgery.ops.unmerge import unmerge

Worlds = Callable[[str], World]
Weights = dict[str, Tensor]


def raw(file: Path) -> dict[str, tuple[str, bytes]]:
    """Every tensor's dtype and bytes, read from the format itself."""
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    return {
        k: (v["dtype"], data[8 + size + v["data_offsets"][0] : 8 + size + v["data_offsets"][1]])
        for k, v in header.items()
    }


# Nothing is lost in the base


def test_markers_metadata_and_untouched_bytes_survive_in_a_single_file(worlds: Worlds, tmp_path: Path) -> None:
    """Empty and scalar markers, integer position ids, logit_scale, the header's words, and all that isn't adapted."""
    world, base = worlds("sdxl"), tmp_path / "base.safetensors"
    weights = load_file(world.single) | {
        "ztsnr": torch.tensor([]),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "first_stage_model.decoder.conv_in.weight": torch.randn(4, 4, 3, 3).to(torch.float16),
    }
    words = {"modelspec.title": "a model", "modelspec.architecture": "sdxl", "prompt": '{"1": "ein Bär"}',
             "workflow": "{}", "sd_merge_recipe": "A + B"}  # fmt: skip
    save_file(weights, base, words)
    merge(base, [world.kohya], tmp_path / "merged.safetensors")
    before, after = raw(base), raw(tmp_path / "merged.safetensors")
    assert before.keys() == after.keys()
    report = merge(base, [world.kohya], tmp_path / "x.safetensors", dry_run=True)
    same = [k for k in before if before[k] == after[k]]
    assert len(before) - len(same) == report.totals["tensors_touched"]
    for name in ("v_pred", "ztsnr", "edm_vpred.sigma_max", "conditioner.embedders.1.model.logit_scale"):
        assert name in same
    assert "conditioner.embedders.0.transformer.text_model.embeddings.position_ids" in same
    with safe_open(tmp_path / "merged.safetensors", "pt") as file:
        assert file.metadata() == words


def test_a_pipelines_other_files_come_along_byte_for_byte(worlds: Worlds, tmp_path: Path) -> None:
    """model_index.json, scheduler, tokenizers, configs and the VAE are the base's; every part that is touched is not."""
    import shutil

    world = worlds("sdxl")
    base = shutil.copytree(world.base, tmp_path / "base")
    for folder in ("tokenizer", "tokenizer_2", "feature_extractor"):
        (base / folder).mkdir()
        (base / folder / "vocab.json").write_text('{"a": 0}')
        (base / folder / "merges.txt").write_text("a b\n")
    merge(base, [world.kohya], tmp_path / "merged")
    files = {f.relative_to(base) for f in base.rglob("*") if f.is_file()}
    merged = {f.relative_to(tmp_path / "merged") for f in (tmp_path / "merged").rglob("*") if f.is_file()}
    assert merged == files | {Path("lorasurgery.json")}
    changed = {str(f) for f in files if (base / f).read_bytes() != (tmp_path / "merged" / f).read_bytes()}
    assert changed == {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
                       "text_encoder_2/model.safetensors"}  # fmt: skip


def test_a_sharded_part_stays_sharded(worlds: Worlds, tmp_path: Path) -> None:
    """A U-Net in several shards keeps shards and index, and holds the same weights as the one in a single file."""
    import shutil

    world = worlds("sdxl")
    base = shutil.copytree(world.base, tmp_path / "base")
    shutil.rmtree(base / "unet")
    images.quiet(images.denoiser("sdxl").save_pretrained, base / "unet", max_shard_size="500KB")
    index = json.loads((base / "unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    merge(base, [world.kohya], tmp_path / "merged")
    after = json.loads((tmp_path / "merged/unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert after["weight_map"] == index["weight_map"]
    merge(world.base, [world.kohya], tmp_path / "whole")
    whole = raw(tmp_path / "whole/unet/diffusion_pytorch_model.safetensors")
    shards = {k: v for f in (tmp_path / "merged/unet").glob("*.safetensors") for k, v in raw(f).items()}
    assert shards == whole
    model = images.quiet(type(images.denoiser("sdxl")).from_pretrained, tmp_path / "merged/unet")
    assert model.state_dict().keys() == whole.keys()


# Nothing is passed over


def refused(base: Path, file: Path, out: Path) -> str:
    """The one line of a merge that must fail: exit status 1, nothing written, no traceback."""
    name = out / ("merged.safetensors" if base.is_file() else "merged")
    result = CliRunner().invoke(main, ["merge", str(base), str(file), "-o", str(name)])
    assert result.exit_code == 1, result.output
    assert not name.exists()
    assert list(out.glob("*partial*")) == []
    line = result.stderr.strip()
    assert "\n" not in line
    return line


def renamed(file: Path, out: Path, change: Callable[[str], str]) -> Path:
    """A file with its keys changed."""
    return spellings.save({change(k): v for k, v in load_file(file).items()}, out)


def test_another_familys_adapter_is_named(worlds: Worlds, tmp_path: Path) -> None:
    """SDXL's file on SD 1, Flux's on SDXL, SD 1's on Flux: how many modules match nothing, and the first of them."""
    for kind, other in (("sdxl", "sd1"), ("flux", "sdxl"), ("sd1", "flux")):
        for base in (worlds(other).base, worlds(other).single):
            line = refused(base, worlds(kind).kohya, tmp_path)
            assert re.search(r"\d+ of \d+ modules match no tensor in \S+: lora_", line), line
            assert str(base) in line


def test_another_width_is_named(worlds: Worlds, tmp_path: Path) -> None:
    """A module that fits by name and not by shape is an error with both sizes."""
    weights = load_file(worlds("sd1").kohya)
    name = next(k for k in weights if k.endswith("attn1_to_q.lora_down.weight"))
    weights[name] = torch.randn(4, 40)
    line = refused(worlds("sd1").base, spellings.save(weights, tmp_path / "wide.safetensors"), tmp_path)
    assert "×40" in line
    assert name.partition(".")[0] in line


@pytest.mark.parametrize("prefix", ["lora_une_", "lora_unett_", "loraunet_", "lora_te9_", "lora_", "unet_"])
def test_a_misspelt_prefix_is_named(prefix: str, worlds: Worlds, tmp_path: Path) -> None:
    """A whole U-Net under a prefix that nobody uses matches nothing, whatever comes after it."""
    file = renamed(worlds("sdxl").kohya, tmp_path / "odd.safetensors", lambda k: k.replace("lora_unet_", prefix))
    for base in (worlds("sdxl").base, worlds("sdxl").single):
        assert "313 of 337 modules" in refused(base, file, tmp_path)


def test_half_of_the_modules_renamed(worlds: Worlds, tmp_path: Path) -> None:
    """Half a file that matches does not carry the other half: the count and the nearest names are said."""
    file = renamed(worlds("sdxl").kohya, tmp_path / "half.safetensors", lambda k: k.replace("attn2_to_", "attn2_too_"))
    for base in (worlds("sdxl").base, worlds("sdxl").single):
        line = refused(base, file, tmp_path)
        assert re.search(r": \d+ of 337 modules match no tensor", line)
        nearest = line.partition("nearest: ")[2].split(", ")[0]
        assert nearest == re.search(r": lora_unet_(\S+?),", line)[1].replace("too_", "to_")  # type: ignore[index]


def test_a_part_that_the_base_lacks(worlds: Worlds, tmp_path: Path) -> None:
    """Text encoders' updates for a base without any are named with the part that is missing."""
    line = refused(worlds("flux").single, worlds("flux").kohya, tmp_path)
    assert "12 of" in line
    assert "it has no text encoder 1" in line
    line = refused(worlds("sdxl").base / "text_encoder", worlds("sdxl").kohya, tmp_path)
    assert "it has no denoiser" in line


def test_an_alpha_that_belongs_to_nothing(worlds: Worlds, tmp_path: Path) -> None:
    """A misspelt alpha would double the update in silence; it is an error."""
    change = {k: k.replace("to_q", "to_qq") for k in load_file(worlds("sd1").kohya) if k.endswith("attn1_to_q.alpha")}
    file = renamed(worlds("sd1").kohya, tmp_path / "alpha.safetensors", lambda k: change.get(k, k))
    assert "attn1_to_qq.alpha" in refused(worlds("sd1").base, file, tmp_path)


def test_a_name_for_two_text_encoders_is_none(worlds: Worlds, tmp_path: Path) -> None:
    """LyCORIS's own prefix doesn't say which of SDXL's encoders is meant, so both are named and neither is changed."""
    name = "lycoris_text_model_encoder_layers_0_mlp_fc1"
    file = spellings.save(loose.factors(name, (48, 32)), tmp_path / "te.safetensors")
    line = refused(worlds("sdxl").base, file, tmp_path)
    assert re.search(r"it may be text_encoder\.\S+fc1.weight or text_encoder_2\.\S+fc1.weight, and nothing", line)


def test_two_modules_for_one_tensor(tmp_path: Path, worlds: Worlds) -> None:
    """The same module by two of its names is an error, not a sum; so is a fused one beside its part."""
    native, ours = "double_blocks.0.img_attn.qkv", "transformer_blocks_0_attn_to_k"
    weights = loose.factors(f"diffusion_model.{native}", (96, 32)) | loose.factors(f"lora_unet_{ours}", (32, 32))
    file = spellings.save(weights, tmp_path / "twice.safetensors")
    for base in (worlds("flux").base, worlds("flux").single):
        assert "two modules of the adapter mean" in refused(base, file, tmp_path)


def test_a_pipelines_denoiser_comes_before_its_vae(worlds: Worlds, tmp_path: Path) -> None:
    """A PEFT adapter's conv_in is the U-Net's; one that has the VAE's shape is of another width, not the VAE's."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
    wide = loose.factors("base_model.model.conv_in", (8, 3, 3, 3), alpha=None)
    names = {".lora_down.": ".lora_A.", ".lora_up.": ".lora_B."}
    save_file(
        {k.replace(o, n): v for k, v in wide.items() for o, n in names.items() if o in k},
        folder / "adapter_model.safetensors",
    )
    assert load_file(worlds("sd1").base / "vae/diffusion_pytorch_model.safetensors")[
        "encoder.conv_in.weight"
    ].shape == (8, 3, 3, 3)
    assert "unet.conv_in.weight" in refused(worlds("sd1").base, folder, tmp_path)


def test_the_number_of_an_upsampler_must_be_right(worlds: Worlds, tmp_path: Path) -> None:
    """SDXL's first upsampler is output_blocks.2.2.conv, for its level has attention; 2.1.conv is not a module of it."""
    for prefix, dot in (("diffusion_model.", "."), ("lora_unet_", "_")):
        for number in (1, 2):
            name = prefix + f"output_blocks.2.{number}.conv".replace(".", dot)
            file = spellings.save(loose.factors(name, (64, 64, 3, 3)), tmp_path / f"{number}{dot}.safetensors")
            for base in (worlds("sdxl").base, worlds("sdxl").single):
                if number == 1:
                    assert "matches no tensor" in refused(base, file, tmp_path)
                else:
                    merge(base, [file], tmp_path / ("m.safetensors" if base.is_file() else "m"), dry_run=True)


def spelt(worlds: Worlds, style: str) -> tuple[Path, Weights]:
    """A base of one dialect and an adapter's weights in one style."""
    if style == "kohya":
        return worlds("sdxl").single, load_file(worlds("sdxl").kohya)
    kind = "flux" if style == "comfyui" else "sdxl"
    pieces = spellings.native(kind, lambda name: "blocks" in name or "block." in name)
    if style == "comfyui":
        return worlds(kind).base, spellings.keys(pieces, "diffusion_model.", alpha=True)
    return worlds(kind).base, spellings.keys(spellings.split(pieces), "unet.", baked=True)


def places(base: Path, keys: list[str]) -> dict[str, list[BaseRows]]:
    """Where each key's module lies, by the base's own dictionary; [] for none."""
    checkpoint = Checkpoint.open(base)
    names = Dictionary(checkpoint.tensors, pipeline=bool(checkpoint.parts), config=checkpoint.config_of)
    found = {}
    for key in keys:
        parsed = parse_key(key)
        place = adapter_place(parsed[0]) if parsed else None
        found[key] = list(names.find(place)) if place else []
    return found


@st.composite
def mutation(draw: st.DrawFn, name: str) -> str:
    """A name with one mistake: a character dropped, doubled, swapped or changed, a number out of range, a prefix."""
    kind = draw(st.sampled_from(["drop", "double", "swap", "change", "number", "prefix"]))
    i = draw(st.integers(0, len(name) - 2))
    if kind == "drop":
        return name[:i] + name[i + 1 :]
    if kind == "double":
        return name[:i] + name[i] + name[i:]
    if kind == "swap":
        return name[:i] + name[i + 1] + name[i] + name[i + 2 :]
    if kind == "change":
        return name[:i] + draw(st.sampled_from("abxyz019_.")) + name[i + 1 :]
    if kind == "number":
        number = draw(st.sampled_from(re.findall(r"(?<=[._])\d+(?=[._])", name) or ["x"]))
        return name.replace(f"{number}", str(draw(st.integers(20, 2000))), 1)
    return draw(st.sampled_from(["lora_unt_", "unet_", "model.", "transformr.", "lora_te4_", "x."])) + name


@pytest.mark.parametrize("style", ["kohya", "comfyui", "diffusers"])
@settings(max_examples=30)
@given(data=st.data())
def test_a_mistake_in_a_name_is_always_an_error(style: str, worlds: Worlds, data: st.DataObject) -> None:
    """One module misspelt in any way is refused, unless the new name is that of a module of the base as well.

    Then the update goes to that module by its true name, and to no other: the plan's tensors are just those.
    """
    import tempfile

    base, weights = spelt(worlds, style)
    module = data.draw(st.sampled_from(sorted({parse_key(k)[0] for k in weights})))  # type: ignore[index]
    new = data.draw(mutation(module))
    changed = {k: new + k[len(module) :] if parse_key(k)[0] == module else k for k in weights}  # type: ignore[index]
    before = places(base, list(weights))
    with tempfile.TemporaryDirectory() as folder:
        file = spellings.save({changed[k]: v for k, v in weights.items()}, Path(folder) / "odd.safetensors")
        out = Path(folder) / ("merged.safetensors" if base.is_file() else "merged")
        if new == module:
            return
        try:
            report = merge(base, [file], out, dry_run=True)
        except SurgeryError as problem:
            assert "\n" not in str(problem)
            return
    key = next(k for k in weights if k.startswith(module) and not k.endswith("alpha"))
    assert places(base, [changed[key]])[changed[key]] == before[key], (module, new)
    assert report.totals["tensors_touched"] == len({s.tensor for slots in before.values() for s in slots})


# And back again


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "flux"])
def test_unmerge_gives_the_base_back(kind: str, worlds: Worlds, tmp_path: Path) -> None:
    """What merge added, unmerge takes away to rounding, text encoders included."""
    world = worlds(kind)
    merge(world.base, [world.kohya], tmp_path / "merged", weights=[0.7])
    unmerge(tmp_path / "merged", [world.kohya], tmp_path / "back", weights=[0.7])
    for file in sorted(world.base.rglob("*.safetensors")):
        inside = file.relative_to(world.base)
        before, after = load_file(file), load_file(tmp_path / "back" / inside)
        assert before.keys() == after.keys()
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, rtol=0, atol=5e-7)


def test_a_dry_run_needs_no_torch(worlds: Worlds, tmp_path: Path) -> None:
    """Names, parts and alphas of an image model's adapter are settled without importing torch."""
    world = worlds("sdxl")
    for base, out in ((world.base, "out"), (world.single, "out.safetensors")):
        code = (
            "import sys; from lorasurgery.ops.merge import merge\n"
            f"r = merge({str(base)!r}, [{str(world.kohya)!r}], {str(tmp_path / out)!r}, dry_run=True)\n"
            "assert 'torch' not in sys.modules, 'torch was imported'; print(r.totals['adapter_tensors_matched'])"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
        assert found.stdout.strip() == "337"
        assert not (tmp_path / out).exists()

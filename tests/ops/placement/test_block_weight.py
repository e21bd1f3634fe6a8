"""Block weights: each module's strength, by pattern and by block, in merge, unmerge and blend."""

from __future__ import annotations

from pathlib import Path

import images
import loose
import models
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from lorasurgery.adapters.image_names.blocks import LISTS, PRESETS, block_of, names_of
from lorasurgery.cli.main import main
from lorasurgery.errors import MismatchError, UnsupportedError, UsageError
from lorasurgery.ops.blend import BlendOptions, blend
from lorasurgery.ops.merge import merge
from lorasurgery.ops.unmerge import unmerge

Weights = loose.Weights


def blocks(name: str) -> str:
    """The block a kohya module is in, told by hand from sd-scripts' own numbers."""
    if name.startswith("lora_te"):
        return "BASE"
    parts = name.removeprefix("lora_unet_").split("_")
    if parts[0] == "mid" or parts[0] == "middle":
        return "MID"
    if parts[0] in ("input", "output"):
        return f"{'IN' if parts[0] == 'input' else 'OUT'}{int(parts[2]):02}"
    if parts[0] in ("down", "up") and parts[1] == "blocks":
        level, kind, place = int(parts[2]), parts[3], int(parts[4])
        if parts[0] == "down":
            return f"IN{3 * (level + 1) if kind == 'downsamplers' else 3 * level + place + 1:02}"
        return f"OUT{3 * level + (2 if kind == 'upsamplers' else place):02}"
    return "IN00" if parts[:2] == ["conv", "in"] else ""


def scaled(file: Path, out: Path, strength: dict[str, float]) -> Path:
    """The same adapter with each module's up scaled by hand, in float64."""
    weights = load_file(file)
    for key in weights:
        name, _, leaf = key.partition(".")
        if leaf == "lora_up.weight":
            weights[key] = (weights[key].double() * strength.get(name, 1.0)).float()
    save_file(weights, out)
    return out


def state(path: Path) -> Weights:
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    return {f"{f.parent.name}.{k}": v for f in files for k, v in load_file(f).items()}


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("given", ["MIDD", "OUTALL", "ALL0.5", "list"])
def test_presets_and_lists(kind: str, given: str, tmp_path: Path) -> None:
    """Merging with a preset or a list is merging with each module's ΔW scaled by hand; blend writes it baked in."""
    length = 17 if kind == "sd1" else 12
    numbers = [round(0.1 * (i + 1), 1) for i in range(length)]
    lists = {
        "MIDD": [1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
        if kind == "sd1"
        else [1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "OUTALL": [1, *[0] * 7, *[1] * 9] if kind == "sd1" else [1, *[0] * 5, *[1] * 6],
        "ALL0.5": [0.5] * length,
        "list": numbers,
    }
    by_block = dict(zip(LISTS[length], lists[given], strict=True))
    file = loose.kohya(kind, tmp_path / "a.safetensors", only=lambda n: "attn1" in n or "proj_in" in n or "conv" in n)
    names = {k.partition(".")[0] for k in load_file(file)}
    hand = scaled(file, tmp_path / "hand.safetensors", {n: by_block.get(blocks(n), 1.0) for n in names})
    base = images.single_file(kind, tmp_path / "base.safetensors")
    option = given if given != "list" else ",".join(map(str, numbers))
    merge(base, [file], tmp_path / "out.safetensors", block_weights=[option])
    merge(base, [hand], tmp_path / "expected.safetensors")
    found, expected, before = (state(tmp_path / f"{n}.safetensors") for n in ("out", "expected", "base"))
    assert any(not torch.equal(expected[k], before[k]) for k in before)
    assert all(torch.allclose(found[k], expected[k], atol=1e-6) for k in before)
    blend([file], tmp_path / "blend.safetensors", BlendOptions(block_weights=[option]))
    merge(base, [tmp_path / "blend.safetensors"], tmp_path / "blended.safetensors")
    assert all(torch.allclose(v, expected[k], atol=1e-6) for k, v in state(tmp_path / "blended.safetensors").items())


def test_blocks_of_both_namings() -> None:
    """Each U-Net module is in the same block under diffusers' and the original's names, dotted and underscored."""
    for kind in ("sd1", "sdxl"):
        model = images.denoiser(kind)
        for name in images.modules(model):
            underscored = f"lora_unet_{name.replace('.', '_')}"
            assert block_of([f"unet.{name}"]) == block_of([underscored]) == blocks(underscored), name
    for name in images.original(images.denoiser("sd1")):
        path = name.rpartition(".")[0]
        if path.split(".")[0] in ("input_blocks", "middle_block", "output_blocks"):
            assert block_of([path]) == blocks(f"lora_unet_{path.replace('.', '_')}")


def test_patterns(tmp_path: Path) -> None:
    """The most specific of globs and prefixes counts; a prefix ends at a part of the path; both sides' names count."""
    file = loose.kohya("sdxl", tmp_path / "a.safetensors", only=lambda n: "attn1.to_q" in n)
    base = images.single_file("sdxl", tmp_path / "base.safetensors")
    given = ["lora_unet_*=0.5", "input_blocks.4*=2", "*=0.25", "lora_unet_input_blocks_5=0", "output_blocks.1=3"]
    merge(base, [file], tmp_path / "out.safetensors", block_weights=given)

    def strength(name: str) -> float:
        if name.startswith("lora_te"):
            return 0.25
        return {"IN04": 2.0, "IN05": 0.0, "OUT01": 3.0}.get(blocks(name), 0.5)

    names = {k.partition(".")[0] for k in load_file(file)}
    hand = scaled(file, tmp_path / "hand.safetensors", {n: strength(n) for n in names})
    merge(base, [hand], tmp_path / "expected.safetensors")
    found, expected = state(tmp_path / "out.safetensors"), state(tmp_path / "expected.safetensors")
    assert all(torch.allclose(found[k], v, atol=1e-6) for k, v in expected.items())


def test_one_adapter_of_two(tmp_path: Path) -> None:
    """N: means the N-th adapter alone; unmerge takes the same weights back out; a weight of 0 leaves the bytes alone."""
    base = models.save(models.make("llama"), tmp_path / "base")
    for i in (1, 2):
        models.peft_adapter("llama", tmp_path / f"a{i}", seed=i, r=4, target_modules=["q_proj", "v_proj"])
    both = [tmp_path / "a1", tmp_path / "a2"]
    given = ["2:model.layers.0=0", "1:*.v_proj=0.5", "*layers.1.self_attn.q_proj=0"]
    report = merge(base, both, tmp_path / "out", weights=[1.0, -0.5], block_weights=given)
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "out"))
    one, two = (models.peft_deltas("llama", a) for a in both)
    for name, delta in one.items():
        first = 0.0 if "layers.1" in name and "q_proj" in name else 0.5 if "v_proj" in name else 1.0
        second = 0.0 if "layers.0" in name or "q_proj" in name else -0.5
        expected = before[f"{name}.weight"].double() + first * delta + second * two[name]
        assert torch.allclose(after[f"{name}.weight"].double(), expected, atol=1e-6), name
    untouched = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(before[untouched], after[untouched])
    assert report.totals["tensors_touched"] == 3
    unmerge(tmp_path / "out", both, tmp_path / "back", weights=[1.0, -0.5], block_weights=given)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.allclose(back[k], v, atol=1e-6) for k, v in before.items())


def test_blend_bakes_them_in(tmp_path: Path) -> None:
    """A blend's ΔW is each adapter's times its strength and its module's; a module weighed away is not written."""
    for i in (1, 2):
        models.peft_adapter("llama", tmp_path / f"a{i}", seed=i, r=4, target_modules=["q_proj", "v_proj"])
    both = [tmp_path / "a1", tmp_path / "a2"]
    options = BlendOptions(
        weights=[0.7, 0.3], block_weights=["*q_proj=0.5", "2:model.layers.0=0", "*layers.1*v_proj=0"]
    )
    blend(both, tmp_path / "out", options)
    one, two, found = (models.peft_deltas("llama", a) for a in (*both, tmp_path / "out"))
    expected = {}
    for name, delta in one.items():
        gone = "layers.1" in name and "v_proj" in name
        first = 0.0 if gone else 0.35 if "q_proj" in name else 0.7
        second = 0.0 if gone or "layers.0" in name else 0.15
        expected[name] = first * delta + second * two[name]
    assert "model.layers.1.self_attn.v_proj" not in found
    assert models.relative(found, {k: v for k, v in expected.items() if v.any()}) < 1e-6


def test_whole_tensors_and_norms(tmp_path: Path) -> None:
    """Norms of LyCORIS's are weighed like the rest; a tensor stored whole moves by its weight, which a blend can't say."""
    name = "lora_unet_down_blocks_0_attentions_0"
    norm = torch.randn(32)
    weights = loose.factors(f"{name}_proj_in", (32, 32, 1, 1)) | {f"{name}_norm.w_norm": norm}
    save_file(weights, tmp_path / "a.safetensors")
    base = images.single_file("sd1", tmp_path / "base.safetensors")
    merge(base, [tmp_path / "a.safetensors"], tmp_path / "out.safetensors", block_weights=["*_norm=0.5"])
    key = "model.diffusion_model.input_blocks.1.1.norm.weight"
    before, after = load_file(base)[key], load_file(tmp_path / "out.safetensors")[key]
    assert torch.allclose(after, before + 0.5 * norm)
    blend([tmp_path / "a.safetensors"], tmp_path / "b.safetensors", BlendOptions(block_weights=["*_norm=0.5"]))
    assert torch.allclose(load_file(tmp_path / "b.safetensors")[f"{name}_norm.w_norm"], 0.5 * norm)
    models.peft_adapter("llama", tmp_path / "p", r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    model = models.save(models.make("llama"), tmp_path / "model")
    merge(model, [tmp_path / "p"], tmp_path / "half", block_weights=["model.norm=0.5"])
    stored = load_file(tmp_path / "p" / "adapter_model.safetensors")["base_model.model.model.norm.weight"]
    old, new = (load_file(p / "model.safetensors")["model.norm.weight"] for p in (model, tmp_path / "half"))
    assert torch.allclose(new, (old + stored) / 2)
    with pytest.raises(UnsupportedError, match="stored whole"):
        blend([tmp_path / "p"], tmp_path / "no", BlendOptions(block_weights=["model.norm=0.5"]))


WRONG = {
    "nothing": ("q_porj*=1", "matches no module; nearest"),
    "no number": ("q_proj=much", "not a finite number"),
    "nan": ("*=nan", "not a finite number"),
    "no such preset": ("OUTAL", "nearest: OUTALL"),
    "wrong length": ("1,0,1", "SD takes 17 or 26, SDXL 12 or 20"),
    "no U-Net": ("MIDD", "no blocks of SD's or SDXL's"),
    "no such adapter": ("3:*=1", "there are 1 adapters"),
    "adapter 0": ("0:*=1", "counted from 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage(case: str, tmp_path: Path) -> None:
    """What means nothing is wrong usage, with the nearest that does; nothing is written."""
    given, said = WRONG[case]
    base = models.save(models.make("llama"), tmp_path / "base")
    models.peft_adapter("llama", tmp_path / "a", r=2, target_modules=["q_proj"])
    with pytest.raises(UsageError, match=said):
        merge(base, [tmp_path / "a"], tmp_path / "out", block_weights=[given])
    with pytest.raises(UsageError, match=said):
        blend([tmp_path / "a"], tmp_path / "out", BlendOptions(block_weights=[given]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "length", "fits"), [("sd1", 12, "17 or 26"), ("sdxl", 17, "12 or 20")])
def test_lists_of_the_other_model(kind: str, length: int, fits: str, tmp_path: Path) -> None:
    """A list for SD given to SDXL, or the other way about, names the lengths that fit; the command line ends with 2."""
    file = loose.kohya(kind, tmp_path / "a.safetensors", only=lambda n: "attn1" in n)
    numbers = ",".join(["1"] * length)
    args = ["blend", str(file), "-o", str(tmp_path / "o.safetensors"), "--block-weight", numbers]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2
    assert f"takes {fits}" in result.output
    for preset in PRESETS:
        assert CliRunner().invoke(main, [*args[:-1], preset, "--dry-run"]).exit_code == 0


def test_names() -> None:
    """A module goes by the file's and the base's names, with and without the part's prefix."""
    assert "conv_in" in names_of("unet.conv_in")
    assert "input_blocks.0.0" in names_of("lora_unet_conv_in", "model.diffusion_model.input_blocks.0.0")


def test_a_part_that_the_base_lacks_is_left_out_by_name(tmp_path: Path) -> None:
    """A pattern with weight 0 lets a file for transformer and text encoder into a transformer alone; all else still must match."""
    base = images.single_file("flux", tmp_path / "base.safetensors")
    both, one = (
        loose.kohya("flux", tmp_path / "both.safetensors"),
        loose.kohya("flux", tmp_path / "one.safetensors", text=False),
    )
    with pytest.raises(MismatchError, match=r"12 of \d+ modules match no tensor.*no text encoder 1.*block_weights"):
        merge(base, [both], tmp_path / "no.safetensors")
    merge(base, [both], tmp_path / "a.safetensors", block_weights=["lora_te1_*=0"])
    merge(base, [one], tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with pytest.raises(MismatchError, match="12 of"):
        merge(base, [both], tmp_path / "no.safetensors", block_weights=["lora_te1_*=0.5"])
    unmerge(tmp_path / "a.safetensors", [both], tmp_path / "c.safetensors", block_weights=["lora_te1_*=0"])
    assert (tmp_path / "c.safetensors").stat().st_size == base.stat().st_size

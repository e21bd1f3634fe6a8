"""8-bit checkpoints: plain casts are read and written, scaled ones refused, and a lost update stops the merge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasurgery.cli.main import main
from lorasurgery.errors import SurgeryError, UnsupportedError
from lorasurgery.linalg.rounding import add_updates
from lorasurgery.lowrank import LowRank
from lorasurgery.ops.merge import merge
from lorasurgery.ops.unmerge import unmerge

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOUCHED, OTHER = (
    "model.diffusion_model.double_blocks.0.img_attn.qkv",
    "model.diffusion_model.double_blocks.0.txt_attn.qkv",
)


def factors(size: float, shape: tuple[int, int] = (192, 64), rank: int = 16) -> tuple[Tensor, LowRank]:
    """A Gaussian weight of the size that models have (σ = 0.02), and a low-rank update of `size` times its norm."""
    g = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(*shape, generator=g)
    update = LowRank(torch.randn(shape[0], rank, generator=g), torch.randn(rank, shape[1], generator=g))
    return weight, update.times(float(size * weight.norm() / update.dense().norm()))


def make(path: Path, size: float, dtype: torch.dtype = E4M3, extra: dict[str, Tensor] | None = None,
         metadata: dict[str, str] | None = None) -> tuple[Path, Path]:  # fmt: skip
    """A checkpoint with two 8-bit tensors and a 16-bit one, and an adapter for the first."""
    weight, update = factors(size)
    base = {f"{TOUCHED}.weight": weight.to(dtype), f"{OTHER}.weight": weight.flip(0).to(dtype),
            "model.diffusion_model.img_in.weight": weight[:8].to(torch.float16)}  # fmt: skip
    save_file(base | (extra or {}), path / "base.safetensors", metadata)
    name = TOUCHED.removeprefix("model.")
    found = {f"{name}.lora_A.weight": update.down.contiguous(), f"{name}.lora_B.weight": update.up * update.scale}
    save_file(found, path / "adapter.safetensors")
    return path / "base.safetensors", path / "adapter.safetensors"


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_plain_casts_are_read_and_written(dtype: torch.dtype, tmp_path: Path) -> None:
    """A large update on 8-bit weights is the float64 sum rounded once; everything else keeps its bytes; unmerge goes back."""
    base, adapter = make(tmp_path, 1.0, dtype)
    report = merge(base, [adapter], tmp_path / "out.safetensors")
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    _, update = factors(1.0)
    exact = before[f"{TOUCHED}.weight"].double() + update.scale * (update.up.double() @ update.down.double())
    differ = (after[f"{TOUCHED}.weight"].double() != exact.to(dtype).double()).double().mean()
    assert differ <= 1e-4
    assert all(same_bytes(before[k], after[k]) for k in before if not k.startswith(TOUCHED))
    assert report.totals["retention"] > 0.9
    unmerge(tmp_path / "out.safetensors", [adapter], tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")[f"{TOUCHED}.weight"]
    assert (back.double() - before[f"{TOUCHED}.weight"].double()).norm() < 0.2 * before[
        f"{TOUCHED}.weight"
    ].double().norm()


def test_dora_on_8_bits(tmp_path: Path) -> None:
    """DoRA computes in float32 there too."""
    base, adapter = make(tmp_path, 0.5)
    scale = 2 * torch.ones(192, 1)
    save_file(load_file(adapter) | {f"{TOUCHED.removeprefix('model.')}.dora_scale": scale}, adapter)
    merge(base, [adapter], tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")[f"{TOUCHED}.weight"]
    assert torch.allclose(found.float().norm(dim=1), torch.full((192,), 2.0), rtol=0.05)


def test_a_lost_update_stops_the_merge(tmp_path: Path) -> None:
    """At 1% of the weights' norm an e4m3 cast keeps nothing: exit 1, the figure, the ways out, and no file."""
    base, adapter = make(tmp_path, 0.01)
    before = {f.name for f in tmp_path.iterdir()}
    done = CliRunner().invoke(main, ["merge", str(base), str(adapter), "-o", str(tmp_path / "out.safetensors")])
    assert done.exit_code == 1
    line = done.stderr.strip().splitlines()[-1]
    for words in ("rounding would keep 0.", "8-bit", "--dtype bfloat16", "--rounding stochastic", "--allow-loss"):
        assert words in line
    assert {f.name for f in tmp_path.iterdir()} == before


def test_way_out_bfloat16(tmp_path: Path) -> None:
    """--dtype bfloat16 widens what the adapter touches and leaves the other 8-bit tensors' bytes alone."""
    base, adapter = make(tmp_path, 0.01)
    report = merge(base, [adapter], tmp_path / "out.safetensors", dtype="BF16")
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    assert report.totals["retention"] > 0.95
    assert after[f"{TOUCHED}.weight"].dtype == torch.bfloat16
    assert same_bytes(before[f"{OTHER}.weight"], after[f"{OTHER}.weight"])
    name = "model.diffusion_model.img_in.weight"
    assert torch.equal(after[name], before[name].to(torch.bfloat16))


def test_way_out_stochastic(tmp_path: Path) -> None:
    """Stochastic rounding keeps the mean of the update, with noise of about 2.5 times its norm; seeded."""
    base, adapter = make(tmp_path, 0.01)
    report = merge(base, [adapter], tmp_path / "out.safetensors", rounding="stochastic", seed=3)
    assert report.totals["retention"] == pytest.approx(1, abs=0.15)
    assert 2.0 < report.totals["noise"] < 3.0
    merge(base, [adapter], tmp_path / "again.safetensors", rounding="stochastic", seed=3)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_way_out_allow_loss(tmp_path: Path) -> None:
    """--allow-loss writes it, and the report says what was lost."""
    base, adapter = make(tmp_path, 0.01)
    report = merge(base, [adapter], tmp_path / "out.safetensors", allow_loss=True)
    assert report.totals["retention"] < 0.02
    assert any("rounding keeps" in w for w in report.warnings)


def test_a_wide_part_does_not_hide_the_loss(tmp_path: Path) -> None:
    """An update that survives in 16-bit tensors does not make up for one that is lost in 8-bit ones."""
    base, adapter = make(tmp_path, 0.01)
    bias = {"diffusion_model.img_in.diff": torch.ones(8, 64)}
    save_file(load_file(adapter) | bias, adapter)
    with pytest.raises(SurgeryError, match="8-bit tensors"):
        merge(base, [adapter], tmp_path / "out.safetensors")


COMFY = json.dumps({"format_version": "1.0", "layers": {TOUCHED: {"format": "float8_e4m3fn"}}})
SHORT = json.dumps({"layers": {TOUCHED.removeprefix("model.diffusion_model."): {"format": "float8_e4m3fn"}}})
ONE = torch.ones(())
SIGNS: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {
    leaf: ({f"{TOUCHED}.{leaf}": ONE}, {})
    for leaf in ("scale_weight", "scale_input", "input_scale", "weight_scale", "weight_scale_inv", "weight_scale_2",
                 "pre_quant_scale")
}  # fmt: skip
SIGNS |= {
    "comfy_quant": ({f"{TOUCHED}.comfy_quant": torch.zeros(8, dtype=torch.uint8)}, {}),
    "scaled_fp8": ({"model.diffusion_model.scaled_fp8": torch.zeros(2, dtype=E4M3)}, {}),
    "_quantization_metadata": ({}, {"_quantization_metadata": COMFY}),
    "_quantization_metadata, short names": ({}, {"_quantization_metadata": SHORT}),
    "_quantization_metadata, broken": ({}, {"_quantization_metadata": "{"}),
}


@pytest.mark.parametrize("sign", SIGNS)
def test_scaled_checkpoints_are_refused(sign: str, tmp_path: Path) -> None:
    """Every sign of a scale is enough, and is named; nothing is written."""
    base, adapter = make(tmp_path, 1.0, extra=SIGNS[sign][0], metadata=SIGNS[sign][1])
    with pytest.raises(UnsupportedError, match=sign.partition(",")[0]) as problem:
        merge(base, [adapter], tmp_path / "out.safetensors")
    assert f"{TOUCHED}.weight" in str(problem.value)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("dtype", [None, "BF16"])
def test_scales_elsewhere_do_no_harm(dtype: str | None, tmp_path: Path) -> None:
    """A scaled tensor that is not touched is copied, scale and all, even with --dtype."""
    metadata = {"_quantization_metadata": json.dumps({"layers": {OTHER: {"format": "float8_e4m3fn"}}})}
    base, adapter = make(tmp_path, 1.0, extra={f"{OTHER}.weight_scale": torch.tensor(0.123456)}, metadata=metadata)
    merge(base, [adapter], tmp_path / "out.safetensors", dtype=dtype)
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    assert all(same_bytes(before[k], after[k]) for k in before if k.startswith(OTHER) and before[k].ndim)
    assert torch.equal(before[f"{OTHER}.weight_scale"], after[f"{OTHER}.weight_scale"])
    assert after[f"{OTHER}.weight_scale"].dtype == torch.float32


# What survives of a rank-16 update, by ‖ΔW‖/‖W‖: in bfloat16, and in a cast to e4m3, whose steps near zero are 2⁻⁹.
SHARES = [(0.001, 0.53, 0.0), (0.01, 1.0, 0.0), (0.03, 1.0, 0.63)]


@pytest.mark.parametrize(("size", "bf16", "e4m3"), SHARES)
def test_what_survives_rounding(size: float, bf16: float, e4m3: float) -> None:
    """The table of what an update of this size leaves in weights of 16 and 8 bits."""
    weight, update = factors(size, (512, 512))
    for dtype, share in ((torch.bfloat16, bf16), (E4M3, e4m3)):
        _, survival = add_updates(weight.to(dtype), [update], dtype)
        assert survival.retention == pytest.approx(share, abs=0.05), dtype


@pytest.mark.parametrize(("size", "share"), [(0.001, 0.04), (0.01, 0.36), (0.03, 0.80)])
def test_what_a_scale_would_save(size: float, share: float) -> None:
    """The same table's scaled column: with the weight stretched to e4m3's range, more of a small update would survive."""
    weight, update = factors(size, (512, 512))
    scale = weight.abs().max() / 448
    stored = (weight / scale).to(E4M3).float()
    after = (stored + update.dense() / scale).clamp(-448, 448).to(E4M3).float()
    moved, delta = (after - stored) * scale, update.dense()
    assert float((moved * delta).sum() / delta.square().sum()) == pytest.approx(share, abs=0.05)


HASHES = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8, "modelspec.hash_sha256": "0x0"}
WORDS = {"modelspec.architecture": "flux", "modelspec.title": "mine", "prompt": '{"3": {}}', "workflow": "{}",
         "sd_merge_recipe": "{}"}  # fmt: skip


def test_untrue_hashes_go_and_other_metadata_stays(tmp_path: Path) -> None:
    """A merged file has no hash of the base's bytes; workflow, prompt and modelspec are word for word what they were."""
    base, adapter = make(tmp_path, 1.0, metadata=HASHES | WORDS)
    for out, options in (("out", {}), ("half", {"dtype": "BF16"})):
        merge(base, [adapter], tmp_path / f"{out}.safetensors", **options)
        with safe_open(tmp_path / f"{out}.safetensors", "pt") as file:
            assert file.metadata() == WORDS


def test_a_file_that_does_not_change_keeps_its_hashes(tmp_path: Path) -> None:
    """Of two shards, only the one that is touched loses its hashes."""
    weight, update = factors(1.0)
    (tmp_path / "base").mkdir()
    shards = {"one": {"a.weight": weight}, "two": {"b.weight": weight.clone()}}
    for name, tensors in shards.items():
        save_file(tensors, tmp_path / f"base/{name}.safetensors", HASHES | WORDS)
    index = {"metadata": {}, "weight_map": {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}}
    (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps(index))
    save_file(
        {"lycoris_a.lora_down.weight": update.down, "lycoris_a.lora_up.weight": update.up}, tmp_path / "l.safetensors"
    )
    merge(tmp_path / "base", [tmp_path / "l.safetensors"], tmp_path / "out")
    for name, words in (("one", WORDS), ("two", HASHES | WORDS)):
        with safe_open(tmp_path / f"out/{name}.safetensors", "pt") as file:
            assert file.metadata() == words

"""LyCORIS's files: whole networks merge as LyCORIS merges them, become LoRA by rerank, or are refused by name."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
from pathlib import Path

import images
import pytest
import rows_lycoris as lyco
import safetensors.torch
import torch
from lycoris.kohya import create_network, create_network_from_weights
from lycoris.modules import (
    ButterflyOFTModule,
    DiagOFTModule,
    DyLoraModule,
    GLoRAModule,
    IA3Module,
    LoConModule,
    LohaModule,
    LokrModule,
    TLoraModule,
)
from references import best
from rows import weights_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorasurgery.errors import FormatError, MismatchError, UnsupportedError
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.blend import BlendOptions, blend, rerank
from lorasurgery.ops.convert import ConvertOptions, convert
from lorasurgery.ops.merge import merge
from lorasurgery.ops.unmerge import unmerge

F32 = torch.float32
LINEAR = f"{lyco.PREFIX}{lyco.LAYERS['linear'][1]}.weight"
CONV = f"{lyco.PREFIX}{lyco.LAYERS['conv 3×3'][1]}.weight"
logging.getLogger("LyCORIS").setLevel(logging.ERROR)


def made(path: Path, cls: type = LohaModule, kind: str = "linear", **options: object) -> tuple[Path, Path]:
    """A base and a LyCORIS file for one of its layers."""
    found = lyco.row_of(cls, kind, options, 1.0, path, F32, F32)
    return found.base, found.adapter


def delta(base: Path, merged: Path, name: str) -> Tensor:
    """What a merge added to one tensor, as a matrix in float64."""
    return (load_file(merged)[name].double() - load_file(base)[name].double()).flatten(1)


def rewrite(file: Path, metadata: dict[str, str] | None = None, **parts: Tensor) -> None:
    """Add or replace tensors of the file's only module."""
    weights = load_file(file)
    stem = next(iter(weights)).partition(".")[0]
    save_file(weights | {f"{stem}.{p.replace('__', '.')}": t for p, t in parts.items()}, file, metadata)


# Networks as they are trained

_CONV, _ATTENTION = "unet-convblock-only", "unet-transformer-only"  # "full" trips over itself in 4.1.3
NETWORKS = {
    "locon": {"algo": "locon", "preset": _CONV, "train_norm": True},
    "loha": {"algo": "loha", "preset": _CONV, "use_tucker": True},
    "lokr": {"algo": "lokr", "preset": _CONV, "factor": 4},
    "full": {"algo": "full", "preset": _ATTENTION, "train_norm": True},
    "dora": {"algo": "locon", "preset": _ATTENTION, "dora_wd": True},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_whole_network(name: str, tmp_path: Path) -> None:
    """A network on a U-Net, with the keys that LyCORIS saves, merges into a diffusers folder as LyCORIS merges it."""
    unet = images.denoiser("sd1")
    pipe = images.save_pipeline(images.pipeline("sd1"), tmp_path / "base")
    network = create_network(1.0, 4, 4, None, [], unet, **NETWORKS[name])
    generator = torch.Generator().manual_seed(1)
    network.apply_to([], unet, False, True)
    for key, p in network.named_parameters():
        p.data += (0.02 if "dora" in key or name == "full" else 0.2) * torch.randn(p.shape, generator=generator)
    network.save_weights(str(tmp_path / "adapter.safetensors"), F32, {"ss_network_module": "lycoris.kohya"})
    fresh = images.denoiser("sd1")
    weights = load_file(tmp_path / "adapter.safetensors")
    again, weights = create_network_from_weights(1.0, None, None, [], fresh, weights)
    again.merge_to([], fresh, weights, F32, "cpu")
    report = merge(pipe, [tmp_path / "adapter.safetensors"], tmp_path / "out")
    before, after = weights_of(pipe), weights_of(tmp_path / "out")
    assert report.totals["tensors_touched"] > 20
    for key, value in fresh.state_dict().items():
        update = (value - before[f"unet.{key}"]).norm()
        assert (after[f"unet.{key}"] - value).norm() <= 1e-6 * max(update, value.norm()), key


@pytest.mark.parametrize("cls", [LohaModule, LokrModule])
def test_what_the_oracle_gets_wrong(cls: type) -> None:
    """LyCORIS 4.1.3 merges LoHa and LoKr with the scale applied twice; its forward, which was trained, applies it once."""
    base = lyco.layer("linear", F32)
    module = lyco.module(cls, base, F32, rank=1, alpha=0.5, factor=4)
    with torch.no_grad():
        ran = (module(torch.eye(24).double()) - base(torch.eye(24).double())).T
        merged = module.get_merged_weight()[0] - base.weight
        assert torch.allclose(merged, 0.5 * ran)
        assert torch.allclose(lyco.merged(module, 1.0)[0] - base.weight, ran)


# What alpha and strength mean


def test_alpha_may_have_a_dimension_or_be_missing(tmp_path: Path) -> None:
    """A scalar, one element, a bfloat16 one: the same; without alpha the scale is 1."""
    base, file = made(tmp_path, LoConModule)
    merge(base, [file], tmp_path / "scalar.safetensors")
    expected = delta(base, tmp_path / "scalar.safetensors", LINEAR)
    for name, alpha in (("one", torch.tensor([2.0])), ("half", torch.tensor(2.0, dtype=torch.bfloat16))):
        rewrite(file, alpha=alpha)
        merge(base, [file], tmp_path / f"{name}.safetensors")
        assert torch.equal(delta(base, tmp_path / f"{name}.safetensors", LINEAR), expected)
    save_file({k: v for k, v in load_file(file).items() if "alpha" not in k}, file)
    merge(base, [file], tmp_path / "none.safetensors")
    assert torch.allclose(delta(base, tmp_path / "none.safetensors", LINEAR), 2 * expected, atol=1e-6)
    rewrite(file, alpha=torch.tensor(math.inf))
    with pytest.raises(FormatError, match="finite number"):
        merge(base, [file], tmp_path / "no.safetensors")


@pytest.mark.parametrize("metadata", [{}, {"alpha": "8"}])
def test_two_whole_halves_have_no_scale(metadata: dict[str, str], tmp_path: Path) -> None:
    """LoKr with w1 and w2 whole is w1 ⊗ w2, whatever alpha says in a tensor or in the header."""
    base, file = made(tmp_path, LokrModule, factor=4, full_matrix=True)
    weights = load_file(file)
    w1, w2 = (next(t for k, t in weights.items() if k.endswith(f"lokr_{w}")).double() for w in ("w1", "w2"))
    for alpha in (0.25, None):
        kept = {k: v for k, v in weights.items() if "alpha" not in k}
        stem = next(iter(kept)).partition(".")[0]
        save_file(kept if alpha is None else kept | {f"{stem}.alpha": torch.tensor(alpha)}, file, metadata)
        merge(base, [file], tmp_path / f"{alpha}.safetensors")
        found = delta(base, tmp_path / f"{alpha}.safetensors", LINEAR)
        assert torch.allclose(found, torch.kron(w1, w2), atol=1e-6)


def test_weight_zero_leaves_an_adapter_out(tmp_path: Path) -> None:
    """Also LyCORIS's DoRA, which at strength 0 would leave W + ΔW; near 0 it does."""
    base, file = made(tmp_path, LoConModule, "square", weight_decompose=True)
    merge(base, [file], tmp_path / "off.safetensors", weights=[0.0])
    before, off = load_file(base), load_file(tmp_path / "off.safetensors")
    assert all(torch.equal(before[k], off[k]) for k in before)
    merge(base, [file], tmp_path / "near.safetensors", weights=[1e-9])
    weights = {k.rpartition(".lora_")[2]: v for k, v in load_file(file).items()}
    name = f"{lyco.PREFIX}{lyco.LAYERS['square'][1]}.weight"
    expected = 0.5 * weights["up.weight"].double() @ weights["down.weight"].double()
    assert torch.allclose(delta(base, tmp_path / "near.safetensors", name), expected, atol=1e-6)


@pytest.mark.parametrize(("cls", "kind", "options"), [
    (LohaModule, "linear", {}), (LokrModule, "conv 3×3", {"factor": 2, "rank": 1}), (LoConModule, "conv 3×3", {"use_tucker": True}),
])  # fmt: skip
def test_unmerge_takes_it_out_again(cls: type, kind: str, options: dict[str, object], tmp_path: Path) -> None:
    """What merge added, at any strength, unmerge subtracts."""
    base, file = made(tmp_path, cls, kind, **options)
    merge(base, [file], tmp_path / "out.safetensors", weights=[0.7])
    unmerge(tmp_path / "out.safetensors", [file], tmp_path / "back.safetensors", weights=[0.7])
    before, after = load_file(base), load_file(tmp_path / "back.safetensors")
    assert all(torch.allclose(before[k], after[k], atol=1e-6) for k in before)


# Refused by name

REFUSED = [(IA3Module, "IA3"), (DiagOFTModule, "OFT or BOFT"), (ButterflyOFTModule, "OFT or BOFT"), (GLoRAModule, "GLoRA"),
           (TLoraModule, "T-LoRA")]  # fmt: skip


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv 3×3"])
@pytest.mark.parametrize(("cls", "name"), REFUSED)
def test_families_that_are_no_sum(cls: type, name: str, kind: str, reverse: bool, tmp_path: Path) -> None:
    """Files that LyCORIS's own modules save are refused with the family's name, whatever the order of their keys."""
    base = lyco.layer(kind, F32).float()
    state = cls("name", base, lora_dim=4, alpha=2.0).state_dict()
    files = lyco.save(tmp_path, kind, base, dict(sorted(state.items(), reverse=reverse)), F32, F32)
    with pytest.raises(UnsupportedError, match=name):
        merge(files.base, [files.adapter], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_dylora_is_stored_as_lora(tmp_path: Path) -> None:
    """DyLoRA's file is a plain LoRA of the full rank."""
    base = nn.Linear(24, 16)
    module = DyLoraModule("name", base, lora_dim=4, alpha=2.0)
    for p in module.parameters():
        nn.init.normal_(p)
    state = {k: v.detach() for k, v in module.state_dict().items()}
    files = lyco.save(tmp_path, "linear", base, state, F32, F32)
    merge(files.base, [files.adapter], tmp_path / "out.safetensors")
    expected = 0.5 * state["lora_up.weight"].double() @ state["lora_down.weight"].double()
    assert torch.allclose(delta(files.base, tmp_path / "out.safetensors", LINEAR), expected, atol=1e-6)


BROKEN = [
    (LohaModule, {"hada_t1": torch.ones(4, 4, 3, 3)}, FormatError, "hada_t2 is missing"),
    (LohaModule, {"hada_w1_b": torch.ones(3, 24)}, MismatchError, "hada_w1_b is 3×24"),
    (LohaModule, {"hada_w2_a": torch.ones(15, 4)}, MismatchError, "two halves"),
    (LohaModule, {"hada_w1_a": torch.ones(16, 4, dtype=torch.int32)}, FormatError, "floating-point"),
    (LohaModule, {"lora_up__weight": torch.ones(16, 4)}, FormatError, "lora_down is missing"),
    (LohaModule, {"lokr_w1": torch.ones(4, 4)}, FormatError, "lokr_w1 is one too many"),
    (LohaModule, {"dora_scale": torch.ones(15, 1)}, MismatchError, "dora_scale is 15×1"),
    (LohaModule, {"dora_scale": torch.ones(1, 7)}, MismatchError, "dora_scale is 1×7"),
    (LoConModule, {"lora_mid__weight": torch.ones(3, 4, 3, 3)}, MismatchError, "lora_mid is 3×4×3×3"),
    (LoConModule, {"dora_scale": torch.ones(16, 1), "lora_magnitude_vector": torch.ones(16)}, FormatError, "which is meant"),
    (LokrModule, {"lokr_w1": torch.ones(5, 4)}, MismatchError, "5×|is an update of"),
    (LokrModule, {"hada_w1_a": torch.ones(5, 4)}, FormatError, "missing"),
    (LoConModule, {"diff_b": torch.ones(15)}, MismatchError, "is an update of 15×1"),
    (LoConModule, {"w_norm": torch.ones(16), "diff": torch.ones(16)}, FormatError, "both change"),
    (LoConModule, {"unheard_of": torch.ones(16)}, FormatError, "not an adapter tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "parts", "error", "words"), BROKEN, ids=[case[3] for case in BROKEN])
def test_contradictions_are_found_in_headers(
    cls: type, parts: dict[str, Tensor], error: type[Exception], words: str, tmp_path: Path
) -> None:
    """Shapes and parts that don't belong together are one line before anything is computed: --dry-run says them too."""
    base, file = made(tmp_path, cls, factor=4)
    rewrite(file, **parts)
    with pytest.raises(error, match=words):
        merge(base, [file], tmp_path / "out.safetensors", dry_run=True)


def test_norms_over_a_layer_in_parts(tmp_path: Path) -> None:
    """A DoRA norm by input runs over all rows of a fused layer; a base that keeps q, k and v apart can't have it."""
    names = [f"transformer_blocks.0.attn.{n}.weight" for n in ("to_q", "to_k", "to_v", "add_q_proj")]
    save_file({n: torch.ones(8, 8) for n in names}, tmp_path / "base.safetensors")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    weights = {f"{stem}.lora_down.weight": torch.ones(2, 8), f"{stem}.lora_up.weight": torch.ones(24, 2)}
    save_file(weights | {f"{stem}.dora_scale": torch.ones(1, 8)}, tmp_path / "in.safetensors")
    with pytest.raises(UnsupportedError, match="norm for each input"):
        merge(tmp_path / "base.safetensors", [tmp_path / "in.safetensors"], tmp_path / "out.safetensors")
    save_file(weights | {f"{stem}.dora_scale": torch.arange(1.0, 25.0)[:, None]}, tmp_path / "by.safetensors")
    merge(tmp_path / "base.safetensors", [tmp_path / "by.safetensors"], tmp_path / "out.safetensors")
    norms = torch.cat([load_file(tmp_path / "out.safetensors")[n].norm(dim=1) for n in names[:3]])
    assert torch.allclose(norms, torch.arange(1.0, 25.0))


def test_norms_of_the_inputs_keep_their_axis(tmp_path: Path) -> None:
    """Of a square layer too, where they are as many as the outputs: rewritten as they were, refused where they can't be."""
    base, file = made(tmp_path, LoConModule, "square", weight_decompose=True, wd_on_out=False)
    convert(file, tmp_path / "new.safetensors", ConvertOptions("kohya"), base=base)
    old, new = load_file(file), load_file(tmp_path / "new.safetensors")
    (key,) = (k for k in old if k.endswith("dora_scale"))
    assert old[key].shape == (1, 16)
    assert torch.equal(new[key], old[key])
    for name in ("adapter", "new"):
        merge(base, [tmp_path / f"{name}.safetensors"], tmp_path / f"{name}-out.safetensors")
    one, two = (load_file(tmp_path / f"{name}-out.safetensors") for name in ("adapter", "new"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    with pytest.raises(UnsupportedError, match="DoRA along the input axis"):
        convert(file, tmp_path / "peft", ConvertOptions("peft"), base=base)


# Turned into LoRA

TURNED = [
    (LoConModule, "linear", {}), (LoConModule, "conv 3×3", {}), (LoConModule, "conv 3×3", {"use_tucker": True}),
    (LohaModule, "linear", {"rank": 2}), (LohaModule, "linear", {"rank": 6}), (LohaModule, "conv 3×3", {}),
    (LohaModule, "conv 3×3", {"use_tucker": True}),
    (LokrModule, "linear", {"factor": 4, "full_matrix": True}), (LokrModule, "linear", {"factor": 2, "rank": 2}),
    (LokrModule, "conv 3×3", {"factor": 2, "rank": 1, "use_tucker": True}),
    (LokrModule, "conv 3×3", {"factor": 4, "full_matrix": True}), (lyco.FullModule, "linear", {}),
    (lyco.FullModule, "conv 3×3", {}),
]  # fmt: skip


@pytest.mark.parametrize("rank", [2, 5, 16])
@pytest.mark.parametrize(("cls", "kind", "options"), TURNED, ids=str)
def test_rerank_is_the_best_approximation(
    cls: type, kind: str, options: dict[str, object], rank: int, tmp_path: Path
) -> None:
    """Of the dense ΔW, to 1e-5; the stated error is that of the factors in the file; at full rank nothing is lost."""
    base, file = made(tmp_path, cls, kind, **options)
    name = LINEAR if kind == "linear" else CONV
    merge(base, [file], tmp_path / "whole.safetensors")
    dense = delta(base, tmp_path / "whole.safetensors", name)
    report = rerank(file, tmp_path / "lora.safetensors", RankChoice(rank=rank))
    merge(base, [tmp_path / "lora.safetensors"], tmp_path / "less.safetensors")
    weights = {k.rpartition(".lora_")[2]: v for k, v in load_file(tmp_path / "lora.safetensors").items()}
    alpha = next(float(v) for k, v in weights.items() if k.endswith("alpha"))
    up, down = weights["up.weight"].double().flatten(1), weights["down.weight"].double().flatten(1)
    found = alpha / up.shape[1] * up @ down
    assert up.shape[1] <= rank
    assert (found - best(dense, rank)).norm() <= 1e-5 * dense.norm()
    assert report.modules[0].error == pytest.approx(float((found - dense).norm() / dense.norm()), abs=2e-6)
    assert (delta(base, tmp_path / "less.safetensors", name) - found).norm() <= 1e-6 * dense.norm()
    if rank == 16:
        assert report.modules[0].error <= 1e-6
    before, after = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "less.safetensors")
    others = [k for k in before if k != name]
    assert all(torch.equal(before[k], after[k]) for k in others)  # diff_b of a full difference among them


def test_what_has_no_rank_goes_along(tmp_path: Path) -> None:
    """Norms, biases and whole tensors are in the new file, unchanged."""
    base, file = made(tmp_path)
    key = lyco.LAYERS["conv 3×3"][2]
    norm, whole = lyco.LAYERS["GroupNorm"][2], lyco.LAYERS["square"][2]
    extra = {f"{norm}.w_norm": torch.ones(16), f"{norm}.b_norm": 2 * torch.ones(16), f"{key}.diff_b": torch.ones(16),
             f"{whole}.set_weight": torch.ones(16, 16)}  # fmt: skip
    save_file(load_file(file) | extra, file)
    rerank(file, tmp_path / "lora.safetensors", RankChoice(rank=16))
    found = load_file(tmp_path / "lora.safetensors")
    assert all(torch.equal(found[k], v) for k, v in extra.items())
    for name in (file, tmp_path / "lora.safetensors"):
        merge(base, [name], tmp_path / f"{name.stem}-out.safetensors")
    one, two = (load_file(tmp_path / f"{n}-out.safetensors") for n in ("adapter", "lora"))
    assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)


@pytest.mark.parametrize("rank", [None, 3])
def test_a_blend_of_families(rank: int | None, tmp_path: Path) -> None:
    """LoHa, LoKr and LoCon on one layer: Σ wᵢ·ΔWᵢ of the dense updates, or the best approximation of it; norms add up too."""
    files, total, weights = [], torch.zeros(16, 24, dtype=torch.float64), (0.7, -0.3, 1.1)
    norm = lyco.LAYERS["GroupNorm"][2]
    for i, (cls, w) in enumerate(zip((LohaModule, LokrModule, LoConModule), weights, strict=True)):
        (tmp_path / str(i)).mkdir()
        base, file = made(tmp_path / str(i), cls, factor=4)
        save_file(load_file(file) | {f"{norm}.w_norm": torch.full((16,), 1.0 + i)}, file)
        merge(base, [file], tmp_path / f"{i}/out.safetensors")
        total += w * delta(base, tmp_path / f"{i}/out.safetensors", LINEAR)
        files.append(file)
    choice = RankChoice(rank=rank) if rank else None
    blend(files, tmp_path / "lora.safetensors", BlendOptions(weights=list(weights), choice=choice))
    merge(base, [tmp_path / "lora.safetensors"], tmp_path / "out.safetensors")
    expected = best(total, rank) if rank else total
    assert (delta(base, tmp_path / "out.safetensors", LINEAR) - expected).norm() <= 1e-5 * total.norm()
    found = load_file(tmp_path / "lora.safetensors")[f"{norm}.w_norm"]
    assert torch.allclose(found, torch.full((16,), 0.7 * 1 - 0.3 * 2 + 1.1 * 3))


# Metadata


def hashes(file: Path) -> tuple[str, str]:
    """sd-scripts' two hashes, written from their description: of the file as it would be with ss_* metadata alone."""
    with safe_open(file, "pt") as opened:
        metadata = {k: v for k, v in opened.metadata().items() if k.startswith("ss_")}
    raw = safetensors.torch.save(load_file(file), metadata)
    data = io.BytesIO(raw)
    start = 8 + int.from_bytes(data.read(8), "little")
    return hashlib.sha256(raw[start:]).hexdigest(), hashlib.sha256(raw[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]


@pytest.mark.parametrize("extra", [16, 400_000])
def test_metadata_is_brought_up_to_date(extra: int, tmp_path: Path) -> None:
    """dim, alpha, args and all hashes say what is in the file now; the rest is word for word what it was.

    The larger file is longer than 1 MiB, where the legacy hash has bytes to read.
    """
    wide = 24
    stem = "lora_unet_down_blocks_0"
    g = torch.Generator().manual_seed(0)
    weights = {f"{stem}_a.hada_w{i}_{s}": torch.randn(*shape, generator=g)
               for i in (1, 2) for s, shape in (("a", (wide, 8)), ("b", (8, wide)))}  # fmt: skip
    weights |= {f"{stem}_c.diff": torch.randn(32, 16, 3, 3, generator=g), f"{stem}_b.lora_down.weight": torch.randn(20, wide, generator=g),
                f"{stem}_b.lora_up.weight": torch.randn(wide, 20, generator=g), f"{stem}_b.alpha": torch.tensor(1.0)}  # fmt: skip
    weights[f"{stem}_norm.w_norm"] = torch.randn(extra, generator=g)
    kept = {"ss_base_model_version": "sd_v1", "modelspec.title": "mine", "ss_training_comment": 'über "x"'}
    old = {"ss_network_dim": "8", "ss_network_alpha": "4.0", "ss_network_module": "lycoris.kohya",
           "ss_network_args": json.dumps({"algo": "loha", "use_tucker": "True", "preset": "full"}),
           "sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8, "modelspec.hash_sha256": "0x00"}  # fmt: skip
    save_file(weights, tmp_path / "in.safetensors", kept | old)
    rerank(tmp_path / "in.safetensors", tmp_path / "out.safetensors", RankChoice(rank=4))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        found = file.metadata()
    assert {k: found[k] for k in kept} == kept
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "4.0")
    args = json.loads(found["ss_network_args"])
    assert args == {"algo": "locon", "preset": "full", "conv_dim": "4", "conv_alpha": "4.0"}
    model, legacy = hashes(tmp_path / "out.safetensors")
    assert (found["sshs_model_hash"], found["sshs_legacy_hash"]) == (model, legacy)
    assert found["modelspec.hash_sha256"] == f"0x{model}"
    assert ((tmp_path / "out.safetensors").stat().st_size > 0x110000) == (extra > 16)


def test_ranks_that_differ_are_dynamic(tmp_path: Path) -> None:
    """sd-scripts' own word for dims that are not all alike."""
    parts = {f"lora_unet_{n}.{k}": t for n, r in (("a", 2), ("b", 3))
             for k, t in (("lora_down.weight", torch.randn(r, 8)), ("lora_up.weight", torch.randn(8, r)))}  # fmt: skip
    save_file(parts, tmp_path / "in.safetensors", {"ss_network_dim": "8"})
    rerank(tmp_path / "in.safetensors", tmp_path / "out.safetensors", RankChoice(rank=8))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "Dynamic"

"""What is stated of an error is what the file has, and a rule that is asked for holds: both found out from the file.

The oracle reads the safetensors and the config and works in float64; nothing of the package takes part in it.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.rank import Budget, RankChoice
from lorasurgery.ops.blend import BlendOptions, blend, rerank
from lorasurgery.ops.convert import ConvertOptions, convert_adapter
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.report import Report

FAR = 1e-6  # of ‖ΔW‖
Q, K, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"
TABLE, CONV = "model.embed_tokens", "vision.patch_embed.proj"
SHAPES = [(40, 24), (24, 40), (1, 30), (30, 1), (6, 6), (210, 200), (3, 2)]


def change(shape: tuple[int, ...], fall: float, floor: float, seed: int, size: float = 1.0) -> Tensor:
    """A difference whose singular values fall by a factor each, down to a floor, in float32."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[0], math.prod(shape[1:])
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in (rows, columns))
    k = min(rows, columns)
    s = size * (fall ** torch.arange(k, dtype=torch.float64)).clamp_min(floor)
    return ((u[:, :k] * s) @ v[:, :k].mT).float().reshape(shape)


def folder(path: Path, tensors: dict[str, Tensor]) -> Path:
    """A checkpoint."""
    path.mkdir(parents=True, exist_ok=True)
    save_file({k: t.contiguous() for k, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    return path


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "adapter_config.json").read_text())


def scale_of(config: dict[str, Any], path: str, rank: int) -> float:
    """alpha/r or alpha/√r of a module, by what the config says of it."""
    found = [a for p, a in config["alpha_pattern"].items() if re.fullmatch(rf"(.*\.)?({p})", path)]
    alpha = found[0] if found else config["lora_alpha"]
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def written(path: Path) -> dict[str, Tensor]:
    """Every module's s·B·A in float64, as (out, in) or the table's orientation, from the file alone."""
    config, tensors = config_of(path), load_file(path / "adapter_model.safetensors")
    found = {}
    for key in tensors:
        match = re.fullmatch(r"base_model\.model\.(.*)\.lora_(embedding_)?A(\.weight)?", key)
        if not match:
            continue
        a, b = (
            tensors[key].double(),
            tensors[key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")],
        )
        product = scale_of(config, match[1], len(a)) * b.double().flatten(1) @ a.flatten(1)
        found[match[1]] = product.mT if match[2] else product
    return found


def check(report: Report, truth: dict[str, Tensor], file: dict[str, Tensor], far: float = FAR) -> None:
    """Every stated error, energy and norm, and the totals, against float64."""
    lost = whole = 0.0
    for line in report.modules:
        delta = truth[line.name].double().flatten(1)
        left = float((delta - file.get(line.name, torch.zeros(()))).norm())
        norm = float(delta.norm())
        assert line.delta_norm == pytest.approx(norm, rel=1e-6), line.name
        assert line.error is not None
        assert abs(line.error * norm - left) <= far * norm, (line.name, line.error, left / norm)
        assert line.energy == pytest.approx(1 - (left / norm) ** 2, abs=4 * far)
        lost, whole = lost + left**2, whole + norm**2
    assert abs(report.totals["error"] - math.sqrt(lost / whole)) <= far
    assert report.totals["energy"] == pytest.approx(1 - lost / whole, abs=4 * far)


def check_rule(report: Report, choice: RankChoice, size: int) -> None:
    """The rule holds for every line, or a warning names what was asked and what was reached."""
    beyond = [m for m in report.modules if not choice.holds(m.error or 0.0)]
    asked = f"tolerance={choice.tolerance}" if choice.tolerance is not None else f"energy={choice.energy}"
    said = [w for w in report.warnings if w.startswith(f"{asked} does not hold in ")]
    assert bool(beyond) == bool(said), (beyond, report.warnings)
    if choice.budget is not None and choice.budget.size is not None:
        assert size <= choice.budget.size


@contextmanager
def workplace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


RULES = st.one_of(
    st.builds(RankChoice, rank=st.integers(1, 50)),
    st.builds(RankChoice, energy=st.sampled_from([0.5, 0.9, 0.999, 0.99999, 1 - 1e-9, 1.0]),
              max_rank=st.sampled_from([None, None, 3])),
    st.builds(RankChoice, tolerance=st.sampled_from([0.3, 0.01, 1.7e-3, 1e-3, 9e-4, 3e-4, 1e-5, 0.0]),
              max_rank=st.sampled_from([None, None, 5])),
    st.builds(RankChoice, budget=st.builds(Budget, size=st.integers(1_800, 40_000))),
)  # fmt: skip
ALPHAS = st.sampled_from([None, None, 1.0, 16.0, 3.7, 32.0, 1e-6, 1e6])
DTYPES = st.sampled_from(["F32", "BF16", "F16"])


def carried_out(choice: RankChoice, run: Any) -> tuple[Report, RankChoice] | None:
    """A report, and the rule that it kept; a budget that is refused names one that is enough."""
    try:
        return run(choice), choice
    except SurgeryError as problem:
        enough = re.search(r"give at least ([\d,]+)", str(problem))
        if enough is None:
            assert re.search(r"do not fit (float16|bfloat16)|which float32 does not hold", str(problem)), problem
            return None
        choice = RankChoice(budget=Budget(int(enough[1].replace(",", ""))))
        return run(choice), choice


EXTRACT = given(
    choice=RULES, alpha=ALPHAS, rslora=st.booleans(), uniform=st.booleans(), dtype=DTYPES,
    svd=st.sampled_from(["auto", "auto", "randomized", "exact"]), shapes=st.tuples(*[st.sampled_from(SHAPES)] * 2),
    fall=st.sampled_from([0.5, 0.8, 1.0]), floor=st.sampled_from([0.0, 2e-4]), size=st.sampled_from([1.0, 1e-3, 300.0]),
)  # fmt: skip


def holds_for_extract(
    choice: RankChoice, alpha: float | None, rslora: bool, uniform: bool, dtype: str, svd: Any,
    shapes: tuple[tuple[int, int], ...], fall: float, floor: float, size: float,
) -> None:  # fmt: skip
    """Rank rules × alpha × rsLoRA × dtype × one rank for all × shapes; linear, convolution and table."""
    truth = {
        name: change(shape, fall, floor, i, size) for i, (name, shape) in enumerate(zip((Q, UP), shapes, strict=True))
    }
    truth |= {TABLE: change((30, 12), fall, floor, 7, size), CONV: change((8, 3, 2, 2), fall, floor, 8, size)}
    options = ExtractOptions(choice, alpha=alpha, rslora=rslora, uniform_rank=uniform, dtype=dtype, svd=svd)
    with workplace() as tmp:
        tuned = folder(tmp / "t", {f"{n}.weight": t for n, t in truth.items()})
        base = folder(tmp / "b", {f"{n}.weight": torch.zeros_like(t) for n, t in truth.items()})

        def run(choice: RankChoice) -> Report:
            now = ExtractOptions(**(vars(options) | {"choice": choice}))
            return extract(base, tuned, tmp / "o", now)

        done = carried_out(choice, run)
        if done is None:
            return
        report, kept = done
        check(report, truth, written(tmp / "o"))
        check_rule(report, kept, (tmp / "o/adapter_model.safetensors").stat().st_size)


test_extract = settings(max_examples=24)(EXTRACT(holds_for_extract))
test_extract_at_length = pytest.mark.slow(settings(max_examples=400)(EXTRACT(holds_for_extract)))


def adapter(
    path: Path, shapes: dict[str, tuple[int, int]], rank: int, dtype: torch.dtype, alpha: float, seed: int
) -> Path:
    """A PEFT adapter of factors whose directions fall in size."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, (out, into) in shapes.items():
        a = torch.randn(rank, into, generator=generator) * 0.7 ** torch.arange(rank)[:, None]
        b = torch.randn(out, rank, generator=generator) * 0.1
        tensors |= {
            f"base_model.model.{name}.lora_A.weight": a.to(dtype),
            f"base_model.model.{name}.lora_B.weight": b.to(dtype),
        }
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted({n.rpartition(".")[2] for n in shapes}),
              "alpha_pattern": {}, "rank_pattern": {}}  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


INPUTS = {Q: (40, 24), K: (3, 5), UP: (24, 60)}
FACTOR_RULES = st.one_of(
    RULES,
    st.none(),
    st.builds(RankChoice, sv_ratio=st.sampled_from([2.0, 100.0])),
    st.builds(RankChoice, sv_cumulative=st.sampled_from([0.5, 0.99])),
)
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


RERANK = given(
    choice=FACTOR_RULES, own=DTYPES, dtype=st.sampled_from([None, "F32", "BF16", "F16"]), uniform=st.booleans(),
    alpha=st.sampled_from([1.0, 8.0, 3.3, 1e-3]), rank=st.sampled_from([1, 8, 24]),
)  # fmt: skip


def holds_for_rerank(
    choice: RankChoice | None, own: str, dtype: str | None, uniform: bool, alpha: float, rank: int
) -> None:
    """Every rule of factors, what goes in and what comes out in any dtype."""
    with workplace() as tmp:
        source = adapter(tmp / "a", INPUTS, rank, TORCH[own], alpha, 3)
        done = carried_out(choice, lambda c: rerank(source, tmp / "o", c, uniform_rank=uniform, dtype=dtype))  # type: ignore[arg-type]
        if done is None:
            return
        check(done[0], written(source), written(tmp / "o"))
        if done[1] is not None:
            check_rule(done[0], done[1], (tmp / "o/adapter_model.safetensors").stat().st_size)


test_rerank = settings(max_examples=24)(RERANK(holds_for_rerank))
test_rerank_at_length = pytest.mark.slow(settings(max_examples=300)(RERANK(holds_for_rerank)))


LINEAR_BLEND = given(
    choice=FACTOR_RULES, dtypes=st.tuples(DTYPES, DTYPES), dtype=st.sampled_from([None, "F32", "BF16", "F16"]),
    weights=st.sampled_from([(1.0, 1.0), (0.3, -1.7), (1.0, -0.999), (1e-3, 1e3)]), uniform=st.booleans(),
    ranks=st.sampled_from([(4, 9), (1, 1), (24, 20), (150, 140)]), alpha=st.sampled_from([8.0, 3.3]),
)  # fmt: skip


def holds_for_linear_blend(
    choice: RankChoice | None, dtypes: tuple[str, str], dtype: str | None, weights: tuple[float, float], uniform: bool,
    ranks: tuple[int, int], alpha: float,
) -> None:  # fmt: skip
    """Sums, of terms that nearly cancel too, and of so many directions that float32 tells the leading ones."""
    with workplace() as tmp:
        names = ("a", "b")
        sources = [
            adapter(tmp / n, INPUTS, r, TORCH[d], alpha, 3) for n, r, d in zip(names, ranks, dtypes, strict=True)
        ]
        options = BlendOptions(choice=choice, weights=weights, uniform_rank=uniform, dtype=dtype)
        parts = [written(s) for s in sources]
        truth = {n: sum(w * p[n] for w, p in zip(weights, parts, strict=True)) for n in INPUTS}

        def run(choice: RankChoice) -> Report:
            return blend(sources, tmp / "o", BlendOptions(**(vars(options) | {"choice": choice})))

        done = carried_out(choice, run)  # type: ignore[arg-type]
        if done is None:
            return
        check(done[0], truth, written(tmp / "o"))  # type: ignore[arg-type]
        if done[1] is not None:
            check_rule(done[0], done[1], (tmp / "o/adapter_model.safetensors").stat().st_size)


test_linear_blend = settings(max_examples=16)(LINEAR_BLEND(holds_for_linear_blend))
test_linear_blend_at_length = pytest.mark.slow(settings(max_examples=200)(LINEAR_BLEND(holds_for_linear_blend)))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("rank", [4, 60])
def test_many_terms_and_few_directions(rank: int, dtype: str, tmp_path: Path) -> None:
    """Where float32 finds the leading directions of many, the error is told in float64 all the same."""
    sources = []
    for i in range(2):
        generator, path = torch.Generator().manual_seed(i), tmp_path / f"a{i}"
        adapter(path, {Q: (420, 400)}, 150, torch.float32, 8.0, i)
        tensors = {
            k: torch.randn(t.shape, generator=generator)
            for k, t in load_file(path / "adapter_model.safetensors").items()
        }
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        sources.append(path)
    truth = {Q: sum(written(s)[Q] for s in sources)}
    for choice in (RankChoice(rank=rank), RankChoice(energy=0.5, max_rank=rank)):
        report = blend(sources, tmp_path / "o", BlendOptions(choice=choice, dtype=dtype), overwrite=True)
        check(report, truth, written(tmp_path / "o"))  # type: ignore[arg-type]
        check_rule(report, choice, 0)


@pytest.mark.parametrize("choice", [None, RankChoice(rank=5), RankChoice(energy=0.9), RankChoice(budget=Budget(9_000))],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("method", ["ties", "magnitude-prune", "dare-linear", "knots-ties"])
def test_other_blends(method: Any, choice: RankChoice | None, tmp_path: Path) -> None:
    """What the result is of is the same blend at its full rank in float32."""
    sources = [adapter(tmp_path / n, INPUTS, r, torch.float32, 5.0, r) for n, r in (("a", 4), ("b", 7))]
    options = BlendOptions(method=method, weights=(0.7, -1.1))
    whole = {} if method == "knots-ties" else {"choice": RankChoice(rank=60)}
    blend(sources, tmp_path / "whole", BlendOptions(**(vars(options) | whole)))
    for dtype in TORCH:
        now = BlendOptions(**(vars(options) | {"choice": choice, "dtype": dtype}))
        report = blend(sources, tmp_path / "o", now, overwrite=True)
        check(report, written(tmp_path / "whole"), written(tmp_path / "o"), 2 * FAR)
        if choice is not None:
            check_rule(report, choice, (tmp_path / "o/adapter_model.safetensors").stat().st_size)


CONVERT = given(
    own=DTYPES, dtype=st.sampled_from([None, "F32", "BF16", "F16"]), portable=st.booleans(),
       alpha=st.sampled_from([1.0, 8.0, 3.3, 1e-3]), rank=st.sampled_from([1, 8]),
)  # fmt: skip


def holds_for_convert(own: str, dtype: str | None, portable: bool, alpha: float, rank: int) -> None:
    """Casts, and scales that are rounded into lora_B after them."""
    with workplace() as tmp:
        source = adapter(tmp / "a", INPUTS, rank, TORCH[own], alpha, 3)
        report = convert_adapter(source, tmp / "o", ConvertOptions("peft", portable=portable, dtype=dtype))
        check(report, written(source), written(tmp / "o"))


test_convert = settings(max_examples=12)(CONVERT(holds_for_convert))
test_convert_at_length = pytest.mark.slow(settings(max_examples=100)(CONVERT(holds_for_convert)))


@pytest.mark.parametrize("rank", [1, 3, None])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("form", ["hada", "diff"])
def test_parts_of_what_has_no_factors(form: str, dtype: str, rank: int | None, tmp_path: Path) -> None:
    """q, k and v are cut out of one LoHa, or of one whole difference: each of them has an error of its own."""
    names = [f"transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k", "to_v")]
    more = [f"transformer_blocks.0.attn.{n}" for n in ("add_q_proj", "to_out.0", "to_add_out")]
    save_file({f"{n}.weight": torch.ones(8, 10) for n in (*names, *more)}, tmp_path / "base.safetensors")
    generator = torch.Generator().manual_seed(4)
    random = {n: torch.randn(s, generator=generator) for n, s in (
        ("w1_a", (24, 2)), ("w1_b", (2, 10)), ("w2_a", (24, 2)), ("w2_b", (2, 10)))}  # fmt: skip
    random["w1_a"][8:16] *= 30  # k is much larger than the others
    whole = (random["w1_a"].double() @ random["w1_b"].double()) * (random["w2_a"].double() @ random["w2_b"].double())
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    weights = {f"{stem}.hada_{n}": t for n, t in random.items()} if form == "hada" else {f"{stem}.diff": whole.float()}
    save_file(weights, tmp_path / "in.safetensors")
    options = ConvertOptions("diffusers", dtype=dtype, rank=rank)
    report = convert_adapter(
        tmp_path / "in.safetensors", tmp_path / "o.safetensors", options, base=tmp_path / "base.safetensors"
    )
    file = load_file(tmp_path / "o.safetensors")
    truth, found = {}, {}
    for i, (line, name) in enumerate(zip(report.modules, names, strict=True)):
        key = next(k for k in file if name in k and "lora_A" in k)
        assert name in line.name
        truth[line.name] = whole[8 * i : 8 * i + 8]
        found[line.name] = file[key.replace("lora_A", "lora_B")].double() @ file[key].double()
    check(report, truth, found)

"""Numbers at the edges of their dtypes: what comes out is right to float64, or one line names the tensor and why not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_stated_errors import CONV, INPUTS, TABLE, Q, adapter, change, check, folder, written
from torch import Tensor

from lorasurgery.cli.main import main
from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.blend import BlendOptions, blend, rerank
from lorasurgery.ops.convert import ConvertOptions, convert_adapter
from lorasurgery.ops.diff import diff
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.inspect import inspect
from lorasurgery.ops.merge import merge
from lorasurgery.ops.unmerge import unmerge
from lorasurgery.ops.verify import verify

FIT = r"layers\.0\.\w+\.\w+(\.weight)?: the factors do not fit float16( at a scale of \S+)?: their numbers would be about \S+; try"
HELD = r"q_proj\.weight: alpha makes the scale \S+, which float32 does not hold; try another alpha"


def pair(tmp: Path, delta: Tensor, dtype: torch.dtype) -> tuple[Path, Path]:
    """A checkpoint of zeros and one of a difference."""
    tensors = {f"{Q}.weight": delta.to(dtype)}
    return folder(tmp / "b", {k: torch.zeros_like(t) for k, t in tensors.items()}), folder(tmp / "t", tensors)


def extracted(tmp: Path, delta: Tensor, stored: torch.dtype, **options: Any) -> None:
    """Extract and hold every number against the file."""
    base, tuned = pair(tmp, delta, stored)
    report = extract(base, tuned, tmp / "o", ExtractOptions(RankChoice(rank=8), **options))
    check(report, {Q: delta.to(stored)}, written(tmp / "o"))
    assert report.totals["error"] < 0.1


@pytest.mark.parametrize("svd", ["auto", "exact", "randomized"])
@pytest.mark.parametrize("size", [1e38, 1e30, 1e25, 1e20, 1e-20, 1e-30, 1e-38, 1e-42])
def test_extract_of_any_size(size: float, svd: str, tmp_path: Path) -> None:
    """Squares of these numbers are none in float32: errors, norms and energies are right all the same."""
    shape = (300, 280) if svd == "randomized" else (40, 24)
    extracted(tmp_path, change(shape, 0.7, 0.0, 1).double() * size, torch.float32, svd=svd)


@pytest.mark.parametrize("size", [1e38, 1e-38, 1e100, 1e-100])
def test_extract_of_any_dtype(size: float, tmp_path: Path) -> None:
    """bfloat16 goes as far as float32, float64 further."""
    dtype = torch.bfloat16 if abs(math.log10(size)) < 40 else torch.float64
    extracted(tmp_path, change((40, 24), 0.7, 0.0, 1).double() * size, dtype)


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_beyond_all_measure(size: float, tmp_path: Path) -> None:
    """One line, with the tensor and the number."""
    base, tuned = pair(tmp_path, change((9, 7), 0.7, 0.0, 1).double() * size, torch.float64)
    with pytest.raises(SurgeryError, match=r"q_proj\.weight: the difference has numbers up to \S+, which are beyond"):
        extract(base, tuned, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_difference_that_float32_does_not_hold(tmp_path: Path) -> None:
    """Both sides are finite, so it is not said that they hold infinity; left out by name, the rest is extracted."""
    far = {f"{Q}.weight": torch.full((8, 8), 3e38), f"{TABLE}.weight": torch.ones(9, 8)}
    base = folder(tmp_path / "b", far)
    tuned = folder(tmp_path / "t", {f"{Q}.weight": -far[f"{Q}.weight"], f"{TABLE}.weight": 2 * torch.ones(9, 8)})
    with pytest.raises(
        SurgeryError, match=r"q_proj\.weight: the two checkpoints are further apart than float32 can tell"
    ):
        extract(base, tuned, tmp_path / "o")
    from lorasurgery.ops.extraction.options import Selection

    extract(base, tuned, tmp_path / "o", ExtractOptions(selection=Selection(exclude=("q_proj",))))


@pytest.mark.parametrize("size", [1e6, 1e9, 1e10, 1e-6, 1e-8])
@pytest.mark.parametrize("shape", [(40, 24), (1, 400), (400, 1)])
def test_float16_by_balance(size: float, shape: tuple[int, int], tmp_path: Path) -> None:
    """A power of two goes over to the other side where one would overflow."""
    if max(shape) == 400 and size == 1e10:
        size = 3e9
    extracted(tmp_path, change(shape, 0.7, 0.0, 1).double() * size, torch.float32, dtype="F16")


def test_float16_that_nothing_can_balance(tmp_path: Path) -> None:
    """The size is said, and what holds it."""
    base, tuned = pair(tmp_path, change((40, 24), 0.7, 0.0, 1) * 1e14, torch.float32)
    with pytest.raises(SurgeryError, match=FIT):
        extract(base, tuned, tmp_path / "o", ExtractOptions(dtype="F16"))
    extract(base, tuned, tmp_path / "o", ExtractOptions(dtype="F32"))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("alpha", [1e300, 1e38, 1e12, 1e-12, 1e-36, 1e-40, 1e-300, 5e-324])
def test_alpha(alpha: float, dtype: str, tmp_path: Path) -> None:
    """Right, or refused: a scale that float32 has not, or factors that float16 has not."""
    delta = change((40, 24), 0.7, 0.0, 1)
    if 1e-37 < alpha < 1e39 and (dtype != "F16" or alpha == 1e12):
        extracted(tmp_path, delta, torch.float32, dtype=dtype, alpha=alpha)
        return
    base, tuned = pair(tmp_path, delta, torch.float32)
    with pytest.raises(SurgeryError, match=FIT if 1e-37 < alpha < 1e39 else HELD):
        extract(base, tuned, tmp_path / "o", ExtractOptions(dtype=dtype, alpha=alpha))


def scaled(path: Path, size: float, rank: int = 6, alpha: float = 4.0) -> Path:
    """An adapter with both factors of a size."""
    adapter(path, INPUTS, rank, torch.float32, alpha, 1)
    tensors = {k: t * size for k, t in load_file(path / "adapter_model.safetensors").items()}
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("dtype", [None, "BF16", "F16"])
@pytest.mark.parametrize("size", [1e18, 1e15, 1e-15, 1e-18])
def test_rerank_and_convert(size: float, dtype: str | None, tmp_path: Path) -> None:
    """float16 has none of these, and says so; the others are right."""
    source = scaled(tmp_path / "a", size)
    runs: list[Callable[[Path], Any]] = [
        lambda out: rerank(source, out, RankChoice(rank=3), dtype=dtype),
        lambda out: convert_adapter(source, out, ConvertOptions("peft", portable=True, dtype=dtype)),
    ]
    for i, run in enumerate(runs):
        if dtype == "F16":
            with pytest.raises(SurgeryError, match=FIT):
                run(tmp_path / f"o{i}")
        else:
            check(run(tmp_path / f"o{i}"), written(source), written(tmp_path / f"o{i}"))


@pytest.mark.parametrize(("alpha", "words"), [
    (1e300, r"_proj: its update has a norm of about \S+, which is beyond what can be computed with"),
    (-1e300, r"_proj: its update has a norm of about \S+, which is beyond what can be computed with"),
    (1e-300, r"_proj: its update has a norm of about \S+, which is beyond what can be computed with"),
    (1e100, r"_proj: the factors do not fit float32: their numbers would be about \S+"),
    (1e-100, r"_proj: the factors do not fit float32: their numbers would be about \S+"),
])  # fmt: skip
def test_rerank_of_any_alpha(alpha: float, words: str, tmp_path: Path) -> None:
    """rerank writes scale 1, so the factors must hold it; nothing vanishes in silence."""
    source = adapter(tmp_path / "a", INPUTS, 6, torch.float32, alpha, 1)
    with pytest.raises(SurgeryError, match=words):
        rerank(source, tmp_path / "o", RankChoice(rank=3))


@pytest.mark.parametrize(
    "method", ["linear", "cat", "ties", "dare-linear", "dare-ties", "knots-ties", "magnitude-prune"]
)
@pytest.mark.parametrize("weight", [1e300, 1e30, 1e-30, 1e-300, 5e-324])
def test_blend_of_any_weight(weight: float, method: Any, tmp_path: Path) -> None:
    """A norm that is right, or one line."""
    source, one = scaled(tmp_path / "a", 1.0), (1.0, 1.0)
    plain = blend([source, source], tmp_path / "one", BlendOptions(method=method, weights=one)).totals["delta_norm"]
    try:
        report = blend([source, source], tmp_path / "o", BlendOptions(method=method, weights=(weight, weight)))
    except SurgeryError as problem:
        assert abs(math.log10(weight)) > 100
        words = "beyond what can be computed with|do not fit float32|beyond what float32 holds|is zero in every module"
        assert re.search(words, str(problem))
        return
    assert report.totals["delta_norm"] == pytest.approx(weight * plain, rel=1e-5)
    assert load_file(tmp_path / "o/adapter_model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "step"), [(1e30, 1e15), (1e36, 1e18), (1e-30, 1e-15), (1e-37, 1e-18), (1.0, 1e15)])
def test_merge_and_back(size: float, step: float, dtype: torch.dtype, tmp_path: Path) -> None:
    """Norm and retention are those of float64, verify knows the merge, and unmerge has the base's bytes."""
    base = folder(tmp_path / "b", {f"{n}.weight": (torch.randn(s) * size).to(dtype) for n, s in INPUTS.items()})
    source = scaled(tmp_path / "a", step)
    report = merge(base, [source], tmp_path / "m", undo=True)
    before, after = (load_file(tmp_path / p / "model.safetensors") for p in ("b", "m"))
    for line in report.modules:
        delta = written(source)[line.name.removesuffix(".weight")]
        name = line.name if line.name in after else f"{line.name}.weight"
        made = after[name].double() - before[name].double()
        assert line.delta_norm == pytest.approx(float(delta.norm()), rel=1e-3)
        assert line.retention == pytest.approx(float((made * delta).sum() / delta.square().sum()), rel=1e-3)
    assert verify(tmp_path / "m", against=base, adapters=[source]).totals["equal"] == "bits"
    unmerge(tmp_path / "m", [source], tmp_path / "u")
    assert all(torch.equal(t, before[k]) for k, t in load_file(tmp_path / "u/model.safetensors").items())


def test_an_update_that_is_lost_far_out(tmp_path: Path) -> None:
    """Rounding swallows it: that is found out where squares overflow, too."""
    base = folder(tmp_path / "b", {f"{n}.weight": torch.full(s, 1e30).bfloat16() for n, s in INPUTS.items()})
    with pytest.raises(SurgeryError, match="of the update, so the result would hardly differ from the base"):
        merge(base, [scaled(tmp_path / "a", 1e12)], tmp_path / "m")


@pytest.mark.parametrize("weight", [1e39, 1e300, -1e300])
def test_merge_of_any_weight(weight: float, tmp_path: Path) -> None:
    """Of two adapters, the second of which is added to what is there already."""
    base = folder(tmp_path / "b", {f"{n}.weight": torch.zeros(s) for n, s in INPUTS.items()})
    source = scaled(tmp_path / "a", 1.0)
    with pytest.raises(SurgeryError, match=r"_proj\.weight: the merged values are not finite in float32"):
        merge(base, [source, source], tmp_path / "m", weights=[1.0, weight])


@pytest.mark.parametrize("size", [3e38, 1e30, 1e-30, 1e-42])
def test_diff_and_inspect(size: float, tmp_path: Path) -> None:
    """Norms beside float64's, two numbers of other signs at the far ends of float32 among them."""
    one = {f"{CONV}.weight": torch.full((8, 3, 2, 2), size), f"{Q}.weight": torch.full((4, 4), -size)}
    a, b = folder(tmp_path / "a", one), folder(tmp_path / "b", {k: -t for k, t in one.items()})
    report = diff(a, b)
    for line in report.modules:
        wide = next(t for k, t in one.items() if k.startswith(line.name)).double()
        assert line.norm == pytest.approx(float(wide.norm()), rel=1e-6)
        assert line.delta_norm == pytest.approx(2 * float(wide.norm()), rel=1e-6)
    assert report.totals["relative"] == pytest.approx(2.0)
    assert not report.warnings
    if 1e-37 < size < 1e37:
        found = inspect(scaled(tmp_path / "x", math.sqrt(size)), spectrum=True)
        for spectrum in found.modules:
            wanted = float(written(tmp_path / "x")[spectrum.name].norm())
            assert spectrum.delta_norm == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("arguments", [
    ["--alpha", "1e300"], ["--alpha", "1e-300"], ["--alpha", "nan"], ["--alpha", "inf"], ["--alpha", "-1"], ["--alpha", "0"],
    ["--rank", "0"], ["--rank", "99999999999999999999999"], ["--max-rank", "-1"], ["--energy", "nan"], ["--energy", "0"],
    ["--energy", "1.5"], ["--tolerance", "nan"], ["--tolerance", "-0.1"], ["--tolerance", "1"], ["--budget", "0"],
    ["--budget", "1B"], ["--budget", "1e-9%"], ["--budget", "0.0000001%"], ["--budget", "99999999999999999999TB"],
    ["--seed", "99999999999999999999999"], ["--seed", "-99999999999999999999999"],
])  # fmt: skip
def test_numbers_on_the_command_line(arguments: list[str], tmp_path: Path) -> None:
    """Each is taken, or refused in one line in our own words."""
    base, tuned = pair(tmp_path, change((210, 200), 0.9, 0.0, 1), torch.float32)
    found = CliRunner().invoke(main, ["extract", str(base), str(tuned), "-o", str(tmp_path / "o"), *arguments])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    if found.exit_code:
        assert not re.search(
            r"Error:.*Error|_LinAlg|OverflowError|RuntimeError|Traceback|fault of lorasurgery", found.output
        )
        assert not (tmp_path / "o").exists()

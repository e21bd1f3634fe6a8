"""The command line as a person or a script meets it: JSON, exit statuses, one-line errors, no torch for --help."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

REQUIRED = {"command", "version", "inputs", "output", "device", "seconds", "bytes_read", "bytes_written",
            "peak_memory_bytes", "totals", "modules"}  # fmt: skip


def lorasurgery(*words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the program as a process of its own."""
    command = [sys.executable, "-m", "lorasurgery", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=1200)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned, and an adapter extracted from them, for all tests of this file to read."""
    root = tmp_path_factory.mktemp("world")
    models.save(models.make("llama"), root / "base")
    models.save(models.perturb(models.make("llama")), root / "tuned")
    done = lorasurgery("extract", root / "base", root / "tuned", "-o", root / "adapter", "--rank", "4", "--json")
    assert done.returncode == 0, done.stderr
    return root


def test_json_is_one_object_and_nothing_else(world: Path, tmp_path: Path) -> None:
    """--json prints one report with the contract's fields on stdout; no progress goes to stderr."""
    for words in (
        ("extract", world / "base", world / "tuned", "-o", tmp_path / "a", "--rank", "4"),
        ("merge", world / "base", world / "adapter", "-o", tmp_path / "m"),
        ("unmerge", tmp_path / "m", world / "adapter", "-o", tmp_path / "u", "--base", world / "base"),
        ("rerank", world / "adapter", "-o", tmp_path / "r", "--rank", "2"),
        ("blend", world / "adapter", tmp_path / "r", "-o", tmp_path / "l", "-w", "1", "-w", "-0.5"),
        ("convert", world / "adapter", "-o", tmp_path / "c", "--to", "peft", "--base", world / "base"),
    ):
        done = lorasurgery(*words, "--json")
        report = json.loads(done.stdout)
        assert report.keys() >= REQUIRED
        assert report["command"] == words[0]
        assert report["bytes_written"] == sum(
            f.stat().st_size for f in Path(report["output"]).rglob("*") if f.is_file()
        )
        assert report["bytes_read"] > 0
        assert report["peak_memory_bytes"] > 0
        assert done.stderr == ""
    module = json.loads(lorasurgery("extract", world / "base", world / "tuned", "-o", tmp_path / "b", "--json").stdout)[
        "modules"
    ][0]
    assert module.keys() >= {"name", "shape", "rank", "alpha", "delta_norm", "error", "energy"}


def test_progress_is_plain_lines_off_a_terminal(world: Path, tmp_path: Path) -> None:
    """stderr that is not a terminal gets plain lines without escapes; stdout the table and the summary."""
    done = lorasurgery("merge", world / "base", world / "adapter", "-o", tmp_path / "m", NO_COLOR="1")
    assert "merge: " in done.stderr
    assert "MB" in done.stderr
    assert "\x1b" not in done.stderr + done.stdout
    assert "of the update is in the weights" in done.stdout
    assert lorasurgery("merge", world / "base", world / "adapter", "-o", tmp_path / "q", "-q").stdout == ""


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["-h"],
        ["--version"],
        ["extract", "--help"],
        ["merge", "-h"],
        ["unmerge", "-h"],
        ["rerank", "-h"],
        ["blend", "-h"],
        ["inspect", "-h"],
        ["diff", "-h"],
        ["convert", "-h"],
        ["check", "-h"],
        ["plan", "-h"],
        ["push", "-h"],
    ],
)
def test_help_does_not_import_torch(words: list[str]) -> None:
    """Help and version answer at once: torch, numpy and rich stay out."""
    script = (
        "import sys; from lorasurgery.cli.main import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'rich', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    assert done.stdout


def test_dry_run_reads_headers_without_torch_and_writes_nothing(world: Path, tmp_path: Path) -> None:
    """--dry-run plans every command from headers: no torch, no output, the same checks."""
    for words in (
        ["extract", world / "base", world / "tuned", "-o", tmp_path / "o", "--rank", "4"],
        ["merge", world / "base", world / "adapter", "-o", tmp_path / "o"],
        ["unmerge", world / "base", world / "adapter", "-o", tmp_path / "o"],
        ["rerank", world / "adapter", "-o", tmp_path / "o", "--budget", "25%"],
        ["blend", world / "adapter", world / "adapter", "-o", tmp_path / "o", "--method", "ties"],
        ["convert", world / "adapter", "-o", tmp_path / "o", "--to", "peft", "--base", world / "base"],
    ):
        script = (
            "import sys; from lorasurgery.cli.main import main\n"
            f"try: main({[str(w) for w in words] + ['--dry-run', '--json']!r})\nexcept SystemExit as e: assert not e.code, e.code\n"
            "assert 'torch' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["dry_run"] is True
        assert not (tmp_path / "o").exists()


def test_inspect_reads_headers_without_torch(world: Path) -> None:
    """inspect says what an adapter is from its header and config alone."""
    script = (
        "import sys; from lorasurgery.cli.main import main\n"
        f"try: main(['inspect', {str(world / 'adapter')!r}, '--json'])\nexcept SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["totals"]["modules"] == len(report["modules"])
    assert report["totals"]["format"] == "peft"


def test_spectrum_and_diff(world: Path, tmp_path: Path) -> None:
    """The numbers are in the JSON, the tables on the screen; neither writes anything."""
    assert lorasurgery("rerank", world / "adapter", "-o", tmp_path / "r", "--rank", "2").returncode == 0
    report = json.loads(lorasurgery("inspect", world / "adapter", "--spectrum", "--json").stdout)
    module = report["modules"][0]
    assert module.keys() >= {"singular_values", "effective_rank", "stable_rank", "energy_at"}
    assert module["energy_at"].keys() == {"4", "8", "16", "32", "64"}
    found = json.loads(lorasurgery("diff", world / "adapter", tmp_path / "r", "--json").stdout)
    assert found["totals"].keys() >= {"cosine", "norm_ratio", "overlap", "shared"}
    assert found["modules"][0].keys() >= {"cosine", "norm_ratio", "overlap", "angles"}
    screen = lorasurgery("inspect", world / "adapter", "--spectrum").stdout
    assert all(word in screen for word in ("effective", "stable", "e16", "q_proj"))
    screen = lorasurgery("diff", world / "adapter", tmp_path / "r").stdout
    assert all(word in screen for word in ("cosine", "overlap", "angles", "column spaces"))


@pytest.mark.parametrize(
    ("words", "ranks"),
    [(["--rank", "3"], {3}), (["--max-rank", "2"], {2}), (["--energy", "1"], {4}), (["--uniform-rank"], {4}),
     (["--tolerance", "0.9", "--max-rank", "1"], {1}), (["--sv-fro", "1"], {4}), (["--sv-ratio", "1000"], {4}),
     (["--sv-cumulative", "1", "--max-rank", "3"], {3})],
    ids=str,
)  # fmt: skip
def test_rank_options(world: Path, tmp_path: Path, words: list[str], ranks: set[int]) -> None:
    """Each rule through the command line."""
    report = json.loads(lorasurgery("rerank", world / "adapter", "-o", tmp_path / "o", *words, "--json").stdout)
    assert {m["rank"] for m in report["modules"]} == ranks


def test_check_tells_by_its_exit_status(world: Path) -> None:
    """0 when the server takes it as it is meant, 1 when not, with what mends it; without torch."""
    assert lorasurgery("check", world / "adapter", "--for", "peft", "--base", world / "base").returncode == 0
    done = lorasurgery("check", world / "adapter", "--for", "llama.cpp")
    assert done.returncode == 1
    assert "dropped: base_model.model.model.layers.0.input_layernorm.weight and 4" in done.stdout
    assert "lorasurgery merge" in done.stdout
    assert json.loads(lorasurgery("check", world / "adapter", "--for", "vllm", "--json").stdout)["totals"]["findings"]


@pytest.mark.parametrize("words", [["rerank"], ["blend"], ["extract"]])
@pytest.mark.parametrize("budget", ["20KB", "0.3", "30%"])
def test_budgets(world: Path, tmp_path: Path, words: list[str], budget: str) -> None:
    """As a size and as a share; what is written fits."""
    inputs = [world / "adapter"] if words != ["extract"] else [world / "base", world / "tuned"]
    done = lorasurgery(*words, *inputs, "-o", tmp_path / "o", "--budget", budget, "--json")
    assert done.returncode == 0, done.stderr
    whole = "base/model.safetensors" if words == ["extract"] else "adapter/adapter_model.safetensors"
    allowed = 20_000 if budget == "20KB" else 0.3 * (world / whole).stat().st_size
    assert (tmp_path / "o/adapter_model.safetensors").stat().st_size <= allowed


def broken(world: Path, tmp: Path, case: str) -> list[str | Path]:
    """The arguments of one bad call, with the files it needs."""
    base, tuned, adapter, out = world / "base", world / "tuned", world / "adapter", tmp / "out"
    bad = tmp / "bad"

    def copy(source: Path, **changes: Any) -> Path:
        bad.mkdir()
        for file in source.iterdir():
            (bad / file.name).write_bytes(file.read_bytes())
        for name, content in changes.items():
            (bad / name.replace("__", ".")).write_bytes(content)
        return bad

    def config(**changes: Any) -> Path:
        found = json.loads((adapter / "adapter_config.json").read_text()) | changes
        return copy(adapter, adapter_config__json=json.dumps(found).encode())

    def tensors(source: Path, file: str, change: Any) -> Path:
        copy(source)
        weights = load_file(bad / file)
        change(weights)
        save_file(weights, bad / file)
        return bad

    weights = "adapter_model.safetensors"
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    merge: list[str | Path] = ["merge", base]
    blend: list[str | Path] = ["blend", adapter, adapter, "-o", out]
    rerank: list[str | Path] = ["rerank", adapter, "-o", out]
    extract: list[str | Path] = ["extract", base, tuned, "-o", out]
    cases: dict[str, Any] = {
        # arguments
        "no arguments": lambda: ["merge"],
        "no output": lambda: [*merge, adapter],
        "no adapter": lambda: ["merge", base, "-o", out],
        "unknown command": lambda: ["mrege", base],
        "unknown option": lambda: [*merge, adapter, "-o", out, "--wieght", "1"],
        "weight no number": lambda: [*merge, adapter, "-o", out, "-w", "much"],
        "weight nan": lambda: [*merge, adapter, "-o", out, "-w", "nan"],
        "weight inf": lambda: [*merge, adapter, "-o", out, "-w", "-inf"],
        "more weights than adapters": lambda: [*merge, adapter, "-o", out, "-w", "1", "-w", "1"],
        "unknown dtype": lambda: [*merge, adapter, "-o", out, "--dtype", "int3"],
        "adapter in fp8": lambda: [*extract, "--dtype", "float8_e4m3fn"],
        "unknown rounding": lambda: [*merge, adapter, "-o", out, "--rounding", "up"],
        "unknown device": lambda: [*merge, adapter, "-o", out, "--device", "tpu"],
        "device not there": lambda: [*merge, adapter, "-o", out, "--device", "cuda:99"],
        "shard size": lambda: [*merge, adapter, "-o", out, "--max-shard-size", "big"],
        "rank and energy": lambda: [*extract, "--rank", "4", "--energy", "0.9"],
        "rank 0": lambda: [*extract, "--rank", "0"],
        "energy 2": lambda: [*extract, "--energy", "2"],
        "energy nan": lambda: [*extract, "--energy", "nan"],
        "tolerance -1": lambda: [*extract, "--tolerance", "-1"],
        "max-rank 0": lambda: [*extract, "--energy", "0.5", "--max-rank", "0"],
        "alpha 0": lambda: [*extract, "--alpha", "0"],
        "svd by guess": lambda: [*extract, "--svd", "guess"],
        "unknown target": lambda: [*extract, "--target", "q_porj"],
        "unknown exclude": lambda: [*extract, "--exclude", "nothing_like_it"],
        "target no regex": lambda: [*extract, "--target", "q_proj("],
        "full none and more": lambda: [*extract, "--full", "none", "--full", "norm"],
        "adapter into a file": lambda: ["extract", base, tuned, "-o", tmp / "a.safetensors"],
        "output is the base": lambda: [*merge, adapter, "-o", base, "--overwrite"],
        "output in the base": lambda: [*merge, adapter, "-o", base / "x"],
        "output around the base": lambda: [*merge, adapter, "-o", world, "--overwrite"],
        "rerank two rules": lambda: [*rerank, "--rank", "4", "--budget", "1MB"],
        "sv-fro and energy": lambda: [*rerank, "--sv-fro", "0.5", "--energy", "0.5"],
        "sv-ratio below 1": lambda: [*rerank, "--sv-ratio", "0.2"],
        "budget of nothing": lambda: [*rerank, "--budget", "0"],
        "budget no size": lambda: [*rerank, "--budget", "much"],
        "budget beyond all": lambda: [*rerank, "--budget", "150%"],
        "budget too small": lambda: [*rerank, "--budget", "100B"],
        "rerank into itself": lambda: ["rerank", adapter, "-o", adapter, "--overwrite"],
        "rerank a base": lambda: ["rerank", base, "-o", out],
        "rerank in fp8": lambda: [*rerank, "--dtype", "float8_e4m3fn"],
        "rerank nan": lambda: ["rerank", tensors(adapter, weights, lambda w: w[key].fill_(float("nan"))), "-o", out, "--rank", "2"],
        "blend nothing": lambda: ["blend", "-o", out],
        "blend unknown method": lambda: [*blend, "--method", "magic"],
        "blend cat with a rank": lambda: [*blend, "--method", "cat", "--rank", "2"],
        "blend density alone": lambda: [*blend, "--density", "0.5"],
        "blend density 0": lambda: [*blend, "--method", "ties", "--density", "0"],
        "blend normalize to 0": lambda: [*blend, "-w", "1", "-w", "-1", "--normalize"],
        "blend no weight left": lambda: [*blend, "-w", "0", "-w", "0"],
        "blend of other shapes": lambda: ["blend", adapter, tensors(adapter, weights, lambda w: w.update({key: torch.zeros(4, 31)})), "-o", out],
        "blend replaced differs": lambda: ["blend", adapter, tensors(adapter, weights, lambda w: w["base_model.model.model.norm.weight"].add_(1)), "-o", out],
        "convert to nothing known": lambda: ["convert", adapter, "-o", out, "--to", "gguf"],
        "convert without a format": lambda: ["convert", adapter, "-o", out],
        "convert a language model": lambda: ["convert", adapter, "-o", out, "--to", "kohya"],
        "convert what is stored whole": lambda: ["convert", adapter, "-o", out, "--to", "peft", "--portable"],
        "convert a base": lambda: ["convert", base, "-o", out, "--to", "peft"],
        "convert to a file": lambda: ["convert", adapter, "-o", tmp / "out.safetensors", "--to", "peft"],
        "convert by another base": lambda: ["convert", tensors(adapter, weights, lambda w: w.update({key: torch.zeros(4, 31)})), "-o", out, "--to", "peft", "--base", base],
        "convert nan": lambda: ["convert", tensors(adapter, weights, lambda w: w[key].fill_(float("nan"))), "-o", out, "--to", "peft"],
        "check for nobody": lambda: ["check", adapter, "--for", "ollama"],
        "check another base": lambda: ["check", tensors(adapter, weights, lambda w: w.update({key: torch.zeros(4, 31)})), "--base", base],
        "the spectrum of a base": lambda: ["inspect", base, "--spectrum"],
        "a base's base": lambda: ["inspect", base, "--base", base],
        "inspect nothing": lambda: ["inspect", tmp / "nowhere"],
        "diff with a base": lambda: ["diff", adapter, base],
        "diff nan": lambda: ["diff", adapter, tensors(adapter, weights, lambda w: w[key].fill_(float("nan")))],
        "spectrum of inf": lambda: ["inspect", tensors(adapter, weights, lambda w: w[key].fill_(float("inf"))), "--spectrum"],
        # references
        "base missing": lambda: ["merge", tmp / "nowhere", adapter, "-o", out],
        "base on the Hub": lambda: ["merge", "org/name", adapter, "-o", out],
        "adapter missing": lambda: [*merge, tmp / "nowhere", "-o", out],
        "base is an adapter": lambda: ["merge", adapter, adapter, "-o", out],
        "adapter is a base": lambda: [*merge, base, "-o", out],
        "the same model twice": lambda: ["extract", base, base, "-o", out],
        "base a pickle": lambda: ["merge", copy(adapter, pytorch_model__bin=b"x") / "pytorch_model.bin", adapter, "-o", out],
        "base cut short": lambda: ["merge", copy(base, model__safetensors=(base / "model.safetensors").read_bytes()[:-9]), adapter, "-o", out],
        "base config broken": lambda: ["merge", copy(base, config__json=b"{"), adapter, "-o", out],
        "base config a list": lambda: ["merge", copy(base, config__json=b"[]"), adapter, "-o", out],
        "tensor missing in tuned": lambda: ["extract", base, tensors(tuned, "model.safetensors", lambda w: w.pop("model.layers.0.mlp.up_proj.weight")), "-o", out],
        "nan in tuned": lambda: ["extract", base, tensors(tuned, "model.safetensors", lambda w: w["model.layers.0.mlp.up_proj.weight"].fill_(float("nan"))), "-o", out],
        # adapters
        "config not JSON": lambda: [*merge, copy(adapter, adapter_config__json=b"{'a'}"), "-o", out],
        "config a list": lambda: [*merge, copy(adapter, adapter_config__json=b"[1]"), "-o", out],
        "config nested deep": lambda: [*merge, copy(adapter, adapter_config__json=b"[" * 100_000), "-o", out],
        "config empty": lambda: [*merge, copy(adapter, adapter_config__json=b""), "-o", out],
        "alpha a string": lambda: [*merge, config(lora_alpha="16"), "-o", out],
        "alpha NaN": lambda: [*merge, config(lora_alpha=float("nan")), "-o", out],
        "r zero": lambda: [*merge, config(r=0), "-o", out],
        "r another": lambda: [*merge, config(r=64), "-o", out],
        "rank_pattern a list": lambda: [*merge, config(rank_pattern=[1]), "-o", out],
        "rank_pattern no regex": lambda: [*merge, config(rank_pattern={"(": 1}), "-o", out],
        "alpha_pattern of words": lambda: [*merge, config(alpha_pattern={"q_proj": "x"}), "-o", out],
        "modules_to_save a number": lambda: [*merge, config(modules_to_save=3), "-o", out],
        "dora": lambda: [*merge, config(use_dora=True), "-o", out],
        "weights cut short": lambda: [*merge, copy(adapter, adapter_model__safetensors=(adapter / weights).read_bytes()[:-5]), "-o", out],
        "weights are text": lambda: [*merge, copy(adapter, adapter_model__safetensors=b"hello world, this is text"), "-o", out],
        "half a pair": lambda: [*merge, tensors(adapter, weights, lambda w: w.pop(key)), "-o", out],
        "ranks that disagree": lambda: [*merge, tensors(adapter, weights, lambda w: w.update({key: torch.zeros(3, 32)})), "-o", out],
        "factor of integers": lambda: [*merge, tensors(adapter, weights, lambda w: w.update({key: torch.zeros(4, 32, dtype=torch.int32)})), "-o", out],
        "stray tensor": lambda: [*merge, tensors(adapter, weights, lambda w: w.update({"base_model.model.nothing.weight": torch.zeros(2)})), "-o", out],
        "infinite factor": lambda: [*merge, tensors(adapter, weights, lambda w: w[key].fill_(float("inf"))), "-o", out],
    }  # fmt: skip
    if case == "":
        return list(cases)
    made: list[str | Path] = cases[case]()
    return made


CASES = broken(Path(), Path(), "")
# What the one line says: of wrong usage, which ends with 2, and of what is wrong with the files, which ends with 1.
USAGE = {
    "no arguments": "Missing argument 'BASE'",
    "no output": "give either -o OUT or --in-place",
    "no adapter": "Missing argument 'ADAPTER",
    "unknown command": "no command 'mrege'; nearest: merge",
    "unknown option": "No such option '--wieght'",
    "weight no number": "'much' is not a valid float",
    "weight nan": "weight nan is not a finite number",
    "weight inf": "weight -inf is not a finite number",
    "more weights than adapters": "2 weights for 1 adapters",
    "unknown dtype": "--dtype int3: expected one of float32",
    "adapter in fp8": "--dtype: an adapter is written as float32, bfloat16 or float16",
    "unknown rounding": "'up' is not one of 'nearest', 'stochastic'",
    "unknown device": "--device tpu: expected auto, cpu, cuda",
    "device not there": "--device cuda:99: this machine has",
    "shard size": "size 'big': expected a number with KB",
    "rank and energy": "give exactly one of --rank, --energy",
    "rank 0": "--rank 0: expected at least 1",
    "energy 2": "--energy 2.0: expected a share",
    "energy nan": "--energy nan: expected a share",
    "tolerance -1": "--tolerance -1.0: expected a relative error",
    "max-rank 0": "--max-rank 0: expected at least 1",
    "alpha 0": "--alpha 0.0: expected a positive number",
    "svd by guess": "'guess' is not one of 'auto', 'randomized', 'exact'",
    "unknown target": "--target q_porj: matches no module; nearest: q_proj",
    "unknown exclude": "--exclude nothing_like_it: matches no module",
    "target no regex": "--target q_proj(: is not a regular expression",
    "full none and more": "--full none contradicts the other --full",
    "adapter into a file": "an adapter for peft is a folder",
    "rerank two rules": "give exactly one of --rank, --energy",
    "sv-fro and energy": "--sv-fro 0.5: expected a share above 0 and up to 1, and no --energy",
    "sv-ratio below 1": "--sv-ratio 0.2: expected a number of at least 1",
    "budget of nothing": "budget '0': expected a share",
    "budget no size": "size 'much': expected a number with KB",
    "budget beyond all": "budget '150%': expected a share",
    "rerank in fp8": "--dtype: an adapter is written as float32, bfloat16 or float16",
    "blend nothing": "Missing argument 'ADAPTER",
    "blend unknown method": "'magic' is not one of 'linear'",
    "blend cat with a rank": "--method cat keeps every direction",
    "blend density alone": "--density: linear keeps every entry",
    "blend density 0": "--density 0.0: expected a share",
    "blend normalize to 0": "--normalize: the weights sum to 0",
    "blend no weight left": "every weight is 0",
    "convert to nothing known": "'gguf' is not one of 'peft'",
    "convert without a format": "Missing option '--to'",
    "convert to a file": "a PEFT adapter is a folder",
    "check for nobody": "'ollama' is not one of 'peft'",
    "the spectrum of a base": "is not an adapter; --spectrum belongs to adapters",
    "a base's base": "is not an adapter; --base belongs to adapters",
    "diff with a base": "compare two of a kind",
}  # fmt: skip
FILES = {
    "output is the base": "base: is the input",
    "output in the base": "base/x: is the input",
    "output around the base": "holds the input",
    "budget too small": "--budget of 100 bytes holds nothing",
    "rerank into itself": "adapter: is the input",
    "rerank a base": "so it is not an adapter",
    "rerank nan": "q_proj: holds values that are not finite",
    "blend of other shapes": "q_proj is a linear update of 32×31 but",
    "blend replaced differs": "model.norm.weight whole with different values; --average-replaced",
    "convert a language model": "model.embed_tokens adapts an embedding, which the kohya format has no place for",
    "convert what is stored whole": "input_layernorm.weight is stored whole, which not every server takes",
    "convert a base": "so it is not an adapter",
    "convert by another base": "q_proj is an update of 32×31 but model.layers.0.self_attn.q_proj.weight",
    "convert nan": "q_proj: holds values that are not finite",
    "check another base": "q_proj is an update of 32×31 but model.layers.0.self_attn.q_proj.weight",
    "inspect nothing": "nowhere: is neither a file nor a folder",
    "diff nan": "q_proj: holds values that are not finite",
    "spectrum of inf": "q_proj: holds values that are not finite",
    "base missing": "nowhere: is neither a file nor a folder",
    "base on the Hub": "org/name: is neither a file nor a folder here, is not in the Hub's cache",
    "adapter missing": "nowhere: is neither a file nor a folder",
    "base is an adapter": "is an adapter, not a checkpoint",
    "adapter is a base": "so it is not an adapter",
    "the same model twice": "nothing to extract",
    "base a pickle": "pytorch_model.bin: a pickle file",
    "base cut short": "model.norm.weight: the tensors end at byte",
    "base config broken": "bad/config.json: not JSON",
    "base config a list": "bad/config.json: expected a JSON object, found list",
    "tensor missing in tuned": "lacks 1 tensor of",
    "nan in tuned": "up_proj.weight: the difference is not finite",
    "config not JSON": "adapter_config.json: not JSON",
    "config a list": "adapter_config.json: expected a JSON object, found list",
    "config nested deep": "adapter_config.json: is nested too deeply",
    "config empty": "adapter_config.json: not JSON",
    "alpha a string": "lora_alpha is '16'; expected a finite number",
    "alpha NaN": "lora_alpha is nan; expected a finite number",
    "r zero": "r is 0; expected a whole number",
    "r another": "lm_head: the factors have rank 4 but adapter_config.json says 64",
    "rank_pattern a list": "rank_pattern is list; expected an object",
    "rank_pattern no regex": "rank_pattern key '(' is not a regular expression",
    "alpha_pattern of words": "alpha_pattern['q_proj'] is 'x'; expected a finite number",
    "modules_to_save a number": "modules_to_save is 3; expected a list",
    "dora": "lm_head: use_dora is true in adapter_config.json but the module has no lora_magnitude_vector",
    "weights cut short": "model.norm.weight: the tensors end at byte",
    "weights are text": "claims a header of 8031924123371070824 bytes",
    "half a pair": "q_proj: lora_A is missing",
    "ranks that disagree": "q_proj: lora_A is 3×32 but lora_B is 32×4",
    "factor of integers": "q_proj.lora_A.weight is I32",
    "stray tensor": "1 of 22 modules matches no tensor",
    "infinite factor": "the merged values are not finite",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_in_one_clear_line(case: str, world: Path, tmp_path: Path) -> None:
    """Exit status 1 or 2, one line on stderr that says what is wrong, no traceback, no output left behind."""
    words = broken(world, tmp_path, str(case))
    before = set(world.rglob("*")) | set(tmp_path.rglob("*"))
    done = lorasurgery(*words)
    assert done.returncode == (2 if case in USAGE else 1), done
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "rror: " in line or line.startswith("lorasurgery: ")]
    assert len(lines) == 1, done.stderr
    assert (USAGE | FILES)[case] in lines[0]
    assert set(world.rglob("*")) | set(tmp_path.rglob("*")) == before


def test_there_are_at_least_forty_bad_inputs() -> None:
    """The table is as long as promised."""
    assert len(CASES) >= 40


def test_an_existing_output_needs_overwrite(world: Path, tmp_path: Path) -> None:
    """A folder that holds something is refused with the option that replaces it."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    refused = lorasurgery("merge", world / "base", world / "adapter", "-o", out)
    assert refused.returncode == 1
    assert "--overwrite" in refused.stderr
    assert lorasurgery("merge", world / "base", world / "adapter", "-o", out, "--overwrite").returncode == 0
    assert (out / "mine.txt").read_text() == "mine"


def test_misspelt_names_get_suggestions(world: Path, tmp_path: Path) -> None:
    """Commands, options and targets that don't exist name the nearest that do."""
    assert "no command 'mrege'; nearest: merge" in lorasurgery("mrege").stderr
    assert (
        "No such option '--wieght'. (Did you mean one of: '--block-weight', '--quiet', '--weight'?)"
        in lorasurgery("merge", world / "base", world / "adapter", "-o", tmp_path / "o", "--wieght", "1").stderr
    )
    misspelt = lorasurgery("extract", world / "base", world / "tuned", "-o", tmp_path / "o", "--target", "q_porj")
    assert misspelt.returncode == 2
    assert "--target q_porj: matches no module; nearest: q_proj" in misspelt.stderr


def test_sigterm_leaves_nothing(world: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle removes what was staged and exits non-zero."""
    base = tmp_path / "base"
    base.mkdir()
    weights = load_file(world / "base/model.safetensors") | {
        f"m{i}.weight": torch.zeros(1024, 1024) for i in range(200)
    }
    save_file(weights, base / "model.safetensors")
    process = subprocess.Popen([sys.executable, "-m", "lorasurgery", "merge", str(base), str(world / "adapter"), "-o",
                                str(tmp_path / "out")], stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stderr is not None
    process.stderr.readline()  # the first line of progress: it is writing
    process.terminate()
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert rest.splitlines()[-1] == "lorasurgery: interrupted; nothing was left behind"
    assert "Traceback" not in rest
    assert not (tmp_path / "out").exists()


def test_tables_fit_the_terminal(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On 80 columns the sums keep whole names and lose the lesser columns; no line is longer than the terminal."""
    from lorasurgery.cli import tables
    from lorasurgery.ops.diff import diff
    from lorasurgery.ops.inspect import inspect
    from lorasurgery.ops.plan import plan

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    for report in (diff(world / "base", world / "tuned"), inspect(world / "base"), plan(world / "base", 4)):
        tables.show(report, verbose=False)
        shown = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
        assert max(map(len, shown)) <= 80
        assert any("self_attn.q_proj" in row for row in shown)
        assert any("█" in row for row in shown)


def test_the_recorded_command_names_no_folder_of_this_machine(world: Path, tmp_path: Path) -> None:
    """What is published of the command: last names of paths, what was typed, nothing that concerns this run alone."""
    lorasurgery("merge", world / "base", world / "adapter", "-w", "0.5", "-o", tmp_path / "m", "--json", "--overwrite")
    text = (tmp_path / "m/lorasurgery.json").read_text()
    assert json.loads(text)["call"] == "lorasurgery merge base adapter --weight 0.5 -o OUT"
    assert str(tmp_path) not in text
    assert str(world) not in text
    again = tmp_path / "elsewhere"
    lorasurgery("merge", world / "base", world / "adapter", "-w", "0.5", "-o", again)
    assert (again / "lorasurgery.json").read_text() == text


def test_a_call_from_python_is_recorded_too(world: Path, tmp_path: Path) -> None:
    """Without a command line the record holds the call, with last names of paths."""
    from lorasurgery.linalg.rank import RankChoice
    from lorasurgery.ops.blend import rerank

    rerank(world / "adapter", tmp_path / "r", RankChoice(rank=2))
    record = json.loads((tmp_path / "r/lorasurgery.json").read_text())
    assert record["call"].startswith("blend(") or record["call"].startswith("rerank(")
    assert "adapter" in record["call"]
    assert str(world) not in record["call"]
    (source,) = record["sources"]
    assert (source["name"], source["kind"]) == ("adapter", "adapter")
    merge = lorasurgery("merge", world / "base", tmp_path / "r", "-o", tmp_path / "m")
    assert merge.returncode == 0, merge.stderr  # a record is not part of the adapter

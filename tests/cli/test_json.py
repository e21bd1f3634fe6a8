"""docs/schemas is true: every command's --json validates, on MiniLM's weights and on every kind of adapter.

An undocumented field fails here, and so does a documented one that no run shows.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import images
import loose
import models
import pytest
import torch
import zoo
from click.testing import CliRunner
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from safetensors.torch import load_file, save_file

from lorasurgery.cli.main import COMMANDS, main
from lorasurgery.report import Change, Checked, Comparison, ModuleReport, Planned, Report, Source, Spectrum, Stored

sys.path.append(str(Path(__file__).parents[2] / "docs"))
sys.path.append(str(Path(__file__).parents[2] / "examples"))

from generate_json import GROUPS, LISTS, SCHEMAS, Schema, reference
from local_hub import LocalHub
from minilm_finetune import base_model

ROOT = Path(__file__).parents[2]
REPORT, RECORD = Schema("report"), Schema("record")
KNOWN = Registry().with_resource("report.schema.json", Resource.from_contents(REPORT.whole))
VALID = {schema: Draft202012Validator(schema.whole, registry=KNOWN) for schema in (REPORT, RECORD)}
Found = dict[str, Any]
Fields = dict[tuple[str, str], set[str]]
"""(group of commands, part of the report) -> the fields there."""

# Each line is run as it stands, and where it writes something with --dry-run before.
REAL = """
extract base tuned -o adapter --rank 4
extract base tuned -o lean --budget 1MB --target attention --exclude value --full none
merge base adapter -o merged
merge base adapter lean -o narrow --dtype bfloat16 -w 1 -w -0.5
unmerge merged adapter -o left
unmerge merged adapter -o restored --base base
rerank adapter -o smaller --energy 0.5 --max-rank 2
rerank adapter -o cheap --budget 60%
blend adapter smaller -o ties --method ties --density 0.2
blend adapter smaller -o minus -w 1 -w -0.5
convert lean -o portable --to peft --portable --base base
inspect adapter
inspect adapter --spectrum --base base
inspect base
diff base merged
diff adapter smaller
plan base --rank 8 --target attention
check adapter --for vllm --base base
check portable --for vllm
push adapter me/minilm --dry-run
merge base adapter -o kept --undo
inspect kept
verify kept --against base --adapter adapter
unmerge kept adapter -o undone
verify merged --against base --adapter adapter
verify merged --against base --adapter adapter -w 0.5
verify adapter --against base
switch kept --to lean
unmerge kept lean --in-place
merge kept adapter --in-place --undo
verify spoilt
verify grafted --against base
"""
KINDS = """
extract moe moe-tuned -o moe-adapter --rank 4
merge moe moe-adapter -o moe-merged
inspect moe-adapter --spectrum
check moe-adapter --for vllm
plan moe --rank 2 --dtype bf16
extract gpt2 gpt2-tuned -o gpt2-adapter --rank 4
merge gpt2 gpt2-adapter -o gpt2-merged
extract llama grown -o grown-adapter --rank 4 --full none
extract llama grown -o grown-whole --rank 4
merge llama grown-whole -o grown-merged
unmerge grown-merged grown-whole -o grown-left
diff llama grown
inspect llama
merge llama dora -o dora-merged
unmerge dora-merged dora -o dora-left
convert dora -o dora-plain --to peft --portable --base llama
inspect dora --spectrum
merge llama rows -o rows-merged
inspect zero --spectrum
diff zero plain
rerank half -o half-exact
merge qwen2 head -o qwen2-untied
merge qwen2 table -o qwen2-table
inspect sd1
inspect sd1.safetensors --base sd1 --spectrum
merge sd1 sd1.safetensors -o sd1-merged
unmerge sd1-merged sd1.safetensors -o sd1-restored
merge sd1 vectors.safetensors -o sd1-vectors
check sd1.safetensors --for comfyui
rerank sd1.safetensors -o sd1-smaller.safetensors --rank 2
convert sd1.safetensors -o sd1-peft --to peft --base sd1
convert sd1-peft -o sd1-back.safetensors --to kohya --base sd1
convert flux.safetensors -o flux-diffusers.safetensors --to diffusers --base flux
convert flux-diffusers.safetensors -o flux-kohya.safetensors --to kohya --base flux
check flux.safetensors --for diffusers --base flux
rerank loras -o loras-smaller --rank 2
convert loras -o loras-peft --to peft
inspect loras
check loras --for peft
"""
HUB = """
push adapter me/minilm
push smaller me/minilm --create-pr
rerank me/minilm -o fetched --rank 2 --push you/minilm
"""
ON_HUB = """
import sys
from click.testing import CliRunner
from lorasurgery.cli.main import main
for line in sys.argv[1:]:
    print(CliRunner().invoke(main, [*line.split(), "--json"]).stdout, end="")
"""
# Fields that take more than a test has, and where they are.
ELSEWHERE = {("source", "", "files[].header_sha256"): "inputs of more than 256 MB"}


def make_real(root: Path) -> None:
    """MiniLM, and MiniLM as a fine-tune might leave it: low-rank updates, and a little noise on all."""
    (root / "base").symlink_to(base_model())
    shutil.copytree(base_model(), root / "tuned", ignore=shutil.ignore_patterns("model.safetensors"))
    generator = torch.Generator().manual_seed(0)
    weights = load_file(base_model() / "model.safetensors")
    for weight in (w for name, w in weights.items() if "layer." in name):
        weight += 1e-4 * torch.randn(weight.shape, generator=generator)
        if weight.dim() == 2:
            up, down = (torch.randn(size, 4, generator=generator) for size in weight.shape)
            weight += 1e-3 * up @ down.T
    write(root / "tuned/model.safetensors", weights)
    name = "embeddings.position_embeddings.weight"
    write(root / "grafted/model.safetensors", {k: w for k, w in weights.items() if k != name} | {"more": torch.ones(2)})
    weights[name][0, 0] = torch.nan
    write(root / "spoilt/model.safetensors", weights)


def make_kinds(root: Path) -> None:
    """Experts, layers of GPT-2, a grown vocabulary, DoRA, single rows, tied heads, nothing at all, images, a folder."""
    for name, model in (("moe", zoo.make("qwen3_moe")), ("gpt2", models.make("gpt2")), ("llama", models.make("llama"))):
        models.save(model, root / name)
        models.save(models.perturb(model), root / f"{name}-tuned")
    models.save(models.make("qwen2-tied"), root / "qwen2")
    grown = load_file(root / "llama-tuned/model.safetensors") | {"score.weight": torch.ones(3, 32)}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        grown[name] = torch.cat([grown[name], torch.ones(2, 32)])
    write(root / "grown/model.safetensors", grown)
    for name, family, config in (
        ("plain", "llama", {}), ("dora", "llama", {"use_dora": True}), ("rows", "llama", {"trainable_token_indices": [1]}),
        ("table", "qwen2-tied", {"modules_to_save": ["embed_tokens"]}), ("head", "qwen2-tied", {"target_modules": ["lm_head"]}),
    ):  # fmt: skip
        models.peft_adapter(family, root / name, **({"r": 4, "target_modules": ["q_proj"]} | config))
    factors = load_file(root / "plain/adapter_model.safetensors")
    for name, part in (("zero", "lora_B"), ("half", "layers.0.self_attn.q_proj.lora_B")):
        shutil.copytree(root / "plain", root / name)
        write(root / name / "adapter_model.safetensors", {k: t * (part not in k) for k, t in factors.items()})
    for kind in ("sd1", "flux"):
        images.save_pipeline(images.pipeline(kind), root / kind)
        loose.kohya(kind, root / f"{kind}.safetensors", text=kind == "sd1", only=lambda name: "blocks" in name)
    stem = "lora_unet_down_blocks_0_attentions_0"
    vectors = {f"{stem}_norm.w_norm": torch.ones(32), f"{stem}_proj_in.diff_b": torch.ones(32)}
    write(root / "vectors.safetensors", vectors | loose.factors(f"{stem}_proj_in", (32, 32, 1, 1)))
    shutil.copytree(root / "plain", root / "loras/plain")
    shutil.copy(root / "sd1.safetensors", root / "loras/style.safetensors")
    (root / "loras/broken.safetensors").write_bytes(b"no header at all")


def write(path: Path, weights: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file(weights, path, {"format": "pt"})


def run(words: list[str]) -> Found:
    """A command's report; the exit status is 1 when it tells of a failure, or a check did not hold."""
    done = CliRunner().invoke(main, [*words, "--json"])
    assert done.stdout, (words, done.stderr, done.exception)
    report: Found = json.loads(done.stdout)
    totals = report["totals"]
    failed = bool(totals.get("failed")) or totals.get("serves") is False or totals.get("holds") is False
    assert done.exit_code == int(failed), words
    return report


def interrupted() -> Iterator[Found]:
    """Operations in place that are cut off: what inspect says meanwhile, and what --resume does."""
    from lorasurgery.checkpoint.inplace import transaction as surgery

    for name, words in (("end", "switch kept --to lean"), ("apply", "unmerge kept lean --in-place")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(surgery, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            done = CliRunner().invoke(main, words.split())
            assert done.exit_code == 1
            assert "interrupted; some tensors are changed already, and --resume goes on from here" in done.stderr
        yield run(["inspect", "kept"])
        yield run([*words.split(), "--resume"])


def run_all(lines: str) -> Iterator[Found]:
    """The reports of all lines, and of the dry runs of those that write."""
    for words in map(str.split, lines.strip().splitlines()):
        if "-o" in words:
            yield run([*words, "--dry-run"])
        yield run(words)


def run_on_hub(root: Path) -> list[Found]:
    """The reports of commands against a Hub on loopback, which only another process can talk to."""
    with LocalHub(root / "hub", tokens={"hf_local": "me", "hf_other": "you"}) as hub:
        command = [sys.executable, "-W", "ignore", "-c", ON_HUB, *HUB.strip().splitlines()]
        environment = os.environ | hub.environment(root / "home")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that everything is made in, and the working directory meanwhile."""
    root = tmp_path_factory.mktemp("json")
    make_real(root)
    images.quiet(make_kinds, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield root


@pytest.fixture(scope="module")
def reports(root: Path) -> list[Found]:
    """Every report, those of the adapters of a folder among them."""
    found = [*run_all(REAL), *interrupted(), *run_all(KINDS), *run_on_hub(root)]
    return found + [one for report in found for one in report.get("adapters", ())]


def problems(schema: Schema, instance: Found) -> list[str]:
    """What is wrong with a report or a record, and where."""
    return [f"{e.json_path}: {e.message[:200]}" for e in VALID[schema].iter_errors(instance)]


def group_of(report: Found) -> str:
    """The part of the schema, and the chapter of the page, that a report belongs to."""
    name, what = report["command"], report["totals"].get("what")
    if "adapters" in report or not report["totals"]:
        return "folder" if "adapters" in report else "failed"
    if what in ("undone", "settled"):
        return str(what)
    return {"rerank": "blend", "unmerge": "merge", "switch": "merge", "verify": "verify"}.get(
        name, f"{name}_{what}".replace("_None", "")
    )


def paths(value: Found, prefix: str = "") -> Iterator[str]:
    """The fields of an object, and of objects in its lists, as the page names them."""
    for name, item in value.items():
        yield prefix + name
        for one in item if isinstance(item, list) else ():
            yield from paths(one, f"{prefix}{name}[].") if isinstance(one, dict) else ()


def seen(reports: list[Found]) -> Fields:
    """Every field that some report has."""
    found: Fields = defaultdict(set)
    for report in reports:
        found["report", ""] |= report.keys()
        found["pushed", ""] |= report.get("pushed", {}).keys()
        found["source", ""].update(name for item in report.get("sources", ()) for name in paths(item))
        found[group_of(report), "totals"].update(paths(report["totals"]))
        for part in LISTS:
            found[group_of(report), part].update(name for item in report[part] for name in paths(item))
    return found


def documented() -> Fields:
    """Every field that the schema has."""
    found = {(name, ""): {f.path for f in REPORT.fields(REPORT.group(name))} for name in ("source", "pushed")}
    found["report", ""] = set(REPORT.whole["properties"])
    for name in GROUPS:
        for part in ("totals", *LISTS):
            found[name, part] = {f.path for f in REPORT.fields(*REPORT.part(REPORT.group(name), part))}
    return found


def test_the_schemas_are_schemas() -> None:
    """Both are valid JSON Schema 2020-12, every reference in them leads somewhere, and every field has a meaning."""
    for schema in (REPORT, RECORD):
        Draft202012Validator.check_schema(schema.whole)
        references = re.findall(r"#/[$]defs/([a-z_]+)", json.dumps(schema.whole))
        assert set(references) <= REPORT.whole["$defs"].keys()
    groups = [REPORT.part(REPORT.group(name), part) for name in GROUPS for part in ("totals", *LISTS)]
    assert all(f.meaning.endswith((".", "…")) for node, late in groups for f in REPORT.fields(node, late))


def test_the_page_is_current() -> None:
    """docs/json.md is what `make docs` would write now, and its examples are valid."""
    assert (ROOT / "docs/json.md").read_text() == reference()
    for name in GROUPS:
        example = json.loads((SCHEMAS / f"examples/{name}.json").read_text())
        assert not problems(REPORT, example)
        assert group_of(example) == name
    assert not problems(RECORD, json.loads((SCHEMAS / "examples/record.json").read_text()))


def test_classes_and_commands_are_all_there() -> None:
    """The schema lacks no field of a report's classes and no command, and has none that does not exist."""
    found = documented()
    assert {f.name for f in fields(Report)} == found["report", ""]
    assert {f.name for f in fields(Source)} == {name for name in found["source", ""] if "[]" not in name}
    lines = {name for (_, part), names in found.items() if part in LISTS for name in names}
    kinds = (ModuleReport, Stored, Planned, Spectrum, Comparison, Change, Checked)
    assert lines == {f.name for kind in kinds for f in fields(kind)}
    assert set(REPORT.whole["$defs"]["command"]["enum"]) == set(COMMANDS)


@pytest.mark.parametrize("name", GROUPS)
def test_what_is_not_documented_is_refused(name: str) -> None:
    """One more field anywhere, one less in the totals, or another type, makes a report invalid."""
    report = json.loads((SCHEMAS / f"examples/{name}.json").read_text())
    totals = report["totals"]
    changes: list[Found] = [{"more": 1}, {"seconds": "1"}, {"modules": None}, {"totals": totals | {"more": 1}}]
    changes += [{part: [report[part][0] | {"more": 1}]} for part in LISTS if report[part]]
    changes += [{part: [{}]} for part in LISTS]
    changes += [{"totals": {k: v for k, v in totals.items() if k != f.path}}
                for f in REPORT.fields(*REPORT.part(REPORT.group(name), "totals")) if not f.when and "[" not in f.path]  # fmt: skip
    assert all(problems(REPORT, report | change) for change in changes)


def test_every_report_is_valid(reports: list[Found]) -> None:
    """Real weights and tiny models of every kind, plans and results, whole folders and what failed in them."""
    wrong = {f"{r['command']} {r['inputs']}": found for r in reports if (found := problems(REPORT, r))}
    assert not wrong
    assert {r["command"] for r in reports} == set(COMMANDS)
    assert {group_of(r) for r in reports} == {*GROUPS, "failed"}


def test_every_field_is_seen(reports: list[Found]) -> None:
    """What is documented is in some report; the exceptions are named, and are exceptions."""
    found = seen(reports)
    unseen = {(*place, name) for place, names in documented().items() for name in names - found[place]}
    assert unseen == ELSEWHERE.keys()


def test_every_record_is_valid(root: Path, reports: list[Found]) -> None:
    """lorasurgery.json beside each result says what the report said."""
    written = {r["output"]: r for r in reports if not r["dry_run"]}
    records = {str(p.parent.relative_to(root)): json.loads(p.read_text()) for p in root.rglob("lorasurgery.json")}
    records = {name: record for name, record in records.items() if name in written}
    assert len(records) > 20
    for name, record in records.items():
        assert not problems(RECORD, record), name
        assert all(record[key] == written[name][key] for key in record.keys() - {"call"})


@pytest.mark.skipif(not shutil.which("jq"), reason="needs jq")
def test_jq_does_what_the_page_says(reports: list[Found]) -> None:
    """Each program of the page finds something in the reports of its command."""
    programs = re.findall(r"^\$ lorasurgery (\w+).*?jq -r '(.*?)'", reference(), re.DOTALL | re.MULTILINE)
    assert len(programs) == 3
    for command, program in programs:
        given = "\n".join(json.dumps(r) for r in reports if r["command"] == command and not r["dry_run"])
        given = "\n".join(line for line in given.splitlines() if command != "rerank" or '"adapters": [' in line)
        done = subprocess.run(["jq", "-r", program], input=given, capture_output=True, text=True)
        assert done.stdout.strip(), done.stderr

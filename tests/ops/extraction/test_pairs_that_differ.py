"""extract on pairs that differ in more than values: layers, missing tensors, shapes, names; every next move is taken."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from random import Random

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasurgery.adapters.model_names.align import align
from lorasurgery.adapters.model_names.patterns import any_match, exclude_only
from lorasurgery.cli.main import main
from lorasurgery.errors import MismatchError, UnsupportedError
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.diff import diff
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.extraction import decompose as extraction
from lorasurgery.ops.extraction.options import Selection
from lorasurgery.ops.merge import merge
from lorasurgery.report import Report

Weights = dict[str, Tensor]
H = 8


def matrix(rows: int = H, columns: int = H) -> Tensor:
    return torch.randn(rows, columns)


def layer(stem: str) -> Weights:
    return {f"{stem}.self_attn.{p}_proj.weight": matrix() for p in "qv"} | {
        f"{stem}.mlp.up_proj.weight": matrix(12, H),
        f"{stem}.input_layernorm.weight": torch.ones(H),
    }


def body(layers: int = 2, stack: str = "model.layers", top: str = "model.") -> Weights:
    found = {f"{top}embed_tokens.weight": matrix(16, H), f"{top}norm.weight": torch.ones(H)}
    for n in range(layers):
        found |= layer(f"{stack}.{n}")
    return found


def moved(weights: Weights, *only: str) -> Weights:
    """All matrices changed, or those whose names hold one of these words."""
    wanted = only or ("",)
    return {
        n: w + 0.1 * torch.randn_like(w)
        if w.is_floating_point() and w.dim() == 2 and any(o in n for o in wanted)
        else w
        for n, w in weights.items()
    }


def write(folder: Path, weights: Weights, config: dict[str, object] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.clone().contiguous() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def take(base: Path, tuned: Path, out: Path, *arguments: str) -> tuple[int, str]:
    """What the command line answers."""
    result = CliRunner().invoke(main, ["extract", str(base), str(tuned), "-o", str(out), "--rank", "8", *arguments])
    return result.exit_code, " ".join(result.output.split())


def run(base: Path, tuned: Path, out: Path, **selection: object) -> Report:
    options = ExtractOptions(RankChoice(rank=H), Selection(**selection))  # type: ignore[arg-type]
    return extract(base, tuned, out, options, device="cpu")


def advice(message: str) -> list[str]:
    """The --exclude options that a line gives, as a shell would hand them on."""
    found = re.search(r"(?:--exclude (?:'[^']*'|\S+) ?)+", message)
    assert found, message
    return shlex.split(found[0])


def in_adapter(out: Path) -> set[str]:
    """The modules of which an adapter holds anything."""
    keys = load_file(out / "adapter_model.safetensors")
    return {re.sub(r"\.(lora_.*|weight|bias)$", "", k.removeprefix("base_model.model.")) for k in keys}


# Layers

STACKS = [("model.layers", "model."), ("h", ""), ("encoder.layer", "encoder."), ("transformer.h", "transformer."),
          ("double_blocks", ""), ("model.diffusion_model.double_blocks", "model.diffusion_model.")]  # fmt: skip


@pytest.mark.parametrize(("stack", "top"), STACKS)
@pytest.mark.parametrize("count", [1, 3])
def test_other_numbers_of_layers_are_refused_with_both_counts(stack: str, top: str, count: int, tmp_path: Path) -> None:
    """More or fewer layers: no adapter, one line with both counts; --common compares those of the same number."""
    base = body(2, stack, top)
    extra = {n: w for n, w in body(3, stack, top).items() if n.startswith(f"{stack}.2.")}
    tuned = moved(base | extra if count == 3 else {n: w for n, w in base.items() if not n.startswith(f"{stack}.1.")})
    a, b = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned)
    code, text = take(a, b, tmp_path / "out")
    layers = f"{stack}.0 to 2" if count == 3 else f"{stack}.0"
    assert code == 1
    assert f"has {count} layer{'s' if count > 1 else ''} ({layers}) where {a} has 2" in text
    assert not (tmp_path / "out").exists()
    code, text = take(a, b, tmp_path / "out", "--common")
    assert code == 0
    assert "warning: --common" in text
    assert not any(f"{stack}.2." in m or (count == 1 and f"{stack}.1." in m) for m in in_adapter(tmp_path / "out"))


def test_config_tells_an_mtp_layer_from_a_layer_too_few(tmp_path: Path) -> None:
    """The layer after num_hidden_layers predicts further tokens: it is missing, and no layer is too few."""
    base = body(3)
    tuned = moved({n: w for n, w in base.items() if ".2." not in n})
    config = {"model_type": "llama", "num_hidden_layers": 2}
    a, b = write(tmp_path / "base", base, config), write(tmp_path / "tuned", tuned, config)
    code, text = take(a, b, tmp_path / "out")
    assert code == 1
    assert "lacks 4 tensors" in text
    assert advice(text) == ["--exclude", "model.layers.2.+"]


# Tensors that one side lacks

MISSING = {
    "mtp stack": {f"mtp.{n}": w for n, w in layer("layers.0").items()} | {"mtp.fc.weight": matrix(H, 2 * H)},
    "mtp layer": layer("model.layers.2") | {"model.layers.2.eh_proj.weight": matrix(H, 2 * H)},
    "vae": {f"first_stage_model.encoder.down.{n}.conv.weight": torch.randn(4, 4, 3, 3) for n in range(3)},
    "vision": {f"vision_tower.blocks.{n}.attn.qkv.weight": matrix() for n in range(3)} | {"projector.weight": matrix()},
    "norms": {f"model.layers.{n}.self_attn.q_norm.weight": torch.ones(H) for n in range(2)},
    "biases": {f"model.layers.{n}.self_attn.q_proj.bias": torch.ones(H) for n in range(2)},
    "numbers": {"conv_in.0.weight": matrix(), "model.layers.0.to_out.0.weight": matrix()},
    "one": {"extra_proj.weight": matrix()},
    "bare": {"model.layers.1.sinks": torch.ones(4), "temperature": torch.ones(1)},
}


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("kind", MISSING)
def test_what_one_side_lacks_is_refused_at_once_and_the_advice_takes_just_that(
    kind: str, side: str, tmp_path: Path
) -> None:
    """One refusal counts and names all; its --exclude, pasted, and --common both leave out that and nothing else."""
    extra, common = MISSING[kind], body() | {"to_out.0.weight": matrix(), "model.layers.0.to_v.0.weight": matrix()}
    a = write(tmp_path / "base", common | (extra if side == "base" else {}))
    b = write(tmp_path / "tuned", moved(common) | (extra if side == "tuned" else {}))
    code, text = take(a, b, tmp_path / "out")
    assert code == 1
    assert ("lacks" if side == "base" else "has") + f" {len(extra)} tensor" in text
    assert min(extra) in text
    changed = {n.removesuffix(".weight") for n, w in common.items() if w.dim() == 2}
    code, text = take(a, b, tmp_path / "pasted", *advice(text))
    assert code == 0, text
    assert in_adapter(tmp_path / "pasted") == changed
    code, text = take(a, b, tmp_path / "common", "--common")
    assert code == 0
    assert f"{len(extra)} tensor" in text
    assert in_adapter(tmp_path / "common") == changed


def test_missing_new_and_reshaped_are_one_refusal(tmp_path: Path) -> None:
    """All three kinds of difference are in one line, and one set of options takes them all."""
    base = body() | MISSING["mtp stack"] | {"conv_in.weight": torch.randn(8, 4, 3, 3), "conv_in.bias": torch.ones(8)}
    tuned = moved(body()) | MISSING["one"] | {"conv_in.weight": torch.randn(8, 9, 3, 3), "conv_in.bias": torch.ones(8)}
    a, b = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned)
    code, text = take(a, b, tmp_path / "out")
    assert code == 1
    assert all(
        w in text for w in ("lacks 5 tensors", "has 1 tensor that", "conv_in.weight is 8×9×3×3 but the base has")
    )
    assert take(a, b, tmp_path / "out", *advice(text))[0] == 0
    assert take(a, b, tmp_path / "common", "--common")[0] == 0


def test_a_reshaped_layer_is_left_out_by_a_name_of_its_own(tmp_path: Path) -> None:
    """The 9-channel conv_in is called 0.0, as many layers are by their last part: none of them goes with it."""
    common = body() | {"blocks.1.to_out.0.weight": matrix(), "time_embed.0.weight": matrix(), "x.0.0.weight": matrix()}
    a = write(tmp_path / "base", common | {"0.0.weight": torch.randn(8, 4, 3, 3)})
    b = write(tmp_path / "tuned", moved(common) | {"0.0.weight": torch.randn(8, 9, 3, 3)})
    code, text = take(a, b, tmp_path / "out")
    assert code == 1
    assert "0.0.weight is 8×9×3×3 but the base has 8×4×3×3" in text
    assert take(a, b, tmp_path / "out", *advice(text))[0] == 0
    assert {"blocks.1.to_out.0", "time_embed.0", "x.0.0"} <= in_adapter(tmp_path / "out")


def test_fewer_experts_are_left_out_as_the_parameters_they_are(tmp_path: Path) -> None:
    """A pruned mixture of experts: all experts of the parameter go, in one step, and the rest is extracted."""
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 2}

    def experts(count: int) -> Weights:
        return {
            f"model.layers.{n}.mlp.experts.{e}.{p}_proj.weight": matrix()
            for n in range(2) for e in range(count) for p in ("gate", "up", "down")
        }  # fmt: skip

    base = body() | experts(4)
    tuned = moved({n: w for n, w in base.items() if ".experts.3." not in n and ".experts.2." not in n})
    a, b = write(tmp_path / "base", base, config), write(tmp_path / "tuned", tuned, config)
    code, text = take(a, b, tmp_path / "out")
    assert code == 1
    assert "lacks 12 tensors" in text
    code, text = take(a, b, tmp_path / "out", *advice(text))
    assert code == 0, text
    assert not any("experts" in m for m in in_adapter(tmp_path / "out"))
    assert any("self_attn" in m for m in in_adapter(tmp_path / "out"))
    assert take(a, b, tmp_path / "common", "--common")[0] == 0
    assert not any("experts" in m for m in in_adapter(tmp_path / "common"))


def test_quantized_weights_come_with_a_way_to_leave_them_out(tmp_path: Path) -> None:
    """Weights in int8 are refused with options that leave out just them; they count as not measured."""
    base = body() | {f"model.layers.{n}.mlp.up_proj.weight": torch.ones(12, H, dtype=torch.int8) for n in range(2)}
    a, b = write(tmp_path / "base", base), write(tmp_path / "tuned", moved(base))
    code, text = take(a, b, tmp_path / "out")
    assert code == 1
    assert "quantized" in text
    report = run(a, b, tmp_path / "out", exclude=tuple(advice(text)[1::2]))
    assert len(report.modules) == 5
    assert report.totals["excluded"] == 0
    assert report.totals["excluded_unmeasured"] == 2


def test_models_with_nothing_in_common_are_refused(tmp_path: Path) -> None:
    """Without one name in common there is nothing to leave out: it says that they are two models."""
    a, b = write(tmp_path / "base", body()), write(tmp_path / "tuned", {"down.0.conv.weight": matrix()})
    with pytest.raises(MismatchError, match="no tensor of it has a name of"):
        run(a, b, tmp_path / "out")


# Heads

HEADS = [
    ("LlamaForCausalLM", "lm_head", "LlamaForSequenceClassification", "score"),
    ("BertForMaskedLM", "cls.predictions.transform.dense", "BertForSequenceClassification", "classifier"),
    ("LlamaForSequenceClassification", "score", "LlamaForCausalLM", "lm_head"),
    ("RobertaForMaskedLM", "lm_head.dense", "RobertaForQuestionAnswering", "qa_outputs"),
]


@pytest.mark.parametrize(("before", "old", "after", "new"), HEADS)
def test_a_head_for_another_task_is_no_missing_tensor(
    before: str, old: str, after: str, new: str, tmp_path: Path
) -> None:
    """The base's head stays, which the report notes; the new head is stored whole, under --common neither is taken."""
    base, tuned = body() | {f"{old}.weight": matrix()}, moved(body()) | {f"{new}.weight": matrix(3, H)}
    a = write(tmp_path / "base", base, {"model_type": "llama", "architectures": [before]})
    b = write(tmp_path / "tuned", tuned, {"model_type": "llama", "architectures": [after]})
    report = run(a, b, tmp_path / "out")
    assert [m.name for m in report.full] == [f"{new}.weight"]
    assert any(old in w and after in w for w in report.warnings)
    report = run(a, b, tmp_path / "common", common=True)
    assert not report.full
    assert any(new in w for w in report.warnings)


def test_a_head_that_is_lost_for_no_reason_is_missing(tmp_path: Path) -> None:
    """Two language models, untied: the head is part of the model, and its absence is refused."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    a = write(tmp_path / "base", body() | {"lm_head.weight": matrix(16, H)}, config)
    b = write(tmp_path / "tuned", moved(body()), config)
    with pytest.raises(MismatchError, match=r"lacks 1 tensor .*exclude='lm_head' leaves it out"):
        run(a, b, tmp_path / "out")
    run(a, b, tmp_path / "out", exclude=("lm_head",))


# Names

PREFIXES = [
    ("", "model.", ""), ("", "transformer.", ""), ("", "module.", ""), ("", "_orig_mod.", ""), ("", "model.", "lm_head"),
    ("_orig_mod.model.", "model.", ""), ("module.", "_orig_mod.", ""), ("module._orig_mod.model.", "model.", "score"),
    ("", "model.diffusion_model.", ""), ("diffusion_model.", "model.diffusion_model.", ""), ("", "net.", ""),
    ("model.language_model.", "model.", "lm_head"), ("language_model.model.", "model.", ""), ("bert.", "", "classifier"),
]  # fmt: skip


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("one", "other", "head"), PREFIXES)
def test_prefixes_are_seen_through(one: str, other: str, head: str, turned: bool, tmp_path: Path) -> None:
    """Whatever stands before the names, on either side: extract and merge give the tuned weights under base names."""
    first, second = (other, one) if turned else (one, other)
    inside = body(2, "layers", "")
    outside = {f"{head}.weight": matrix()} if head else {}
    changed = moved(inside | outside)
    a = write(tmp_path / "base", {first + n: w for n, w in inside.items()} | outside)
    b = write(tmp_path / "tuned", {(second if n in inside else "") + n: w for n, w in changed.items()})
    report = run(a, b, tmp_path / "out")
    assert len(report.modules) == sum(w.dim() == 2 for w in changed.values())
    merge(a, [tmp_path / "out"], tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    for name, tensor in changed.items():
        torch.testing.assert_close(merged[(first if name in inside else "") + name], tensor, rtol=0, atol=1e-5)
    found = diff(a, b, device="cpu")
    assert found.totals["only_a"] == found.totals["only_b"] == 0


def test_a_compiled_part_is_unwrapped(tmp_path: Path) -> None:
    """torch.compile on a part of the model puts its word in the middle of names."""
    base = body()
    a = write(tmp_path / "base", base)
    b = write(tmp_path / "tuned", {n.replace("model.", "model._orig_mod."): w for n, w in moved(base).items()})
    assert len(run(a, b, tmp_path / "out").modules) == 7
    assert not any("_orig_mod" in m for m in in_adapter(tmp_path / "out"))


def test_a_prefix_is_not_taken_for_a_sibling() -> None:
    """Layers that the encoder has more of are not those of a decoder that one side lacks."""
    names = [f"layers.{n}.fc{i}.weight" for n in range(4) for i in (1, 2)]
    base = {f"{p}.{n}": (2,) for p in ("encoder", "decoder") for n in names if p == "decoder" or "layers.0" in n}
    assert align(base, {f"encoder.{n}": (2,) for n in names}) == []


def test_a_prefix_without_the_shapes_is_not_believed() -> None:
    """Equal endings in other shapes are other tensors."""
    assert (
        align({"h.0.w.weight": (2, 2), "wte.weight": (3, 2)}, {"x.h.0.w.weight": (4, 4), "x.wte.weight": (5, 4)}) == []
    )


VLM: dict[str, tuple[list[tuple[str, str]], str]] = {
    "qwen2_vl": ([("model.", "model.language_model."), ("visual.", "model.visual.")], "lm_head."),
    "qwen2_5_vl": ([("model.", "model.language_model."), ("visual.", "model.visual.")], "lm_head."),
    "llava": (
        [("language_model.model.", "model.language_model."), ("vision_tower.", "model.vision_tower."),
         ("multi_modal_projector.", "model.multi_modal_projector.")],
        "language_model.lm_head.",
    ),
    "paligemma": (
        [("language_model.model.", "model.language_model."), ("vision_tower.vision_model.", "model.vision_tower."),
         ("multi_modal_projector.", "model.multi_modal_projector.")],
        "language_model.lm_head.",
    ),
    "mllama": (
        [("language_model.model.", "model.language_model."), ("vision_model.", "model.vision_model."),
         ("multi_modal_projector.", "model.multi_modal_projector.")],
        "language_model.lm_head.",
    ),
    "gemma3": (
        [("language_model.model.", "model.language_model."), ("vision_tower.", "model.vision_tower."),
         ("multi_modal_projector.", "model.multi_modal_projector.")],
        "language_model.lm_head.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", VLM)
@pytest.mark.parametrize("configured", ["both", "base"])
def test_names_of_transformers_4_and_5_are_one_model(kind: str, turned: bool, configured: str, tmp_path: Path) -> None:
    """Saved by one version or the other, either side: all tensors meet, and merge gives the tuned weights."""
    parts, head = VLM[kind]
    inside = [body(2, "layers", "")] + [{"proj.weight": matrix(), "blocks.0.fc.weight": matrix()} for _ in parts[1:]]
    names = [(old + n, new + n, w) for (old, new), part in zip(parts, inside, strict=True) for n, w in part.items()]
    names.append((head + "weight", "lm_head.weight", matrix(16, H)))
    sides = [{n[i]: n[2] for n in names} for i in ((1, 0) if turned else (0, 1))]
    changed = moved(sides[1])
    config: dict[str, object] = {"model_type": kind, "tie_word_embeddings": False}
    a = write(tmp_path / "base", sides[0], config)
    b = write(tmp_path / "tuned", changed, config if configured == "both" else None)
    report = run(a, b, tmp_path / "out")
    assert not report.warnings
    merge(a, [tmp_path / "out"], tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    for old, new in zip(sides[0], sides[1], strict=True):
        torch.testing.assert_close(merged[old], changed[new], rtol=0, atol=1e-5)


def test_the_language_model_alone_meets_that_of_the_whole(tmp_path: Path) -> None:
    """A text-only fine-tune of a model that sees: its tower is refused as missing, --common takes the language model."""
    text = body(2, "layers", "")
    tower = {f"vision_tower.vision_model.blocks.{n}.fc.weight": matrix() for n in range(2)}
    base = {f"language_model.model.{n}": w for n, w in text.items()} | tower
    a = write(tmp_path / "base", base, {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]})
    changed = moved(text)
    b = write(tmp_path / "tuned", {f"model.{n}": w for n, w in changed.items()},
              {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]})  # fmt: skip
    code, said = take(a, b, tmp_path / "out")
    assert code == 1
    assert "lacks 2 tensors" in said
    assert take(a, b, tmp_path / "out", *advice(said))[0] == 0
    assert take(a, b, tmp_path / "common", "--common")[0] == 0
    for out in ("out", "common"):
        merge(a, [tmp_path / out], tmp_path / f"{out}-merged")
        merged = load_file(tmp_path / f"{out}-merged/model.safetensors")
        assert all(torch.equal(merged[n], w) for n, w in tower.items())
        for name, tensor in changed.items():
            torch.testing.assert_close(merged[f"language_model.model.{name}"], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("name", ["h.0.attn.bias", "embeddings.position_ids", "h.0.rotary_emb.inv_freq"])
def test_buffers_come_and_go(name: str, side: str, tmp_path: Path) -> None:
    """A buffer that models recompute is neither missing nor new, and is not stored."""
    buffer = {name: torch.ones(1, 4)}
    a = write(tmp_path / "base", body() | (buffer if side == "base" else {}))
    b = write(tmp_path / "tuned", moved(body()) | (buffer if side == "tuned" else {}))
    report = run(a, b, tmp_path / "out")
    assert not report.warnings
    assert not [m for m in report.full if m.name == name]


# Advice

WORDS = ["model", "layers", "mlp", "attn", "to_out", "conv_in", "proj", "0", "1", "2", "20", "mtp", "attention", "norm"]


@pytest.mark.parametrize("seed", range(60))
def test_the_patterns_mean_what_is_meant_and_nothing_else(seed: int) -> None:
    """Random paths, some of them meant: the options mean all of those and none of the others."""
    random = Random(seed)
    paths = {".".join(random.choice(WORDS) for _ in range(random.randint(1, 4))) for _ in range(random.randint(2, 40))}
    paths |= {"a+b.c", "a.b[0]", "it's"}
    stem = random.choice(sorted(paths)).rpartition(".")[0]
    meant = {p for p in paths if p.startswith(stem + ".")} or {min(paths)}
    options = shlex.split(exclude_only(meant, paths))
    patterns = options[1::2]
    assert options[::2] == ["--exclude"] * len(patterns)
    if patterns:
        assert {p for p in paths if any_match(patterns, p)} == meant
    else:
        assert len(meant) > 12  # so many that nobody would type them


# What was excluded

SELECTIONS: list[dict[str, tuple[str, ...]]] = [
    {"exclude": ("q_proj",)}, {"target": ("attention",), "exclude": ("v_proj",)},
    {"exclude": ("model.layers.1.+",)},
]  # fmt: skip


@pytest.mark.parametrize("room", [None, 100])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_energy_of_what_is_excluded_is_reported(
    selection: dict[str, tuple[str, ...]], room: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """excluded_share is what float64 says: ‖ΔW‖² of what --exclude leaves out of all that --target means.

    In blocks as at once.
    """
    if room:
        monkeypatch.setattr(extraction, "MEASURED", room)
    base = body()
    tuned = {n: w + 0.1 * torch.randn_like(w) for n, w in base.items()}
    a, b = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned)
    options = ExtractOptions(RankChoice(rank=H), Selection(**selection))
    report = extract(a, b, tmp_path / "out", options, device="cpu")
    meant = [n for n in base if Selection(selection.get("target", ())).wants(n.removesuffix(".weight"))]
    squares = {n: float((tuned[n].double() - base[n].double()).square().sum()) for n in meant}
    chosen = Selection(**selection)
    out = sum(s for n, s in squares.items() if not chosen.wants(n.removesuffix(".weight")))
    assert report.totals["excluded_norm"] == pytest.approx(out**0.5, rel=1e-5)
    assert report.totals["excluded_share"] == pytest.approx(out / sum(squares.values()), rel=1e-5)
    assert report.totals["excluded"] == sum(not chosen.wants(n.removesuffix(".weight")) for n in meant)
    assert report.totals["excluded_unmeasured"] == 0
    assert "of the whole energy" in report.summary


def test_nothing_is_said_where_nothing_was_excluded(tmp_path: Path) -> None:
    """Without a selection, and where what it leaves out is equal on both sides, the totals stay as they were."""
    base = body()
    a, b = write(tmp_path / "base", base), write(tmp_path / "tuned", moved(base, "q_proj"))
    assert "excluded" not in run(a, b, tmp_path / "one").totals
    assert "excluded" not in run(a, b, tmp_path / "two", target=("q_proj",)).totals


def test_values_that_are_not_finite_are_excluded_unmeasured(tmp_path: Path) -> None:
    """NaN in what is left out by name stops nothing; it counts as not measured."""
    base = body()
    tuned = moved(base)
    tuned["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    a, b = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned)
    totals = run(a, b, tmp_path / "out", exclude=("model.layers.0.mlp.up_proj",)).totals
    assert (totals["excluded"], totals["excluded_norm"], totals["excluded_unmeasured"]) == (1, 0.0, 1)


def test_a_scalar_may_be_excluded(tmp_path: Path) -> None:
    """A parameter without an axis is measured as any other."""
    a = write(tmp_path / "base", body() | {"model.layers.0.alpha": torch.tensor(1.0)})
    b = write(
        tmp_path / "tuned", moved(load_file(a / "model.safetensors")) | {"model.layers.0.alpha": torch.tensor(3.0)}
    )
    totals = run(a, b, tmp_path / "out", exclude=("alpha",)).totals
    assert (totals["excluded"], totals["excluded_norm"]) == (1, 2.0)


def test_a_selection_of_what_did_not_change_says_what_did(tmp_path: Path) -> None:
    """Nothing to extract among what was asked for, but something beside it: the line says so."""
    base = body()
    a, b = write(tmp_path / "base", base), write(tmp_path / "tuned", moved(base, "q_proj"))
    with pytest.raises(MismatchError, match="nothing to extract; 2 that are left out by name changed"):
        run(a, b, tmp_path / "out", exclude=("q_proj",))


def test_what_a_target_does_not_mean_is_not_read(tmp_path: Path) -> None:
    """Of a large model with one module asked for, only that module's bytes are read, and nothing is said of the rest."""
    base = body()
    a, b = write(tmp_path / "base", base), write(tmp_path / "tuned", moved(base))
    report = run(a, b, tmp_path / "out", target=("model.layers.0.mlp.up_proj",))
    assert report.bytes_read == 2 * base["model.layers.0.mlp.up_proj.weight"].nbytes
    assert "excluded" not in report.totals


def test_unsupported_numbers_on_one_side_only(tmp_path: Path) -> None:
    """A tuned model in int8 against a float base is refused too, naming the side."""
    base = body()
    tuned = {n: w.to(torch.int8) if "up_proj" in n else w for n, w in moved(base).items()}
    a, b = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned)
    with pytest.raises(UnsupportedError, match=r"tuned: .*up_proj.weight is I8.*exclude.*up_proj"):
        run(a, b, tmp_path / "out")

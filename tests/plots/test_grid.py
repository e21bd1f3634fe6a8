"""Every module of the known families has its place in a picture, and every label its room; no matplotlib needed."""

from __future__ import annotations

import math
from itertools import pairwise

import families
import pytest

from lorasurgery.plots.grid import (
    Column,
    Grid,
    grid_of,
    keep_largest,
    kind_labels,
    numbered_columns,
    rows_of_words,
    short_names,
    shorten,
    stack_names,
)
from lorasurgery.plots.measures import COSINE, DELTA_NORM, ERROR, RELATIVE, measures_of, pooled
from lorasurgery.report import Change, Comparison, ModuleReport, Report


def modules(names: list[str]) -> list[ModuleReport]:
    return [ModuleReport(n, (2, 2), delta_norm=1.0) for n in names]


def grid(names: list[str]) -> Grid:
    return grid_of(modules(names))


FAMILIES = {
    "bert": (families.bert(), 6, 6, 4),
    "bert-tensors": (families.bert_tensors(), 6, 16, 7),
    "llama-32": (families.llama(32), 32, 7, 0),
    "llama-80": (families.llama(80), 80, 7, 0),
    "t5": (families.t5(6), 12, 10, 2),
    "gpt2": (families.gpt2(), 12, 4, 0),
    "mixture": (families.mixture(4, 128), 4, 7, 0),
    "sdxl": (families.sdxl(), 17, 18, 6),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_module_is_lost_or_doubled(family: str) -> None:
    """Each module stands in one cell or outside, and a family has the layers and kinds it should."""
    names, layers, kinds, outside = FAMILIES[family]
    found = grid(names)
    placed = [m.name for held in found.cells.values() for m in held] + [m.name for m in found.outside]
    assert sorted(placed) == sorted(names)
    assert (len(found.columns), len(found.kinds), len(found.outside)) == (layers, kinds, outside)


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_tell_kinds_apart(family: str) -> None:
    """Short labels stay different from each other and short enough to stand beside a map."""
    labels = kind_labels(grid(FAMILIES[family][0]))
    assert len(set(labels)) == len(labels)
    assert max(map(len, labels)) <= 34


def test_labels_are_what_people_say() -> None:
    """Llama's q_proj is q_proj; BERT's three dense layers keep what tells them apart."""
    assert kind_labels(grid(families.llama(2)))[-2:] == ["q_proj", "v_proj"]
    assert {"query", "attention.output.dense", "output.dense"} <= set(kind_labels(grid(families.bert())))


def test_experts_share_a_cell() -> None:
    """128 experts of a layer are one cell, and the label counts them."""
    found = grid(families.mixture(3, 128))
    assert len(found.cells["mlp.experts.*.w1", Column("model.layers", (1,))]) == 128
    assert "experts.*.w1 ×128" in kind_labels(found)


def test_fused_experts_share_a_cell() -> None:
    """The spectra of one parameter's experts, NAME[3], belong to the parameter's row."""
    names = [f"model.layers.{i}.mlp.experts.down_proj[{e}]" for i in range(2) for e in range(8)]
    assert kind_labels(grid(names)) == ["down_proj.* ×8"]


def test_a_unet_has_its_blocks_across() -> None:
    """SDXL's columns are attentions and resnets of each block, in the order data passes them; rows are the usual kinds."""
    found = grid(sorted(families.sdxl(), reverse=True))
    stacks = list(dict.fromkeys(c.stack for c in found.columns))
    assert stacks == ["down_blocks", "mid_block", "up_blocks"]
    assert [c.label for c in found.columns][:8] == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1", "0", "1"]
    labels = kind_labels(found)
    assert {"attn1.to_q ×2–10", "net.0.proj ×2–10", "net.2 ×2–10", "conv_shortcut", "proj_in"} <= set(labels)
    cell = found.cells["attentions.transformer_blocks.*.attn1.to_q", Column("up_blocks", (0, 2))]
    assert [m.name.split(".")[5] for m in cell] == [str(i) for i in reversed(range(10))]


def test_both_stacks_of_t5_share_rows() -> None:
    """Encoder and decoder stand side by side, encoder first; the decoder's third sublayer is the encoder's second."""
    found = grid(families.t5(3))
    assert [c.stack for c in found.columns] == ["encoder.block"] * 3 + ["decoder.block"] * 3
    assert all(("layer.*.DenseReluDense.wi", c) in found.cells for c in found.columns)
    assert ("layer.1.EncDecAttention.q", found.columns[0]) not in found.cells


def test_numbers_that_are_names_stay_apart() -> None:
    """Wan's ffn.0 and ffn.2 are two layers and not two of a kind, and so are the norms of T5's sublayers."""
    assert grid([f"blocks.{i}.ffn.{n}" for i in range(3) for n in (0, 2)]).kinds == ["ffn.0", "ffn.2"]
    names = families.t5(2) + [f"encoder.block.{i}.layer.{n}.layer_norm.weight" for i in range(2) for n in (0, 1)]
    assert {"layer.0.layer_norm.weight", "layer.1.layer_norm.weight"} <= set(grid(names).kinds)


def test_the_largest_kinds_are_kept_in_order() -> None:
    """A map of too many kinds keeps those that changed most, and counts the others."""
    sized = [ModuleReport(f"net.{i}.part_{k}", (2, 2), delta_norm=float(k % 5)) for i in range(2) for k in range(10)]
    found = keep_largest(grid_of(sized), 4, lambda held: pooled(held, DELTA_NORM))
    assert (found.kinds, found.dropped) == (["part_3", "part_4", "part_8", "part_9"], 6)


@pytest.mark.parametrize("inches", [0.02, 0.07, 0.15, 0.3, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_of_layers_have_room(family: str, inches: float) -> None:
    """Numbered columns lie as far apart as their numbers are wide, in each width and over the edges of stacks."""
    columns = grid(FAMILIES[family][0]).columns
    shown = numbered_columns(columns, inches)
    assert shown[0] == 0
    for a, b in pairwise(shown):
        widths = (len(columns[a].label) + len(columns[b].label)) / 2 * 8.0 * 0.6 / 72
        assert (b - a) * inches >= widths


def test_words_go_to_the_next_line_when_they_would_touch() -> None:
    """Names of neighbouring stacks stand on lines of their own only where they must."""
    assert rows_of_words([(0.5, "encoder"), (3.0, "decoder")], 8.5) == [0, 0]
    assert rows_of_words([(0.1, "down_blocks"), (0.3, "mid_block"), (0.5, "up_blocks"), (3.0, "x")], 8.5) == [
        0,
        1,
        2,
        0,
    ]


def test_short_names() -> None:
    """Nothing is left alone that says too little: a word after a number keeps it, an ending two names share stays longer."""
    assert short_names(["ff.net.0.proj", "attn.to_q"]) == ["net.0.proj", "to_q"]
    assert short_names(["a.b.c", "b.c", "c"]) == ["a.b.c", "b.c", "c"]
    assert stack_names(["unet.down_blocks", "unet.up_blocks"]) == ["down_blocks", "up_blocks"]
    assert stack_names(["transformer_blocks", "single_transformer_blocks"]) == [
        "transformer_blocks",
        "single_transformer_blocks",
    ]
    assert len(shorten("x" * 99, 20)) == 20


def test_pooling() -> None:
    """Norms of several modules add in squares, errors and relative changes are those of all together, the rest is a mean."""
    two = [ModuleReport("a", (2, 2), delta_norm=3.0, error=0.5), ModuleReport("b", (2, 2), delta_norm=4.0, error=0.1)]
    assert pooled(two, DELTA_NORM) == 5.0
    assert pooled(two, ERROR) == pytest.approx(math.hypot(1.5, 0.4) / 5)
    changes = [Change("a", (2, 2), norm=10.0, relative=0.3), Change("b", (2, 2), norm=20.0, relative=0.2)]
    assert pooled(changes, RELATIVE) == pytest.approx(5 / math.hypot(10, 20))
    assert pooled([Comparison("a", (2, 2), cosine=-0.5), Comparison("b", (2, 2), cosine=1.0)], COSINE) == 0.25


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf, -math.inf])
def test_what_is_no_number_does_not_count(nothing: float | None) -> None:
    """A module without a finite number leaves the others of its cell as they are; alone it gives None."""
    bad, good = ModuleReport("a", (2, 2), delta_norm=nothing, error=nothing), ModuleReport("b", (2, 2), delta_norm=2.0, error=0.5)  # fmt: skip
    assert pooled([bad], DELTA_NORM) is None
    assert pooled([bad, good], DELTA_NORM) == 2.0
    assert pooled([bad, good], ERROR) == 0.5


def test_huge_and_tiny_norms_pool() -> None:
    """Squares neither overflow nor vanish."""
    assert pooled([ModuleReport("a", (2, 2), delta_norm=1e200)] * 2, DELTA_NORM) == pytest.approx(math.sqrt(2) * 1e200)
    assert pooled([ModuleReport("a", (2, 2), delta_norm=1e-200)] * 2, DELTA_NORM) == pytest.approx(
        math.sqrt(2) * 1e-200
    )


def test_each_report_has_its_measures() -> None:
    """Which panels a report gets follows from what its modules know; ranks alone are no picture."""
    assert [m.field for m in measures_of(families.changed(families.llama(2)))] == ["relative"]
    assert [m.field for m in measures_of(families.compared(families.llama(2)))] == ["cosine", "overlap"]
    assert [m.field for m in measures_of(families.extracted(families.llama(2)))] == ["delta_norm", "error", "rank"]
    assert measures_of(Report("inspect", ["a"], "", modules=[ModuleReport("m", (2, 2), rank=4)])) == []

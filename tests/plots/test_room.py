"""No two words of a picture touch, and none lies over a map, however many layers and kinds there are."""

from __future__ import annotations

import families
import numpy as np
import pytest

from lorasurgery.report import Report

pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from lorasurgery.plots.sheet import card, sheet
from lorasurgery.plots.style import house_style

PICTURES = {
    "bert change": families.changed(families.bert_tensors()),
    "bert extract with ranks": families.extracted(families.bert(), ranks=True),
    "bert comparison": families.compared(families.bert()),
    "bert spectrum": families.spectra(families.bert(), rank=128),
    "llama-32 change": families.changed([*families.llama(32), "lm_head", "model.embed_tokens"]),
    "llama-80 comparison": families.compared(families.llama(80)),
    "t5 spectrum": families.spectra(families.t5(6)),
    "gpt2 comparison": families.compared([*families.gpt2(), "wte", "wpe"]),
    "experts": families.extracted(families.mixture(6, 128)),
    "sdxl extract": families.extracted(families.sdxl()),
    "sdxl spectrum": families.spectra(families.sdxl(), rank=8),
    "one kind": families.compared([f"h.{i}.attn.c_attn" for i in range(12)]),
    "few": families.compared(families.llama(1)[:3]),
    "many stacks": families.extracted(
        [f"stage_{s}_of_the_net.{i}.conv{k}" for s in range(9) for i in range(2) for k in (1, 2)]
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_words_do_not_touch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all words that are drawn, no two boxes overlap, and none lies over another panel."""
    _check(PICTURES[name], monkeypatch)


def test_the_card_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same holds for the picture of a model card."""
    _check(families.spectra(families.bert(), rank=1024), monkeypatch, make=card)


def _check(report: Report, monkeypatch: pytest.MonkeyPatch, make=sheet) -> None:
    drawn: dict[int, Text] = {}
    real = Text.draw

    def draw(self: Text, *args: object, **kwargs: object) -> object:
        drawn[id(self)] = self
        return real(self, *args, **kwargs)

    with house_style():
        figure = make(report)
        canvas = FigureCanvasAgg(figure)
        monkeypatch.setattr(Text, "draw", draw)
        canvas.draw()
        renderer = canvas.get_renderer()
        words = [t for t in drawn.values() if t.get_visible() and t.get_text().strip()]
        boxes = np.array([t.get_window_extent(renderer).padded(-0.5).extents for t in words])
        touching = _overlaps(boxes, boxes) & ~np.eye(len(words), dtype=bool)
        assert not touching.any(), [words[i].get_text() for i in np.argwhere(touching)[0]]
        for ax in figure.axes:
            own = {id(t) for t in ax.findobj(Text)}
            covered = _overlaps(boxes, np.array([ax.get_window_extent().extents]))[:, 0]
            assert not [t.get_text() for t, over in zip(words, covered, strict=True) if over and id(t) not in own]


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which boxes (x0, y0, x1, y1) of a, (m, 4), overlap which of b, (n, 4) -> (m, n)."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    return (low < high).all(-1)

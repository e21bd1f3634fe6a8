"""Every kind of report becomes a picture: whole, the same each time, and refused in a clear line where it can't be."""

from __future__ import annotations

import hashlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import families
import pytest

from lorasurgery.errors import OutputError, UsageError
from lorasurgery.plots import card_picture, check_plot_name, draw
from lorasurgery.plots.plan import notes, plan
from lorasurgery.plots.style import write_whole
from lorasurgery.report import Change, Comparison, ModuleReport, Report, Spectrum

pytest.importorskip("matplotlib")
SMALL = families.llama(2)
REPORTS = {
    "change": families.changed(SMALL),
    "comparison": families.compared(SMALL),
    "extract": families.extracted(SMALL, ranks=True),
    "spectrum": families.spectra(SMALL),
    "one module": families.spectra(SMALL[:1], rank=1),
    "outside only": families.compared(["wte", "wpe", "lm_head"]),
    "retention": Report(
        "merge", ["base", "adapter"], "o",
        modules=[ModuleReport(n, (4, 4), delta_norm=1.0, retention=0.5 + i / 100) for i, n in enumerate(SMALL)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REPORTS)
def test_every_report_draws_to_svg(kind: str, tmp_path: Path) -> None:
    """An SVG is well-formed and says in comments what its outlines say."""
    draw(REPORTS[kind], tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    words = re.findall("<!-- (.*?) -->", text)
    assert words
    if kind in ("change", "comparison", "extract"):
        assert {"q_proj", "v_proj", "layer"} <= set(words)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", ["extract", "spectrum", "outside only"])
def test_reports_draw_to_png(kind: str, tmp_path: Path) -> None:
    """A PNG of about two pixels for each of a README's 900; a program's own settings of matplotlib stay as they were."""
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(REPORTS[kind], str(tmp_path / "picture.PNG"))
    content = (tmp_path / "picture.PNG").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert abs(int.from_bytes(content[16:20], "big") - 1800) < 60
    assert dict(matplotlib.rcParams) == before


def test_the_card_has_a_picture() -> None:
    """Bytes of a PNG for a model card; a report without singular values has none."""
    assert card_picture(REPORTS["spectrum"])[:4] == b"\x89PNG"
    with pytest.raises(UsageError, match="no singular values"):
        card_picture(REPORTS["extract"])


_SCRIPT = """
import hashlib, sys
sys.path.insert(0, {tests!r})
import families
import lorasurgery.plots as plots
assert not {{"matplotlib", "numpy", "torch"}} & set(sys.modules), "imported before anything is drawn"
for end in ("svg", "png"):
    plots.draw(families.spectra(families.llama(2)), {folder!r} + "/there." + end)
assert "matplotlib.pyplot" not in sys.modules and "torch" not in sys.modules
"""


def test_bytes_are_the_same_in_another_process(tmp_path: Path) -> None:
    """Neither the time, nor the order of hashes, nor a user's settings change a byte; nothing is imported too early."""
    script = _SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    (tmp_path / "matplotlibrc").write_text("font.size: 23\naxes.facecolor: red\nsvg.fonttype: none\n")
    env = os.environ | {"PYTHONHASHSEED": "7", "MPLBACKEND": "svg", "MATPLOTLIBRC": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for end in ("svg", "png"):
        draw(families.spectra(families.llama(2)), tmp_path / f"here.{end}")
        here, there = (hashlib.sha256((tmp_path / f"{x}.{end}").read_bytes()).hexdigest() for x in ("here", "there"))
        assert here == there
    assert b"matplotlib.org" not in (tmp_path / "here.svg").read_bytes().split(b"<defs>")[0].split(b"<metadata>")[1]


def test_numbers_of_every_kind_draw(tmp_path: Path) -> None:
    """Missing, zero, infinite and extreme numbers are drawn as what they are, among others."""
    numbers = (None, 0.0, math.nan, 0.5, math.inf, 1e-300, 1e300)
    modules = [
        ModuleReport(n, (4, 4), rank=i % 3, delta_norm=numbers[i % 7], error=numbers[i % 5])
        for i, n in enumerate([*families.gpt2()[:24], "wte", "wpe"])
    ]
    draw(Report("extract", ["a", "b"], "o", modules=modules), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert all(word in text for word in ("not changed", "no number", "c_attn"))


def test_alike_numbers_draw(tmp_path: Path) -> None:
    """Where all are the same, and be it enormous, a scale has nothing to spread."""
    modules = [ModuleReport(n, (4, 4), delta_norm=1e300, error=0.0) for n in SMALL]
    draw(Report("extract", ["a", "b"], "o", modules=modules), tmp_path / "a.png")


def test_changes_without_numbers_draw(tmp_path: Path) -> None:
    """Tensors that are new, gone or reshaped are hatched, and the legend says what that means."""
    modules: list[ModuleReport] = [Change(n, (4, 4), relative=(None, 0.5)[i % 2]) for i, n in enumerate(SMALL)]
    draw(Report("diff", ["a", "b"], "", modules=modules), tmp_path / "a.svg")
    assert "of another shape" in (tmp_path / "a.svg").read_text()


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    """A $ starts no formula, -- ends no comment, and letters that the font lacks raise no warning."""
    modules = [ModuleReport(n, (4, 4), delta_norm=1.0) for n in ("a$\\frac$", "b--><svg", "模型", "_c")]
    draw(Report("extract", ["a$b$", "c&<d"], "o", modules=modules), tmp_path / "a.svg")
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def test_updates_of_zero_draw(tmp_path: Path) -> None:
    """An adapter that changes nothing has a map that says so, and no curves."""
    modules: list[ModuleReport] = [Spectrum(n, (4, 4), delta_norm=0.0) for n in SMALL]
    draw(Report("inspect", ["a"], "", modules=modules), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "not changed" in text
    assert "singular" not in text


def test_cosines_that_are_all_zero_draw(tmp_path: Path) -> None:
    """A scale around zero needs no largest value."""
    modules: list[ModuleReport] = [Comparison(n, (4, 4), cosine=0.0, overlap=0.0) for n in SMALL]
    draw(Report("diff", ["a", "b"], "", modules=modules), tmp_path / "a.svg")


def test_what_is_left_out_is_said() -> None:
    """Too many kinds, too many modules outside, several in a cell, tensors stored whole: a note says each."""
    names = [f"net.{i}.part_{k}" for i in range(3) for k in range(30)] + [f"outer_{k}" for k in range(20)]
    report = families.extracted([*names, *(f"net.{i}.experts.{e}.w" for i in range(3) for e in range(9))])
    report.full = [ModuleReport("norm", (4,))]
    assert notes(plan(report)).splitlines() == [
        "×n: n modules in one cell, their ‖ΔW‖ added in squares, the error of all of them together",
        "the map shows the 24 largest of 31 kinds",
        "the bars show the 12 largest of 20 modules",
        "not shown: 1 tensor stored whole",
    ]


NOTHING = {
    "adapters": (Report("inspect", ["loras"], "", adapters=[Report("inspect", ["a"], "")]), "holds 1; name one"),
    "headers": (Report("inspect", ["a"], "", modules=[ModuleReport("m", (2, 2), rank=4)]), "spectrum=True"),
    "dry run": (
        Report("extract", ["a"], "", dry_run=True, modules=[ModuleReport("m", (2, 2), rank=4)]),
        "dry_run=True",
    ),
    "empty": (Report("diff", ["a", "b"], ""), "no modules"),
    "not finite": (Report("merge", ["a"], "", modules=[ModuleReport("m", (2, 2), delta_norm=math.nan)]), "finite"),
}


@pytest.mark.parametrize("case", NOTHING)
def test_nothing_to_draw_is_refused(case: str, tmp_path: Path) -> None:
    """The line says why there is nothing, and no file appears."""
    report, says = NOTHING[case]
    with pytest.raises(UsageError, match=re.escape(says)):
        draw(report, tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.pdf", "a", "svg", ".svg", "a.svg.gz", ""])
def test_other_endings_are_refused(name: str) -> None:
    """Before any work."""
    with pytest.raises(UsageError, match=r"ends in \.svg or \.png"):
        check_plot_name(name)


def test_without_matplotlib_the_next_move_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before any work too."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for work in (
        lambda: check_plot_name("a.svg"),
        lambda: draw(REPORTS["change"], tmp_path / "a.svg"),
        lambda: card_picture(REPORTS["spectrum"]),
    ):
        with pytest.raises(UsageError, match=re.escape("pip install 'lorasurgery[plot]'")):
            work()


def test_a_failed_write_leaves_the_old_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A full disk leaves what was there, and nothing beside it."""
    file = tmp_path / "a.svg"
    file.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        draw(REPORTS["outside only"], file)
    assert [p.name for p in tmp_path.iterdir()] == ["a.svg"]
    assert file.read_text() == "old"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """Before any work, and again if it goes away meanwhile."""
    with pytest.raises(UsageError, match=r"no folder .*nowhere"):
        check_plot_name(tmp_path / "nowhere" / "a.svg")
    (tmp_path / "b.svg").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        check_plot_name(tmp_path / "b.svg")
    with pytest.raises(OutputError, match="nowhere"):
        write_whole(tmp_path / "nowhere" / "a.svg", b"<svg/>")

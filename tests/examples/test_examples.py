"""Every example runs offline on real weights, tells its story, and holds what it claims."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A work folder, in which the first example that needs a model makes it; hundreds of megabytes, so not left."""
    folder = tmp_path_factory.mktemp("work")
    yield folder
    shutil.rmtree(folder)


def run(script: str, work: Path, *options: str) -> str:
    """Run an example as a reader would, offline and with all its bounds checked; what it printed."""
    offline = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    command = [sys.executable, "-W", "ignore", EXAMPLES / script, "--work", work, *options]
    environment = offline | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "holds: " in done.stdout
    assert "DOES NOT HOLD" not in done.stdout
    assert done.stderr == ""
    return done.stdout


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}


def test_extract(work: Path) -> None:
    """Plan, extract, inspect, merge; then base + PEFT and the merged checkpoint are one model."""
    said = run("extract.py", work, "--rank", "16")
    for command in ("plan", "extract", "inspect", "merge"):
        assert f"$ lorasurgery {command} " in said
    assert "rank   8" in said  # from the spectrum
    assert "rank  16" in said  # from the report
    assert "holds: base + PEFT and the merged checkpoint are one model, to 1e-5" in said
    assert files(work / "extract") == {"adapter/adapter_model.safetensors", "merged/model.safetensors"}


def test_blend_and_switch(work: Path) -> None:
    """Two adapters are compared, blended with negative weights too, and switched; files and memory agree."""
    said = run("blend_and_switch.py", work)
    assert re.search(
        r"cosine [+−-]0\.\d{3} in total", said
    )  # its sign is of this Python's docstrings, learnt for 4 steps
    assert " -w 1.0 -w -0.5 " in said
    for row in ("base", "tuned a", "tuned b", "in memory: a", "in memory: +0.7·a +0.3·b", "in memory: +1·a -0.5·b"):
        assert f"\n {row} " in said
    assert "holds: unmerge(model) restores every bit" in said
    adapters = {f"{name}/adapter_model.safetensors" for name in ("a", "b", "blend", "away")}
    assert files(work / "blend") == {*adapters, "merged/model.safetensors"}


def test_rank_against_quality(work: Path) -> None:
    """A table of every way to choose ranks, and a picture that says the same."""
    said = run("rank_against_quality.py", work)
    for choice in ("--rank 4", "--rank 16", "--energy 0.3", "--budget 2%"):
        assert f"\n {choice} " in said
    assert "rank-against-quality.svg" in said
    picture = (work / "rank/rank-against-quality.svg").read_text()
    assert picture.startswith("<?xml")
    assert picture.rstrip().endswith("</svg>")


def test_publish(work: Path) -> None:
    """From a Hub on loopback and back to it: only headers for a plan, and the published adapter is the merged model."""
    said = run("publish.py", work)
    assert "$ export HF_ENDPOINT=http://127.0.0.1:" in said
    assert "$ lorasurgery extract me/base me/tuned@" in said
    assert "--push me/adapter --private" in said
    assert 'PeftModel.from_pretrained(model, "me/adapter")' in said
    assert "base_model: me/base" in said
    assert "holds: a plan fetches less than 1% of the model" in said
    report = json.loads((work / "publish/adapter/lorasurgery.json").read_text())
    assert report["command"] == "extract"


def test_a_bound_that_does_not_hold_fails_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    """The exit status is 1, and the claim that failed is named."""
    from common import verdict  # here and not above: it imports transformers, which takes seconds

    assert verdict({"water is wet": True}) == 0
    assert verdict({"water is wet": True, "the moon is cheese": False}) == 1
    assert "DOES NOT HOLD: the moon is cheese" in capsys.readouterr().out


def test_two_that_make_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    """The first to end wins, whole; the other one, and one that fails, leave nothing."""
    from minilm_finetune import whole_folder

    out = tmp_path / "model"
    with whole_folder(out) as first:
        with whole_folder(out) as second:
            (second / "weights").write_text("second")
        (first / "weights").write_text("first")
    with pytest.raises(KeyError), whole_folder(tmp_path / "other") as partial:
        (partial / "weights").write_text("half")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (out / "weights").read_text() == "second"

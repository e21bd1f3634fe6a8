"""torchrun: several ranks write the bytes of one, and a rank that dies fails the job so that --resume goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from long_runs import hashes, left, operation, torchrun, world

from lorasurgery.checkpoint.journal import journals
from lorasurgery.engine.ranks import Ranks, ranks
from lorasurgery.errors import SurgeryError, UsageError
from lorasurgery.ops.blend import rerank

DIES = """
import os, lorasurgery.checkpoint.journal as journal
from lorasurgery.cli.main import run
add, count = journal.Run.add, [0]
def add_or_die(self, *args, **more):
    count[0] += 1
    if count[0] == 4 and os.environ["RANK"] == "1":
        os._exit(9)
    add(self, *args, **more)
journal.Run.add = add_or_die
run()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world")
    world(path)
    return path


def arguments(name: str, folder: Path, out: Path) -> list[str]:
    """The command line of long_runs.operation."""
    base, tuned, adapter = (str(folder / n) for n in ("base", "tuned", "adapter"))
    words = {
        "merge": ["merge", base, adapter, "--rounding", "stochastic"],
        "extract": ["extract", base, tuned, "--rank", "8"],
        "blend": ["blend", adapter, adapter, "-w", "0.5", "-w", "0.25", "--rank", "6"],
    }[name]
    return [*words, "-o", str(out), "--json"]


def without_call(folder: Path) -> dict[str, str]:
    """The hashes but for the record, which tells how it was called."""
    assert (folder / "lorasurgery.json").exists()
    return {name: found for name, found in hashes(folder).items() if name != "lorasurgery.json"}


FOUR = [pytest.param(name, 4, marks=pytest.mark.slow) for name in ("merge", "extract", "blend")]


@pytest.mark.parametrize(("name", "count"), [("merge", 2), ("extract", 2), ("blend", 2), *FOUR])
def test_the_bytes_of_one_process(name: str, count: int, folder: Path, tmp_path: Path) -> None:
    """Two and four ranks: the files of one process, one report on stdout, no remains."""
    operation(name, folder, tmp_path / "one")
    done = torchrun(count, arguments(name, folder, tmp_path / "many"))
    assert done.returncode == 0, done.stderr
    assert without_call(tmp_path / "many") == without_call(tmp_path / "one")
    report, one = json.loads(done.stdout), json.loads((tmp_path / "one/lorasurgery.json").read_text())
    assert report["modules"] == one["modules"]
    assert report["totals"] == one["totals"]


@pytest.mark.parametrize("name", ["merge", "extract"])
def test_a_rank_that_dies(name: str, folder: Path, tmp_path: Path) -> None:
    """The job fails, nothing looks finished, and --resume, on another number of ranks, ends with the same bytes."""
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    out = tmp_path / "out"
    done = torchrun(2, arguments(name, folder, out), str(script))
    assert done.returncode == 1
    assert re.search(r"exitcode +: 9\b", done.stderr), done.stderr  # torchrun's word for the one that died
    assert "Traceback" not in "\n".join(line for line in done.stderr.splitlines() if "lorasurgery" in line)
    assert all(name.endswith(".lorasurgery-partial") for name in left(out))
    assert journals(out)
    operation(name, folder, tmp_path / "one")
    report = operation(name, folder, out, resume=True)
    assert report.resumed > 0
    assert without_call(out) == without_call(tmp_path / "one")


def test_commands_that_are_not_shared_out(folder: Path) -> None:
    """inspect under torchrun is the first rank's: one report."""
    done = torchrun(2, ["inspect", str(folder / "adapter"), "--json"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["command"] == "inspect"


def test_one_line_when_the_input_is_wrong(folder: Path, tmp_path: Path) -> None:
    """An error that all ranks meet: exit status not 0, and no rank hangs."""
    done = torchrun(
        2, ["merge", str(folder / "nowhere.safetensors"), str(folder / "adapter"), "-o", str(tmp_path / "o")]
    )
    assert done.returncode == 1
    assert "nowhere.safetensors: is neither a file nor a folder" in done.stderr
    assert not (tmp_path / "o").exists()


@given(st.integers(1, 12), st.lists(st.integers(0, 100), max_size=60))
def test_shares(size: int, costs: list[int]) -> None:
    """Every item is one rank's, in order, and no rank has more than its share and one item more."""
    shares = [Ranks(rank, size).mine(range(len(costs)), costs) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(len(costs)))
    fair = sum(costs) / size
    assert all(sum(costs[i] for i in share) <= fair + max(costs, default=0) for share in shares)


def test_variables_that_contradict_each_other(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    """Ranks beyond the world's size, words for numbers, and a folder of adapters are refused in one line."""
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(SurgeryError, match="torchrun"):
        ranks()
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(SurgeryError, match="numbers"):
        ranks()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "many").mkdir()
    (tmp_path / "many/one").symlink_to(folder / "adapter")
    with pytest.raises(UsageError, match="without torchrun"):
        rerank(str(tmp_path / "many"), tmp_path / "out")

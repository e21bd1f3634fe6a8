"""With the network off, every command works on local paths: any use of a socket ends the process in an error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import models
import pytest

# An audit hook sees every socket that Python makes, whichever library asks for it, and can't be taken off again.
NO_SOCKETS = """
import sys

def hook(event, args):
    if event.startswith("socket."):
        raise RuntimeError(f"the network was used: {event} {args}")

sys.addaudithook(hook)
import runpy
runpy.run_module("lorasurgery", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned and an adapter."""
    root = tmp_path_factory.mktemp("world")
    models.save(models.make("llama"), root / "base")
    models.save(models.perturb(models.make("llama")), root / "tuned")
    models.peft_adapter("llama", root / "adapter", r=4, target_modules=["q_proj", "up_proj"])
    (root / "base/README.md").write_text("---\nlicense: mit\n---\n")  # read for its licence
    shutil.copytree(root / "base", root / "model")  # to be changed in place
    return root


COMMANDS = {
    "extract": "extract base tuned -o OUT --rank 4",
    "merge": "merge base adapter -o OUT",
    "unmerge": "unmerge base adapter -o OUT",
    "rerank": "rerank adapter -o OUT --rank 2 --plot OUT.svg",
    "blend": "blend adapter adapter -w 1 -w -0.5 -o OUT",
    "convert": "convert adapter -o OUT --to peft --portable --base base",
    "inspect": "inspect adapter --spectrum --base base --plot OUT.png",
    "inspect a checkpoint": "inspect base",
    "check": "check adapter --for peft --base base",
    "diff": "diff base tuned --plot OUT.svg",
    "diff adapters": "diff adapter adapter",
    "plan": "plan base --rank 8",
    "switch": "switch model --to adapter --add",
    "verify": "verify base --against base",
    "push": "push adapter me/adapter --dry-run",
    "a dry run": "merge base adapter -o OUT --dry-run",
}


def run(words: list[str], cwd: Path, code: str = NO_SOCKETS) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}  # nothing says offline
    return subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, env=environment, capture_output=True, text=True,
                          timeout=1200)  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_local_work_never_touches_the_network(name: str, world: Path, tmp_path: Path) -> None:
    """Every command on local paths ends well in a process that may not make a socket."""
    words = [w.replace("OUT", str(tmp_path / "out")) for w in COMMANDS[name].split()]
    done = run([*words, "--json"], world)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["command"] == words[0]


def test_every_command_is_among_them() -> None:
    """A new command must show that it works offline."""
    from lorasurgery.cli.main import COMMANDS as ALL

    assert {line.split()[0] for line in COMMANDS.values()} == set(ALL)


def test_a_path_that_is_no_reference_stays_local(world: Path) -> None:
    """Names that can't be on the Hub are told as missing, without asking anybody."""
    for name in ("./nowhere", "/no/where", "nowhere", "a/b/c", "some/file.safetensors", "../x/y"):
        done = run(["inspect", name], world)
        assert done.returncode == 1
        assert "neither a file nor a folder" in done.stderr
        assert "network" not in done.stderr


def test_the_hook_works(world: Path) -> None:
    """A reference to the Hub does use the network, so the hook would have seen it."""
    done = run(["inspect", "org/name"], world)
    assert done.returncode == 1
    assert "the network was used" in done.stderr or "can't be reached" in done.stderr

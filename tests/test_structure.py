"""The structure holds: imports point down, only cli/ prints, and the written reference is what the help says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from import_graph import FILES, PACKAGE, circles, imports_of, module_of

import lorasurgery

ROOT = Path(__file__).parent.parent
# The floors, lowest first: a room imports rooms that stand before it. `ops` alone are the verbs, a file each, which may
# call one another; their rooms stand beneath them.
FLOORS = [
    "_version", "errors", "arguments", "notebook", "totals", "report", "keywords", "module_location", "engine", "lowrank", "linalg", "checkpoint", "adapters", "clients",
    "hub", "plots", "ops.provenance", "ops.placement", "ops.factors", "ops.merging", "ops.blending", "ops.conversion",
    "ops.extraction", "ops.examining", "ops", "cli", "__main__", "",
]  # fmt: skip
# What a room knows nothing of, though it stands lower.
APART = {
    "checkpoint": {"lowrank", "linalg"},
    "plots": {"lowrank", "linalg", "checkpoint", "adapters", "clients", "hub"},
    "nn": {"report", "plots", "ops"},
}


def room_of(module: str) -> str:
    """The longest floor that a module of the package lies on; nn stands beside ops."""
    inner = module.removeprefix("lorasurgery").removeprefix(".")
    floors = [f for f in [*FLOORS, "nn"] if f and (inner == f or inner.startswith(f"{f}."))]
    return max(floors, key=len, default=inner)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    """No room imports one that stands above it, for types or inside a function either."""
    here = room_of(module_of(path))
    others = {room_of(name) for name in imports_of(path)} - {here}
    floor = FLOORS.index("ops" if here == "nn" else here)
    if path == PACKAGE / "__init__.py":
        return  # offers the public names of all rooms
    assert all(other != "nn" and FLOORS.index(other) < floor for other in others), others
    assert not {other.partition(".")[0] for other in others} & APART.get(here, set())


def test_no_file_imports_itself_in_a_circle() -> None:
    """Not for types, not inside a function: whoever reads a file can read what it stands on first."""
    assert not circles()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_cli_prints(path: Path) -> None:
    """Library code returns reports; click and rich stay in cli/."""
    if path.is_relative_to(PACKAGE / "cli"):
        return
    printer = path.relative_to(PACKAGE).as_posix() == "nn/model.py"  # print_trainable_parameters is there to print
    tree = ast.parse(path.read_text())
    calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert printer or "print" not in calls
    words = path.read_text()
    assert "import click" not in words
    assert "import rich" not in words
    assert "from rich" not in words


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_readable(path: Path) -> None:
    """A file of more than 600 lines has a second idea inside."""
    assert len(path.read_text().splitlines()) <= 600


def test_the_cli_reference_is_current() -> None:
    """docs/cli.md is what `make docs` would write now."""
    done = subprocess.run([sys.executable, ROOT / "docs/generate_cli.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_is_documented() -> None:
    """README and the reference name every command."""
    from lorasurgery.cli.main import COMMANDS

    for text in ((ROOT / "README.md").read_text(), (ROOT / "docs/cli.md").read_text()):
        assert all(f"lorasurgery {name}" in text for name in COMMANDS)


def test_public_names_are_imported_when_they_are_used() -> None:
    """`import lorasurgery` brings neither torch nor huggingface_hub; each public name is the one in its room."""
    code = (
        "import sys, lorasurgery\n"
        "assert not {'torch', 'numpy', 'huggingface_hub', 'rich', 'click'} & set(sys.modules)\n"
        "for name, home in lorasurgery._PLACES.items():\n"
        "    found = getattr(lorasurgery, name)\n"
        "    assert found.__module__.startswith('lorasurgery.'), name\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    import lorasurgery
    from lorasurgery.ops.merge import merge

    assert lorasurgery.merge is merge
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {a.asname for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names if a.asname}
    assert typed - {"__version__"} == set(lorasurgery._PLACES) == set(lorasurgery.__all__) == set(dir(lorasurgery))


def test_a_star_import_gives_the_public_names_alone() -> None:
    """`from lorasurgery import *` brings every public name, and `dir` shows nothing else."""
    names: dict[str, object] = {}
    exec("from lorasurgery import *", names)
    assert set(names) - {"__builtins__"} == set(lorasurgery.__all__)


def test_no_two_files_of_tests_bear_one_name() -> None:
    """They are imported by their names alone, as helpers of one another; a conftest.py, of which many are, never is."""
    alone = [p for p in (ROOT / "tests").rglob("*.py") if not (p.parent / "__init__.py").exists()]
    names = [p.name for p in alone if p.name != "conftest.py"]
    assert sorted(set(names)) == sorted(names)
    assert not [p for p in alone if re.search(r"^\s*(from|import) conftest\b", p.read_text(), re.M)]


def test_several_folders_of_tests_are_collected_together(tmp_path: Path) -> None:
    """`make test TESTS="tests/a tests/b"`: each folder may have a conftest.py of its own."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "conftest.py").write_text("import pytest\n\n@pytest.fixture\ndef one():\n    return 1\n")
        (tmp_path / name / f"test_{name}.py").write_text("def test_it(one):\n    assert one == 1\n")
    command = [sys.executable, "-m", "pytest", "-v", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "a", "b"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "2 passed" in done.stdout, done.stdout

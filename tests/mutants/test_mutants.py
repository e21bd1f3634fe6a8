"""The tool that puts mistakes into the code: it must choose the same ones again, change what it says, and stop in time."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from mutant_choice import EQUIVALENT, ROOMS, choose, reason, reasons
from mutant_copies import Marked, watched
from mutant_kinds import mutants

ROOT = Path(__file__).parent.parent.parent
SOURCE = '''\
"""A module."""
LIMIT = 3


class Thing:
    """Counts é."""

    size: int = 1

    def grow(self, by: int = 2, *, top: bool = True) -> int:
        """More of it, up to 7."""
        "é"; self.size += by * 2
        if self.size > LIMIT and top:
            raise ValueError(f"{self.size - 1} is too much")
        for i in range(by, LIMIT):
            if not top:
                break
            print(i, self.size)
        return [0, 1, 2][1:by]
'''
EXPECTED = [
    ("early return", 'return None "é"; self.size += by * 2'),
    ("constant", "''; self.size += by * 2"),
    ("arithmetic", '"é"; self.size -= by * 2'),
    ("arithmetic", '"é"; self.size += (by / 2)'),
    ("constant", '"é"; self.size += by * 3'),
    ("constant", '"é"; self.size += by * 1'),
    ("condition", "if not (self.size > LIMIT and top):"),
    ("boolean", "if (self.size > LIMIT or top):"),
    ("comparison", "if self.size >= LIMIT and top:"),
    ("comparison", "if self.size <= LIMIT and top:"),
    ("raise removed", "pass"),
    ("arguments", "for i in range(LIMIT, by):"),
    ("boolean", "if (top):"),
    ("loop", "if not top: continue"),
    ("call removed", "pass"),
    ("arguments", "print(self.size, i)"),
    ("return None", "return None"),
    ("constant", "return [1, 1, 2][1:by]"),
    ("constant", "return [(-1), 1, 2][1:by]"),
    ("constant", "return [0, 2, 2][1:by]"),
    ("constant", "return [0, 0, 2][1:by]"),
    ("constant", "return [0, 1, 3][1:by]"),
    ("constant", "return [0, 1, 1][1:by]"),
    ("slice", "return [0, 1, 2][:by]"),
    ("slice", "return [0, 1, 2][1 + 1:by]"),
    ("slice", "return [0, 1, 2][1:]"),
    ("slice", "return [0, 1, 2][1:by + 1]"),
    ("constant", "return [0, 1, 2][2:by]"),
    ("constant", "return [0, 1, 2][0:by]"),
]


def test_every_kind_of_mistake() -> None:
    """Each place has the mistakes that it can have, and names, annotations, defaults and texts for people stay."""
    found = mutants("thing.py", SOURCE.encode())
    assert [(m.kind, m.now) for m in found] == EXPECTED
    assert {m.function for m in found} == {"Thing.grow"}
    assert [m.line for m in found if m.kind == "loop"] == [17]


def test_one_change_of_the_code_each() -> None:
    """Every mutant of the package is a file that can be read, and means something else than before."""
    for path in sorted((ROOT / "lorasurgery" / "linalg").glob("*.py")):
        source = path.read_bytes()
        for mutant in mutants(path.name, source)[::40]:
            assert ast.dump(ast.parse(mutant.applied(source))) != ast.dump(ast.parse(source)), mutant


def package(root: Path, more: str = "") -> Path:
    """Two small rooms."""
    for room in ("linalg", "ops"):
        (root / "lorasurgery" / room).mkdir(parents=True)
        text = "\n".join(f"def f{i}(a, b):\n    return a + b * {i}\n" for i in range(30))
        (root / "lorasurgery" / room / "some.py").write_text(text + more)
    return root


def test_the_choice_is_the_same_again_and_little_of_it_changes(tmp_path: Path) -> None:
    """A function more moves lines and takes a few turns; all other mutants are those that they were."""
    before = choose(package(tmp_path / "one"), 24, 16)
    assert before == choose(tmp_path / "one", 24, 16)
    assert len(before) == 24 // len(ROOMS) * 2, "two rooms are empty"
    assert len({(m.file, m.function) for m in before}) == len(before)
    assert before != choose(tmp_path / "one", 24, 17)
    after = choose(package(tmp_path / "two", "\ndef new(a):\n    return a < 1 and a > 7\n"), 24, 16)
    texts = [{(m.file, m.function, m.now) for m in found} for found in (before, after)]
    assert len(texts[0] - texts[1]) <= 4
    assert all(m.file == "lorasurgery/ops/some.py" for m in choose(tmp_path / "one", 4, 16, "lorasurgery/ops"))


def test_reasons_go_by_the_text(tmp_path: Path) -> None:
    """What makes no difference is known by file, kind and text; another line of the same file is not."""
    file = tmp_path / "equivalent.json"
    entry = {"file": "f.py", "function": "f", "kind": "constant", "was": "return 1", "now": "return 2", "why": "so"}
    file.write_text(json.dumps([entry]))
    known = reasons(file)
    moved = b"# above\n\n\ndef f():\n    return 1\n"
    assert [reason(m, known) for m in mutants("f.py", moved)] == [None, "so", None]
    assert [reason(m, known) for m in mutants("g.py", moved)] == [None, None, None]
    assert all(reasons(EQUIVALENT).values())


def test_marks_change_nothing_else() -> None:
    """A marked file does what it did, and tells when a marked statement is come by."""
    mutant = next(m for m in mutants("thing.py", SOURCE.encode()) if m.kind == "loop")
    tree = ast.fix_missing_locations(Marked({mutant.statement: 5}).visit(ast.parse(SOURCE)))
    lines = ast.unparse(tree).splitlines()
    (at,) = [i for i, line in enumerate(lines) if "seen(5)" in line]
    assert lines[at + 1].strip() == "break"
    assert ast.dump(ast.parse("\n".join(lines[:at] + lines[at + 1 :]))) == ast.dump(ast.parse(SOURCE))


@pytest.mark.skipif(sys.platform != "linux", reason="counts processor time by /proc")
def test_loops_without_end_are_ended(tmp_path: Path) -> None:
    """What takes more processor time than its tests did is ended, children too; what ends by itself has its status."""
    null = os.open(os.devnull, os.O_WRONLY)
    loop = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    assert watched([sys.executable, "-c", loop], tmp_path, dict(os.environ), null, 0.5) == "ran for more than 0 s"
    assert watched([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, dict(os.environ), null, 60) == 3
    os.close(null)

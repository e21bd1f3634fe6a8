"""Separate environments for peers with other pins, made once in the folder of work data."""

from __future__ import annotations

import subprocess
import sys
import venv
from importlib.metadata import distributions
from pathlib import Path

HERE = Path(__file__).resolve().parent
# torch first: if it is requested together with others, pip may choose a build with gigabytes of CUDA
STEPS = {
    "mergekit": [["torch==2.13.0"], ["-r", str(HERE / "requirements-mergekit.txt")]],
    # axolotl alone: its 58 requirements (xformers, bitsandbytes, triton, gradio …) are not needed to merge
    "axolotl": [
        ["torch==2.13.0"],
        ["-r", str(HERE / "requirements-axolotl.txt")],
        ["--no-deps", "axolotl==0.19.0"],
    ],
}


def environment(name: str, work: Path) -> Path | None:
    """Return the folder of a peer's programs, installed if missing; None if it can't be installed."""
    folder = work / f"{name}-venv"
    mark = folder / f"{name}.installed"
    if not mark.exists():
        print(f"installing {name} into {folder} (once)", file=sys.stderr)
        try:
            venv.create(folder, with_pip=True, clear=True)
            for what in STEPS[name]:
                subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", *what], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{name} can't be installed: {error}", file=sys.stderr)
            return None
        mark.touch()
    return folder / "bin"


def installed(folder: Path, *packages: str) -> dict[str, str]:
    """Return the versions of packages in an environment; nothing if it is missing."""
    places = [str(p) for p in folder.glob("lib/python*/site-packages")]
    found = {d.metadata["Name"]: d.version for d in distributions(path=places)}
    return {p: found[p] for p in packages if p in found}

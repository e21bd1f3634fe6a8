"""The limits of any merge: copying a checkpoint's files to the disk, and reading them once.

python -m benchmarks.limits copy FROM TO      cp without sharing of blocks, then fsync of each file and the folder
python -m benchmarks.limits read FROM         reads of 16 MB into one buffer
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BLOCK = 16 * 2**20


def copy(source: Path, target: Path) -> None:
    """Copy every file with cp, then wait until the disk has them."""
    target.mkdir(parents=True)
    whole = ["--reflink=never"] if sys.platform == "linux" else []
    subprocess.run(["cp", *whole, *map(str, sorted(source.iterdir())), str(target)], check=True)
    for path in (*target.iterdir(), target):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def read(source: Path) -> None:
    """Read every file from beginning to end and discard the data."""
    buffer = bytearray(BLOCK)
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


if __name__ == "__main__":
    {"copy": copy, "read": read}[sys.argv[1]](*map(Path, sys.argv[2:]))

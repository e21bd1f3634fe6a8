"""What an operation measures about itself."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lorasurgery.engine.runtime import resolve_device
from lorasurgery.errors import UsageError

CHILD = "from lorasurgery.engine.runtime import peak_memory; print(peak_memory())"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone passes a parent's size on")
def test_peak_memory_is_not_that_of_the_process_that_started_it() -> None:
    """A child of a process that holds 300 MB says what it took itself."""
    held = bytearray(b"1") * (300 << 20)
    said = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert 1 << 20 < int(said.stdout) < len(held)


@pytest.mark.parametrize(
    ("name", "said"),
    [("mps", "--device mps: not available on this machine"), ("cuda", "--device cuda: this machine has 0 CUDA devices"),
     ("cuda:3", "--device cuda:3: this machine has 0 CUDA devices"), ("tpu", "--device tpu: expected auto, cpu")],
)  # fmt: skip
def test_a_device_that_is_not_there(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused by its name before anything is read, with one that is there; auto takes that."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match=said):
        resolve_device(name)
    assert resolve_device("auto") == torch.device("cpu")

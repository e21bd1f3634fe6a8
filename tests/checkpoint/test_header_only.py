"""The mark beside a file of which only the header is here: what this program did not write is not believed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import FormatError


@pytest.mark.parametrize("raw", [b'["w"', b"", b"null", b"5", b'"w"', b"[1]", b'[["w"]]', b'{"w": 1}', b"{}"], ids=repr)
def test_a_mark_that_is_no_list_of_names(raw: bytes, tmp_path: Path) -> None:
    """Whatever else it holds, one line names the mark and says what to do."""
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    mark = tmp_path / ".w.safetensors.header-only"
    mark.write_bytes(raw)
    with pytest.raises(FormatError, match="should name tensors of the file beside it") as caught:
        Checkpoint.open(tmp_path / "w.safetensors")
    assert str(mark) in str(caught.value)
    mark.write_bytes(b"[]")
    with pytest.raises(FormatError, match="only the header of this file was fetched"):
        Checkpoint.open(tmp_path / "w.safetensors").read("w")

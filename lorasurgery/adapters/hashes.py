"""The hashes that image tools keep in a LoRA's header, so that they need not read the whole file to know it.

Facts: sd-scripts of February 2026, library/train_util.py, precalculate_safetensors_hashes; sai_model_spec.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.checkpoint.plan import PlannedFile

if TYPE_CHECKING:
    from torch import Tensor

MODEL, LEGACY, SPEC = "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"
_LEGACY_START, _LEGACY_LENGTH = 0x100000, 0x10000


def with_hashes(file: PlannedFile, tensors: Mapping[str, Tensor]) -> PlannedFile:
    """The file with the hashes its metadata had, of its new bytes; files that train with sd-scripts get them anyway.

    The model hash is the SHA-256 of all bytes after the header; the legacy hash that of 64 KiB at 1 MiB, in the file
    as it would be with the ss_* metadata alone.
    """
    known = {MODEL, LEGACY, SPEC} & set(file.metadata)
    trained = any(key.startswith("ss_") for key in file.metadata)
    if not known and not trained:
        return file
    plain = replace(file, metadata={k: v for k, v in file.metadata.items() if k.startswith("ss_")})
    start = len(plain.header())
    model, legacy = hashlib.sha256(), hashlib.sha256()
    legacy.update(plain.header()[_LEGACY_START : _LEGACY_START + _LEGACY_LENGTH])
    for item in file.tensors:
        raw = _bytes(tensors[item.name])
        model.update(raw)
        legacy.update(raw[max(0, _LEGACY_START - start) : max(0, _LEGACY_START + _LEGACY_LENGTH - start)])
        start += len(raw)
    found = {MODEL: model.hexdigest(), LEGACY: legacy.hexdigest()[:8]}
    if SPEC in known:
        found[SPEC] = f"0x{model.hexdigest()}"
    return replace(file, metadata=file.metadata | found)


def without_hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a file whose tensors change while it is streamed: hashes that would be untrue are left out."""
    return {k: v for k, v in metadata.items() if k not in (MODEL, LEGACY, SPEC)}


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")

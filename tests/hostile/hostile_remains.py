"""Targets among what the program itself leaves: undo records, journals, the record beside a result."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import hostile_mutate as mutate
import torch
import zstandard
from hostile_files import Files, Work, bytes_of, data_of, header_of, laid_out

from lorasurgery.adapters.formats import open_adapter
from lorasurgery.checkpoint.inplace.recover import recover_first, unfinished
from lorasurgery.checkpoint.journal import JOURNAL, Run
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.engine.atomic_file import PARTIAL, new_token
from lorasurgery.engine.ranks import ranks
from lorasurgery.errors import FormatError
from lorasurgery.linalg.undo import Corrections
from lorasurgery.ops.merging.undo.record import read_undo_record
from lorasurgery.ops.merging.undo.recorder import pack_corrections, unpack_corrections, unpack_difference
from lorasurgery.ops.merging.undo.view import UndoView
from lorasurgery.ops.provenance.record import read_record
from lorasurgery.ops.unmerge import unmerge


def undo_record(files: Files, rng: random.Random, folder: Path) -> Work:
    """Undo records: what they say of tensors, stretches and files, then every tensor as it was."""
    merged = folder / "merged"
    shutil.copytree(files.merged, merged)
    path = merged / "lorasurgery-undo" / "0001.safetensors"
    found, data = header_of(path), data_of(path)
    start, end = found["about"]["data_offsets"]
    about = mutate.text(mutate.tree(json.loads(data[start:end]), rng), rng)
    kept = data[found["data"]["data_offsets"][0] : found["data"]["data_offsets"][1]]
    kept = mutate.bytes_(kept, rng) if rng.random() < 0.3 else kept
    header_, _ = laid_out({"about": ("U8", [len(about)]), "data": ("U8", [len(kept)])})
    path.write_bytes(bytes_of(header_, about + kept))

    def read() -> None:
        record = read_undo_record(path)
        if len(record.adapters) != 1:  # they would not match those given
            return
        view = UndoView(Checkpoint.open(merged), record, [open_adapter(files.adapter)], torch.device("cpu"))
        for name in view.tensors:
            view.raw(name)

    ways: list[Work] = [read, read, lambda: unmerge(merged, [files.adapter], in_place=True, device="cpu", dry_run=True)]
    return rng.choice(ways)


def undo_pack(files: Files, rng: random.Random, folder: Path) -> Work:
    """What is kept of a stretch: the packed bytes, and what is in them."""
    some = Corrections(torch.tensor([2, 9]), torch.tensor([1, -1]), torch.tensor([4]), torch.tensor([77]))
    packed = pack_corrections(some, 2)
    raw = zstandard.ZstdDecompressor().decompress(packed)
    bomb = rng.random() < 0.1
    if rng.random() < 0.5:
        packed = mutate.bytes_(packed, rng)
    else:
        packed = zstandard.ZstdCompressor().compress(bytes(10**8) if bomb else mutate.bytes_(raw, rng))
    itemsize, size = rng.choice((1, 2, 4)), rng.choice((0, 1, 10, 100))

    def work() -> None:
        try:
            if rng.random() < 0.5:
                unpack_corrections(packed, itemsize, size)
            else:
                unpack_difference(packed, None, itemsize, size)
        except FormatError as problem:  # whoever calls names the file
            raise FormatError(f"{folder.name}: {problem}") from None

    return work


def surgery(files: Files, rng: random.Random, folder: Path) -> Work:
    """The journal of an operation in place."""
    base = folder / "base"
    shutil.copytree(files.base, base)
    shard = "model-00001-of-00002.safetensors"
    lines: list[Any] = [
        {"about": {"call": "merge base adapter --in-place"}}, {"checked": True, "noted": []},
        {"ready": [[shard, 900, 0, 4, 3057449933]], "done": {"0 x": [None, []]}}, {"applied": True},
        {"ending": {"0": "config.json"}, "removed": ["lorasurgery-undo/0001.safetensors"]},
    ]  # fmt: skip
    lines = lines[: rng.randrange(1, 6)]
    place = rng.randrange(len(lines))
    lines[place] = mutate.tree(lines[place], rng)
    raw = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    work = base / ".lorasurgery-surgery"
    work.mkdir()
    (work / "redo").write_bytes(b"\1\2\3\4")
    (work / "new-0").write_bytes(b"{}")
    (work / "journal").write_bytes(mutate.bytes_(raw, rng) if rng.random() < 0.3 else raw)
    ways: list[Work] = [
        lambda: unfinished(base),
        lambda: Checkpoint.open(base),
        lambda: recover_first(base, resume=True),
    ]
    return rng.choice(ways)


def record(files: Files, rng: random.Random, folder: Path) -> Work:
    """lorasurgery.json."""
    found = json.loads((files.merged / "lorasurgery.json").read_bytes())
    (folder / "lorasurgery.json").write_bytes(mutate.text(mutate.tree(found, rng), rng))
    return lambda: read_record(folder, [])


def resume(files: Files, rng: random.Random, folder: Path) -> Work:
    """The journal of a long run, and the mark of a file of which only the header is here."""
    out = folder / "out"
    out.mkdir()
    about = {"command": "merge", "base": "x"}
    lines: list[Any] = [
        {"about": about, "boot": ""}, {"done": "0 x", "record": [None, []]}, {"synced": 1}, {"renamed": ["config.json"]},
    ]  # fmt: skip
    place = rng.randrange(len(lines))
    lines[place] = mutate.tree(lines[place], rng)
    raw = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    (out / f"{JOURNAL}{new_token()}-0{PARTIAL}").write_bytes(mutate.bytes_(raw, rng) if rng.random() < 0.3 else raw)
    shutil.copy(files.loose / "kohya.safetensors", folder)
    (folder / ".kohya.safetensors.header-only").write_bytes(mutate.text(mutate.tree(["a", "b"], rng), rng))

    def stub() -> None:
        with Checkpoint.open(folder / "kohya.safetensors") as found:
            for name in found.tensors:
                found.raw(name)

    def go_on() -> None:
        run = Run(out, about, resume=True, ranks=ranks())
        run.begin(lambda: None)
        run.end(committed=False)

    return rng.choice((stub, go_on))

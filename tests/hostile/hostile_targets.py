"""What is fuzzed: each target makes one hostile input from good files, and says how the program meets it."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_mutate as mutate
import hostile_remains as remains
from click.testing import CliRunner
from hostile_files import Files, Work, bytes_of, data_of, header_of, laid_out, write_sparse

from lorasurgery.adapters.path_regex import PathRegex, PathText, PatternError
from lorasurgery.adapters.peft.patterns import PatternTable
from lorasurgery.checkpoint.header import parse_header
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.cli.main import main
from lorasurgery.clients.servers import SERVERS
from lorasurgery.errors import FormatError
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.blend import blend, rerank
from lorasurgery.ops.check import check
from lorasurgery.ops.convert import ConvertOptions, convert
from lorasurgery.ops.diff import diff
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.inspect import inspect
from lorasurgery.ops.merge import merge
from lorasurgery.ops.plan import plan
from lorasurgery.ops.verify import verify

Target = Callable[[Files, random.Random, Path], Work]


def header(files: Files, rng: random.Random, folder: Path) -> Work:
    """Headers as bytes, parsed without a file."""
    source = rng.choice(sorted(files.folder.rglob("*.safetensors")))
    raw = mutate.text(mutate.tree(header_of(source), rng), rng)
    data = len(data_of(source)) if rng.random() < 0.8 else rng.choice((0, 8, 512, 2048, 2**40))
    return lambda: parse_header(raw, 8 + len(raw) + data, folder.name)


def file(files: Files, rng: random.Random, folder: Path) -> Work:
    """Whole files of weights, bytes changed anywhere, opened and read."""
    source = rng.choice(sorted(files.folder.rglob("*.safetensors")))
    path = folder / "model.safetensors"
    path.write_bytes(mutate.bytes_(source.read_bytes(), rng))

    def work() -> None:
        with Checkpoint.open(path) as found:
            for name in found.tensors:
                found.raw(name)

    return work


def index(files: Files, rng: random.Random, folder: Path) -> Work:
    """Folders: index, config.json and their names, looked at and merged into."""
    base = folder / "base"
    shutil.copytree(files.base, base)
    name = rng.choice(("model.safetensors.index.json", "model.safetensors.index.json", "config.json"))
    target = base / name
    target.write_bytes(mutate.text(mutate.tree(json.loads(target.read_bytes()), rng), rng))
    if rng.random() < 0.1:
        (base / "model_index.json").write_text("{}")
        (base / "unet").symlink_to(".")
    return _use_base(base, files, rng)


def base_tensors(files: Files, rng: random.Random, folder: Path) -> Work:
    """Names, dtypes and shapes of a checkpoint, in a file that is whole."""
    base = folder / "base"
    base.mkdir()
    shutil.copy(files.base / "config.json", base)
    found = {n: e for shard in sorted(files.base.glob("*.safetensors")) for n, e in header_of(shard).items()}
    _write_changed(found, base / "model.safetensors", rng)
    return _use_base(base, files, rng)


def _use_base(base: Path, files: Files, rng: random.Random) -> Work:
    """One of the things that are done with a checkpoint."""
    out = base.parent / "out"
    ways: list[Work] = [
        lambda: inspect(base),
        lambda: verify(base, device="cpu"),
        lambda: plan(base),
        lambda: diff(base, files.base, device="cpu"),
        lambda: merge(base, [files.adapter], in_place=True, device="cpu"),
        lambda: extract(base, files.merged, out, ExtractOptions(RankChoice(rank=1)), device="cpu"),
        lambda: extract(files.base, base, out, ExtractOptions(RankChoice(rank=1)), dry_run=True),
        lambda: merge(base, [files.adapter], out, device="cpu"),
        lambda: merge(base, [files.adapter], out, dry_run=True),
    ]
    return rng.choice(ways)


def adapter_config(files: Files, rng: random.Random, folder: Path) -> Work:
    """adapter_config.json, opened, checked for every server and merged."""
    adapter = _adapter(files, folder)
    config = adapter / "adapter_config.json"
    config.write_bytes(mutate.text(mutate.tree(json.loads(config.read_bytes()), rng), rng))
    return _use(adapter, files, rng)


def patterns(files: Files, rng: random.Random, folder: Path) -> Work:
    """Regular expressions from configs, on paths of up to 64 KB."""
    texts = [mutate._name(rng.choice(mutate.PATTERNS), rng) for _ in range(rng.choice((1, 1, 3)))]
    paths = [rng.choice(("model.layers.0.self_attn.q_proj", "a" * 3000, "x." * 300, *mutate.NAMES)) for _ in range(3)]

    def work() -> None:
        table = PatternTable(dict.fromkeys(texts, 8), folder.name)
        for path in paths:
            table.first(path, 4)
        try:
            PathRegex(texts[0]).fullmatch(PathText(paths[0]))
        except PatternError as problem:
            raise FormatError(f"{folder.name}: {problem}") from None

    return work


def adapter_keys(files: Files, rng: random.Random, folder: Path) -> Work:
    """Keys, dtypes and shapes of a PEFT adapter, in files that are whole."""
    adapter = _adapter(files, folder)
    _write_changed(header_of(adapter / "adapter_model.safetensors"), adapter / "adapter_model.safetensors", rng)
    return _use(adapter, files, rng)


def loose(files: Files, rng: random.Random, folder: Path) -> Work:
    """Adapters in one file: keys, shapes, and what the header says of alpha."""
    source = rng.choice(sorted(files.loose.iterdir()))
    path = folder / source.name
    found = header_of(source)
    said = found.get("__metadata__", {})
    if "lora_adapter_metadata" in said and rng.random() < 0.6:
        flat = json.loads(said["lora_adapter_metadata"])
        said["lora_adapter_metadata"] = mutate.text(mutate.tree(flat, rng), rng).decode("utf-8", "replace")
        path.write_bytes(bytes_of(found, data_of(source)))
    else:
        _write_changed(found, path, rng)
    return _use(path, files, rng)


def command_line(files: Files, rng: random.Random, folder: Path) -> Work:
    """Whole commands, their output included: names that no terminal shows."""
    adapter = _adapter(files, folder)
    if rng.random() < 0.5:
        config = adapter / "adapter_config.json"
        config.write_bytes(mutate.text(mutate.tree(json.loads(config.read_bytes()), rng), rng))
    else:
        _write_changed(header_of(adapter / "adapter_model.safetensors"), adapter / "adapter_model.safetensors", rng)
    words = rng.choice((["inspect", "-v"], ["inspect", "--json"], ["check"], ["check", "--for", "vllm", "--json"],
                        ["inspect", "--spectrum"], ["verify"]))  # fmt: skip

    def work() -> None:
        done = CliRunner().invoke(main, [words[0], str(adapter), *words[1:]])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        if done.stderr and done.exit_code and not done.stdout:
            raise FormatError(done.stderr.removesuffix("\n"))

    return work


def _adapter(files: Files, folder: Path) -> Path:
    adapter = folder / "adapter"
    shutil.copytree(files.adapter, adapter)
    return adapter


def _use(adapter: Path, files: Files, rng: random.Random) -> Work:
    """One of the things that are done with an adapter."""
    server, out = rng.choice(sorted(SERVERS)), adapter.parent / "out"
    ways: list[Work] = [
        lambda: check(adapter, server),
        lambda: check(adapter, server, base=files.base),
        lambda: inspect(adapter),
        lambda: inspect(adapter, base=files.base),
        lambda: inspect(adapter, spectrum=True, device="cpu"),
        lambda: merge(files.base, [adapter], out, dry_run=True),
        lambda: verify(adapter, device="cpu"),
        lambda: merge(files.base, [adapter], out, device="cpu", undo=rng.random() < 0.5),
        lambda: rerank(adapter, out, RankChoice(rank=1), device="cpu"),
        lambda: blend([adapter, files.adapter], out, device="cpu"),
        lambda: convert(adapter, out, ConvertOptions("peft", portable=True), device="cpu"),
        lambda: convert(adapter, f"{out}.safetensors", ConvertOptions("kohya"), base=files.base, device="cpu"),
    ]
    return rng.choice(ways)


def _write_changed(found: dict[str, Any], path: Path, rng: random.Random) -> None:
    """Change names, dtypes and shapes of a header, and write a file in which they are true."""
    metadata = found.pop("__metadata__", {})
    tensors = {name: (entry["dtype"], entry["shape"]) for name, entry in found.items()}
    for _ in range(rng.choice((1, 1, 2, 4))):
        name = rng.choice(list(tensors))
        dtype, shape = tensors[name]
        kind = rng.randrange(6)
        if kind < 2:
            tensors[mutate._name(name, rng)] = tensors.pop(name)
        elif kind == 2:
            tensors[mutate._name(name, rng)] = tensors[name]
        elif kind == 3:
            tensors[name] = (rng.choice(("F32", "BF16", "F16", "I64", "U8", "BOOL", "F8_E4M3", "F64")), shape)
        elif kind == 4:
            new = [rng.choice((0, 1, 2, 3, 8, 16, 1000)) for _ in range(rng.randrange(7))]
            tensors[name] = (dtype, rng.choice((new, shape[::-1], [2**62, 0], [1] * 64)))
        else:
            metadata = {mutate._name(k, rng): mutate._name(v, rng) for k, v in (metadata or {"alpha": "1"}).items()}
    header_, size = laid_out(tensors, metadata)
    if size > 1 << 26 or struct.calcsize("<Q") + len(json.dumps(header_)) > 1 << 26:
        header_, size = laid_out({"a": ("F32", [0])})
    write_sparse(path, header_, size)


_ALL = (header, file, index, base_tensors, adapter_config, patterns, adapter_keys, loose, remains.undo_record,
        remains.undo_pack, remains.surgery, remains.record, remains.resume, command_line)  # fmt: skip
TARGETS: dict[str, Target] = {target.__name__: target for target in _ALL}

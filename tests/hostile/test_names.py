"""Keys and tensor names that are paths, have line breaks or control characters, are very long, or say numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from hostile_files import MODULES, RANK, WIDTH, Files, bytes_of, laid_out
from hostile_line import refused, within

from lorasurgery.adapters.peft.read import _strip_wrappers
from lorasurgery.checkpoint.header import parse_header, read_header
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.cli.main import main
from lorasurgery.errors import FormatError, SurgeryError, nearest, one_line
from lorasurgery.module_location import location_of
from lorasurgery.ops.merge import merge

NAMES = {
    "a path": "../../etc/passwd", "absolute": "/etc/passwd", "a NUL": "a\0b", "a line break": "a\nb", "a return": "a\rb",
    "a terminal's words": "\x1b[2J\x1b]0;x\x07", "turned around": "\u202egnp.x", "empty": "", "dots": "." * 3000,
    "64 KB": "q" * 65_536, "wrapped for ever": ".base_layer" * 6000, "endless digits": f"layers.{'9' * 5000}.q_proj",
    "markup": "[/b][red]x[bold", "pictures": ":smile:", "999 letters": "q" * 999, "a far layer": "layers.99999999999.q_proj", "digits of another script": "layers.٣.q_proj",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("good") / "good")


@pytest.mark.parametrize("case", NAMES)
def test_adapters_with_odd_keys(case: str, files: Files, tmp_path: Path) -> None:
    """A module of any name is shown as plain text, and is refused by one line where the base has no such module."""
    adapter = Path(shutil.copytree(files.adapter, tmp_path / "adapter"))
    path = NAMES[case]
    tensors = {f"base_model.model.{path}.lora_A.weight": ("F32", [RANK, WIDTH]),
               f"base_model.model.{path}.lora_B.weight": ("F32", [WIDTH, RANK])}  # fmt: skip
    header, size = laid_out(tensors)
    (adapter / "adapter_model.safetensors").write_bytes(bytes_of(header, size))
    line = refused(["merge", files.base, adapter, "-o", tmp_path / "out"], tmp_path)
    assert str(adapter) in line


@pytest.mark.parametrize("case", [c for c in NAMES if len(NAMES[c]) < 1000])
def test_checkpoints_with_odd_names(case: str, files: Files, tmp_path: Path) -> None:
    """A tensor of any name is looked at, merged around byte for byte, and never taken for a path."""
    name = NAMES[case]
    tensors = {f"{m}.weight": ("F32", [WIDTH, WIDTH]) for m in MODULES} | {name: ("F32", [2, 2])}
    header, size = laid_out(tensors, {"format": "pt"})
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(bytes_of(header, bytes(size - 16) + bytes(range(16))))
    with within():
        done = CliRunner().invoke(main, ["inspect", "-v", str(base)])
        assert done.exit_code == 0, done.output
        assert all(line.isprintable() for line in done.stdout.splitlines())
        merge(base, [files.adapter], tmp_path / "out", device="cpu")
    assert Checkpoint.open(tmp_path / "out").raw(name).tolist() == list(range(16))
    assert {f.name for f in tmp_path.iterdir()} == {"base", "out"}


@pytest.mark.parametrize("name", ["q" * 1001, "q" * 10**6, "x." * 65])
def test_names_that_no_tensor_has(name: str, tmp_path: Path) -> None:
    """What is done with each part of a name takes the square of its length: a thousand characters are the most."""
    path = tmp_path / "model.safetensors"
    header, size = laid_out({name: ("F32", [2, 2])})
    path.write_bytes(bytes_of(header, size))
    assert "which no tensor has" in refused(["inspect", path], tmp_path)


@pytest.mark.parametrize("key", ["\n", "\x1b[2J", "x" * 65_536, "\u202e"])
def test_keys_of_no_kind(key: str, tmp_path: Path) -> None:
    """A loose file whose key belongs to no family is named in one line, without the key's control characters."""
    path = tmp_path / "lora.safetensors"
    header, size = laid_out({"lora_unet_a.lora_up.weight": ("F32", [2, 2]), f"lora_unet_a.{key}": ("F32", [2])})
    path.write_bytes(bytes_of(header, size))
    assert "lora.safetensors" in refused(["inspect", path], tmp_path)


def test_headers_in_bounded_time() -> None:
    """A name that stands twice among 2·10⁵, and objects nested for ever, are told at once."""
    entry = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    many = b",".join(b'"%d":%b' % (i, entry) for i in range(200_000))
    for raw, said in (
        (b"{" + many + b',"7":' + entry + b"}", "7 stands twice"),
        (b'{"a":' * 500_000, "nested too deeply"),
        (b'{"a":' + b"[" * 10**6, "nested too deeply"),
    ):
        with within(), pytest.raises(FormatError, match=said):
            parse_header(raw, 8 + len(raw), "w")


def test_wrappers_are_taken_off_in_one_pass() -> None:
    """A name of thousands of base_layer takes no square of them, and real names keep their meaning."""
    with within():
        assert _strip_wrappers("a" + ".base_layer" * 300_000 + ".weight") == "a.weight"
    assert _strip_wrappers("score.modules_to_save.default.weight") == "score.weight"
    assert _strip_wrappers("base_layer.q.base_layer") == "base_layer.q.base_layer"


def test_numbers_that_count_no_layers() -> None:
    """A part of a name is a layer's number up to a million; a range up to it fits into memory."""
    assert location_of("model.layers.31.q").layer == 31
    assert location_of(f"layers.{'9' * 5000}.q").layer is None


def test_nearest_names_in_bounded_time() -> None:
    """Suggestions among 10⁵ names, and among names of 64 KB, cost a second at most."""
    with within():
        assert "q_proj" in nearest("q_porj", [*(f"x{i}" for i in range(100_000)), "q_proj"])
        nearest("a" * 65_536, ["a" * 65_535] * 100)


@pytest.mark.parametrize("text", ["a\nb", "a" * 10_000, "\ud800", "w" * 700 + " " + "b " * 5000])
def test_messages_are_one_line(text: str) -> None:
    """Whatever name stands in it, an error is one line of bounded length that any terminal shows."""
    line = str(SurgeryError(f"file.safetensors: {text}: expected something else"))
    assert line.isprintable()
    assert line.encode()
    assert len(line) < 5000
    assert line.startswith("file.safetensors: ")
    assert line.endswith("expected something else")
    assert one_line("plain") == "plain"


def test_names_keep_their_files_apart(files: Files, tmp_path: Path) -> None:
    """An index with two spellings of one shard, or a shard that is not a safetensors file by name, is refused."""
    for odd in (
        "./model-00001-of-00002.safetensors",
        "sub/../model-00001-of-00002.safetensors",
        "config.json",
        ".",
        "a//b",
    ):
        base = Path(shutil.copytree(files.base, tmp_path / "base"))
        index = base / "model.safetensors.index.json"
        index.write_text(index.read_text().replace('"model-00001-of-00002.safetensors"', f'"{odd}"', 1))
        assert "shard" in refused(["inspect", base], tmp_path)
        shutil.rmtree(base)
    assert read_header(files.base / "model-00001-of-00002.safetensors").tensors


def test_matrices_without_elements(files: Files, tmp_path: Path) -> None:
    """A matrix of no elements, and an embedding that is one number, are passed over by what looks at sizes."""
    tensors = {"model.layers.0.q_proj.weight": ("F32", [0, 0]), "model.layers.0.k_proj.weight": ("F32", [2**62, 0]),
               "model.embed_tokens.weight": ("F32", []), "model.layers.0.v_proj.weight": ("F32", [8, 8])}  # fmt: skip
    header, size = laid_out(tensors, {"format": "pt"})
    (tmp_path / "model.safetensors").write_bytes(bytes_of(header, size))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 16, "num_hidden_layers": 1}')
    for words in (["inspect", "-v"], ["plan"], ["verify"]):
        with within():
            done = CliRunner().invoke(main, [*words, str(tmp_path)])
        assert isinstance(done.exception, SystemExit | None), repr(done.exception)
        assert done.stdout

"""The header check: what safetensors accepts is read alike, what is broken is refused in one line."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from lorasurgery.checkpoint.dtypes import dtype_name
from lorasurgery.checkpoint.header import parse_header, read_header
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import FormatError, SurgeryError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.complex64, torch.int64, torch.int32,
          torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool]  # fmt: skip


def entry(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def file_bytes(header: Any, data: bytes = b"\0" * 16) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "length beyond the file": struct.pack("<Q", 1000) + b"{}",
    "length beyond all bounds": struct.pack("<Q", 2**63) + b"{}",
    "header of no bytes": struct.pack("<Q", 0),
    "not JSON": file_bytes(b"{nonsense"),
    "an array": file_bytes(b"[]"),
    "a string": file_bytes(b'"{}"'),
    "not UTF-8": file_bytes(b'{"\xff\xfe":1}'),
    "NaN": file_bytes(b'{"w":NaN}'),
    "nested for ever": file_bytes(b'{"a":' * 20000),
    "entry is not an object": file_bytes({"w": 3}),
    "entry lacks dtype": file_bytes({"w": {"shape": [2], "data_offsets": [0, 8]}}),
    "entry has more": file_bytes({"w": entry() | {"extra": 1}}),
    "unknown dtype": file_bytes({"w": entry("F7")}),
    "dtype no string": file_bytes({"w": entry(5)}),
    "shape negative": file_bytes({"w": entry(shape=(-2, -2))}),
    "shape a float": file_bytes({"w": entry(shape=(2.0, 2))}),
    "shape a bool": file_bytes({"w": entry(shape=(True, 4))}),
    "shape huge": file_bytes({"w": entry(shape=(2**62, 2**62, 2**62))}),
    "shape of huge digits": file_bytes(b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}'),
    "shape times dtype": file_bytes({"w": entry(shape=(2, 3))}),
    "offsets reversed": file_bytes({"w": entry(offsets=(16, 0))}),
    "offsets three": file_bytes({"w": entry(offsets=(0, 8, 16))}),
    "offsets negative": file_bytes({"w": entry(offsets=(-16, 0))}),
    "offsets beyond": file_bytes({"w": entry(shape=(4, 4), offsets=(0, 64))}),
    "overlap": file_bytes({"a": entry(), "b": entry(shape=(2,), offsets=(8, 16))}),
    "gap": file_bytes({"a": entry(shape=(1,), offsets=(0, 4)), "b": entry(shape=(2,), offsets=(8, 16))}),
    "gap at the start": file_bytes({"b": entry(shape=(2,), offsets=(8, 16))}),
    "bytes left over": file_bytes({"w": entry()}, b"\0" * 20),
    "twice the same name": file_bytes(b'{"w":' + json.dumps(entry()).encode() + b',"w":' + json.dumps(entry()).encode() + b"}"),
    "metadata no object": file_bytes({"__metadata__": [1], "w": entry()}),
    "metadata of numbers": file_bytes({"__metadata__": {"a": 1}, "w": entry()}),
    "half a character": file_bytes(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}"),
    "half a byte": file_bytes({"w": entry("F4", (3,), (0, 2))}, b"\0\0"),
    "a zip": b"PK\x03\x04" + b"\0" * 64,
    "a pickle": b"\x80\x02}q\x00." + b"\0" * 64,
    "a GGUF file": b"GGUF" + b"\0" * 64,
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
}  # fmt: skip
SAID = {
    "empty": "has 0 bytes, too few",
    "seven bytes": "has 7 bytes, too few",
    "length beyond the file": "claims a header of 1000 bytes but the file has 10",
    "length beyond all bounds": "claims a header of 9223372036854775808 bytes (at most 100000000)",
    "header of no bytes": "does not begin with '{'",
    "not JSON": "the header: not JSON (Expecting property name",
    "an array": "does not begin with '{'",
    "a string": "does not begin with '{'",
    "not UTF-8": "the header: not JSON: not UTF-8 (",
    "NaN": "NaN is not JSON",
    "nested for ever": "nested too deeply",
    "entry is not an object": "w: expected an object with dtype, shape and data_offsets",
    "entry lacks dtype": "w: expected an object with dtype, shape and data_offsets",
    "entry has more": "w: expected an object with dtype, shape and data_offsets",
    "unknown dtype": "w: unknown dtype F7",
    "dtype no string": "w: unknown dtype 5",
    "shape negative": "w: shape must be a list of at most 64 whole numbers, found [-2, -2]",
    "shape a float": "w: shape must be a list of at most 64 whole numbers, found [2.0, 2]",
    "shape a bool": "w: shape must be a list of at most 64 whole numbers, found [True, 4]",
    "shape huge": "w: F32 of shape [4611686018427387904, 4611686018427387904, 4611686018427387904] takes",
    "shape of huge digits": "the header: not JSON (a number of thousands of digits)",
    "shape times dtype": "w: F32 of shape [2, 3] takes 24 bytes but its offsets span 16",
    "offsets reversed": "w: data_offsets must be two rising whole numbers, found [16, 0]",
    "offsets three": "w: data_offsets must be two rising whole numbers, found [0, 8, 16]",
    "offsets negative": "w: data_offsets must be two rising whole numbers, found [-16, 0]",
    "offsets beyond": "w: the tensors end at byte 137 but the file has 89",
    "overlap": "b: begins at byte 143 but 151 was expected; it overlaps",
    "gap": "b: begins at byte 139 but 135 was expected; it leaves a gap of 4 bytes",
    "gap at the start": "b: begins at byte 78 but 70 was expected; it leaves a gap of 8 bytes",
    "bytes left over": "4 bytes follow the last tensor",
    "twice the same name": "w stands twice",
    "metadata no object": "__metadata__ must be an object of strings",
    "metadata of numbers": "__metadata__ must be an object of strings",
    "half a character": "the header: holds half of a character",
    "half a byte": "w: F4 of shape [3] takes 1.5 bytes but its offsets span 2",
    "a zip": "is a zip archive",
    "a pickle": "is a pickle",
    "a GGUF file": "is a GGUF file",
    "a git-lfs pointer": "is a git-lfs pointer",
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    """Every broken file is a FormatError of one line that names file and flaw; safetensors agrees that it is broken."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(BROKEN[case])
    with pytest.raises(FormatError) as caught:
        Checkpoint.open(path)
    assert SAID[case] in str(caught.value).removeprefix(f"{path}: ")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    lenient = {"twice the same name", "entry has more", "half a character"}  # here we are stricter
    if case not in lenient:
        with pytest.raises((safetensors.SafetensorError, OSError, ValueError, TypeError)):
            load_file(path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_reads_back_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """Matrices, scalars and empty tensors of every dtype come back as safetensors itself reads them."""
    raw = torch.randint(0, 2 if dtype == torch.bool else 100, (3 * 4 * dtype.itemsize,), dtype=torch.uint8)
    tensors = {
        "m": raw.view(dtype).reshape(3, 4),
        "scalar": raw.view(dtype)[0].clone(),
        "empty": raw.view(dtype)[:0].clone(),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with Checkpoint.open(tmp_path) as found:
        assert found.files["model.safetensors"].metadata == {"format": "pt"}
        for name, tensor in tensors.items():
            ours = found.read(name)
            assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(ours.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
            assert found.tensors[name].dtype == dtype_name(dtype)
            assert b"".join(bytes(c) for c in found.chunks(name, 5)) == bytes(
                tensor.reshape(-1).view(torch.uint8).tolist()
            )


@given(st.binary(max_size=200), st.integers(0, 400))
def test_any_bytes_are_a_header_or_a_format_error(raw: bytes, size: int) -> None:
    """The parser answers arbitrary bytes with a header or a FormatError, nothing else."""
    try:
        parse_header(raw, size, "x")
    except FormatError as problem:
        assert "\n" not in str(problem)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "F9"]) | _json,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | _json,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | _json,
    }
)


@given(st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), _entries | _json, max_size=4), st.integers(0, 60))
def test_headers_we_accept_safetensors_accepts(table: dict[str, Any], data: int) -> None:
    """Whatever passes our check is read by safetensors with the same names, dtypes and shapes."""
    raw = json.dumps(table).encode()
    try:
        header = parse_header(raw, 8 + len(raw) + data, "x")
    except FormatError:
        return
    theirs = safetensors.deserialize(struct.pack("<Q", len(raw)) + raw + b"\0" * data)
    assert {n: (d["dtype"], tuple(d["shape"])) for n, d in theirs} == {
        n: (t.dtype, t.shape) for n, t in header.tensors.items()
    }


@given(st.data())
def test_a_flipped_byte_is_a_format_error_or_harmless(data: st.DataObject) -> None:
    """One changed byte in the header of a good file gives a header within the file or a FormatError."""
    good = save({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, {"format": "pt"})
    length = struct.unpack("<Q", good[:8])[0]
    raw = bytearray(good[8 : 8 + length])
    raw[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    try:
        header = parse_header(bytes(raw), len(good), "x")
    except FormatError:
        return
    assert all(8 + length <= t.start <= t.end <= len(good) for t in header.tensors.values())


def test_a_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    """A FIFO named like a checkpoint is refused at once; opening it would wait for ever."""
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="not a regular file"):
        Checkpoint.open(tmp_path)


def test_a_file_cut_while_in_use_is_an_error(tmp_path: Path) -> None:
    """A file that shrinks after its header was read gives a FormatError, not a crash or zeros."""
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    found = Checkpoint.open(path)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(FormatError, match=r"was changed while it was read \(it had 4,072 bytes and has 3,972\)"):
        found.read("w")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickles_are_refused_by_name(suffix: str, tmp_path: Path) -> None:
    """Pickle files are never opened; the message says how to convert, for files and for folders that hold only them."""
    path = tmp_path / f"pytorch_model{suffix}"
    path.write_bytes(b"anything")
    for reference in (path, tmp_path):
        with pytest.raises(SurgeryError, match="pickle"):
            Checkpoint.open(reference)


def test_odd_names_are_shown_in_one_line(tmp_path: Path) -> None:
    """A tensor's name with a newline does not break the one-line promise."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes({"a\nb": entry("F7")}))
    with pytest.raises(FormatError, match="unknown dtype F7") as caught:
        read_header(path)
    assert r"'a\nb'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lengths_that_look_like_a_pickle(tmp_path: Path) -> None:
    """A header of 640 bytes begins with 80 02, as a pickle does; it is opened all the same."""
    for padding in range(500, 660):
        file = tmp_path / "x.safetensors"
        save_file({"w": torch.ones(2)}, file, {"note": "x" * padding})
        assert set(read_header(file).tensors) == {"w"}
        if file.read_bytes()[:2] == b"\x80\x02":
            return
    raise AssertionError("no such length was met")

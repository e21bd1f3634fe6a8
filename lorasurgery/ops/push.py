"""push: a whole, valid adapter or checkpoint, with its model card, as one commit on the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasurgery.adapters.adapter import Adapter
from lorasurgery.adapters.formats import is_adapter, open_adapter
from lorasurgery.arguments import check_class, check_kinds
from lorasurgery.checkpoint.header import PICKLE_SUFFIXES, show
from lorasurgery.checkpoint.inside import files_below, is_link, leads_out
from lorasurgery.checkpoint.reader import Checkpoint
from lorasurgery.engine.atomic_file import PARTIAL
from lorasurgery.engine.runtime import Clock
from lorasurgery.errors import FormatError, OutputError, SurgeryError, UsageError, some
from lorasurgery.hub import push as hub
from lorasurgery.keywords import say, saying_keywords
from lorasurgery.ops.card import make_card
from lorasurgery.ops.factors.folders import find_adapters
from lorasurgery.ops.provenance.card_reader import check_card
from lorasurgery.ops.provenance.record import check_base_model, local_bases, with_base_model
from lorasurgery.report import Progress, Report

Target = hub.Target
_TEXTS = (".json", ".txt", ".model", ".jinja", ".py", ".md")  # of sub-folders: configs of a model's further modules


@dataclass
class Parcel:
    """What will be published: a whole adapter or checkpoint, and what lies beside it.

    Args:
        files: Name in the repository -> file here.
        left_out: What lies in the folder but is not published: pickles, other weights, other folders.
    """

    path: Path
    adapter: Adapter | None
    model: Checkpoint | None
    files: dict[str, Path] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files.values())


def push(
    path: str | Path,
    target: str | Target,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    base_model: str | None = None,
    overwrite_card: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Publish an adapter or checkpoint on the Hugging Face Hub, in one commit.

    Examples:
        ```python
        push("adapter", "me/llama-style", private=True).pushed["url"]
        ```

    Args:
        path: Folder or .safetensors file; checked from its headers to be whole before anything is sent.
        target: `org/name`, or a Target, which holds the three that follow.
        private: Make the repository private; one that is public already is refused.
        revision: Commit to this branch, made where it is missing; None is main.
        create_pr: Open a pull request instead of committing.
        message: Of the commit; None says what was uploaded.
        base_model: The base as the Hub knows it, for the adapter's config and the model card as they are sent; the
            local files stay as they are.
        overwrite_card: Write a new model card though the repository or the folder has one.
        dry_run: Check, and say what would be sent; the Hub is not asked.

    Raises:
        SurgeryError: not whole, or the Hub refuses; the local files stay as they are, and repeating the same call
            sends only what is missing.
    """
    with saying_keywords("push"):
        check_kinds({"path": path, "private": private, "revision": revision, "create_pr": create_pr,
                     "message": message, "base_model": base_model, "overwrite_card": overwrite_card,
                     "dry_run": dry_run, "progress": progress}, "path")  # fmt: skip
        whole = Target(target, private, revision, create_pr) if isinstance(target, str) else target
        check_class("target", whole, Target)
        if whole is target and (private or revision or create_pr):
            raise UsageError("target: a Target says whether --private, --revision or --create-pr; put them into it")
        report = _push(
            Path(path), whole, message, base_model, overwrite_card=overwrite_card, dry_run=dry_run, progress=progress
        )
    return say(report, "push")


def _push(
    path: Path, target: Target, message: str | None, base_model: str | None, *, overwrite_card: bool, dry_run: bool,
    progress: Progress | None,
) -> Report:  # fmt: skip
    clock = Clock()
    target.check()
    check_base_model(base_model)
    parcel = pack(path)
    sent = parcel.files | with_base_model(parcel.files, base_model)
    report = Report("push", [str(path)], "", dry_run=dry_run)
    report.totals = {"files": sorted(parcel.files), "bytes": parcel.nbytes, "left_out": parcel.left_out}
    if parcel.left_out:
        report.warnings.append(f"not published: {some(parcel.left_out)} (pickles, other weights, other folders)")
    report.warnings += [] if base_model else local_bases(parcel.files)
    own_card = hub.CARD in parcel.files and not overwrite_card
    if own_card:
        check_card(parcel.files[hub.CARD])
    card = "" if own_card else " and a model card"
    report.summary = f"{len(parcel.files)} files{card}, {parcel.nbytes / 1e6:,.2f} MB, to {target.repo}"
    if not dry_run:
        made: dict[str, bytes] = {}
        if not own_card:
            made = make_card(parcel.path, parcel.adapter, target.repo, report.warnings, progress, base=base_model)
        what = "adapter" if parcel.adapter else "checkpoint"
        message = message or f"Upload {what} with lorasurgery"
        pushed = _send(parcel, sent, made, target, message, base_model, overwrite_card=overwrite_card)
        report.pushed, report.output, report.bytes_written = pushed, pushed["url"], pushed["bytes"]
        report.summary = _summary(pushed)
    return clock.stamp(report)


def _send(
    parcel: Parcel, sent: Mapping[str, Path | bytes], made: dict[str, bytes], target: Target, message: str,
    base_model: str | None, *, overwrite_card: bool,
) -> dict[str, Any]:  # fmt: skip
    try:
        return hub.upload(sent, made, target, message=message, overwrite_card=overwrite_card)
    except OutputError:  # the same command would be refused again
        raise
    except SurgeryError as problem:
        options = " --private" if target.private else ""
        options += f" --revision {target.revision}" if target.revision else ""
        options += " --create-pr" if target.create_pr else ""
        options += f" --base-model {base_model}" if base_model else ""
        options += " --overwrite-card" if overwrite_card else ""
        raise type(problem)(
            f"{problem}; nothing was published and {show(str(parcel.path))} is whole: repeat the upload alone with "
            f"`lorasurgery push {show(str(parcel.path))} {target.repo}{options}`"
        ) from None


def _summary(pushed: dict[str, Any]) -> str:
    where, commit = pushed.get("pull_request") or pushed["url"], pushed["commit"][:10]
    text = f"{where}: {pushed['files']} files, {pushed['bytes'] / 1e6:,.2f} MB in commit {commit}"
    if not pushed["files"]:
        text = f"{where}: has all of this already, in commit {commit}; nothing was sent"
    kept = "; the model card that was there is kept (--overwrite-card writes a new one)"
    return text + (kept if pushed["card"] == "kept" else "")


def pack(path: Path) -> Parcel:
    """Open what is to be published and choose its files, from headers and names.

    Raises:
        SurgeryError: missing, broken, half-written, or a link that leads out of the folder.
    """
    if not path.exists():
        raise FormatError(f"{show(str(path))}: is neither a file nor a folder; push takes what lies on this machine")
    if find_adapters(path):
        raise UsageError(f"{show(str(path))}: holds several adapters; push them one by one")
    adapter = open_adapter(path) if is_adapter(path) else None
    model = None if adapter else Checkpoint.open(path)
    opened = adapter.weights if adapter else model
    assert opened is not None
    parcel = Parcel(path, adapter, model)
    if path.is_file():
        parcel.files = {path.name: path}
        return parcel
    _choose(parcel, set(opened.files), everywhere=bool(opened.parts))
    parcel.left_out.sort(key=lambda name: (name.count("/"), name))
    return parcel


def _choose(parcel: Parcel, weights: set[str], *, everywhere: bool) -> None:
    """All that lies beside the weights goes along, but pickles and weights that are not part of the whole."""
    homes = {"", *(name.rpartition("/")[0] for name in weights)}
    for file, name in _visible(parcel.path):
        if file.name.endswith(PARTIAL):
            raise FormatError(
                f"{show(str(file))}: is the remains of an interrupted run; repeat the command with --overwrite"
            )
        if any(part.startswith(".") for part in name.split("/")):
            continue
        other = file.suffix == ".safetensors" and name not in weights
        home = name.rpartition("/")[0]
        if file.is_dir():  # a link to one elsewhere
            beside = any(w.startswith(f"{name}/") for w in weights)
        else:
            beside = home in homes or (file.name.endswith(_TEXTS) and not _holds_weights(file.parent))
        elsewhere = not (everywhere or beside)
        if other or elsewhere or file.name.endswith(PICKLE_SUFFIXES):
            parcel.left_out.append(name)
        elif is_link(file) and leads_out(file, parcel.path):  # it could publish what nobody meant to
            raise FormatError(f"{show(str(file))}: is a link that leads out of the folder; put the file itself there")
        else:
            parcel.files[name] = file


def _holds_weights(folder: Path) -> bool:
    """Whether a folder is a model of its own, such as a trainer's checkpoint-500."""
    return any(f.suffix == ".safetensors" or f.name.endswith(PICKLE_SUFFIXES) for f in folder.rglob("*"))


def _visible(folder: Path) -> Iterable[tuple[Path, str]]:
    """Files by their names, and links that lead out."""
    files, outside = files_below(folder)
    yield from sorted((file, name) for name, file in (files | {name: folder / name for name in outside}).items())

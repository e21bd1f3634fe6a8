"""Folders of adapters: the same operation on each in turn, one report, and a bad one doesn't stop the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lorasurgery.adapters.formats import is_adapter
from lorasurgery.checkpoint.modes import Modes
from lorasurgery.checkpoint.output import check_output
from lorasurgery.engine.runtime import Clock
from lorasurgery.errors import SurgeryError, UsageError
from lorasurgery.report import Report


def find_adapters(reference: str | Path) -> list[Path]:
    """The adapters in a folder that is not an adapter itself, by name; empty for anything else.

    Sub-folders and .safetensors files count; a file that can't be read counts too, so that it is named. Checkpoints
    and hidden names are passed over.
    """
    folder = Path(reference)
    if not folder.is_dir() or _counts(folder):
        return []
    entries = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]
    return [p for p in entries if (p.is_dir() or p.suffix == ".safetensors") and _counts(p)]


def _counts(path: Path) -> bool:
    try:
        return is_adapter(path)
    except (SurgeryError, OSError):
        return path.is_file()


def run_each(
    command: str, folder: str | Path, items: list[Path], work: Callable[[Path, Path], Report],
    out: str | Path = "", *, loose: bool | None = None, overwrite: bool = False, dry_run: bool = False,
) -> Report:  # fmt: skip
    """Do `work(adapter, output)` for each adapter of a folder, into outputs of the same names.

    Examples:
        ```python
        run_each("rerank", "loras", find_adapters("loras"), lambda one, to: rerank(one, to, choice), "smaller")
        ```

    Args:
        out: A folder; empty where nothing is written.
        loose: Whether outputs are files (True) or folders (False); None keeps each adapter's own kind.

    Returns:
        A report with each adapter's own under `adapters`; those that failed say why in `error`.

    Raises:
        UsageError: options without meaning, or two adapters that would be written under one name.
    """
    clock, report = Clock(), Report(command, [str(folder)], str(out), dry_run=dry_run)
    targets = _targets(items, Path(out), loose) if out else dict.fromkeys(items, Path())
    if out:
        check_output(Path(out), [Path(folder)], overwrite)
        if not dry_run:
            Path(out).mkdir(Modes.of([folder], Path(out)).folder, parents=True, exist_ok=True)
    report.adapters = [_one(command, item, targets[item], work) for item in items]
    for key in ("bytes_read", "bytes_written"):
        setattr(report, key, sum(getattr(r, key) for r in report.adapters))
    report.device = next((r.device for r in report.adapters if not r.error), report.device)
    failed = [r for r in report.adapters if r.error]
    report.totals = {"adapters": len(items), "failed": len(failed)}
    report.summary = f"{len(items) - len(failed)} of {len(items)} adapters done"
    if out and not dry_run and not any(Path(out).iterdir()):
        Path(out).rmdir()
    return clock.stamp(report)


def _targets(items: list[Path], out: Path, loose: bool | None) -> dict[Path, Path]:
    found: dict[Path, Path] = {}
    for item in items:
        as_file = item.is_file() if loose is None else loose
        stem = item.name.removesuffix(".safetensors")
        target = out / (f"{stem}.safetensors" if as_file else stem)
        if target in found.values():
            raise UsageError(f"{item}: {target} is another adapter's output already; rename one of the two")
        found[item] = target
    return found


def _one(command: str, item: Path, target: Path, work: Callable[[Path, Path], Report]) -> Report:
    clock = Clock()
    try:
        return work(item, target)
    except UsageError:
        raise
    except (SurgeryError, OSError, RuntimeError) as problem:  # RuntimeError is torch's, such as a GPU out of memory
        line = " ".join(str(problem).split()) or type(problem).__name__
        return clock.stamp(Report(command, [str(item)], "", error=line))

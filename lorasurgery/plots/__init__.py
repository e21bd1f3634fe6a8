"""Pictures of reports: what changed where, what was lost, and how much rank it takes. Knows no tensors and no files but
the picture it writes; matplotlib (the extra `plot`) is imported by its files only when something is drawn."""

from __future__ import annotations

from pathlib import Path

from lorasurgery.errors import UsageError
from lorasurgery.keywords import saying_keywords
from lorasurgery.report import Report

FORMATS = ("svg", "png")


def draw(report: Report, file: str | Path, *, mode: int = 0o666) -> None:
    """Draw what a report holds: heat maps over layers and modules, and curves where there are singular values.

    Examples:
        ```python
        draw(inspect("adapter", spectrum=True), "adapter.svg")
        ```

    Args:
        report: Of diff, extract, rerank, blend, merge, or inspect with `spectrum`.
        file: A name that ends in .svg or .png; an older file of that name is replaced, whole or not at all.
        mode: Who may read it, as far as the umask allows.

    Raises:
        UsageError: another ending, no such folder, no matplotlib, or a report with nothing to draw.
        OutputError: the file can't be written.
    """
    with saying_keywords("draw"):
        check_plot_name(file)
        from lorasurgery.plots.sheet import sheet
        from lorasurgery.plots.style import house_style, render, write_whole

        with house_style():
            picture = render(sheet(report), format_of(file), title=f"lorasurgery {report.command}")
        write_whole(Path(file), picture, mode)


def card_picture(report: Report) -> bytes:
    """A compact PNG for a model card: the singular values of each module, and error against rank and size.

    Examples:
        ```python
        Path("spectrum.png").write_bytes(card_picture(inspect("adapter", spectrum=True)))
        ```

    Args:
        report: Of inspect with `spectrum`.

    Raises:
        UsageError: no matplotlib, or no singular values in the report.
    """
    check_matplotlib()
    from lorasurgery.plots.sheet import card
    from lorasurgery.plots.style import house_style, render

    with house_style():
        return render(card(report), "png", title="lorasurgery spectrum")


def check_plot_name(file: str | Path) -> None:
    """Refuse, before any work, a picture that could not be written at its end.

    >>> check_plot_name("change.pdf")
    Traceback (most recent call last):
    lorasurgery.errors.UsageError: change.pdf: a picture's name ends in .svg or .png

    Raises:
        UsageError: another ending, no such folder, or matplotlib is missing.
    """
    if format_of(file) not in FORMATS:
        raise UsageError(f"{file}: a picture's name ends in .svg or .png")
    if not Path(file).parent.is_dir():
        raise UsageError(f"{file}: there is no folder {Path(file).parent}; make it, or name a file elsewhere")
    if Path(file).is_dir():
        raise UsageError(f"{file}: is a folder; name a file")
    check_matplotlib()


def check_matplotlib() -> None:
    """Refuse to draw without matplotlib.

    Raises:
        UsageError: with the command that installs it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as problem:
        raise UsageError(f"pictures need matplotlib ({problem}): pip install 'lorasurgery[plot]'") from None


def format_of(file: str | Path) -> str:
    """What a picture's name ends in.

    >>> format_of("a/change.SVG")
    'svg'
    """
    return Path(file).suffix[1:].lower()

"""How every picture looks: type, colours for the colour-blind too, and settings that make the same bytes each time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.engine.atomic_file import write_atomic
from lorasurgery.engine.process import own_settings
from lorasurgery.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 9.0
"""Inches; at 100 pixels an inch this is the width of a README, where the smallest type (7.5 points) is 10 pixels."""

# Okabe & Ito 2008, "Color Universal Design", but brown for its yellow, which is too pale for a line on white.
LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7F5F3F")
ACCENT, TOGETHER, AGAINST = "#0072B2", "#542788", "#B35806"  # the latter from PuOr, the map of signs
GREY = "#6b6b6b"
ABSENT = "#ececec"

_SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, and has Δ and ‖
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "figure.titlesize": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "hatch.linewidth": 0.6,
    "text.parse_math": False,  # a $ in a name is a $
    # Letters as outlines: a reader's machine need not have the font, so nothing shifts and nothing overlaps. matplotlib
    # keeps the words as comments, where a search finds them.
    "svg.fonttype": "path",
    "svg.hashsalt": "lorasurgery",  # the ids inside an SVG are random without it
}


@contextmanager
def house_style() -> Iterator[None]:
    """matplotlib's defaults and ours on top, whatever a user's matplotlibrc says, until the block ends."""
    import matplotlib.style

    with own_settings(), matplotlib.style.context(["default", _SETTINGS]):
        # A name in a script that the font lacks is drawn as boxes, which tells as much as a warning.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


DOTS_PER_INCH = 200  # two for each pixel of a README, so that it is sharp on fine screens too
_DIGITS = 5  # of the figure: a hundredth of a pixel


def render(figure: Figure, kind: str, *, title: str) -> bytes:
    """The bytes of a picture, `svg` or `png`, without a date or a version in them."""
    metadata: dict[str, str | None] = {"Title": title}
    metadata |= {"Date": None, "Creator": "lorasurgery"} if kind == "svg" else {"Software": "lorasurgery"}
    _settle(figure)
    buffer = BytesIO()
    figure.savefig(
        buffer, format=kind, dpi=DOTS_PER_INCH, metadata=metadata, bbox_inches="tight", pad_inches=0.08,
        facecolor="white",
    )  # fmt: skip
    return buffer.getvalue()


def _settle(figure: Figure) -> None:
    """Lay the panels out and round where they stand: the layout's last bits hang on addresses in memory."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for part in figure.subfigs:
        box = part.bbox_relative
        box.p0, box.p1 = box.p0.round(_DIGITS), box.p1.round(_DIGITS)
    for ax in figure.axes:  # those of the parts too
        x, y, width, height = ax.get_position(original=True).bounds
        ax.set_position((round(x, _DIGITS), round(y, _DIGITS), round(width, _DIGITS), round(height, _DIGITS)))
        ax.set_in_layout(True)


def write_whole(file: Path, content: bytes, mode: int = 0o666) -> None:
    """Write beside the final name, sync, and rename, so that a failure leaves what was there before.

    Raises:
        OutputError: the folder is missing or can't be written to.
    """
    try:
        write_atomic(file, content, mode=mode, durable=False)  # a picture can be drawn again
    except OSError as problem:
        raise OutputError(
            f"{file}: can't be written ({problem.strerror}); name a file in a folder that exists"
        ) from None

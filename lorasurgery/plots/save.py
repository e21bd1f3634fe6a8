"""From a figure to a file: the same bytes for the same figure, and a file that is whole or not there."""

from __future__ import annotations

import os
import secrets
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 200  # two for each pixel of a README, so that it is sharp on fine screens too
_DIGITS = 5  # of the figure: a hundredth of a pixel
_PARTIAL = ".lorasurgery-partial"


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
    partial = file.with_name(f".{file.name}.{secrets.token_hex(8)}{_PARTIAL}")
    try:
        with open(partial, "xb", opener=lambda path, flags: os.open(path, flags, mode)) as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
    except OSError as problem:
        partial.unlink(missing_ok=True)
        raise OutputError(
            f"{file}: can't be written ({problem.strerror}); name a file in a folder that exists"
        ) from None

"""Write the table of results into docs/formats.md by running its rows; `--check` compares all but the figures."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from math import ceil, floor, log10
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGET = Path(__file__).parent / "formats.md"
BEGIN, END = "<!-- results: made by docs/generate_formats.py -->", "<!-- end of results -->"
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
sys.path.insert(0, str(ROOT / "tests"))

from rows import Row, run  # noqa: E402
from table import ROWS  # noqa: E402


def bound(difference: float) -> str:
    """A difference rounded up to one digit.

    >>> bound(6.3e-8), bound(0.0)
    ('<7e-08', '0')
    """
    if difference == 0:
        return "0"
    power = floor(log10(difference))
    digit = ceil(difference / 10**power)
    return f"<{digit}e{power:03d}" if digit < 10 else f"<1e{power + 1:03d}"


def line(row: Row, figure: str) -> str:
    """One row of the table; the dtypes are the adapter's and the base's."""
    strength = "" if row.strength == 1 else f", strength {row.strength:g}"
    return f"| {row.family}{strength} | {row.layer} | {row.dtypes} | {row.oracle} | {figure} |"


def measured(row: Row) -> str:
    """Run one row in a folder of its own: the difference, or for narrow bases the share of elements that differ."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(row, Path(folder))
    return bound(result.difference) if row.base == "float32" else f"{bound(result.unequal)} of elements"


def table(figures: list[str]) -> str:
    """The table between its markers."""
    head = ["| family | layer | dtype | oracle | largest difference |", "|---|---|---|---|---|"]
    body = [line(row, figure) for row, figure in zip(ROWS, figures, strict=True)]
    return "\n".join([BEGIN, "", *head, *body, "", END])


def without_figures(text: str) -> str:
    """The same table whatever was measured."""
    return re.sub(r"\| (<[^|]*|0[^|]*) \|$", "| |", text, flags=re.MULTILINE)


if __name__ == "__main__":
    text = TARGET.read_text()
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 or end < 0:
        sys.exit(f"docs/formats.md has no markers {BEGIN} and {END}")
    found = text[start : end + len(END)]
    if "--check" in sys.argv:
        if without_figures(found) != without_figures(table(["0"] * len(ROWS))):
            sys.exit("docs/formats.md does not list the rows that are tested; run `make docs`")
    else:
        TARGET.write_text(text[:start] + table([measured(row) for row in ROWS]) + text[end + len(END) :])

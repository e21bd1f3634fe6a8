"""All rows of the table of results: for the test that runs them, and for docs/generate_formats.py that prints them."""

from __future__ import annotations

import rows_images
import rows_lycoris
import rows_peft
from rows import Row

ROWS: list[Row] = [*rows_peft.ROWS, *rows_images.ROWS, *rows_lycoris.ROWS]

"""Write docs/cli.md from the commands' own help; `--check` only says whether it is current."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from lorasurgery.cli.main import COMMANDS, main

TARGET = Path(__file__).parent / "cli.md"


def reference() -> str:
    """The help of the program and of every command, as one page."""
    parts = ["# Command-line reference", "", "Made from the commands' help by `make docs`; do not edit.", ""]
    context = click.Context(
        main, info_name="lorasurgery", max_content_width=100, terminal_width=100, help_option_names=["-h", "--help"]
    )
    parts += ["## lorasurgery", "", "```text", main.get_help(context), "```", ""]
    for name in COMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context, max_content_width=100, terminal_width=100)
        parts += [f"## lorasurgery {name}", "", "```text", command.get_help(inner), "```", ""]
    return "\n".join(line.rstrip() for line in "\n".join(parts).splitlines()) + "\n"


if __name__ == "__main__":
    if "--check" not in sys.argv:
        TARGET.write_text(reference())
    elif not TARGET.exists() or TARGET.read_text() != reference():
        sys.exit("docs/cli.md is not what the help says; run `make docs`")

"""Options that several commands share, declared once, and the outermost layer that turns errors into exit codes."""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from lorasurgery.checkpoint.dtypes import parse_dtype
from lorasurgery.checkpoint.plan import parse_size
from lorasurgery.errors import SurgeryError, UsageError

F = TypeVar("F", bound=Callable[..., Any])


class _Parsed(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A click type made of a parser that raises UsageError."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self._parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(value) if isinstance(value, str) else value
        except UsageError as problem:
            self.fail(str(problem), param, ctx)


DTYPE = _Parsed("dtype", parse_dtype)
SIZE = _Parsed("size", parse_size)

_COMMON = [
    click.option("-o", "--output", "out", required=True, metavar="OUT", help="Where the result goes."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON report on stdout and nothing else."),
    click.option("--dry-run", is_flag=True, help="Say what would be done, from headers alone; write nothing."),
    click.option("--overwrite", is_flag=True, help="Replace an output that exists."),
    click.option("-q", "--quiet", is_flag=True, help="No progress and no report; warnings and errors only."),
    click.option("-v", "--verbose", is_flag=True, help="Show every module."),
]
_CHECKPOINT = [
    click.option("-w", "--weight", "weights", type=float, multiple=True,
                 help="Strength; the n-th belongs to the n-th adapter, the rest are 1. May be negative."),
    click.option("--dtype", type=DTYPE, help="Write floating tensors as float32, bfloat16, float16 or float8_e4m3fn."),
    click.option("--rounding", type=click.Choice(["nearest", "stochastic"]), default="nearest", show_default=True,
                 help="stochastic is right on average; see --seed."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of stochastic rounding."),
    click.option("--max-shard-size", type=SIZE, help="Split the output anew, e.g. 5GB; default: the base's layout."),
]  # fmt: skip


def _apply(options: list[Callable[[F], F]]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


common: Callable[[F], F] = _apply(_COMMON)
"""-o, --device, --json, --dry-run, --overwrite, -q, -v: every command that writes has them."""

checkpoint: Callable[[F], F] = _apply(_CHECKPOINT)
"""-w, --dtype, --rounding, --seed, --max-shard-size: every command that writes a checkpoint has them."""


def guarded(function: F) -> F:
    """Turn every failure into one line on stderr and the contract's exit status; a traceback is a bug."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        signal.signal(signal.SIGTERM, _interrupted)
        gc.set_threshold(200_000)  # importing torch makes objects that all live on; looking for waste costs 0.2 s
        try:
            return function(*args, **kwargs)
        except UsageError as problem:
            _fail(problem, 2)
        except SurgeryError as problem:
            _fail(problem, 1)
        except MemoryError:
            _fail(SurgeryError("out of memory; nothing was written"), 1)
        except RecursionError:
            _fail(SurgeryError("an input is nested too deeply to be read"), 1)
        except BrokenPipeError:  # the reader of our stdout went away; the output itself is complete
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as problem:
            _fail(SurgeryError(f"{problem.filename or 'system'}: {problem.strerror or problem}"), 1)
        except RuntimeError as problem:  # torch's errors, such as a GPU out of memory
            _fail(SurgeryError(f"{type(problem).__name__}: {problem}"), 1)

    return wrapper  # type: ignore[return-value]


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(problem: SurgeryError, status: int) -> None:
    line = " ".join(str(problem).split())
    click.echo(f"lorasurgery: {line}", err=True)
    sys.exit(status)

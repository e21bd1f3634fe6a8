"""Options that several commands share, declared once, and the outermost layer that turns errors into exit codes."""

from __future__ import annotations

import functools
import gc
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from lorasurgery.checkpoint.dtypes import parse_dtype
from lorasurgery.checkpoint.locate import exists
from lorasurgery.checkpoint.plan import parse_size
from lorasurgery.engine.ranks import ranks as torchrun
from lorasurgery.errors import SurgeryError, UsageError
from lorasurgery.linalg.rank import RankChoice
from lorasurgery.ops.asked import RULES, budget_of
from lorasurgery.ops.asked import rank_choice as choice_of
from lorasurgery.report import COMMAND_LINE

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


SHARED = ("extract", "merge", "unmerge", "rerank", "blend")
"""Commands whose work is shared out over the ranks of torchrun."""

DTYPE = _Parsed("dtype", parse_dtype)
SIZE = _Parsed("size", parse_size)
BUDGET = _Parsed("size|share", budget_of)

_TELLING = [
    click.option("--json", "as_json", is_flag=True, help="Print one JSON report on stdout and nothing else."),
    click.option("-q", "--quiet", is_flag=True, help="No progress and no report; warnings and errors only."),
    click.option("-v", "--verbose", is_flag=True, help="Show every module."),
]
_READING = [
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
    *_TELLING,
]
_OUT = click.option("-o", "--output", "out", required=True, metavar="OUT", help="Where the result goes.")
_PLACED = [
    click.option("-o", "--output", "out", metavar="OUT", help="Where the result goes."),
    click.option("--in-place", is_flag=True,
                 help="Change the tensors inside the checkpoint's own files; a kill loses nothing."),
]  # fmt: skip
_COMMON = [
    click.option("--dry-run", is_flag=True, help="Say what would be done, from headers alone; write nothing."),
    click.option("--overwrite", is_flag=True, help="Replace an output that exists."),
    click.option(
        "--push", metavar="REPO_ID", help="Publish the result on the Hugging Face Hub; see `lorasurgery push`."
    ),
    click.option("--private", is_flag=True, help="With --push: make the repository private."),
    *_READING,
]
RESUME: Callable[[Any], Any] = click.option(
    "--resume", is_flag=True,
    help="Go on with what an interrupted run of the same command left; the result is the same to the byte.",
)  # fmt: skip
_LARGE = [
    RESUME,
    click.option("--memory-limit", type=SIZE, metavar="SIZE",
                 help="Work through even the largest tensor in blocks that take no more than this, e.g. 512MB."),
]  # fmt: skip
_RANKS = [
    click.option("--rank", type=int, help="Directions kept in every module."),
    click.option("--energy", type=float, help="Keep the least rank that holds this share of ‖ΔW‖², e.g. 0.9."),
    click.option("--tolerance", type=float, help="Keep the least rank with a relative error of at most this."),
    click.option(
        "--budget",
        type=BUDGET,
        help="Bytes for the whole file, e.g. 100MB, or a share of what goes in, e.g. 25%: the directions of "
        "all modules compete by σ² for each parameter until they are spent.",
    ),
    click.option("--max-rank", type=int, help="A cap on what --energy, --tolerance or --budget ask for."),
    click.option("--uniform-rank", is_flag=True, help="Zero-pad all factors to one rank: the form every server takes."),
]
_FAMILIAR = [
    click.option("--sv-ratio", type=float, help="Keep directions with σ > σ₁/RATIO (sd-scripts' sv_ratio)."),
    click.option("--sv-fro", type=float, help="Keep this share of the Frobenius norm, √Σσ² (sd-scripts' sv_fro)."),
    click.option("--sv-cumulative", type=float, help="Keep this share of Σσ (sd-scripts' sv_cumulative)."),
]
PLOT: Callable[[Any], Any] = click.option(
    "--plot", metavar="FILE", help="Draw a picture of the report as .svg or .png (needs the extra `plot`)."
)
BLOCK_WEIGHT: Callable[[Any], Any] = click.option(
    "--block-weight", "block_weights", multiple=True, metavar="[N:]PATTERN=W",
    help="Strength of the modules that a glob or a prefix of their path means, for all adapters or the N-th; or an LBW "
         "preset or list for SD and SDXL (docs/formats.md). Repeatable.",
)  # fmt: skip
_STRENGTHS = [
    click.option("-w", "--weight", "weights", type=float, multiple=True,
                 help="Strength; the n-th belongs to the n-th adapter, the rest are 1. May be negative."),
    BLOCK_WEIGHT,
    click.option("--rounding", type=click.Choice(["nearest", "stochastic"]), default="nearest", show_default=True,
                 help="stochastic is right on average; see --seed."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of stochastic rounding."),
]  # fmt: skip
ALLOW_LOSS: Callable[[Any], Any] = click.option(
    "--allow-loss", is_flag=True, help="Write the result even when rounding keeps less than half of the update."
)
ALLOW_NONFINITE: Callable[[Any], Any] = click.option(
    "--allow-nonfinite", is_flag=True, help="Go on where a value is NaN or infinite, instead of naming it and stopping."
)
_CHECKPOINT = [
    *_STRENGTHS,
    click.option("--dtype", type=DTYPE, help="Write floating tensors as float32, bfloat16, float16 or float8_e4m3fn."),
    ALLOW_NONFINITE,
    click.option(
        "--max-shard-size", type=SIZE,
        help="Split the output into shards of this size, e.g. 5GB; default: the base's layout.",
    ),
]  # fmt: skip


def _apply(options: list[Callable[[F], F]]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


telling: Callable[[F], F] = _apply(_TELLING)
"""--json, -q, -v: every command has them."""

reading: Callable[[F], F] = _apply(_READING)
"""--device and those of telling: every command that computes has them."""

common: Callable[[F], F] = _apply([_OUT, *_COMMON])
"""-o, --dry-run, --overwrite and those of reading: every command that writes has them."""

placed: Callable[[F], F] = _apply([*_PLACED, *_COMMON])
"""The same, with --in-place instead of -o."""

inside: Callable[[F], F] = _apply([_COMMON[0], *_READING])
"""--dry-run and those of reading: for commands that work in place alone."""

ranks: Callable[[F], F] = _apply(_RANKS)
"""--rank, --energy, --tolerance, --budget, --max-rank, --uniform-rank: every command that chooses ranks has them."""

familiar: Callable[[F], F] = _apply(_FAMILIAR)
"""--sv-ratio, --sv-fro, --sv-cumulative: rank rules under the names that sd-scripts gave them, for factors."""

large: Callable[[F], F] = _apply(_LARGE)
"""--resume, --memory-limit: for commands that may run for hours."""

strengths: Callable[[F], F] = _apply(_STRENGTHS)
"""-w, --block-weight, --rounding, --seed: for commands that merge."""

checkpoint: Callable[[F], F] = _apply(_CHECKPOINT)
"""Those and --dtype, --allow-nonfinite, --max-shard-size: for commands that write a checkpoint."""


def rank_choice(chosen: dict[str, Any], default: int | None = None) -> RankChoice | None:
    """Take the rank options out of `chosen` and make the choice that they mean.

    Without a rule it is the default rank, or all directions up to the cap, or None.
    """
    rules = {name: chosen.pop(name, None) for name in RULES}
    fro = chosen.pop("sv_fro", None)
    if fro is not None:
        if rules["energy"] is not None or not 0 < fro <= 1:
            raise UsageError(f"--sv-fro {fro}: expected a share above 0 and up to 1, and no --energy beside it")
        rules["energy"] = fro**2
    return choice_of(rules, default)


def guarded(function: F) -> F:
    """Turn every failure into one line on stderr and the contract's exit status; a traceback is a bug."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        signal.signal(signal.SIGTERM, _interrupted)
        gc.set_threshold(200_000)  # importing torch makes objects that all live on; looking for waste costs 0.2 s
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # the line that says what failed is ours
        token = COMMAND_LINE.set(command_line(click.get_current_context()))
        try:
            if torchrun().first or function.__module__.rpartition(".")[2] in SHARED:
                return function(*args, **kwargs)
            return None  # a command that is not shared out is the first rank's alone
        except UsageError as problem:
            _fail(problem, 2)
        except SurgeryError as problem:
            _fail(problem, 1)
        except KeyboardInterrupt as problem:  # Ctrl-C, or SIGTERM; what it says is what was left
            _fail(SurgeryError(f"interrupted; {problem}" if str(problem) else "interrupted"), 1)
        except MemoryError as problem:
            _fail(SurgeryError(f"out of memory; {str(problem) or 'nothing was written'}"), 1)
        except RecursionError:
            _fail(SurgeryError("an input is nested too deeply to be read"), 1)
        except BrokenPipeError:  # the reader of our stdout went away; the output itself is complete
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as problem:
            _fail(SurgeryError(f"{problem.filename or 'system'}: {problem.strerror or problem}"), 1)
        except (RuntimeError, ArithmeticError) as problem:
            _fail(_unforeseen(problem), 1)
        finally:
            COMMAND_LINE.reset(token)

    return wrapper  # type: ignore[return-value]


def _unforeseen(problem: Exception) -> SurgeryError:
    """What is said of a failure that nobody expected: of a library's arithmetic, or of a device."""
    text = " ".join(str(problem).split())
    if any(sign in text for sign in ("out of memory", "ALLOC_FAILED")):
        return SurgeryError("out of the device's memory; --memory-limit takes less at a time, --device cpu takes none")
    return SurgeryError(f"stopped by a fault of lorasurgery's own; please report it with the command ({text})")


_UNSAID = {"as_json", "quiet", "verbose", "plot", "push", "private", "overwrite", "resume", "memory_limit", "dry_run",
           "out"}  # fmt: skip


def command_line(context: click.Context) -> str:
    """The command as it can be published: local paths by their last names, without what only concerns this run.

    It does not hold the output's name, so that the same operation writes the same record wherever it writes it.
    """
    words = ["lorasurgery", str(context.info_name)]
    for param in context.command.params:
        given = context.params.get(param.name or "")
        typed = context.get_parameter_source(param.name or "") == ParameterSource.COMMANDLINE
        if not typed or param.name in _UNSAID:
            continue
        values = [_shown(v) for v in (given if isinstance(given, (list, tuple)) else [given])]
        if isinstance(param, click.Argument):
            words += values
        elif getattr(param, "is_flag", False):
            words.append(param.opts[-1])
        else:
            words += [word for value in values for word in (param.opts[-1], value)]
    return shlex.join(words) + (" -o OUT" if context.params.get("out") else "")


def _shown(value: Any) -> str:
    """A value as it may be published: of a path on this machine the last name."""
    text = str(value)
    path = Path(text)
    return path.name if path.is_absolute() or text.startswith((".", "~")) or exists(path) else text


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(problem: SurgeryError, status: int) -> None:
    here = os.environ.get("RANK", "0")
    click.echo(f"lorasurgery{f' (rank {here})' if here != '0' else ''}: {problem}", err=True)
    sys.exit(status)

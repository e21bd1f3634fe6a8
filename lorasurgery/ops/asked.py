"""What a verb is asked for: plain keywords and an options object, checked, parsed and brought together.

A keyword fills the field of its name. One that is left at its default was not given, so options objects that were
made for earlier versions mean what they meant.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from lorasurgery.arguments import as_tuple, check_class, check_kinds, shown
from lorasurgery.checkpoint.dtypes import parse_dtype, typed_name
from lorasurgery.checkpoint.plan import parse_size
from lorasurgery.errors import UsageError
from lorasurgery.linalg.rank import Budget, RankChoice
from lorasurgery.ops.blending.options import BlendOptions
from lorasurgery.ops.conversion.options import FORMATS, ConvertOptions
from lorasurgery.ops.extraction.options import DEFAULT_RANK, ExtractOptions, Selection
from lorasurgery.ops.merging.options import MergeOptions

T = TypeVar("T", ExtractOptions, BlendOptions, ConvertOptions, MergeOptions, Selection)
B = TypeVar("B", ExtractOptions, BlendOptions)

Paths = str | Path | Sequence[str | Path]
Size = int | str
RULES = ("rank", "energy", "tolerance", "budget", "sv_ratio", "sv_cumulative", "max_rank")


def all_paths(given: Paths) -> list[str | Path]:
    """One path or several as a list.

    >>> all_paths("style"), all_paths(("style", "topic"))
    (['style'], ['style', 'topic'])
    """
    return list(as_tuple(given))


def bytes_of(given: Size | None) -> int | None:
    """Bytes, from a number or from what people type, such as 5GB.

    >>> bytes_of("5GB"), bytes_of(1000)
    (5000000000, 1000)
    """
    return parse_size(given) if isinstance(given, str) else given


def dtype_of(given: Any) -> str | None:
    """A dtype's safetensors name, from any spelling that the command line takes, that name or torch's dtype.

    >>> dtype_of("bf16"), dtype_of("F32")
    ('BF16', 'F32')
    """
    text = None if given is None else str(given).removeprefix("torch.")
    is_stored_so = text is not None and typed_name(text) != text
    return text if text is None or is_stored_so else parse_dtype(text)


def budget_of(given: Budget | float | str | None) -> Budget | None:
    """Bytes as a whole number, a share as a fraction, or either as people type it: 100MB, 0.25, 25%.

    >>> budget_of("25%"), budget_of("1KB").size, budget_of(0.5).share, budget_of(4000).size
    (Budget(size=None, share=0.25), 1000, 0.5, 4000)

    Raises:
        UsageError: none of these, or a share of 0.
    """
    if given is None or isinstance(given, Budget):
        return given
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return Budget(size=given)
    if isinstance(given, float):
        return Budget(share=_share(given, str(given)))
    if not isinstance(given, str):
        raise UsageError(f"budget: expected bytes, a share, or a size such as '100MB', got {shown(given)}")
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(%?)", given.strip())
    if match is None:
        return Budget(size=parse_size(given))
    number = float(match[1])
    if number > 1 and not match[2]:
        return Budget(size=parse_size(given))
    return Budget(share=_share(number / (100 if match[2] else 1), given))


def _share(share: float, text: str) -> float:
    if not 0 < share <= 1:
        raise UsageError(f"budget {text!r}: expected a share above 0 and up to 1 (25%), or a size such as 100MB")
    return share


def rank_choice(rules: Mapping[str, Any], default: int | None = None) -> RankChoice | None:
    """The choice that rank rules mean: without one it is the default rank, or all up to the cap, or None.

    Args:
        rules: Any of rank, energy, tolerance, budget, sv_ratio, sv_cumulative and max_rank; None is not given.
        default: The rank where none of them is.
    """
    given = {name: rules[name] for name in RULES if rules.get(name) is not None}
    if not given.keys() - {"max_rank"}:
        given["rank"] = default or given.get("max_rank")
        if given["rank"] is None:
            return None
    return RankChoice(**given | ({"budget": budget_of(given["budget"])} if "budget" in given else {}))


def _filled(options: T, given: Mapping[str, Any]) -> T:
    """The options with the keywords that were given.

    Raises:
        UsageError: of a wrong type, or given both ways.
    """
    changed = {}
    for item in fields(options):
        value, own = _listed(given.get(item.name)), getattr(options, item.name)
        default = _default(item)
        if value is None or value == default:
            continue
        if own not in (default, value):
            raise UsageError(
                f"{item.name}: is given as a keyword and in {type(options).__name__} too; leave one of them out"
            )
        changed[item.name] = value
    return replace(options, **changed)


def _listed(value: Any) -> Any:
    """An array or a set as a tuple, which can be compared."""
    many = isinstance(value, Iterable) and not isinstance(value, (str, os.PathLike, list, tuple))
    return as_tuple(value) if many else value


def _default(item: Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _plain(options: T) -> T:
    """The same options, checked, with sizes, dtypes, and one thing where several may be in their plain form."""
    values = {item.name: getattr(options, item.name) for item in fields(options)}
    check_kinds(values)
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("max_shard_size", "memory_limit"):
            parsed[name] = bytes_of(value)
        elif name == "dtype":
            parsed[name] = dtype_of(value)
        elif name in ("weights", "block_weights", "target", "exclude", "full"):
            parsed[name] = value if isinstance(value, list) and name == "weights" else as_tuple(value)
    return replace(options, **parsed)


def _chosen(options: B, given: Mapping[str, Any], default: int | None = None) -> B:
    """The options with the rank rules among the keywords."""
    check_class("choice", options.choice, RankChoice)
    asked = [name for name in RULES if given.get(name) is not None]
    if not asked:
        return options
    if options.choice != type(options)().choice:
        raise UsageError(f"{asked[0]}: {type(options).__name__} has a choice of ranks already; leave one of them out")
    choice = rank_choice(given, default)
    assert choice is not None
    return replace(options, choice=choice)


def extract_options(options: ExtractOptions | None, given: Mapping[str, Any]) -> ExtractOptions:
    """Everything that extract is asked for.

    Args:
        options: The object, if any.
        given: All keywords of the call by name, their types checked; those that are not fields are passed over.

    Raises:
        UsageError: of a wrong type, given both ways, or without meaning.
    """
    check_class("options", options, ExtractOptions)
    options = _chosen(options or ExtractOptions(), given, DEFAULT_RANK)
    check_class("selection", options.selection, Selection)
    patterns = {name: as_tuple(given.get(name)) or None for name in ("target", "exclude", "full")}
    selection = _filled(_plain(options.selection), patterns)
    found = _plain(_filled(replace(options, selection=selection), given))
    found.check()
    return found


def blend_options(options: BlendOptions | None, given: Mapping[str, Any]) -> BlendOptions:
    """Everything that blend is asked for; as extract_options."""
    check_class("options", options, BlendOptions)
    found = _plain(_filled(_chosen(options or BlendOptions(), given), given))
    found.check()
    return found


def convert_options(options: ConvertOptions | None, given: Mapping[str, Any]) -> ConvertOptions:
    """Everything that convert is asked for; as extract_options."""
    check_class("options", options, ConvertOptions)
    to = given.get("to")
    if options is None and to is None:
        raise UsageError(f"to: say which format comes out, one of {', '.join(FORMATS)}")
    found = _plain(_filled(options or ConvertOptions(to), given))  # type: ignore[arg-type]  # check() looks
    found.check()
    return found


def merge_options(options: MergeOptions | None, given: Mapping[str, Any]) -> MergeOptions:
    """Everything that merge, unmerge or switch is asked for; as extract_options, and each verb checks the weights."""
    check_class("options", options, MergeOptions)
    return _plain(_filled(options or MergeOptions(), given))

"""LoRA surgery on safetensors checkpoints: extract, merge, blend and publish without building the model.

The names below are imported when they are first used, so `import lorasurgery` needs neither torch nor the Hub's client.

>>> import lorasurgery
>>> lorasurgery.RankChoice(rank=8)
RankChoice(rank=8, energy=None, tolerance=None, budget=None, max_rank=None, sv_ratio=None, sv_cumulative=None)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorasurgery._version import __version__ as __version__

if TYPE_CHECKING:
    from lorasurgery.adapters.formats import open_adapter as open_adapter
    from lorasurgery.checkpoint.reader import Checkpoint as Checkpoint
    from lorasurgery.errors import SurgeryError as SurgeryError
    from lorasurgery.linalg.rank import Budget as Budget
    from lorasurgery.linalg.rank import RankChoice as RankChoice
    from lorasurgery.lowrank import LowRank as LowRank
    from lorasurgery.ops.blend import blend as blend
    from lorasurgery.ops.blend import rerank as rerank
    from lorasurgery.ops.blending.options import BlendOptions as BlendOptions
    from lorasurgery.ops.check import check as check
    from lorasurgery.ops.conversion.options import ConvertOptions as ConvertOptions
    from lorasurgery.ops.convert import convert as convert
    from lorasurgery.ops.diff import diff as diff
    from lorasurgery.ops.extract import extract as extract
    from lorasurgery.ops.extraction.options import ExtractOptions as ExtractOptions
    from lorasurgery.ops.extraction.options import Selection as Selection
    from lorasurgery.ops.inspect import inspect as inspect
    from lorasurgery.ops.merge import merge as merge
    from lorasurgery.ops.merging.options import MergeOptions as MergeOptions
    from lorasurgery.ops.plan import plan as plan
    from lorasurgery.ops.push import Target as Target
    from lorasurgery.ops.push import push as push
    from lorasurgery.ops.switch import switch as switch
    from lorasurgery.ops.unmerge import unmerge as unmerge
    from lorasurgery.ops.verify import verify as verify
    from lorasurgery.plots import draw as draw
    from lorasurgery.report import Report as Report

__all__ = [
    "BlendOptions", "Budget", "Checkpoint", "ConvertOptions", "ExtractOptions", "LowRank", "MergeOptions", "RankChoice",
    "Report", "Selection", "SurgeryError", "Target", "blend", "check", "convert", "diff", "draw", "extract", "inspect",
    "merge", "open_adapter", "plan", "push", "rerank", "switch", "unmerge", "verify",
]  # fmt: skip
_HOMES = {
    "adapters.formats": ("open_adapter",), "checkpoint.reader": ("Checkpoint",), "errors": ("SurgeryError",),
    "linalg.rank": ("Budget", "RankChoice"), "lowrank": ("LowRank",), "plots": ("draw",), "report": ("Report",),
    "ops.blend": ("blend", "rerank"), "ops.blending.options": ("BlendOptions",), "ops.check": ("check",),
    "ops.convert": ("convert",), "ops.conversion.options": ("ConvertOptions",), "ops.diff": ("diff",),
    "ops.extract": ("extract",), "ops.extraction.options": ("ExtractOptions", "Selection"),
    "ops.inspect": ("inspect",), "ops.merge": ("merge",),
    "ops.merging.options": ("MergeOptions",), "ops.plan": ("plan",), "ops.push": ("Target", "push"),
    "ops.switch": ("switch",), "ops.unmerge": ("unmerge",), "ops.verify": ("verify",),
}  # fmt: skip
_PLACES = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'lorasurgery' has no attribute {name!r}")
    return getattr(import_module(f"lorasurgery.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

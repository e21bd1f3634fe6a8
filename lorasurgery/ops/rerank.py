"""rerank, under its documented path; the work is that of blend."""

from lorasurgery.ops.blend import rerank

__all__ = ["rerank"]

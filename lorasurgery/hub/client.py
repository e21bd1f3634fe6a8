"""huggingface_hub's client, with its own settings for endpoint, token and cache, and its failures in one line."""

from __future__ import annotations

from typing import Any

from lorasurgery._version import __version__
from lorasurgery.errors import SurgeryError
from lorasurgery.hub.reference import Reference, explain


def api() -> Any:
    """huggingface_hub's client, which knows the endpoint and the token."""
    from huggingface_hub import HfApi

    return HfApi(library_name="lorasurgery", library_version=__version__)


def explained(problem: Exception, what: Reference | str) -> SurgeryError:
    """One line for what huggingface_hub raised, as reference.explain words it."""
    from huggingface_hub import get_token

    return explain(problem, what, token=get_token(), endpoint=api().endpoint)

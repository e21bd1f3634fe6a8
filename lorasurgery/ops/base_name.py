"""By which name an adapter's config knows its base: PEFT writes the path that the base was loaded from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorasurgery.adapters.peft.read import CONFIG_NAME
from lorasurgery.checkpoint.header import show
from lorasurgery.checkpoint.locate import load_object
from lorasurgery.errors import UsageError

HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_KEY = "base_model_name_or_path"


def check_base_model(name: str | None) -> None:
    """Refuse what is no name on the Hub.

    Raises:
        UsageError: with what is expected.
    """
    if name is not None and not HUB_NAME.fullmatch(name):
        raise UsageError(f"--base-model {show(name)}: expected the base's name on the Hub, as org/name")


def is_local(name: Any) -> bool:
    """Whether a base is named as only this machine knows it: by a path.

    >>> is_local("/home/me/llama"), is_local("../llama"), is_local("meta-llama/Llama-3.2-1B"), is_local(None)
    (True, True, False, False)
    """
    return isinstance(name, str) and bool(name) and (not HUB_NAME.fullmatch(name) or Path(name).exists())


def local_bases(files: Mapping[str, Path]) -> list[str]:
    """A sentence for each config among some files that would tell of this machine's folders."""
    return [
        f"{name}: names the base by a path of this machine ({show(config[_KEY])}), which is published with it; "
        "`lorasurgery push … --base-model ORG/NAME` writes the name that the Hub knows into what is sent"
        for name, config in _configs(files)
        if is_local(config.get(_KEY))
    ]


def with_base_model(files: Mapping[str, Path], base_model: str | None) -> dict[str, bytes]:
    """The configs among some files with another name for the base; the files stay."""
    if base_model is None:
        return {}
    return {
        name: (json.dumps(config | {_KEY: base_model}, indent=2, ensure_ascii=False) + "\n").encode()
        for name, config in _configs(files)
    }


def _configs(files: Mapping[str, Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, file in files.items():
        if name.rpartition("/")[2] == CONFIG_NAME:
            yield name, load_object(file)

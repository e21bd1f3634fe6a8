"""A Hub in a folder, as far as push asks it: files are sent one by one and appear in one commit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from lorasurgery.hub import push as hub
from lorasurgery.ops.push import Target, push


class FolderHub:
    """What huggingface_hub's client does, in a folder."""

    endpoint = "https://hub.example"

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, folder / "manifest.json"

    def create_repo(self, *_: Any, **__: Any) -> None:
        """Make the folder."""
        self.folder.mkdir(exist_ok=True)

    def model_info(self, *_: Any, **__: Any) -> Any:
        """Which files are there."""
        names = json.loads(self.manifest.read_text()) if self.manifest.exists() else {}
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n) for n in names], sha="", private=False)

    def create_commit(self, _: str, operations: Any, **__: Any) -> Any:
        """Take what is sent, and show it when all is there."""
        shown = {}
        for operation in operations:
            with operation.as_file() as file:
                data = file.read()
            shown[operation.path_in_repo] = hashlib.sha256(data).hexdigest()
            (self.folder / shown[operation.path_in_repo]).write_bytes(data)
        fresh = self.folder / "manifest.new"
        fresh.write_text(json.dumps(shown))
        fresh.replace(self.manifest)
        return SimpleNamespace(oid="0" * 40, pr_url=None)


def upload(place: Path) -> None:
    """Publish what lies in a place, on the Hub beside it."""
    with patch.object(hub, "api", lambda: FolderHub(place.parent / "hub")):
        push(place, Target("me/model"))

"""References fetched through huggingface_hub: whole into the user's cache, or only the headers, by range requests.

Only what the operations read is fetched: safetensors weights that count, their indexes, configs, tokenizer, card.
Pickles are never fetched. Everything keeps to huggingface_hub's settings: cache, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

from lorasurgery._version import __version__
from lorasurgery.adapters.image_names.components import FOLDER_NAMES
from lorasurgery.adapters.peft.read import WEIGHTS_NAME
from lorasurgery.checkpoint.header import show
from lorasurgery.checkpoint.inside import is_commit, is_inside, to_write
from lorasurgery.checkpoint.locate import INDEX_SUFFIX, load_bytes, locate
from lorasurgery.checkpoint.operation import Operation
from lorasurgery.engine.atomic_file import write_atomic
from lorasurgery.errors import FormatError
from lorasurgery.hub.client import WORKERS, Remote, api, explained
from lorasurgery.hub.reference import Reference, parse_reference
from lorasurgery.report import Progress

_BESIDE = (".json", ".txt", ".model", ".jinja", ".py", "README.md", "LICENSE", "LICENSE.md", "NOTICE")
_CONFIGS = ("config.json", INDEX_SUFFIX, "model_index.json")  # all that a plan needs beside the headers


def here(given: str | Path, *, progress: Progress | None = None) -> str | Path:
    """The local path of what may be a reference: an existing path always wins, and what looks like none stays.

    Raises:
        SurgeryError: as fetch does.
    """
    reference = None if Path(given).exists() else parse_reference(given)
    return fetch(reference, progress=progress) if reference else given


def fetch(reference: Reference, *, progress: Progress | None = None) -> Path:
    """Bring a repository's weights and what belongs to them into the Hub's cache.

    Examples:
        ```python
        fetch(Reference("org/name", "v1.0"))
        ```

    Returns:
        The snapshot's folder (or what lies inside of it), where names are links to the cache's blobs.

    Raises:
        SurgeryError: gated, missing, offline, or without safetensors, in one line.
    """
    found = _look(reference)
    if isinstance(found, Path):
        return found
    commit, names = found
    beside = _download(reference, commit, _beside(names), None)
    weights = _weights(reference, names, beside)
    return _download(reference, commit, [*_beside(names), *weights], progress) / reference.inside


def fetch_headers(reference: Reference, folder: Path) -> Path:
    """Lay out a repository under `folder` with the weights as stubs: real headers and sizes, no tensors.

    What the cache already has whole is taken from there.

    Returns:
        The folder (or file) that stands for the reference.

    Raises:
        SurgeryError: as fetch does.
    """
    found = _look(reference)
    if isinstance(found, Path):
        return found
    commit, names = found
    configs = [n for n in names if n.endswith(_CONFIGS)]
    beside = _download(reference, commit, configs, None)
    weights = _weights(reference, names, beside)
    if all((beside / name).is_file() for name in weights):
        return beside / reference.inside
    home = folder / f"models--{reference.repo.replace('/', '--')}" / "snapshots" / commit
    for name in configs:
        _lay_out(home, name, load_bytes(beside / name), reference)
    remote = Remote(reference, commit)
    with ThreadPoolExecutor(WORKERS, "headers") as pool:
        list(pool.map(lambda name: remote.stub(name, home / name), weights))
    return home / reference.inside


def _look(reference: Reference) -> tuple[str, list[str]] | Path:
    """The commit and its files; without a connection, the folder of the cache."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    client = api()
    try:
        info = client.model_info(reference.repo, revision=reference.revision)
        names = [s.rfilename for s in info.siblings or ()]
    except (HfHubHTTPError, HFValidationError, RepositoryNotFoundError) as problem:
        raise explained(problem, reference) from None
    except Exception as problem:  # no connection: each version of the client has its own kinds for it
        cached = from_cache(reference)
        if cached is None:
            raise explained(_as_offline(problem), reference) from None
        return cached
    if not is_commit(info.sha):
        raise FormatError(
            f"{reference}: the Hub names {show(repr(info.sha))} as the commit, which is not 40 hex digits"
        )
    return info.sha, [n for n in names if is_inside(n) and _lies_in(n, reference.inside)]


def from_cache(reference: Reference) -> Path | None:
    """Where a reference lies in the Hub's cache, None where it does not; without a connection."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(reference.repo, revision=reference.revision, local_files_only=True))
    except Exception as problem:
        # a snapshot that lacks any file of the repository counts as incomplete, and pickles are never fetched here
        folder = Path(getattr(problem, "snapshot_path", None) or "")
    path = folder / reference.inside
    weights = path.rglob("*.safetensors") if path.is_dir() else [path]
    return path if folder.name and any(file.is_file() for file in weights) else None


def _as_offline(problem: Exception) -> Exception:
    from huggingface_hub.errors import LocalEntryNotFoundError

    missing = LocalEntryNotFoundError(str(problem))
    missing.__cause__ = problem
    return missing


def _lies_in(name: str, inside: str) -> bool:
    folder = inside.rpartition("/")[0] if inside.endswith(".safetensors") else inside
    return not folder or name.startswith(f"{folder}/")


def _beside(names: Iterable[str]) -> list[str]:
    return [n for n in names if n.endswith(_BESIDE)]


def _weights(reference: Reference, names: Sequence[str], beside: Path) -> list[str]:
    """The weight files that count, by the rule that holds on the disk: it is run on a folder of empty files."""
    if reference.inside.endswith(".safetensors"):
        if reference.inside not in names:
            raise FormatError(f"{reference}: the repository has no such file")
        return [reference.inside]
    top = f"{reference.inside}/" if reference.inside else ""
    members = [name for part in FOLDER_NAMES if (name := f"{top}{part}/{WEIGHTS_NAME}") in names]
    if f"{top}{WEIGHTS_NAME}" in names or members:
        return [f"{top}{WEIGHTS_NAME}"] if f"{top}{WEIGHTS_NAME}" in names else members
    with tempfile.TemporaryDirectory(prefix="lorasurgery-") as scratch:
        for name in names:
            data = load_bytes(beside / name) if name.endswith(INDEX_SUFFIX) else b""
            _lay_out(Path(scratch), name, data, reference)
        try:
            with Operation(writes=False):  # what lies here is not an input of the one under way
                return [top + file for file in locate(Path(scratch) / reference.inside).files]
        except FormatError as problem:
            raise type(problem)(
                _several(reference, names, top, str(problem).replace(scratch, str(reference)))
            ) from None


def _lay_out(folder: Path, name: str, data: bytes, reference: Reference) -> None:
    """Write a file under a name that a server gave."""
    target = to_write(folder, name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    except OSError as problem:  # a name that is too long, or that of a file and of a folder
        raise FormatError(f"{reference}: {show(name)} can't be a file here ({problem.strerror})") from None


def _several(reference: Reference, names: Sequence[str], top: str, says: str) -> str:
    """Where a repository holds several adapters, the next move is to name one of them."""
    files = [n for n in names if n.endswith(".safetensors") and n.rpartition("/")[0] == top.rstrip("/")]
    if len(files) < 2 or any(n.endswith(INDEX_SUFFIX) for n in names if n.rpartition("/")[0] == top.rstrip("/")):
        return says
    at = f"@{reference.revision}" if reference.revision else ""
    return (
        f"{reference}: has {len(files)} safetensors files and no index to say which belong together; name one: "
        f"hf://{reference.repo}{at}/{files[0]}"
    )


def _download(reference: Reference, commit: str, names: Sequence[str], progress: Progress | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            reference.repo,
            revision=commit,
            allow_patterns=[escape(name) for name in names],
            tqdm_class=_counter(f"fetching {reference}", progress),
            library_name="lorasurgery",
            library_version=__version__,
        )
    except Exception as problem:  # many kinds, by version
        raise explained(problem, reference) from None
    if Path(folder).name != commit:  # it asks the server once more
        raise FormatError(f"{reference}: the Hub gave another commit for {commit} ({show(Path(folder).name)})")
    _keep_branch(reference, commit)
    return Path(folder)


def _keep_branch(reference: Reference, commit: str) -> None:
    """Let the cache know which commit a branch meant, so that the same reference works offline."""
    from huggingface_hub import constants

    name = reference.revision or "main"
    if name != commit:
        file = Path(constants.HF_HUB_CACHE) / f"models--{reference.repo.replace('/', '--')}" / "refs" / name
        with suppress(OSError):  # a cache that can't be written is still a cache
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, commit.encode(), mode=0o666, durable=False)


def _counter(label: str, progress: Progress | None) -> type:
    """A class for huggingface_hub to count bytes with, which shows nothing itself and tells `progress`."""
    from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

    class Counter(tqdm):  # type: ignore[misc,unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # the transfer's bar and the files' bar stay silent; the one that counts what is on the disk tells
            self._tells = kwargs.get("unit") == "B" and not str(kwargs.get("desc", "")).startswith("Downloading")
            self._done = 0.0
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> None:
            self._done += n or 0
            total = int(self.total or 0)
            if progress and self._tells and total:
                progress(label, min(int(self._done), total), total)

    return Counter

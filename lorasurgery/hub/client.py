"""huggingface_hub's client: its settings, its failures in one line, and weight files read in ranges."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lorasurgery._version import __version__
from lorasurgery.checkpoint.header import MAX_HEADER, parse_header
from lorasurgery.checkpoint.header_only import write_stub
from lorasurgery.errors import FormatError, SurgeryError
from lorasurgery.hub.reference import Reference, explain


def api() -> Any:
    """huggingface_hub's client, which knows the endpoint and the token."""
    from huggingface_hub import HfApi

    return HfApi(library_name="lorasurgery", library_version=__version__)


def explained(problem: Exception, what: Reference | str) -> SurgeryError:
    """One line for what huggingface_hub raised, as reference.explain words it."""
    from huggingface_hub import get_token

    return explain(problem, what, token=get_token(), endpoint=api().endpoint)


WORKERS = 8
_FIRST = 1 << 17  # bytes of a weight file asked for at once: nearly every header is shorter


class Remote:
    """Weight files of one commit, read in ranges through huggingface_hub's file system."""

    def __init__(self, reference: Reference, commit: str) -> None:
        from huggingface_hub import HfFileSystem

        self.reference, self.commit = reference, commit
        self._files = HfFileSystem(skip_instance_cache=True)

    def stub(self, name: str, target: Path) -> None:
        """Fetch a file's header, and the alphas that an adapter's plan needs, and write its stub."""
        path, where = f"{self.reference.repo}@{self.commit}/{name}", f"{self.reference}: {name}"
        try:
            size = int(self._files.info(path)["size"])
            start = self._header(path, size, where)
            alphas = [t for t in parse_header(start[8:], size, where).tensors.values() if t.name.endswith(".alpha")]
            with ThreadPoolExecutor(WORKERS, "alphas") as pool:
                data = list(pool.map(lambda t: self._read(path, t.start, t.end), alphas))
            tensors = {t.name: (t.start, found) for t, found in zip(alphas, data, strict=True)}
            write_stub(target, start, size, tensors)
        except FormatError:
            raise
        except Exception as problem:
            raise explained(problem, self.reference) from None

    def _header(self, path: str, size: int, where: str) -> bytes:
        start = self._read(path, 0, min(_FIRST, size))
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > min(MAX_HEADER, size - 8):
            raise FormatError(f"{where}: has {size} bytes and claims a header of {length}; not a safetensors file")
        return start[: 8 + length] + self._read(path, len(start), 8 + length)

    def _read(self, path: str, start: int, end: int) -> bytes:
        if end <= start:
            return b""
        data: bytes = self._files.cat_file(path, start=start, end=end, cache_type="none")
        if len(data) != end - start:
            raise FormatError(f"{path}: {len(data)} bytes came where {end - start} were asked for")
        return data

"""Where a name out of a file leads: below the folder that it belongs to, or it is refused.

Records, journals, indexes and servers name files, and each of them may come from a stranger. So a name is written in
one way only and leads nowhere by itself, and the folders on its way count as much as the file. Reading follows links
that stay in the folder, and those of the Hub's cache from a snapshot to its blobs; writing, renaming and removing
follow none. Who may change the folder in the moment between the check and the use is not kept out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lorasurgery.checkpoint.header import show
from lorasurgery.errors import FormatError, OutputError

LEADS_OUT = "is a link that leads out of its folder, or lies behind one"
_LONGEST = 255  # bytes of a name: file systems take no more
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_inside(name: Any) -> bool:
    """Whether a name from a file is that of a file in its folder or below, written in one way only.

    >>> [is_inside(n) for n in ("a.safetensors", "unet/a.safetensors", "../a", "/a", "./a", "a//b", "C:a", "")]
    [True, True, False, False, False, False, False, False]
    """
    if not isinstance(name, str) or not name or set(name) & {"\x00", "\\"}:
        return False
    if any("\ud800" <= c <= "\udfff" for c in name):  # half a character, which no file system takes
        return False
    path = PurePosixPath(name)
    plain = str(path) == name and name != "." and not path.is_absolute() and ".." not in path.parts
    return plain and not PureWindowsPath(name).drive and all(len(p.encode()) <= _LONGEST for p in path.parts)


def is_commit(text: Any) -> bool:
    """Whether a text is a commit as git names it, and so the name of a folder too.

    >>> is_commit("0" * 40), is_commit("../" + "0" * 37), is_commit("main")
    (True, False, False)
    """
    return isinstance(text, str) and _COMMIT.fullmatch(text) is not None


def is_link(path: Path) -> bool:
    """Whether a path is a link, or what Windows has for one between folders."""
    return os.path.islink(path) or bool(  # noqa: PTH114 — a Path would raise where a name is too long
        getattr(os.path, "isjunction", lambda _: False)(path)
    )


def leads_out(path: Path, folder: Path) -> bool:
    """Whether what a path below a folder leads to lies elsewhere; the Hub's blobs count as part of their snapshot."""
    try:
        real, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError):  # a link to itself, or half a character
        return True
    return not any(real.is_relative_to(place) for place in (home, *_blobs(home)))


def _blobs(home: Path) -> Iterator[Path]:
    """Where the Hub's cache keeps what the files of a repository's snapshots/COMMIT/, or of a folder in it, lead to."""
    for place in (home, *home.parents):
        if place.parent.name == "snapshots" and (place == home or is_commit(place.name)):
            yield place.parents[1] / "blobs"


def link_on_the_way(folder: Path, name: str) -> Path | None:
    """The first part of a path below a folder that is a link; None where there is none."""
    parts = PurePosixPath(name).parts
    return next((p for i in range(len(parts)) if is_link(p := folder.joinpath(*parts[: i + 1]))), None)


def to_read(folder: Path, name: Any, *, odd: bool = False) -> Path:
    """The path of a file that something names, to be read or copied.

    Args:
        odd: It lies in the folder itself, and what it is called follows a name that the user chose: any will do.

    Raises:
        FormatError: the name, or a link, leads out of the folder.
    """
    plain = odd and isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")
    path = folder / name if plain and "\x00" not in name else _named(folder, name)
    if leads_out(path, folder):
        raise FormatError(f"{show(str(path))}: {LEADS_OUT}, so it is not followed; put the file itself there")
    return path


def to_write(folder: Path, name: Any) -> Path:
    """The path of a file that something names, to be opened and changed: no link at all leads there.

    Raises:
        FormatError: the name leads out of the folder.
        OutputError: it, or a folder on the way, is a link.
    """
    path = _named(folder, name)
    refuse_link(link_on_the_way(folder, name) or path)
    return path


def refuse_link(path: Path) -> None:
    """Refuse to change a link, or what lies behind it: it is somebody else's.

    Raises:
        OutputError: with the next move.
    """
    if is_link(path):
        raise OutputError(
            f"{show(str(path))}: is a link, and nothing is written or removed through one; put what it leads to in its "
            "place, or remove it"
        )


def to_replace(folder: Path, name: Any) -> Path:
    """The path of a file that something names, to get other content by a rename, or to be removed.

    If it is a link itself, that is what is replaced or removed, and not what it leads to.

    Raises:
        FormatError: the name leads out of the folder.
        OutputError: a folder on the way is a link.
    """
    path = _named(folder, name)
    refuse_folder_links(folder, name)
    return path


def refuse_folder_links(folder: Path, name: str) -> None:
    """Refuse to write a file, of whatever name, in a folder below another one that a link leads to.

    Raises:
        OutputError: a folder on the way is a link.
    """
    link = link_on_the_way(folder, name.rpartition("/")[0])
    if link is not None:
        refuse_link(link)


def _named(folder: Path, name: Any) -> Path:
    if not is_inside(name):
        raise FormatError(f"{show(str(folder))}: {show(repr(name))} is not the name of a file in this folder")
    return folder / str(name)


def files_below(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The files of a folder by their names in it, and the links in it that lead out, which nobody follows.

    A link to another folder inside is followed once: what lies there has two names then.
    """
    found: dict[str, Path] = {}
    outside: list[str] = []

    def walk(place: Path, prefix: str, *, linked: bool) -> None:
        entries: list[Path] = []
        with suppress(PermissionError):
            entries = sorted(place.iterdir())
        for path in entries:
            name, link = prefix + path.name, is_link(path)
            if link and leads_out(path, folder):
                outside.append(name)
            elif path.is_file():
                found[name] = path
            elif path.is_dir() and not (link and (linked or place.resolve().is_relative_to(path.resolve()))):
                walk(path, f"{name}/", linked=linked or link)

    walk(folder, "", linked=False)
    return dict(sorted(found.items())), outside

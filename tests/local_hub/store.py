"""What a local Hub keeps: repos, their commits, and the bytes of their files, in one folder.

It knows git's ids and the rules by which the Hub takes a commit or refuses it. It knows nothing of HTTP, but for the
status that a refusal will be told with.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from local_hub.card import card_errors

LARGE = 10 * 1024 * 1024
LFS_SUFFIXES = tuple(
    ".7z .arrow .bin .bz2 .ckpt .gguf .gz .h5 .joblib .msgpack .npy .npz .onnx .parquet .pickle .pkl .png .pt .pth"
    " .safetensors .tar .tflite .tgz .xz .zip .zst".split()
)
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


class RefusedError(Exception):
    """What the Hub answers instead: a status, a sentence, and perhaps the code that clients look for."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        in_a_header = " ".join(message.split()).encode("ascii", "replace").decode()
        self.headers = headers | {"X-Error-Message": in_a_header} | ({"X-Error-Code": code} if code else {})


@dataclass(frozen=True)
class File:
    """One file of a commit: which bytes, and the id git gives it (of a large one, git has only a pointer)."""

    sha256: str
    size: int
    lfs: bool
    blob_id: str

    @property
    def etag(self) -> str:
        """By which clients recognise the content."""
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    """A whole tree and how it came about; never changed once made."""

    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, File]


@dataclass
class Repo:
    """Commits, and the names that point to them: refs/heads/main, refs/pr/1."""

    id: str
    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """The user in whose namespace it lies."""
        return self.id.split("/")[0]

    def ref(self, revision: str) -> str:
        """The full name of a branch or a pull request, which are what one can commit to."""
        for name in (f"refs/heads/{revision}", revision):
            if name in self.refs:
                return name
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a pull request or a commit id names."""
        return self.commits.get(revision) or self.commits[self.refs[self.ref(revision)]]

    def history(self, revision: str) -> list[Commit]:
        """A commit and those before it, newest first."""
        found = [self.at(revision)]
        while found[-1].parent:
            found.append(self.commits[found[-1].parent])
        return found


def pointer(sha256: str, size: int) -> bytes:
    """What git keeps of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_id(content: bytes) -> str:
    """The id git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str, size: int, sample: bytes = b"") -> bool:
    """Whether a file goes through LFS: by its name, its size, or because it isn't text."""
    return path.endswith(LFS_SUFFIXES) or size >= LARGE or b"\0" in sample


class Store:
    """The repos of one folder. Every change is one replaced file, so a server that dies leaves whole commits only."""

    def __init__(self, folder: Path) -> None:
        self.objects, self._repos = folder / "objects", folder / "repos"
        for part in (self.objects, self._repos):
            part.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        self.repos = {repo.id: repo for repo in map(_load, sorted(self._repos.glob("*.json")))}

    def create(self, repo_id: str, author: str, private: bool = False) -> Repo:
        """A new repo, with the first commit that the Hub makes by itself."""
        if not REPO_ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id:
            raise RefusedError(400, f"Invalid repo name: {repo_id}")
        with self.lock:
            repo = self.repos[repo_id] = Repo(repo_id, private)
            commit = self._new_commit(None, {".gitattributes": self.put(GITATTRIBUTES)}, "initial commit", "", author)
            self._point(repo, "refs/heads/main", commit)
        return repo

    def delete(self, repo: Repo) -> None:
        """Forget a repo; its objects stay, as other repos may have them too."""
        with self.lock:
            del self.repos[repo.id]
            self._file_of(repo).unlink()

    def branch(self, repo: Repo, name: str, start: str) -> None:
        """A new branch, at the commit that `start` names."""
        with self.lock:
            self._point(repo, f"refs/heads/{name}", repo.at(start))

    def commit(
        self, repo: Repo, revision: str, lines: list[dict[str, Any]], author: str, pull_request: bool
    ) -> tuple[Commit, str]:
        """Take the lines of a commit all together or not at all.

        Returns: the commit and the name of what points to it now: the branch, or a new refs/pr/N.
        Raises: RefusedError where a line names what isn't there, or the branch has moved on from the expected parent.
        """
        header = lines[0]["value"]
        with self.lock:
            ref = repo.ref(revision)
            parent, expected = repo.at(revision), header.get("parentCommit") or ""
            if not parent.id.startswith(expected):
                if not pull_request:
                    raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
                parent = repo.at(expected)  # a pull request may start from an older commit
            files = dict(parent.files)
            for line in lines[1:]:
                self._apply(files, line["key"], line["value"])
            commit = self._new_commit(parent.id, files, header["summary"], header.get("description", ""), author)
            if pull_request:
                ref = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repo.refs)}"
            self._point(repo, ref, commit)
        return commit, ref

    def _apply(self, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
        path = PurePosixPath(value["path"])
        if path.is_absolute() or not path.parts or {"..", ".git"} & set(path.parts):
            raise RefusedError(400, f"Invalid path: {path}")
        if key == "file":
            content = base64.b64decode(value["content"])
            if str(path) == "README.md" and (errors := card_errors(content.decode(errors="replace"))):
                raise RefusedError(400, "Invalid metadata in README.md: " + "; ".join(errors))
            files[str(path)] = self.put(content)
        elif key == "lfsFile":
            files[str(path)] = self.large(value["oid"])
        elif key in ("deletedFile", "deletedFolder"):
            gone = [p for p in files if p == str(path) or (key == "deletedFolder" and path in PurePosixPath(p).parents)]
            if not gone:
                raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise RefusedError(400, f"Unknown operation: {key}")

    def large(self, sha256: str) -> File:
        """The large file whose bytes were sent before."""
        if not self.has(sha256):
            raise RefusedError(400, f"The commit was rejected: LFS object {sha256} does not exist, upload it first")
        size = self.object(sha256).stat().st_size
        return File(sha256, size, lfs=True, blob_id=git_id(pointer(sha256, size)))

    def put(self, content: bytes) -> File:
        """Keep a small file's bytes."""
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.has(sha256):
            self.receive(sha256, len(content), [content])
        return File(sha256, len(content), lfs=False, blob_id=git_id(content))

    def object(self, sha256: str) -> Path:
        """Where the bytes of that hash lie, or would."""
        return self.objects / sha256

    def has(self, sha256: str) -> bool:
        """Whether the bytes of that hash are here, all of them."""
        return bool(re.fullmatch("[0-9a-f]{64}", sha256)) and self.object(sha256).exists()

    def receive(self, sha256: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write an object as it comes in; it gets its name only once its size and its hash are right."""
        partial = self.objects / f"{uuid4().hex}.partial"
        digest, seen = hashlib.sha256(), 0
        try:
            with partial.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    digest.update(chunk)
                    seen += len(chunk)
            if (digest.hexdigest(), seen) != (sha256, size):
                raise RefusedError(
                    400, f"BadDigest: got {seen} bytes of sha256 {digest.hexdigest()}, not {size} of {sha256}"
                )
            partial.replace(self.object(sha256))
        finally:
            partial.unlink(missing_ok=True)

    def _new_commit(self, parent: str | None, files: dict[str, File], title: str, message: str, author: str) -> Commit:
        # The date stays out of the id, so that the same pushes give the same ids on any day.
        told = [parent, title, message, sorted((path, file.etag) for path, file in files.items())]
        commit_id = hashlib.sha1(json.dumps(told).encode()).hexdigest()
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        return Commit(commit_id, parent, title, message, author, date, files)

    def _point(self, repo: Repo, ref: str, commit: Commit) -> None:
        repo.commits[commit.id] = commit
        repo.refs[ref] = commit.id
        self._save(repo)

    def _file_of(self, repo: Repo) -> Path:
        return self._repos / f"{repo.id.replace('/', '--')}.json"

    def _save(self, repo: Repo) -> None:
        target = self._file_of(repo)
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(repo), indent=1))
        partial.replace(target)


def _load(path: Path) -> Repo:
    told = json.loads(path.read_text())
    commits = {}
    for commit_id, values in told.pop("commits").items():
        files = {name: File(**file) for name, file in values.pop("files").items()}
        commits[commit_id] = Commit(**values, files=files)
    return Repo(**told, commits=commits)

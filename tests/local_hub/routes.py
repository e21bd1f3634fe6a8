"""What the Hub's addresses answer, in the shape the client expects.

The store (store.py) knows what there is; here are only the words of the protocol, as huggingface_hub 2.4
and its forebears since 0.30 speak it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote

from local_hub.access import Guarded
from local_hub.card import card_errors, card_warnings, metadata
from local_hub.store import Commit, File, RefusedError, is_large, pointer

ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Any]]] = []
PARTS = {
    "{repo}": "(?P<repo>[^/]+/[^/]+)",
    "{rev}": r"(?P<rev>refs/pr/\d+|[^/]+)",
    "{name}": "(?P<name>[^/]+)",
    "{path}": "(?P<path>.+)",
}


def route(method: str, *paths: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Put a method of Api at these addresses; what it returns is answered as JSON."""

    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        for path in paths:
            for part, pattern in PARTS.items():
                path = path.replace(part, pattern)
            ROUTES.append((method, re.compile(path), function))
        return function

    return put


class Api(Guarded):
    """The Hub's own address: huggingface.co, were it real."""

    def respond(self, path: str, query: dict[str, str]) -> None:
        """Find the route and answer what it returns."""
        self.query = query
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, function in ROUTES:
            if wanted == method and (found := pattern.fullmatch(path)):
                groups = {name: unquote(value or "") for name, value in found.groupdict().items()}
                value = function(self, **groups)
                if value is not None:
                    self.answer(200, value)
                return
        if path.startswith("/api/models/") or "/resolve/" in path:
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        raise RefusedError(404, "Sorry, we can't find the page you are looking for.")

    # People

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Any:
        user = self.known_user()
        token = {"displayName": "local", "role": "write"}
        return {
            "type": "user", "id": user, "name": user, "fullname": user, "email": None, "isPro": False, "orgs": [],
            "auth": {"type": "access_token", "accessToken": token},
        }  # fmt: skip

    @route("GET", "/api/models/{repo}/auth-check", "/api/models/{repo}/auth-check/(?P<write>write)")
    def auth_check(self, repo: str, write: str = "") -> Any:
        (self.writable if write else self.readable)(repo)
        return {}

    # Repos and branches

    def _named(self) -> tuple[str, str, dict[str, Any]]:
        user, told = self.known_user(), self.json()
        owner = told.get("organization") or user
        if told.get("type") not in (None, "model"):
            raise RefusedError(400, "This Hub has models only")
        if owner != user:
            raise RefusedError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        return user, f"{owner}/{told['name']}", told

    @route("POST", "/api/repos/create")
    def create_repo(self) -> Any:
        user, repo_id, told = self._named()
        url = f"{self.hub.url}/{repo_id}"
        with self.hub.store.lock:
            if repo_id in self.hub.store.repos:
                self.answer(409, {"error": "You already created this model repo", "url": url})
                return None
            private = told.get("private") or told.get("visibility") == "private"
            self.hub.store.create(repo_id, user, bool(private))
        return {"url": url, "name": repo_id, "id": repo_id}

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self) -> Any:
        _, repo_id, _ = self._named()
        self.hub.store.delete(self.writable(repo_id))
        return {}

    @route("GET", "/api/models/{repo}", "/api/models/{repo}/revision/{rev}")
    def model_info(self, repo: str, rev: str = "main") -> Any:
        found = self.visible(repo)
        commit = found.at(rev)
        card = self._card(commit)
        blobs = self.query.get("blobs", "").lower() in ("true", "1")
        return {
            "_id": repo, "id": repo, "modelId": repo, "author": found.owner, "sha": commit.id, "private": found.private,
            "gated": "manual" if repo in self.hub.gated else False, "disabled": False, "downloads": 0, "likes": 0,
            "lastModified": commit.date, "createdAt": found.history("main")[-1].date, "cardData": card or None,
            "tags": card.get("tags", []), "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"),
            "siblings": [_sibling(path, file, blobs) for path, file in sorted(commit.files.items())],
        }  # fmt: skip

    def _card(self, commit: Commit) -> dict[str, Any]:
        readme = commit.files.get("README.md")
        if readme is None or readme.lfs:
            return {}
        return metadata(self.hub.store.object(readme.sha256).read_text(errors="replace"))

    @route("GET", "/api/models/{repo}/refs")
    def refs(self, repo: str) -> Any:
        told: dict[str, list[Any]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for ref, commit in self.visible(repo).refs.items():
            kind, name = ("pullRequests", ref) if "/pr/" in ref else ("branches", ref.removeprefix("refs/heads/"))
            told[kind].append({"name": name, "ref": ref, "targetCommit": commit})
        return told

    @route("GET", "/api/models/{repo}/commits/{rev}")
    def commits(self, repo: str, rev: str) -> Any:
        return [
            {"id": c.id, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": c.date}
            for c in self.visible(repo).history(rev)
        ]

    @route("POST", "/api/models/{repo}/branch/{name}")
    def create_branch(self, repo: str, name: str) -> Any:
        found = self.writable(repo)
        if name.startswith("refs/"):
            raise RefusedError(400, f"Invalid reference for a branch: {name}")
        if f"refs/heads/{name}" in found.refs:
            raise RefusedError(409, f"Reference already exists: refs/heads/{name}")
        self.hub.store.branch(found, name, self.json().get("startingPoint") or "main")
        return {}

    # Reading

    @route("GET", "/api/models/{repo}/tree/{rev}", "/api/models/{repo}/tree/{rev}/{path}")
    def tree(self, repo: str, rev: str, path: str = "") -> Any:
        files = self.visible(repo).at(rev).files
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        listed = [entry for entry in _entries(files) if _lies_in(entry["path"], path, recursive)]
        if path and not listed:
            raise RefusedError(404, f'{path} does not exist on "{rev}"', "EntryNotFound")
        return listed

    @route("POST", "/api/models/{repo}/paths-info/{rev}")
    def paths_info(self, repo: str, rev: str) -> Any:
        told = b"".join(self.body()).decode()
        # The client sends a form, the Hub's own documentation JSON.
        asked = json.loads(told)["paths"] if told.startswith("{") else parse_qs(told).get("paths", [])
        return [entry for entry in _entries(self.visible(repo).at(rev).files) if entry["path"] in asked]

    @route("GET", "/{repo}/resolve/{rev}/{path}")
    def resolve(self, repo: str, rev: str, path: str) -> None:
        commit = self.readable(repo).at(rev)
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            raise RefusedError(404, "Entry not found", "EntryNotFound", **headers)
        file = commit.files[path]
        if file.lfs:
            headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
            self.answer(302, Location=self.hub.link("GET", file.sha256, file.size), **headers)
        else:
            kind = {"Content-Type": "text/plain; charset=utf-8", "ETag": f'"{file.blob_id}"'}
            self.answer_file(self.hub.store.object(file.sha256), headers | kind)

    # Writing

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Any:
        self.user()
        text = self.json()["content"]
        errors, warnings = card_errors(text), card_warnings(text)
        status = 400 if errors else 200
        if self.headers.get("Accept") == "text/plain":  # ModelCard.validate shows the answer as it is
            told = [f"- Error: {e}" for e in errors] + [f"- Warning: {w}" for w in warnings]
            self.answer(status, "\n".join(told))
        else:
            told_as = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
            self.answer(status, told_as)

    @route("POST", "/api/models/{repo}/preupload/{rev}")
    def preupload(self, repo: str, rev: str) -> Any:
        files = self.writable(repo).at(rev).files
        return {"files": [_upload_mode(told, files.get(told["path"])) for told in self.json()["files"]]}

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str) -> Any:
        told = self.json()
        if "ref" not in told:  # as the client has it when it means to open a pull request
            self.query["create_pr"] = "1"
        self.writable(repo)
        return {"transfer": "basic", "objects": [self._lfs_object(repo, o["oid"], o["size"]) for o in told["objects"]]}

    def _lfs_object(self, repo: str, oid: str, size: int) -> dict[str, Any]:
        if self.hub.store.has(oid):
            return {"oid": oid, "size": size}  # without actions: nothing to send, which is how a push resumes
        upload = {"href": self.hub.link("PUT", oid, size), "header": {}}
        verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/objects/verify", "header": {}}
        return {"oid": oid, "size": size, "authenticated": True, "actions": {"upload": upload, "verify": verify}}

    @route("POST", "/{repo}.git/info/lfs/objects/verify")
    def lfs_verify(self, repo: str) -> Any:
        self.visible(repo)
        self.known_user()
        told, store = self.json(), self.hub.store
        if not store.has(told["oid"]) or store.large(told["oid"]).size != told["size"]:
            raise RefusedError(404, "LFS object does not exist, or has another size")
        return {}

    @route("POST", "/api/models/{repo}/commit/{rev}")
    def commit(self, repo: str, rev: str) -> Any:
        found, user = self.writable(repo), self.known_user()
        lines = [json.loads(line) for line in b"".join(self.body(upload=True)).splitlines() if line.strip()]
        commit, ref = self.hub.store.commit(found, rev, lines, user, "create_pr" in self.query)
        told = {"success": True, "commitOid": commit.id, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit.id}"}
        if "create_pr" in self.query:
            told["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{ref.rsplit('/')[-1]}"
        return told


def _lfs(file: File) -> dict[str, Any]:
    return {"oid": file.sha256, "size": file.size, "pointerSize": len(pointer(file.sha256, file.size))}


def _sibling(path: str, file: File, blobs: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"rfilename": path}
    if blobs:
        told |= {"size": file.size, "blobId": file.blob_id}
        if file.lfs:
            told["lfs"] = _lfs(file) | {"sha256": file.sha256}
    return told


def _lies_in(path: str, folder: str, recursive: bool) -> bool:
    folders = PurePosixPath(path).parents
    return PurePosixPath(folder) in (folders if recursive else folders[:1])


def _entries(files: dict[str, File]) -> list[dict[str, Any]]:
    """Folders, then files, as the listing of a tree tells them."""
    told: list[dict[str, Any]] = []
    for folder in sorted({str(up) for path in files for up in PurePosixPath(path).parents} - {"."}):
        inside = sorted((path, file.blob_id) for path, file in files.items() if path.startswith(f"{folder}/"))
        told.append(
            {"type": "directory", "path": folder, "size": 0, "oid": hashlib.sha1(repr(inside).encode()).hexdigest()}
        )
    for path, file in sorted(files.items()):
        entry = {"type": "file", "path": path, "size": file.size, "oid": file.blob_id}
        told.append(entry | ({"lfs": _lfs(file)} if file.lfs else {}))
    return told


def _upload_mode(told: dict[str, Any], there: File | None) -> dict[str, Any]:
    """How a file is to be sent, and the id of what is there by its name: the client leaves out what hasn't changed."""
    sample = base64.b64decode(told.get("sample", ""))
    mode = "lfs" if is_large(told["path"], told["size"], sample) else "regular"
    return {"path": told["path"], "uploadMode": mode, "shouldIgnore": False, "oid": there and there.etag}

"""Publishing files as one commit of a model repository, through huggingface_hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasurgery.checkpoint.locate import INDEX_SUFFIX
from lorasurgery.errors import OutputError, SurgeryError, UsageError
from lorasurgery.hub.client import api, explained

CARD = "README.md"
_WEIGHTS = re.compile(r"(?:model|diffusion_pytorch_model)(?:-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class Target:
    """Where to publish.

    Args:
        repo: `org/name`; made when it does not exist.
        private: Make it private; an existing public repository is then refused.
        revision: Branch, made from main when it does not exist; None is main.
        create_pr: Open a pull request instead of committing to the branch.
    """

    repo: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False

    def check(self) -> None:
        """Refuse what can't be before anything is computed or sent.

        Raises:
            UsageError: no `org/name`, or a pull request on a branch.
        """
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", self.repo) or "--" in self.repo:
            raise UsageError(f"{self.repo}: expected a repository on the Hub as org/name")
        if self.create_pr and self.revision not in (None, "main"):
            raise UsageError("--create-pr: a pull request goes to main; leave --revision out")


def check_account(target: Target) -> None:
    """Make sure that there is a token and that the Hub takes it, before hours of work.

    Raises:
        SurgeryError: no token, one that is not accepted, or no connection, in one line.
    """
    from huggingface_hub import constants, get_token

    if not get_token():
        raise SurgeryError(f"{target.repo}: publishing needs a token; log in with `hf auth login`, or set HF_TOKEN")
    if constants.HF_HUB_OFFLINE:
        raise SurgeryError(f"{target.repo}: HF_HUB_OFFLINE is set, so nothing can be published; unset it")
    try:
        api().whoami()
    except Exception as problem:  # its kinds differ by version
        raise explained(problem, target.repo) from None


def upload(
    files: Mapping[str, Path | bytes], made: Mapping[str, bytes], target: Target, *, message: str, overwrite_card: bool
) -> dict[str, Any]:
    """Publish files in one commit; large ones that the Hub has already, from an upload that failed, are not sent again.

    Weights of the same folder that the new ones replace under other names (shards of another number) are deleted in
    the same commit, for a reader would take them first.

    Args:
        files: Name in the repository -> file here, or its bytes where they are others than here.
        made: Name -> bytes made for the purpose: the model card and its picture.
        overwrite_card: Replace the model card that the repository has.

    Returns:
        repo, url, commit, files and bytes that are new, card (`written` or `kept`), deleted; pull_request where one
        was opened. Without any change there is no new commit, and files is 0.

    Raises:
        SurgeryError: refused, or cut off; nothing is published then.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    client = api()
    try:
        remote, head = _prepare(client, target)
        kept = CARD in remote and not overwrite_card
        sent: dict[str, Path | bytes] = {**files, **made}
        if kept:  # the picture belongs to the card
            sent = {name: data for name, data in sent.items() if name != CARD and name not in made}
        stale = _stale(remote, sent)
        commit = client.create_commit(
            target.repo,
            [
                *(CommitOperationAdd(name, str(data) if isinstance(data, Path) else data)
                  for name, data in sorted(sent.items())),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=message, revision=target.revision, create_pr=target.create_pr,
        )  # fmt: skip
    except SurgeryError:
        raise
    except Exception as problem:  # its kinds differ by version
        raise explained(problem, target.repo) from None
    branch = f"/tree/{target.revision}" if target.revision else ""
    if commit.oid == head:  # all of it was there already, so the Hub made no commit
        sent = {}
    found = {
        "repo": target.repo, "url": f"{client.endpoint}/{target.repo}{branch}", "commit": commit.oid,
        "files": len(sent), "bytes": sum(_size(data) for data in sent.values()), "deleted": stale,
        "card": "kept" if kept else "written",
    }  # fmt: skip
    return found | ({"pull_request": commit.pr_url} if commit.pr_url else {})


def _prepare(client: Any, target: Target) -> tuple[set[str], str]:
    """Make repository and branch where they are missing; the files that are there already, and the last commit."""
    client.create_repo(target.repo, private=target.private or None, exist_ok=True)
    if target.revision and target.revision != "main":
        client.create_branch(target.repo, branch=target.revision, exist_ok=True)
    info = client.model_info(target.repo, revision=target.revision)
    if target.private and not info.private:
        raise OutputError(
            f"{target.repo}: exists and is public, but --private was asked for, so nothing was sent; make it private "
            f"at {client.endpoint}/{target.repo}/settings, or name another repository"
        )
    return {s.rfilename for s in info.siblings or ()}, str(info.sha)


def _stale(remote: set[str], sent: Mapping[str, Any]) -> list[str]:
    folders = {name.rpartition("/")[0] for name in sent if _is_weights(name)}
    return sorted(n for n in remote if _is_weights(n) and n.rpartition("/")[0] in folders and n not in sent)


def _is_weights(name: str) -> bool:
    last = name.rpartition("/")[2]
    return _WEIGHTS.fullmatch(last) is not None or last.endswith(INDEX_SUFFIX)


def _size(data: Path | bytes) -> int:
    return len(data) if isinstance(data, bytes) else data.stat().st_size


def show_bars(shown: bool) -> None:
    """Let huggingface_hub show its own bars while it uploads, or not."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars  # type: ignore[attr-defined]

    (enable_progress_bars if shown else disable_progress_bars)()

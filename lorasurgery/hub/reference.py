"""What a person means by `org/name[@revision]`, and which failures of the Hub mean what. No network here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasurgery.checkpoint.header import PICKLE_SUFFIXES
from lorasurgery.checkpoint.inside import is_inside
from lorasurgery.errors import SurgeryError, UsageError

SCHEME = "hf://"
_NAME = r"[A-Za-z0-9][\w.-]*"
_REFERENCE = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[^\s@/]+|refs/pr/\d+))?(?:/(?P<inside>[^@]+))?")
_CACHED = re.compile(r"models--(?P<repo>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})(?:[/\\](?P<inside>.+))?$")


@dataclass(frozen=True)
class Reference:
    """A model repository on the Hub, at a revision.

    Args:
        repo: `org/name`.
        revision: Branch, tag, commit or `refs/pr/N`; None is the default branch.
        inside: A file or folder in the repository; empty for all of it.
    """

    repo: str
    revision: str | None = None
    inside: str = ""

    def __str__(self) -> str:
        text = self.repo + (f"@{self.revision}" if self.revision else "")
        return f"{SCHEME}{text}/{self.inside}" if self.inside else text


def parse_reference(text: str | Path) -> Reference | None:
    """Tell whether a path that does not exist here is meant to be on the Hub.

    >>> parse_reference("org/name@main")
    Reference(repo='org/name', revision='main', inside='')
    >>> parse_reference("hf://org/name@v1/unet/lora.safetensors").inside
    'unet/lora.safetensors'
    >>> parse_reference("./org/name"), parse_reference("models/a.safetensors"), parse_reference("a/b/c")
    (None, None, None)

    Raises:
        UsageError: it begins with hf:// but is not a repository.
    """
    words = str(text)
    named = words.startswith(SCHEME)
    if not isinstance(text, str) or (not named and words.endswith((".safetensors", ".json", *PICKLE_SUFFIXES))):
        return None
    match = _REFERENCE.fullmatch(words.removeprefix(SCHEME))
    if match is None or (match["inside"] and not named):  # deeper paths are local ones that were misspelt
        if named:
            raise UsageError(f"{words}: expected hf://org/name[@revision][/path/in/the/repository]")
        return None
    found = Reference(match["repo"], match["revision"], (match["inside"] or "").rstrip("/"))
    for part in filter(None, (found.revision, found.inside)):  # both become paths below the Hub's cache
        if not is_inside(part):
            raise UsageError(f"{words}: {part} is neither a revision nor a path in a repository")
    return found


def cached_reference(path: str | Path) -> Reference | None:
    """The repository, commit and file that a path in the Hub's cache belongs to.

    >>> cached_reference("/cache/models--org--name/snapshots/" + "0" * 40 + "/model.safetensors").repo
    'org/name'
    """
    match = _CACHED.search(str(path))
    if match is None:
        return None
    return Reference(match["repo"].replace("--", "/"), match["commit"], (match["inside"] or "").replace("\\", "/"))


def explain(problem: Exception, what: Reference | str, *, token: str | None, endpoint: str) -> SurgeryError:
    """One line for a failure of the Hub: what is wrong and the next move. Tokens never enter it.

    Args:
        problem: What huggingface_hub raised.
        token: The one that was sent, if any.
    """
    kinds = {kind.__name__ for kind in type(problem).__mro__}
    status = getattr(getattr(problem, "response", None), "status_code", None)
    repo = what.repo if isinstance(what, Reference) else what
    revision = what.revision if isinstance(what, Reference) else None
    if "GatedRepoError" in kinds:
        says = f"is gated; ask for access at {endpoint}/{repo}, then log in (hf auth login, or HF_TOKEN)"
    elif "RevisionNotFoundError" in kinds:
        says = f"has no revision {revision or 'main'}; see {endpoint}/{repo}/tree/main for those it has"
    elif status == 401 and (token or "Invalid" in str(problem)):
        says = "the Hub does not accept this token, or it gives no access; log in again (hf auth login, or HF_TOKEN)"
    elif "RepositoryNotFoundError" in kinds:
        private = "it may be private: log in (hf auth login, or HF_TOKEN)" if not token else "check its name"
        says = f"is neither a file nor a folder here nor a repository on the Hub; {private}"
    elif status == 403:
        says = "the token may not do that; make one with write access at " + f"{endpoint}/settings/tokens"
    elif kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
        says = "is neither a file nor a folder here, is not in the Hub's cache, and the Hub can't be reached" + (
            " (HF_HUB_OFFLINE is set); unset it, or give a local path"
            if "OfflineModeIsEnabled" in kinds or _is_offline(problem)
            else f" ({endpoint}); check the network, or give a local path"
        )
    else:
        says = f"the Hub ({endpoint}) failed: {_one_line(problem)}"
    return SurgeryError(without_token(f"{what}: {says}", token))


def without_token(text: str, token: str | None = None) -> str:
    """The same text with the token, and all that looks like one, cut out.

    >>> without_token("Authorization: Bearer abc, or hf_0123456789abcdefghij")
    'Authorization: Bearer (token) or (token)'
    """
    known = text.replace(token, "(token)") if token else text
    return re.sub(r"\bhf_[A-Za-z0-9]{16,}|(?<=Bearer )\S+", "(token)", known)


def _is_offline(problem: Exception) -> bool:
    cause: Any = problem
    while cause is not None:
        if type(cause).__name__ == "OfflineModeIsEnabled":
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _one_line(problem: Exception) -> str:
    """What it says, and what caused it where that is something else."""
    cause = problem.__cause__
    return _words(problem) + (f" ({_words(cause)})" if isinstance(cause, Exception) else "")


def _words(problem: Exception) -> str:
    words = " ".join(str(problem).split()).rstrip(".")
    return f"{type(problem).__name__}: {words[:400]}" if words else type(problem).__name__

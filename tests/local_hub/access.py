"""Who may do what at a local Hub, and how it says no: as the real one does, which hides what is private."""

from __future__ import annotations

from local_hub.protocol import Connection
from local_hub.store import RefusedError, Repo


class Guarded(Connection):
    """A connection that knows whose token came with the request."""

    def user(self) -> str | None:
        """Whose token came along; None for no token."""
        sent = self.headers.get("Authorization")
        if sent is None:
            return None
        if (token := sent.removeprefix("Bearer ")) not in self.hub.tokens:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def known_user(self) -> str:
        """The same where it takes a token."""
        if (user := self.user()) is None:
            raise RefusedError(401, "Invalid username or password.")
        return user

    def visible(self, repo_id: str) -> Repo:
        """A repo that this client may know of; a private one is not even said to exist."""
        user, repo = self.user(), self.hub.store.repos.get(repo_id)
        if repo is None or (repo.private and user != repo.owner):
            raise RefusedError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def readable(self, repo_id: str) -> Repo:
        """A repo whose files this client may read."""
        user, repo = self.user(), self.visible(repo_id)
        if repo_id in self.hub.gated and user != repo.owner:
            start = f"Access to model {repo_id} is restricted"
            if user is None:
                raise RefusedError(401, f"{start}. You must be authenticated to access it. Please log in.", "GatedRepo")
            ask = f"Visit {self.hub.url}/{repo_id} to ask for access."
            raise RefusedError(403, f"{start} and you are not in the authorized list. {ask}", "GatedRepo")
        return repo

    def writable(self, repo_id: str) -> Repo:
        """A repo that this client may push to; anyone may open a pull request."""
        repo, user = self.visible(repo_id), self.known_user()
        if user != repo.owner and "create_pr" not in self.query:
            raise RefusedError(403, f"Forbidden: {user} has no right to write to {repo_id}")
        return repo

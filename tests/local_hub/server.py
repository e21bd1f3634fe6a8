"""A Hugging Face Hub on this machine: small, but real enough for an unmodified huggingface_hub to push and pull.

    python tests/local_hub --folder /tmp/hub --port 8123

It prints two lines to paste into another shell; everything that uses huggingface_hub there then talks to this server.
Models only, over plain HTTP and LFS: no datasets, no Spaces, no xet, no pages to look at. It listens on 127.0.0.1 and
nowhere else, and keeps all it is given in the folder. In Python:

    with LocalHub(folder) as hub:
        subprocess.run([...], env=os.environ | hub.environment())
        hub.files("me/adapter"), hub.log
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hmac
import secrets
import signal
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from urllib.parse import urlencode

from local_hub.protocol import Outage, Request, Server, Storage
from local_hub.routes import Api
from local_hub.store import Commit, Store, is_large

TOKENS = {"hf_local": "me"}


class LocalHub:
    """The server, from `with` to its end; what it keeps in the folder outlasts it.

    Args:
        folder: where repos and objects lie; a folder that a LocalHub has filled before is taken up again.
        tokens: the tokens that are good, and whose they are; a user may write under their own name.
        gated: repos whose files only their owner may read.
        port: 0 for any that is free.
        verbose: write a line to stderr for each request.

    `log` holds every request so far, oldest first; clear it to look at what comes next.
    """

    def __init__(
        self,
        folder: Path,
        tokens: Mapping[str, str] = TOKENS,
        gated: Collection[str] = (),
        port: int = 0,
        verbose: bool = False,
    ) -> None:
        self.folder, self.tokens, self.gated, self.verbose = Path(folder), dict(tokens), gated, verbose
        self.store = Store(self.folder)
        self.log: list[Request] = []
        self.outage = Outage(self._cut)
        self._secret = secrets.token_bytes(16)
        self._port = port

    def __enter__(self) -> LocalHub:
        self._api, self._storage = Server(self._port, Api, self), Server(0, Storage, self)
        self._api.start()
        self._storage.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the doors: from here on clients find nobody at this address."""
        self._api.stop()
        self._storage.stop()

    def _cut(self) -> None:
        self._api.cut()
        self._storage.cut()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is to be."""
        return self._api.url

    def environment(self, home: Path | None = None, token: str | None = None) -> dict[str, str]:
        """The variables with which another process uses this Hub and a cache of its own, and nothing else.

        Args:
            home: where that process keeps its cache; a folder beside the repos if not given.
            token: the first of the good ones if not given; "" for none.
        """
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": next(iter(self.tokens)) if token is None else token,
            "HF_HOME": str(home or self.folder / "home"),
            # With hf_xet installed, huggingface_hub 2.x uploads through xet without asking the server.
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def fail_after(self, received: int | None = None, *, sent: int | None = None) -> None:
        """Die after this many more bytes of uploads (or of answers): every connection breaks, and new ones too.

        Uploads are what PUTs and commits carry; they are counted in steps of up to 64 KiB, so an object that reaches
        the limit is lost. Clients still find a door here, that shuts in their face; `stop` takes the door away.
        """
        self.outage.plan(received=received, sent=sent)

    def recover(self) -> None:
        """Be well again."""
        self.outage.plan()

    def signature(self, method: str, sha256: str, size: int) -> str:
        """What proves to the storage that the Hub allowed this."""
        return hmac.new(self._secret, f"{method} {sha256} {size}".encode(), "sha256").hexdigest()

    def link(self, method: str, sha256: str, size: int) -> str:
        """A signed link to an object in the storage."""
        query = {"size": size, "signature": self.signature(method, sha256, size)}
        return f"{self._storage.url}/cdn/{sha256}?{urlencode(query)}"

    def files(self, repo: str, rev: str = "main") -> dict[str, bytes | Path]:
        """The files of a commit: the bytes of small ones, and where those of large ones lie."""
        found = self.store.repos[repo].at(rev).files
        paths = {name: self.store.object(file.sha256) for name, file in found.items()}
        return {name: path if found[name].lfs else path.read_bytes() for name, path in paths.items()}

    def fill(self, repo: str, files: Mapping[str, bytes], private: bool = False, rev: str = "main") -> Commit:
        """Put files into a repo as one commit, without a client; makes the repo where there is none."""
        store = self.store
        found = store.repos.get(repo) or store.create(repo, repo.split("/")[0], private)
        lines = [{"key": "header", "value": {"summary": "Add files"}}]
        for path, content in files.items():
            file = store.put(content)
            if is_large(path, file.size, content[:512]):
                lines.append({"key": "lfsFile", "value": {"path": path, "oid": file.sha256}})
            else:
                lines.append({"key": "file", "value": {"path": path, "content": base64.b64encode(content)}})
        return store.commit(found, rev, lines, found.owner, pull_request=False)[0]

    def commits(self, repo: str, rev: str = "main") -> list[Commit]:
        """The history of a branch or pull request, newest first."""
        return self.store.repos[repo].history(rev)

    def objects(self) -> set[str]:
        """The sha256 of all that was received in whole, whether a commit names it or not."""
        return {path.name for path in self.store.objects.iterdir() if self.store.has(path.name)}


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where repos and objects are kept")
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes any that is free")
    args = parser.parse_args()
    for end in (signal.SIGINT, signal.SIGTERM):  # set by hand: a shell's background jobs come with SIGINT ignored
        signal.signal(end, signal.default_int_handler)
    with (
        contextlib.suppress(KeyboardInterrupt),
        LocalHub(args.folder.absolute(), port=args.port, verbose=True) as hub,
    ):
        told = hub.environment()
        print(f"export HF_ENDPOINT={told['HF_ENDPOINT']} HF_TOKEN={told['HF_TOKEN']}")
        print(f"export HF_HOME={told['HF_HOME']} HF_HUB_DISABLE_XET=1", flush=True)
        threading.Event().wait()

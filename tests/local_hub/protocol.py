"""The connections of a local Hub: keep-alive HTTP/1.1, byte ranges, a log of requests, and dying on demand.

Two servers speak it, as at the real one: the Hub itself (routes.py) and, here, the storage of large files,
which has another address, takes no tokens, and serves whoever holds a signed link.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from local_hub.store import RefusedError

if TYPE_CHECKING:
    from local_hub import LocalHub

CHUNK = 64 * 1024


@dataclass
class Request:
    """One request as the server saw it; bytes are those of bodies, and status 0 means that no answer was sent."""

    method: str
    path: str
    range: str | None
    status: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    token_sent: bool = False


class DownError(ConnectionError):
    """The server has died, as far as clients can tell."""


class Outage:
    """Decides when the server dies: after so many bytes taken in or given out, counted from `plan`."""

    def __init__(self, cut: Callable[[], None]) -> None:
        self._cut, self._lock = cut, threading.Lock()
        self._left: dict[str, int] = {}
        self.down = False

    def plan(self, **left: int | None) -> None:
        """Die once this many bytes went `received` or `sent`; at once for zero."""
        with self._lock:
            self._left = {way: n for way, n in left.items() if n is not None}
            self.down = 0 in self._left.values()

    def count(self, way: str, size: int) -> None:
        """Note bytes that went by. Raises DownError once they are too many, and every time from then on."""
        dies = False
        with self._lock:
            if way in self._left:
                self._left[way] -= size
                dies = not self.down and self._left[way] <= 0
                self.down |= dies
        if dies:
            self._cut()
        self.check()

    def check(self) -> None:
        """Raise DownError if the server has died."""
        if self.down:
            raise DownError


class Server(ThreadingHTTPServer):
    """A server on loopback that knows its open connections, so that it can break them."""

    request_queue_size = 64

    def __init__(self, port: int, handler: type[Connection], hub: LocalHub) -> None:
        super().__init__(("127.0.0.1", port), handler)
        self.hub = hub
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._open: set[socket.socket] = set()

    def start(self) -> None:
        """Serve in the background."""
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening and break what is open."""
        self.shutdown()
        self.server_close()
        self.cut()

    def cut(self) -> None:
        """Break all connections, as those of a killed process break."""
        for connection in list(self._open):
            _break(connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection while it is open."""
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection and close it."""
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are this server's business; anything else is a bug and is shown."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def _break(connection: socket.socket) -> None:
    # What the kernel does with the sockets of a killed process; it also wakes a thread that waits to read.
    with contextlib.suppress(OSError):  # the client may have been faster
        connection.shutdown(socket.SHUT_RDWR)


class Connection(BaseHTTPRequestHandler):
    """One client's connection. `respond` answers a request or raises RefusedError."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body go out as two writes; together they would wait for an ACK
    server: Server

    def respond(self, path: str, query: dict[str, str]) -> None:
        """Answer one request; `path` is still quoted."""
        raise NotImplementedError

    def serve(self) -> None:
        """Log a request and have it answered."""
        self.hub = self.server.hub
        url = urlsplit(self.path)
        token_sent = "Authorization" in self.headers
        self.record = Request(self.command, unquote(url.path), self.headers.get("Range"), token_sent=token_sent)
        self.hub.log.append(self.record)
        self._unread = int(self.headers.get("Content-Length") or 0)
        try:
            self.hub.outage.check()
            if "Transfer-Encoding" in self.headers:
                self.close_connection = True
                raise RefusedError(411, "Length Required")
            self.respond(url.path, dict(parse_qsl(url.query)))
        except RefusedError as refusal:
            self.answer(refusal.status, {"error": refusal.message}, **refusal.headers)
        except DownError:
            _break(self.connection)
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve  # noqa: N815 (the base class's names)

    def body(self, upload: bool = False) -> Iterator[bytes]:
        """The request's body as it comes in; an upload's bytes count towards the server's death."""
        while self._unread:
            chunk = self.rfile.read(min(CHUNK, self._unread))
            if not chunk:
                raise ConnectionResetError("the client went away")
            self._unread -= len(chunk)
            self.record.received_bytes += len(chunk)
            if upload:
                self.hub.outage.count("received", len(chunk))
            yield chunk

    def json(self) -> Any:
        """The request's body as JSON."""
        return json.loads(b"".join(self.body()) or b"{}")

    def answer(self, status: int, value: Any = None, **headers: str) -> None:
        """Answer with JSON, or with text, or with nothing."""
        text = isinstance(value, str)
        content = b"" if value is None else value.encode() if text else json.dumps(value, default=str).encode()
        kind = "text/plain; charset=utf-8" if text else "application/json; charset=utf-8"
        self._head(status, len(content), {"Content-Type": kind} | headers)
        if self.command != "HEAD":
            self._send(content)

    def answer_file(self, path: Path, headers: dict[str, str]) -> None:
        """Answer with a file, or with the range of it that was asked for."""
        size = path.stat().st_size
        start, stop = span(self.record.range, size)
        status = 200
        if self.record.range and (start, stop) != (0, size):
            status, headers = 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        self._head(status, stop - start, headers | {"Accept-Ranges": "bytes"})
        if self.command == "HEAD":
            return
        with path.open("rb") as file:
            file.seek(start)
            for position in range(start, stop, CHUNK):
                self._send(file.read(min(CHUNK, stop - position)))

    def _head(self, status: int, size: int, headers: dict[str, str]) -> None:
        for _ in self.body():  # what a refused client still sends would be taken for its next request
            pass
        self.record.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def _send(self, content: bytes) -> None:
        # Counted before it is sent: once the client has the bytes, a test may look at the log.
        self.record.sent_bytes += len(content)
        self.wfile.write(content)
        self.hub.outage.count("sent", len(content))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
        """One line for a request, where someone watches."""
        if self.server.hub.verbose:
            super().log_message(format, *args)


def span(asked: str | None, size: int) -> tuple[int, int]:
    """First byte of a range, and the one after its last: `bytes=2-5`, `bytes=2-` or `bytes=-3` of so many bytes.

    >>> span("bytes=2-5", 10), span("bytes=-3", 10), span(None, 10)
    ((2, 6), (7, 10), (0, 10))
    """
    found = re.fullmatch(r"\s*bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", asked or "", re.IGNORECASE)
    if not found or not any(found.groups()):
        return 0, size
    first, last = found.groups()
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
        raise RefusedError(416, "Requested Range Not Satisfiable", Content_Range=f"bytes */{size}")
    return start, stop


class Storage(Connection):
    """Where the bytes of large files go and come from, by links that the Hub signs."""

    def respond(self, path: str, query: dict[str, str]) -> None:
        """GET, HEAD or PUT /cdn/<sha256>."""
        if self.record.token_sent:
            raise RefusedError(400, "Only one auth mechanism allowed")  # S3 says so too; a token has no business here
        sha256, size = path.removeprefix("/cdn/"), int(query.get("size", 0))
        method = "GET" if self.command == "HEAD" else self.command
        if not hmac.compare_digest(query.get("signature", ""), self.hub.signature(method, sha256, size)):
            raise RefusedError(403, "SignatureDoesNotMatch")
        store = self.hub.store
        if method == "PUT":
            store.receive(sha256, size, self.body(upload=True))
            self.answer(200, ETag=f'"{sha256}"')
        elif method == "GET" and store.has(sha256):
            kind = {"Content-Type": "application/octet-stream"}
            self.answer_file(store.object(sha256), kind | {"ETag": f'"{sha256}"'})
        else:
            raise RefusedError(404, "NoSuchKey")

"""A model hub on the loopback interface: what huggingface_hub asks of huggingface.co, with faults on demand.

Spoken: ``GET /api/models/ID[/revision/REV]`` (with ``blobs`` for sizes), ``GET /api/models/ID/tree/REV`` and ``HEAD`` and
``GET`` of ``/ID/resolve/REV/PATH`` with ETag, X-Repo-Commit, X-Linked-Etag, X-Linked-Size and Range.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The repositories, the faults to show, and what was asked. ``revisions`` name the one commit that there is."""

    repositories: dict[str, dict[str, bytes]]
    endpoint: str = ""
    revisions: tuple[str, ...] = ("main", COMMIT)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)  # id -> status, X-Error-Code
    cut_at: int | None = None  # bytes of weights sent before the line is cut; after that only 503, until it is None again
    drop_at: int | None = None  # cut once at this byte, then serve on: a client may resume with Range
    missing_bytes: int = 0  # so much shorter are weights than was announced
    stall: bool = False  # send half of the weights, then nothing, however often one asks
    is_down: bool = False
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    released: threading.Event = field(default_factory=threading.Event)  # ends a stall

    def fetched(self) -> set[str]:
        """The files whose contents were asked for."""
        return {
            path.split("/resolve/")[1].partition("/")[2]
            for method, path, _ in self.asked
            if method == "GET" and "/resolve/" in path
        }


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        api = path.startswith("/api/models/")
        words = path.removeprefix("/api/models/").strip("/").split("/")
        model_id, verb, revision, rest = "/".join(words[:2]), *(words[2:4] + ["main"] * 2)[:2], "/".join(words[4:])
        if self.hub.is_down:
            return self._send(503, {})
        if model_id in self.hub.refusals:
            status, code = self.hub.refusals[model_id]
            return self._send(status, {"X-Error-Code": code})
        if model_id not in self.hub.repositories:
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        if revision not in self.hub.revisions:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        files = self.hub.repositories[model_id]
        if not api:
            return self._send_file(files, rest)
        if verb == "tree":
            listing: object = [
                {"type": "file", "path": name, "size": len(data), "oid": _digest(data)[:40]} for name, data in files.items()
            ]
        else:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            listing = {"id": model_id, "modelId": model_id, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
        return self._send(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())

    def _send_file(self, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        data = files[name]
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Etag": f'"{_digest(data)}"', "X-Linked-Size": str(len(data))}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        is_weights = name.endswith(".safetensors") and self.command == "GET"
        return self._send(206 if start else 200, headers, data[start:], self._fault(start, len(data)) if is_weights else None)

    def _fault(self, start: int, size: int) -> int | None:
        """How many bytes to send before something goes wrong; None if nothing does."""
        hub = self.hub
        if hub.drop_at is not None:
            at, hub.drop_at = hub.drop_at, None
            return max(0, min(at, size - 1) - start)
        if hub.cut_at is not None and hub.cut_at < size:
            hub.is_down = True
            return max(0, hub.cut_at - start)
        if hub.stall:
            return 0 if start else size // 2
        return None

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"", fault_at: int | None = None) -> None:
        if fault_at is None and self.hub.missing_bytes and self.path.endswith(".safetensors"):
            body = body[: -self.hub.missing_bytes] if self.command == "GET" else body
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if fault_at is None else body[:fault_at])
        if fault_at is not None and self.hub.stall:
            self.wfile.flush()
            self.hub.released.wait()


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # with the usual 5, connections of eight parallel downloads wait a second for their turn


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def serve(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    """Run a hub with these repositories (id -> path -> bytes) for the length of a ``with`` block."""
    hub = Hub(repositories)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()

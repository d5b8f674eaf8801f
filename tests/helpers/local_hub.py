"""A hub on this machine: folders served as huggingface.co serves repositories, for huggingface_hub's own client."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote


@dataclass
class LocalHub:
    """What is served, and what was asked for.

    Attributes:
        repositories: folders by `owner/name` and revision.
        endpoint: of the server.
        private: repositories that want the token "secret".
        requests: "HEAD /owner/name/resolve/main/file" and so on, in order.
    """

    repositories: dict[tuple[str, str], Path] = field(default_factory=dict)
    endpoint: str = ""
    private: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)


@contextmanager
def serve() -> Iterator[LocalHub]:
    """A hub on a free port of 127.0.0.1."""
    hub = LocalHub()

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: LocalHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.served.requests.append(f"{self.command} {path}")
        if path.startswith("/api/models/"):
            repository, _, revision = path.removeprefix("/api/models/").partition("/tree/")
            file = None
        else:
            repository, _, rest = path.removeprefix("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
        if repository in self.served.private and self.headers.get("Authorization") != "Bearer secret":
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        folder = self.served.repositories.get((repository, revision or "main"))
        if folder is None:
            known = any(name == repository for name, _ in self.served.repositories)
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
        commit = hashlib.sha1(f"{repository}@{revision or 'main'}".encode()).hexdigest()
        if file is None:
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            tree = [
                {"type": "file", "path": p.relative_to(folder).as_posix(), "size": p.stat().st_size, "oid": "0" * 40}
                for p in files
            ]
            return self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        wanted = folder / file
        if not wanted.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = wanted.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        return self._send(200, content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

"""A model hub on this machine, as much of it as reading a repository's files takes.

Knows nothing of models; answers ranges, as the real one does.
Called by test_planning.py.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40


@dataclass(slots=True)
class Hub:
    """A running hub; `sent` counts the bytes it gave of each file."""

    url: str
    sent: Counter[str] = field(default_factory=Counter)


@contextmanager
def hub_of(repository: str, directory: Path) -> Iterator[Hub]:
    """Serve `directory` as the repository of that name."""
    hub = Hub("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            asked = re.fullmatch(rf"/{repository}/resolve/[^/]+/([\w.-]+)", self.path.partition("?")[0])
            path = directory / asked[1] if asked else None
            if path is None or not path.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body=with_body)
                return
            content, status = path.read_bytes(), 200
            headers = {"ETag": '"1"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted:
                size, status = len(content), 206
                content = content[int(wanted[1]) : int(wanted[2]) + 1]
                headers["Content-Range"] = f"bytes {wanted[1]}-{int(wanted[1]) + len(content) - 1}/{size}"
            self._send(status, content, headers, with_body=with_body)
            if with_body:
                hub.sent[path.name] += len(content)

        def _send(self, status: int, content: bytes, headers: dict[str, str], *, with_body: bool) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()

"""``/healthz``, ``/readyz`` and ``/metrics`` over HTTP, for the kubelet and Prometheus. Nothing can be changed here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

Check = Callable[[], str | None]
"""Returns what is wrong, or None."""


class Web:
    """The server, on a thread of its own; a context manager.

    Args:
        port: 0 takes a free one.
        healthy: whether the program works at all; else the kubelet starts it anew.
        ready: whether it can do its work now.
        metrics: the text for Prometheus.
    """

    def __init__(self, port: int, *, healthy: Check, ready: Check, metrics: Callable[[], bytes]) -> None:
        def answer(path: str) -> tuple[int, bytes]:
            if path == "/metrics":
                return 200, metrics()
            check = {"/healthz": healthy, "/readyz": ready}.get(path)
            if check is None:
                return 404, b"only /healthz, /readyz and /metrics are here\n"
            wrong = check()
            return (200, b"ok\n") if wrong is None else (503, f"{wrong}\n".encode())

        self._server = ThreadingHTTPServer(("", port), _handler(answer))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="web", daemon=True)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(answer: Callable[[str], tuple[int, bytes]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            status, body = answer(self.path.partition("?")[0])
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
            """Say nothing: the kubelet asks every few seconds."""

    return Handler

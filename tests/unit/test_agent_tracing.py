"""Spans as a collector gets them."""

from __future__ import annotations

import http.server
import json
import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from chrek.agent.tracing import Tracer
from chrek.errors import CaptureFailed, Reason, UsageError


@pytest.fixture
def collector() -> Iterator[tuple[str, queue.Queue[dict[str, Any]]]]:
    """Something that takes spans over HTTP."""
    got: queue.Queue[dict[str, Any]] = queue.Queue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            got.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", got
        server.shutdown()
        thread.join()


def test_failed_operation_with_its_phases(collector: tuple[str, queue.Queue[dict[str, Any]]]) -> None:
    """One span for the operation, with its reason, and one below it for each phase."""
    endpoint, got = collector
    tracer = Tracer(endpoint, node="node1")

    def operation() -> None:
        with tracer.span("capture", {"pod": "a/b", "id": "x"}) as span:
            span.phase("preflight")
            span.phase("dump")
            raise CaptureFailed(Reason.DUMP_FAILED, "It did not work.")

    with pytest.raises(CaptureFailed):
        operation()
    (resource,) = got.get(timeout=60)["resourceSpans"]
    assert {"key": "k8s.node.name", "value": {"stringValue": "node1"}} in resource["resource"]["attributes"]
    root, first, second = resource["scopeSpans"][0]["spans"]
    assert (root["name"], root["status"]) == ("capture", {"code": 2, "message": "DUMP_FAILED"})
    assert {"key": "chrek.pod", "value": {"stringValue": "a/b"}} in root["attributes"]
    assert [first["name"], second["name"]] == ["capture: preflight", "capture: dump"]
    assert first["parentSpanId"] == root["spanId"]
    assert first["endTimeUnixNano"] == second["startTimeUnixNano"]


def test_without_an_endpoint_nothing_is_sent() -> None:
    """Tracing is off by default, and a word that is no address is refused."""
    with Tracer("", node="n").span("capture", {}) as span:
        span.phase("dump")
    with pytest.raises(UsageError, match="tracing_endpoint"):
        Tracer("collector:4318", node="n")

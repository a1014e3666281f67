"""Spans of captures and restores, sent to an OpenTelemetry collector when the chart names one.

The OTLP/HTTP protocol in its JSON form is one POST of a plain object (opentelemetry.io/docs/specs/otlp), so no
library is needed. A span for the operation, one below it for each phase. What cannot be delivered is dropped:
work never waits for a collector.
"""

from __future__ import annotations

import json
import queue
import secrets
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import chrek
from chrek.agent import log
from chrek.errors import ChrekError, Reason, UsageError

_LONGEST_QUEUE: Final = 256
_INTERNAL, _OK, _ERROR = 1, 1, 2


@dataclass
class Span:
    """An operation under way."""

    name: str
    attributes: dict[str, str]
    began: int = field(default_factory=time.time_ns)
    phases: list[tuple[str, int]] = field(default_factory=list)

    def phase(self, name: str) -> None:
        """Note that the next phase begins."""
        self.phases.append((name, time.time_ns()))


class Tracer:
    """Sends spans; one without an endpoint sends nothing."""

    def __init__(self, endpoint: str, *, node: str) -> None:
        if endpoint and not endpoint.startswith(("http://", "https://")):
            message = f"tracing_endpoint is {endpoint!r}."
            raise UsageError(
                Reason.BAD_VALUE, message, cure="Allowed: http://host:port or https://host:port, or nothing."
            )
        self._url = f"{endpoint.rstrip('/')}/v1/traces" if endpoint else ""
        self._resource = {"service.name": "chrek-agent", "service.version": chrek.__version__, "k8s.node.name": node}
        self._queue: queue.Queue[bytes] = queue.Queue(_LONGEST_QUEUE)
        if endpoint:
            threading.Thread(target=self._send, name="tracing", daemon=True).start()

    @contextmanager
    def span(self, name: str, attributes: Mapping[str, object]) -> Iterator[Span]:
        """Trace the block; an error that leaves it marks the span as failed, by its reason code."""
        span = Span(name, {f"chrek.{key}": str(value) for key, value in attributes.items()})
        failure = ""
        try:
            yield span
        except ChrekError as error:
            failure = error.reason.code
            raise
        except BaseException as error:
            failure = type(error).__name__
            raise
        finally:
            if self._url:
                self._put(span, failure)

    def _put(self, span: Span, failure: str) -> None:
        try:
            self._queue.put_nowait(json.dumps(encode(span, failure, self._resource)).encode())
        except queue.Full:
            log.debug("a span is dropped: the collector is too slow")

    def _send(self) -> None:
        while True:
            request = urllib.request.Request(  # noqa: S310 - http or https, by the administrator's choice
                self._url, data=self._queue.get(), headers={"Content-Type": "application/json"}
            )
            try:
                urllib.request.urlopen(request, timeout=10).close()  # noqa: S310
            except OSError as error:
                log.debug(f"a span is dropped: {self._url}: {error}")


def encode(span: Span, failure: str, resource: Mapping[str, str]) -> dict[str, object]:
    """Return an ended span and those of its phases as the protocol has them."""
    trace, root, ended = secrets.token_hex(16), secrets.token_hex(8), time.time_ns()
    status: dict[str, object] = {"code": _ERROR, "message": failure} if failure else {"code": _OK}

    def one(name: str, identity: str, began: int, until: int, **more: object) -> dict[str, object]:
        times = {"startTimeUnixNano": str(began), "endTimeUnixNano": str(until)}
        return {"traceId": trace, "spanId": identity, "name": name, "kind": _INTERNAL, **times, **more}

    ends = [began for _, began in span.phases[1:]] + [ended]
    spans = [one(span.name, root, span.began, ended, attributes=_attributes(span.attributes), status=status)]
    for (name, began), until in zip(span.phases, ends, strict=False):
        spans.append(one(f"{span.name}: {name}", secrets.token_hex(8), began, until, parentSpanId=root))
    scope = {"scope": {"name": "chrek"}, "spans": spans}
    return {"resourceSpans": [{"resource": {"attributes": _attributes(resource)}, "scopeSpans": [scope]}]}


def _attributes(values: Mapping[str, str]) -> list[dict[str, object]]:
    return [{"key": key, "value": {"stringValue": value}} for key, value in values.items()]

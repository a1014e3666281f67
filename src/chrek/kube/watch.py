"""Follows the pods of one node, over the official client's `SharedInformer`.

The API server selects by node (and namespace), so that an agent costs the same in a cluster of ten nodes and
of ten thousand. Deletions that happened while the connection was down are delivered too: the informer keeps
what it has seen and compares after a relist.

Rejected: kopf cannot select by a field and watches whole clusters; kr8s and lightkube go on with a resource
version that the server has forgotten.

What the informer lacks is added where it calls the API:

- it asks again at once, thousands of times a second, while the API server is away: attempts are spaced;
- it does not say when its first list is complete: the first watch request says so;
- a watch without an end on a connection that died silently would wait for ever: the server ends each
  after `WATCH_SECONDS`, and a little later so do we;
- a stop that comes between a request and its answer is forgotten: the answer's connection is cut here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import random
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

from chrek.kube.api import TIMEOUT, Api, ApiFailed, failure
from chrek.kube.pods import Pod, from_model

_informer: Any = importlib.import_module("kubernetes.informer")

WATCH_SECONDS: Final = 300
_LONGEST_PAUSE: Final = 10.0
_FIRST_PAUSE: Final = 0.25


class PodWatch:
    """Hands every state of the node's pods to callbacks, on a thread of its own.

    Args:
        api: the connection.
        node: the node's name.
        namespace: only this namespace; None for all, which needs a ClusterRole.
        on_pod: called with each pod at the start and after each change. It must return soon and not raise:
            put the pod into a queue.
        on_gone: called with the last known state of a pod that was deleted.
        on_trouble: called with a sentence when the API server cannot be asked; once for each attempt.

    Attributes:
        failed: why the last request did not work, None when it did.
    """

    def __init__(
        self,
        api: Api,
        *,
        node: str,
        namespace: str | None,
        on_pod: Callable[[Pod], None],
        on_gone: Callable[[Pod], None],
        on_trouble: Callable[[str], None],
    ) -> None:
        self._list = api.core.list_pod_for_all_namespaces if namespace is None else api.core.list_namespaced_pod
        self._on_trouble = on_trouble
        self._stopping = threading.Event()
        self._synced = threading.Event()
        self._failures = 0
        self.failed: ApiFailed | None = None
        self._answer: Any = None
        self._informer = _informer.SharedInformer(
            self._spaced_list(), namespace=namespace, field_selector=f"spec.nodeName={node}"
        )
        for kind in (_informer.ADDED, _informer.MODIFIED):
            self._informer.add_event_handler(kind, self._reporting(on_pod))
        self._informer.add_event_handler(_informer.DELETED, self._reporting(on_gone))
        # Each of its attempts is told to `on_trouble`; its own tracebacks say nothing more.
        logging.getLogger("kubernetes.informer.informer").setLevel(logging.CRITICAL)

    def start(self) -> None:
        """Start to follow."""
        self._informer.start()

    def stop(self) -> None:
        """Stop; no callback runs any more when this returns."""
        self._stopping.set()
        self._cut()
        self._informer.stop()

    def wait_until_synced(self, seconds: float) -> bool:
        """Wait until every pod that exists was handed over once; whether that happened in time."""
        return self._synced.wait(seconds)

    def pods(self) -> list[Pod]:
        """Return all pods of the node as last seen."""
        return [from_model(model) for model in self._informer.cache.list()]

    def _spaced_list(self) -> Callable[..., Any]:
        # wraps: the client's watch learns the type of what it reads from the function's documentation.
        @functools.wraps(self._list)
        def ask(*arguments: object, **options: Any) -> Any:  # noqa: ANN401 - the client's list
            if options.get("watch"):
                self._synced.set()
                options |= {"timeout_seconds": WATCH_SECONDS, "allow_watch_bookmarks": True}
                options["_request_timeout"] = (TIMEOUT[0], WATCH_SECONDS + TIMEOUT[1])
            else:
                options["_request_timeout"] = TIMEOUT
            try:
                answer = self._list(*arguments, **options)
            except Exception as error:
                self._pause(error)
                raise
            self._failures = 0
            self.failed = None
            if options.get("watch"):
                self._answer = answer
                if self._stopping.is_set():
                    self._cut()
            return answer

        return ask

    def _reporting(self, callback: Callable[[Pod], None]) -> Callable[[Any], None]:
        def handle(model: Any) -> None:  # noqa: ANN401 - the client's V1Pod
            try:
                callback(from_model(model))
            except Exception as error:  # noqa: BLE001 - the informer would only log it
                self._on_trouble(f"Pod {model.metadata.namespace}/{model.metadata.name}: {error!r}")

        return handle

    def _cut(self) -> None:
        """End the watch that is being read: only a shutdown wakes a thread that waits inside TLS."""
        connection = getattr(self._answer, "connection", None)
        if connection is not None and connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _pause(self, error: Exception) -> None:
        longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**self._failures)
        # Spread, so that the agents of all nodes do not come back in step.
        pause = longest * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        self._failures = min(self._failures + 1, 16)
        with contextlib.suppress(Exception):
            self.failed = failure("follow pods", error)
            self._on_trouble(f"{self.failed}; next attempt in {pause:.1f} s")
        self._stopping.wait(pause)

"""What every part of the agent works with: settings, the API, the runtime of this node, numbers."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chrek.agent import log
from chrek.agent.tracing import Tracer
from chrek.errors import Reason, Refused
from chrek.kube import ApiFailed, annotate, names
from chrek.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chrek.agent.config import Config
    from chrek.agent.metrics import Metrics
    from chrek.errors import ChrekError
    from chrek.kube import Api, EventReason, Events, Pod

NEVER_ALLOWED: Final = frozenset(
    {
        Reason.USER_NAMESPACE,
        Reason.FOREIGN_NAMESPACE,
        Reason.FOREIGN_MOUNT,
        Reason.PRIVILEGE_EXCEEDED,
        Reason.TENANT_MISMATCH,
        Reason.STORE_MISMATCH,
        Reason.CORRUPT,
        Reason.POD_NOT_SUPPORTED,
    }
)
"""What keeps tenants apart is not the tenants' to override."""

NEVER_ALLOWED_RESTORING: Final = NEVER_ALLOWED - {Reason.PRIVILEGE_EXCEEDED}
"""The same for a restore, where to allow more privilege than the pod has means to take it from the application."""


class Node:
    """The agent's node, as the agent sees it."""

    def __init__(self, config: Config, api: Api, events: Events, metrics: Metrics) -> None:
        self.config = config
        self.api = api
        self.events = events
        self.metrics = metrics
        self.tracer = Tracer(config.tracing_endpoint, node=config.node)
        self._lock = threading.Lock()
        self._runtime: Runtime | None = None

    @property
    def runtime(self) -> Runtime:
        """The node's container runtime; looked for until one was found.

        Raises:
            ChrekError: RUNTIME_UNREACHABLE.
        """
        with self._lock:
            if self._runtime is None:
                self._runtime = Runtime.find(self.config.runtime_socket or None, root=Path(self.config.host_root))
            return self._runtime

    def close(self) -> None:
        """Hang up."""
        with self._lock:
            if self._runtime is not None:
                self._runtime.close()
            self._runtime = None

    def trouble(self, error: ChrekError, **context: object) -> None:
        """Say what went wrong here, and count it where it was the API."""
        log.warning(str(error), reason=error.reason.code, **context)
        if isinstance(error, ApiFailed):
            self.metrics.api_failed(error.status)

    def tell(self, pod: Pod, reason: EventReason, words: str | ChrekError, container_id: str = "") -> None:
        """Post an event about a container of a pod. One that is forbidden is said here: the work goes on without it.

        Raises:
            ApiFailed: the API server did not answer, or has other trouble: say it again later.
        """
        try:
            if isinstance(words, str):
                self.events.post(pod, reason, words, container_id=container_id)
            else:
                self.events.post_error(pod, reason, words, container_id=container_id)
        except ApiFailed as error:
            if not error.denied:
                raise
            self.trouble(error, pod=str(pod))

    def annotate(self, pod: Pod, annotations: Mapping[str, str | None]) -> None:
        """Set annotations of a pod, unless it is gone. Where that is forbidden it is said here, once for each start.

        Raises:
            ApiFailed: as `tell`.
        """
        try:
            annotate(self.api, pod, annotations)
        except ApiFailed as error:
            if error.denied:
                self.trouble(error, pod=str(pod))
            elif error.status not in (404, 422):
                raise


def allowed(pod: Pod, *, never: frozenset[Reason] = NEVER_ALLOWED) -> frozenset[Reason]:
    """Return the refusals that a pod's annotation overrides, which are none of *never*.

    Raises:
        UsageError: BAD_VALUE, a word is no reason code.
        Refused: with the reason that no pod may override.
    """
    found = Reason.parse_list(pod.annotations.get(names.ALLOW_ANNOTATION, ""))
    for reason in sorted(found & never, key=lambda each: each.code):
        message = f"Annotation {names.ALLOW_ANNOTATION} of pod {pod} lists {reason.code}, which no pod can override."
        raise Refused(reason, message, cure="Remove it from the annotation.")
    return found


def require_supported(pod: Pod) -> None:
    """Refuse a pod with a feature that nothing here works with.

    Raises:
        Refused: POD_NOT_SUPPORTED.
    """
    if pod.unsupported:
        raise Refused(Reason.POD_NOT_SUPPORTED, f"Pod {pod} has {', '.join(pod.unsupported)}.")

"""Kubernetes events on pods: what `kubectl describe pod` shows of ChReK's work."""

from __future__ import annotations

import datetime as dt
import hashlib
from enum import StrEnum
from typing import Final

from chrek.errors import ChrekError
from chrek.kube.api import CONFLICT, TIMEOUT, Api, ApiFailed, calling
from chrek.kube.pods import Pod

_LONGEST: Final = 1024
"""Bytes of a message that the API server takes (its validation calls them characters)."""


class EventReason(StrEnum):
    """The closed list of what events say; normal ones and warnings."""

    CHECKPOINT_STARTED = "CheckpointStarted"
    CHECKPOINT_CREATED = "CheckpointCreated"
    CHECKPOINT_SKIPPED = "CheckpointSkipped"
    CHECKPOINT_REFUSED = "CheckpointRefused"
    CHECKPOINT_FAILED = "CheckpointFailed"
    RESTORED = "Restored"
    RESTORE_REFUSED = "RestoreRefused"
    RESTORE_FAILED = "RestoreFailed"
    STARTED_COLD = "StartedCold"
    RESTORE_GIVEN_UP = "RestoreGivenUp"

    @property
    def warning(self) -> bool:
        """Whether somebody should look."""
        return self in _WARNINGS


_WARNINGS: Final = frozenset(
    {
        EventReason.CHECKPOINT_REFUSED,
        EventReason.CHECKPOINT_FAILED,
        EventReason.RESTORE_REFUSED,
        EventReason.RESTORE_FAILED,
        EventReason.RESTORE_GIVEN_UP,
    }
)


class Events:
    """Posts events in the name of a component of a node.

    An event's name is made from what it says about which container, so that an agent that starts again and
    comes to the same result does not say it twice.
    """

    def __init__(self, api: Api, *, component: str, node: str) -> None:
        self._api = api
        self._component = component
        self._node = node

    def post(self, pod: Pod, reason: EventReason, message: str, *, container_id: str = "") -> None:
        """Say something about a pod; saying it again about the same container is no error and has no effect.

        Raises:
            ApiFailed: the API server refused or did not answer.
        """
        text = _cut(message, _LONGEST)
        now = dt.datetime.now(dt.UTC)
        body = {
            "metadata": {"name": self._name(pod, reason, text, container_id), "namespace": pod.namespace},
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Pod",
                "namespace": pod.namespace,
                "name": pod.name,
                "uid": pod.uid,
            },
            "type": "Warning" if reason.warning else "Normal",
            "reason": str(reason),
            "message": text,
            "source": {"component": self._component, "host": self._node},
            "reportingComponent": self._component,
            "reportingInstance": self._node,
            "action": str(reason),
            "firstTimestamp": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "lastTimestamp": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "count": 1,
        }
        try:
            with calling(f"post event {reason} on pod {pod}"):
                self._api.core.create_namespaced_event(pod.namespace, body, _request_timeout=TIMEOUT)
        except ApiFailed as error:
            if error.status != CONFLICT:
                raise

    def post_error(self, pod: Pod, reason: EventReason, error: ChrekError, *, container_id: str = "") -> None:
        """Say what went wrong, with its code first and the cure last.

        Raises:
            ApiFailed: as `post`.
        """
        frame = f"{error.reason.code}:  {error.cure}"
        what = _cut(error.message, _LONGEST - len(frame.encode()))
        self.post(pod, reason, f"{error.reason.code}: {what} {error.cure}", container_id=container_id)

    def _name(self, pod: Pod, reason: EventReason, message: str, container_id: str) -> str:
        said = f"{pod.uid}\x00{container_id}\x00{reason}\x00{message}"
        # A pod's name has up to 253 characters, and so has an event's.
        return f"{pod.name[:200].rstrip('.-')}.{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def _cut(text: str, room: int) -> str:
    """Return *text* in at most *room* bytes, with dots where something is missing."""
    data = text.encode()
    return text if len(data) <= room else data[: max(0, room - 3)].decode(errors="ignore") + "..."

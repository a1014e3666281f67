"""One writer for each checkpoint id in the whole cluster, by a Lease.

A lease is held by a name; whoever holds it renews it three times in its duration. Somebody else takes it
over only after having *watched it not being renewed* for that long: the clocks of two nodes are never
compared (the same rule as client-go's leader election). An agent that starts again on its node finds its own
name in the lease and goes on at once.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import importlib
import re
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

from chrek.errors import CaptureFailed, Reason, Refused
from chrek.kube.api import CONFLICT, NOT_FOUND, TIMEOUT, Api, ApiFailed, calling

_watch: Any = importlib.import_module("kubernetes.watch")

DURATION: Final = 15
"""Seconds without a renewal after which another node may take over."""
ID_ANNOTATION: Final = "nvidia.com/checkpoint-hash"
_PREFIX: Final = "chrek-checkpoint-"


def lease_name(checkpoint_id: str) -> str:
    """Return the Lease's name for an id; ids may have capitals and underscores, names of objects may not."""
    if re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", checkpoint_id):
        return f"{_PREFIX}{checkpoint_id}"
    digest = hashlib.sha256(checkpoint_id.encode()).hexdigest()[:16]
    # A dot cannot be in the other form, so the two never meet.
    return f"{_PREFIX}{digest}.x"


class CheckpointLease:
    """The right to write one checkpoint; a context manager.

    Args:
        api: the connection.
        namespace: where the leases of this store are.
        checkpoint_id: the id.
        holder: who we are, the same after a restart: the node's name.
        duration: seconds; all holders of a store use the same.
        on_trouble: called with what goes wrong in the background: a renewal, the giving back.
    """

    def __init__(
        self,
        api: Api,
        *,
        namespace: str,
        checkpoint_id: str,
        holder: str,
        duration: int = DURATION,
        on_trouble: Callable[[ApiFailed], None] = lambda _: None,
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._id = checkpoint_id
        self._name = lease_name(checkpoint_id)
        self._holder = holder
        self._duration = duration
        self._on_trouble = on_trouble
        self._why = f"Another node took over writing checkpoint {checkpoint_id}."
        self._version = ""
        self._lost = threading.Event()
        self._stop = threading.Event()
        self._renewer: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Take the lease, waiting up to its duration to see whether another holder is alive.

        Raises:
            Refused: CAPTURE_IN_PROGRESS, another holder is.
            ApiFailed: the API server refused or did not answer.
        """
        while not self._try_to_take():
            pass
        self._lost.clear()
        self._stop.clear()
        self._renewer = threading.Thread(target=self._renew_until_stopped, name=f"lease {self._id}", daemon=True)
        self._renewer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lease back; where that fails it simply runs out.

        Not when it turned out that another agent of this node writes: the lease is its, too.
        """
        self._stop.set()
        if self._renewer is not None:
            self._renewer.join()
        shared = isinstance(error, Refused) and error.reason is Reason.CAPTURE_IN_PROGRESS
        if not self._lost.is_set() and not shared:
            try:
                self._delete_ours()
            except ApiFailed as failure:
                self._on_trouble(failure)

    def check(self) -> None:
        """Look whether the lease is still ours: before anything is published.

        Raises:
            CaptureFailed: LEASE_LOST.
        """
        if self._lost.is_set():
            raise CaptureFailed(Reason.LEASE_LOST, self._why)

    def _try_to_take(self) -> bool:
        """Take the lease if nobody holds it, else wait for news; False to look again."""
        found = self._read()
        if found is None:
            return self._accepted(self._create)
        if found.spec.holder_identity not in (None, "", self._holder):
            self._wait_until_abandoned(found)
        return self._accepted(lambda: self._replace(found))

    def _wait_until_abandoned(self, found: Any) -> None:  # noqa: ANN401 - the client's V1Lease
        """Return when the lease was not renewed for as long as its holder promised.

        Raises:
            Refused: CAPTURE_IN_PROGRESS, it was renewed.
        """
        deadline = time.monotonic() + (found.spec.lease_duration_seconds or self._duration)
        version = found.metadata.resource_version
        while (left := deadline - time.monotonic()) > 0:
            events = _watch.Watch().stream(
                self._api.coordination.list_namespaced_lease,
                self._namespace,
                field_selector=f"metadata.name={self._name}",
                resource_version=version,
                timeout_seconds=max(1, round(left)),
                _request_timeout=(TIMEOUT[0], left + TIMEOUT[1]),
            )
            with calling(f"watch lease {self._name}"), contextlib.closing(events):
                for event in events:
                    if event["type"] == "DELETED":
                        return
                    holder = event["object"].spec.holder_identity
                    raise Refused(
                        Reason.CAPTURE_IN_PROGRESS, f"Checkpoint {self._id} is being written by {holder} just now."
                    )

    def _renew_until_stopped(self) -> None:
        renewed = time.monotonic()
        while not self._stop.wait(self._duration / 3):
            try:
                found = self._read()
                if found is None and time.monotonic() - renewed < self._duration:
                    # Somebody deleted it. Nobody else can have had it and be done: it had not run out.
                    self._create()
                elif found is None or found.spec.holder_identity != self._holder:
                    self._lost.set()
                    return
                else:
                    self._replace(found)
                renewed = time.monotonic()
            except ApiFailed as failure:
                if failure.status == CONFLICT:
                    continue  # the next round reads who won
                self._on_trouble(failure)
                if time.monotonic() - renewed > self._duration:
                    self._why = f"The lease of checkpoint {self._id} could not be renewed: {failure.message}"
                    self._lost.set()
                    return

    def _read(self) -> Any:  # noqa: ANN401 - the client's V1Lease
        try:
            with calling(f"read lease {self._name}"):
                return self._api.coordination.read_namespaced_lease(
                    self._name, self._namespace, _request_timeout=TIMEOUT
                )
        except ApiFailed as error:
            if error.status == NOT_FOUND:
                return None
            raise

    def _create(self) -> None:
        body = {
            "metadata": {"name": self._name, "annotations": {ID_ANNOTATION: self._id}},
            "spec": self._spec(),
        }
        with calling(f"create lease {self._name}"):
            self._wrote(self._api.coordination.create_namespaced_lease(self._namespace, body, _request_timeout=TIMEOUT))

    def _replace(self, found: Any) -> None:  # noqa: ANN401 - the client's V1Lease
        body = {
            "metadata": {
                "name": self._name,
                "resourceVersion": found.metadata.resource_version,
                "annotations": {ID_ANNOTATION: self._id},
            },
            "spec": self._spec(),
        }
        with calling(f"renew lease {self._name}"):
            self._wrote(
                self._api.coordination.replace_namespaced_lease(
                    self._name, self._namespace, body, _request_timeout=TIMEOUT
                )
            )

    def _wrote(self, lease: Any) -> None:  # noqa: ANN401 - the client's V1Lease
        self._version = lease.metadata.resource_version

    def _delete_ours(self) -> None:
        """Delete what this object wrote last; another agent of this node may have gone on with it since."""
        found = self._read()
        if found is None or found.metadata.resource_version != self._version:
            return
        only_this = {"preconditions": {"uid": found.metadata.uid, "resourceVersion": found.metadata.resource_version}}
        with calling(f"delete lease {self._name}"):
            self._api.coordination.delete_namespaced_lease(
                self._name, self._namespace, body=only_this, _request_timeout=TIMEOUT
            )

    def _spec(self) -> dict[str, object]:
        return {
            "holderIdentity": self._holder,
            "leaseDurationSeconds": self._duration,
            "renewTime": dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        }

    @staticmethod
    def _accepted(write: Callable[[], None]) -> bool:
        """Whether a write went through; not when somebody was faster."""
        try:
            write()
        except ApiFailed as error:
            if error.status in (CONFLICT, NOT_FOUND):
                return False
            raise
        return True

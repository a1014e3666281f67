"""A pod as ChReK sees it, and the one thing it writes on pods: annotations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from chrek.errors import ExitCode
from chrek.kube.api import TIMEOUT, Api, calling

_PAGE: Final = 500
SHORT_LIFE: Final = 60.0
"""Seconds under which a container that ended counts as one that did not work."""


@dataclass(frozen=True)
class PodContainer:
    """A container of a pod, from its spec and its status.

    Attributes:
        variables: names in its `env` with their literal value, or None where it comes from elsewhere.
        id: the running container's id with its scheme, empty before it was first created.
        sidecar: a native sidecar, that is an init container that is restarted always.
        liveness_seconds: how long its liveness probe bears no answer, None without one.
        short_lived: its last run before this one lasted less than a minute.
        said_unusable: that run ended with 171, with which a restored application says that what was restored is damaged.
        exit_code, last_words: how it ended and its termination message, None and empty while it runs.
    """

    name: str
    image: str
    variables: Mapping[str, str | None]
    readiness_probe: bool
    sidecar: bool
    id: str
    running: bool
    restarts: int
    liveness_seconds: float | None = None
    short_lived: bool = False
    said_unusable: bool = False
    exit_code: int | None = None
    last_words: str = ""


@dataclass(frozen=True)
class Pod:
    """A pod at one resource version.

    Attributes:
        unsupported: features of it that neither capture nor restore can work with, as its spec has them.
    """

    namespace: str
    name: str
    uid: str
    version: str
    node: str
    service_account: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    phase: str
    ready: bool
    deleting: bool
    containers: tuple[PodContainer, ...]
    unsupported: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    def container(self, name: str) -> PodContainer | None:
        """Return the container of that name."""
        return next((each for each in self.containers if each.name == name), None)


def from_model(model: Any) -> Pod:  # noqa: ANN401 - the client's V1Pod
    """Read the client's model."""
    metadata, spec, status = model.metadata, model.spec, model.status
    statuses = {
        each.name: each for each in [*(status.container_statuses or []), *(status.init_container_statuses or [])]
    }
    sidecars = [each for each in spec.init_containers or [] if each.restart_policy == "Always"]
    return Pod(
        namespace=metadata.namespace,
        name=metadata.name,
        uid=metadata.uid,
        version=metadata.resource_version,
        node=spec.node_name or "",
        service_account=spec.service_account_name or "default",
        labels=dict(metadata.labels or {}),
        annotations=dict(metadata.annotations or {}),
        phase=status.phase or "Unknown",
        ready=any(each.type == "Ready" and each.status == "True" for each in status.conditions or []),
        deleting=metadata.deletion_timestamp is not None,
        containers=(
            *(_container(each, statuses.get(each.name), sidecar=False) for each in spec.containers),
            *(_container(each, statuses.get(each.name), sidecar=True) for each in sidecars),
        ),
        unsupported=tuple(_unsupported(spec)),
    )


def _unsupported(spec: Any) -> list[str]:  # noqa: ANN401 - the client's V1PodSpec
    # With a shared or the node's process namespace our init is not the one that adopts the restored tree; with the
    # node's IPC namespace /dev/shm and the message queues are those of everybody on the node.
    found = {
        "shareProcessNamespace: true": spec.share_process_namespace is True,
        "hostPID: true": spec.host_pid is True,
        "hostIPC: true": spec.host_ipc is True,
        "hostUsers: false": spec.host_users is False,
        f"runtimeClassName: {spec.runtime_class_name}": bool(
            re.match(r"(gvisor|kata|runsc)", spec.runtime_class_name or "")
        ),
    }
    return [feature for feature, there in found.items() if there]


def _container(spec: Any, status: Any, *, sidecar: bool) -> PodContainer:  # noqa: ANN401 - the client's models
    running = status is not None and status.state is not None and status.state.running is not None
    ended = status.state.terminated if status is not None and status.state is not None else None
    return PodContainer(
        name=spec.name,
        image=spec.image or "",
        variables={each.name: None if each.value_from else (each.value or "") for each in spec.env or []},
        readiness_probe=spec.readiness_probe is not None,
        sidecar=sidecar,
        id=(status.container_id if status else None) or "",
        running=running,
        restarts=status.restart_count if status else 0,
        liveness_seconds=_patience(spec.liveness_probe),
        short_lived=_was_short(status),
        said_unusable=getattr(_last_run(status), "exit_code", None) == ExitCode.RESTORE_FAILED,
        exit_code=ended.exit_code if ended else None,
        last_words=(ended.message if ended else None) or "",
    )


def _patience(probe: Any) -> float | None:  # noqa: ANN401 - the client's V1Probe
    """Return the seconds from the first unanswered probe to the kill; the defaults are the API's."""
    if probe is None:
        return None
    period, failures, timeout = probe.period_seconds or 10, probe.failure_threshold or 3, probe.timeout_seconds or 1
    return float(period * (failures - 1) + timeout)


def _last_run(status: Any) -> Any:  # noqa: ANN401 - the client's V1ContainerStatus and V1ContainerStateTerminated
    return status.last_state.terminated if status is not None and status.last_state is not None else None


def _was_short(status: Any) -> bool:  # noqa: ANN401 - the client's V1ContainerStatus
    last = _last_run(status)
    if last is None or last.started_at is None or last.finished_at is None:
        return False
    return bool((last.finished_at - last.started_at).total_seconds() < SHORT_LIFE)


def every(api: Api, namespace: str | None) -> Iterator[Pod]:
    """Yield all pods of a namespace, or of the cluster for None.

    Raises:
        ApiFailed: the API server refused or did not answer.
    """
    more = None
    while more != "":
        with calling(f"list the pods of {namespace or 'all namespaces'}"):
            page: dict[str, Any] = {"limit": _PAGE, "_continue": more, "_request_timeout": TIMEOUT}
            if namespace is None:
                answer = api.core.list_pod_for_all_namespaces(**page)
            else:
                answer = api.core.list_namespaced_pod(namespace, **page)
        yield from map(from_model, answer.items)
        more = answer.metadata._continue or ""  # noqa: SLF001 - the client's name of it


def annotate(api: Api, pod: Pod, annotations: Mapping[str, str | None]) -> None:
    """Set annotations of a pod; None removes one.

    The pod's uid goes with the patch, so that a successor of the same name is never written on.

    Raises:
        ApiFailed: status 404 when the pod is gone, 422 when another one has its name.
    """
    patch = {"metadata": {"uid": pod.uid, "annotations": dict(annotations)}}
    with calling(f"annotate pod {pod}"):
        api.core.patch_namespaced_pod(pod.name, pod.namespace, patch, _request_timeout=TIMEOUT)

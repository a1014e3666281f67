"""One container as its runtime describes it, whichever runtime that is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chrek.errors import ChrekError, Reason, Refused
from chrek.runtime.messages import Mount, State, Status, StatusResponse, mapping
from chrek.system.ids import HostPid

_POD_NAMESPACE = "io.kubernetes.pod.namespace"
_POD_NAME = "io.kubernetes.pod.name"
POD_UID = "io.kubernetes.pod.uid"
CONTAINER_NAME = "io.kubernetes.container.name"


@dataclass(frozen=True)
class ContainerMount:
    """A volume of the container: the same folder as the container and as the host see it."""

    container_path: str
    host_path: str
    read_only: bool


@dataclass(frozen=True)
class Container:
    """A running container.

    Attributes:
        id: the runtime's id, without the ``containerd://`` that the API puts before it.
        attempt: which start of the container in this pod it is, from 0.
        pid: its PID 1, as a process of the host's PID namespace.
        started_at: nanoseconds since 1970.
        image: the image as the pod names it.
        image_ref: what the runtime resolved it to, a digest or a name with one.
        spec: the OCI runtime spec that the container was made from.
        snapshotter, snapshot: containerd's; None elsewhere.
        log_path: the log file on the host, as the kubelet reads it.
    """

    id: str
    name: str
    attempt: int
    namespace: str
    pod: str
    pod_uid: str
    pid: HostPid
    started_at: int
    image: str
    image_ref: str
    spec: Mapping[str, Any]
    snapshotter: str | None
    snapshot: str | None
    mounts: tuple[ContainerMount, ...]
    log_path: str

    @property
    def environment(self) -> dict[str, str]:
        """The environment PID 1 was started with, `valueFrom` resolved; later entries win, as in execve."""
        entries: list[str] = self.spec.get("process", {}).get("env") or []
        return dict(entry.partition("=")[::2] for entry in entries)

    @property
    def command(self) -> tuple[str, ...]:
        """The arguments PID 1 was started with."""
        return tuple(self.spec.get("process", {}).get("args") or ())

    @property
    def image_digest(self) -> str | None:
        """``sha256:...`` where the runtime knows it."""
        digest = self.image_ref.rpartition("@")[2]
        return digest if digest.startswith("sha256:") else None


def from_status(answer: StatusResponse) -> Container:
    """Read a verbose ``ContainerStatus``.

    Both containerd (from 1.0) and CRI-O (from 1.18) put a JSON object under the key ``info`` that has
    ``pid`` and ``runtimeSpec``; containerd adds ``snapshotter`` and ``snapshotKey``.

    Raises:
        Refused: CONTAINER_GONE, it does not run.
        ChrekError: RUNTIME_UNREACHABLE, the answer lacks what every known runtime gives.
    """
    status = answer.status or Status()
    labels = mapping(status.labels)
    name = labels.get(CONTAINER_NAME) or (status.metadata.name if status.metadata else None) or ""
    if (status.state or 0) != State.RUNNING:
        state = State(status.state or 0).name.lower()
        raise Refused(Reason.CONTAINER_GONE, f"Container {status.id} ({name}) is {state}, not running.")
    info = _info(answer)
    pid, spec = info.get("pid"), info.get("runtimeSpec")
    if not isinstance(pid, int) or pid <= 0 or not isinstance(spec, dict):
        raise ChrekError(
            Reason.RUNTIME_UNREACHABLE,
            f"The container runtime does not tell the process id and spec of container {status.id}.",
        )
    return Container(
        id=status.id or "",
        name=name,
        attempt=(status.metadata.attempt if status.metadata else None) or 0,
        namespace=labels.get(_POD_NAMESPACE, ""),
        pod=labels.get(_POD_NAME, ""),
        pod_uid=labels.get(POD_UID, ""),
        pid=HostPid(pid),
        started_at=status.started_at or 0,
        image=(status.image.image if status.image else None) or "",
        image_ref=status.image_ref or "",
        spec=spec,
        snapshotter=info.get("snapshotter"),
        snapshot=info.get("snapshotKey"),
        mounts=tuple(_mount(mount) for mount in status.mounts),
        log_path=status.log_path or "",
    )


def _mount(mount: Mount) -> ContainerMount:
    return ContainerMount(mount.container_path or "", mount.host_path or "", bool(mount.readonly))


def _info(answer: StatusResponse) -> dict[str, Any]:
    text = mapping(answer.info).get("info", "{}")
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}

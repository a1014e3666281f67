"""The container runtime tells what is needed about a container that the API server names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chrek.errors import ChrekError, Reason, Refused
from chrek.runtime import Runtime
from chrek.system.procfs import read_text
from cluster.kube.layout import BUSYBOX_IMAGE
from cluster.workspace import Workspace, pod


def test_container_is_found_by_pod_and_by_id(workspace: Workspace) -> None:
    """Both ways give the same container, with its process, command, environment, image and mounts."""
    extra = {
        "env": [
            {"name": "PLAIN", "value": "a=b"},
            {"name": "WHERE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        ],
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch", "readOnly": True}],
    }
    workspace.apply(pod("app", "exec sleep 1000", container=extra, volumes=[{"name": "scratch", "emptyDir": {}}]))
    app = workspace.ready("app")
    with Runtime.find() as runtime:
        found = runtime.container_of(pod_uid=app.metadata.uid, name="main")
        assert runtime.container(app.status.container_statuses[0].container_id) == found
    assert (found.namespace, found.pod, found.name, found.attempt) == (workspace.namespace, "app", "main", 0)
    assert read_text(found.pid, "cmdline") == "sleep\x001000\x00"
    assert found.command == ("sh", "-c", "exec sleep 1000")
    assert (found.environment["PLAIN"], found.environment["WHERE"]) == ("a=b", workspace.cluster.node)
    assert found.image == BUSYBOX_IMAGE
    assert found.snapshotter == "overlayfs"
    assert found.snapshot == found.id
    scratch = next(mount for mount in found.mounts if mount.container_path == "/scratch")
    assert scratch.read_only
    assert Path(scratch.host_path).is_dir()
    assert Path(found.log_path).exists()
    assert found.id in (read_text(found.pid, "cgroup") or "")


def test_restarted_container_is_another_one(workspace: Workspace) -> None:
    """After a restart the pod's name gives the new start; the old id is refused as gone."""
    workspace.apply(pod("app", "exec sleep 1000", restartPolicy="Always"))
    app = workspace.ready("app")
    with Runtime.find() as runtime:
        first = runtime.container_of(pod_uid=app.metadata.uid, name="main")
        os.kill(first.pid, 9)
        workspace.wait_pod(
            "app",
            lambda each: (
                each.status.container_statuses[0].restart_count == 1
                and each.status.container_statuses[0].state.running is not None
            ),
            what="restarted",
        )
        second = runtime.container_of(pod_uid=app.metadata.uid, name="main")
        assert (second.attempt, second.pid != first.pid) == (1, True)
        with pytest.raises(Refused) as caught:
            runtime.container(first.id)
        assert caught.value.reason is Reason.CONTAINER_GONE


def test_unknown_container_is_refused(workspace: Workspace) -> None:
    """An id nobody knows, and a pod without that container, are CONTAINER_GONE."""
    with Runtime.find() as runtime:
        with pytest.raises(Refused) as by_id:
            runtime.container("containerd://0000")
        with pytest.raises(Refused) as by_name:
            runtime.container_of(pod_uid="0000", name=workspace.namespace)
    assert (by_id.value.reason, by_name.value.reason) == (Reason.CONTAINER_GONE, Reason.CONTAINER_GONE)


def test_runtime_survives_a_restart_of_containerd(workspace: Workspace) -> None:
    """While containerd is away a call says so; afterwards the same client works again."""
    workspace.apply(pod("app", "exec sleep 1000"))
    app = workspace.ready("app")
    with Runtime.find() as runtime:
        before = runtime.container_of(pod_uid=app.metadata.uid, name="main")
        workspace.cluster.stop("containerd")
        try:
            with pytest.raises(ChrekError) as caught:
                runtime.version()
        finally:
            workspace.cluster.start("containerd")
        assert caught.value.reason is Reason.RUNTIME_UNREACHABLE
        assert runtime.container_of(pod_uid=app.metadata.uid, name="main") == before


def test_socket_is_found_below_another_root_and_by_configuration(workspace: Workspace, tmp_path: Path) -> None:
    """An agent sees the host's /run elsewhere, and may be told the kubelet's own endpoint."""
    folder = tmp_path / "host" / "run" / "containerd"
    folder.mkdir(parents=True)
    (folder / "containerd.sock").symlink_to(workspace.cluster.cri_socket)
    with Runtime.find(root=tmp_path / "host") as runtime:
        assert runtime.version().startswith("containerd v2.")
    with Runtime.find(f"unix://{workspace.cluster.cri_socket}") as runtime:
        assert runtime.socket == workspace.cluster.cri_socket

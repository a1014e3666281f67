"""The test cluster does what a real one does, so that what passes on it means something."""

from __future__ import annotations

import kubernetes
import pytest

from cluster.kube.layout import BUSYBOX_IMAGE
from cluster.workspace import Manifest, Workspace, pod

RESTRICTED: Manifest = {
    "allowPrivilegeEscalation": False,
    "runAsNonRoot": True,
    "runAsUser": 65534,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def test_node_is_ready_and_runs_the_release_it_was_built_from(workspace: Workspace) -> None:
    """The kubelet reports Ready, its own version and containerd's."""
    node = workspace.core.read_node(workspace.cluster.node)
    conditions = {each.type: each.status for each in node.status.conditions}
    assert conditions["Ready"] == "True"
    assert node.status.node_info.kubelet_version.startswith("v1.36.")
    assert node.status.node_info.container_runtime_version.startswith("containerd://2.")


def test_pod_runs_with_probe_logs_and_exec(workspace: Workspace) -> None:
    """A pod becomes Ready when its probe passes; its output and its exit statuses reach the client."""
    probe = {"readinessProbe": {"exec": {"command": ["cat", "/tmp/ready"]}, "periodSeconds": 1}}
    workspace.apply(pod("app", "echo started; touch /tmp/ready; exec sleep 1000", container=probe))
    workspace.ready("app")
    assert workspace.logs("app") == "started\n"
    assert workspace.exec("app", "sh", "-c", "cat /proc/1/comm; exit 7").status == 7
    assert workspace.exec("app", "cat", "/proc/1/comm").output == "sleep\n"


def test_job_completes(workspace: Workspace) -> None:
    """A Job whose pod exits 0 is complete."""
    template = {"spec": pod("unused", "exit 0")["spec"]}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": {"template": template}}
    workspace.apply(job)
    workspace.wait(
        kubernetes.client.BatchV1Api(workspace.api).list_namespaced_job,
        lambda job: any(each.type == "Complete" and each.status == "True" for each in job.status.conditions or []),
        what="job complete",
    )


def test_claim_binds_to_a_host_folder_of_a_class_without_provisioner(workspace: Workspace) -> None:
    """Two pods share a file through a claim on a hostPath volume."""
    name = f"{workspace.namespace}-volume"
    folder = workspace.cluster.layout.run / name
    workspace.apply(
        {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {"name": name},
            "provisioner": "kubernetes.io/no-provisioner",
            "volumeBindingMode": "WaitForFirstConsumer",
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": {
                "storageClassName": name,
                "capacity": {"storage": "1Gi"},
                "accessModes": ["ReadWriteMany"],
                "hostPath": {"path": str(folder), "type": "DirectoryOrCreate"},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "claim"},
            "spec": {
                "storageClassName": name,
                "accessModes": ["ReadWriteMany"],
                "resources": {"requests": {"storage": "1Gi"}},
            },
        },
    )
    volume = [{"name": "data", "persistentVolumeClaim": {"claimName": "claim"}}]
    mount = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    try:
        workspace.apply(pod("writer", "echo shared > /data/file", container=mount, volumes=volume))
        assert workspace.ended("writer").status.phase == "Succeeded"
        workspace.apply(pod("reader", "cat /data/file", container=mount, volumes=volume))
        assert workspace.ended("reader").status.phase == "Succeeded"
        assert workspace.logs("reader") == "shared\n"
        assert (folder / "file").read_text() == "shared\n"
    finally:
        workspace.core.delete_persistent_volume(name)
        kubernetes.client.StorageV1Api(workspace.api).delete_storage_class(name)


def test_privileged_daemonset_sees_the_processes_of_other_pods(workspace: Workspace) -> None:
    """An agent with hostPID finds a pod's process, reads its memory map and its root, and enters its namespaces."""
    workspace.apply(pod("work", "exec sleep 31415"))
    workspace.apply(
        {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": {"name": "agent"},
            "spec": {
                "selector": {"matchLabels": {"app": "agent"}},
                "template": {
                    "metadata": {"labels": {"app": "agent"}},
                    "spec": {
                        "hostPID": True,
                        "terminationGracePeriodSeconds": 1,
                        "containers": [
                            {
                                "name": "main",
                                "image": BUSYBOX_IMAGE,
                                "command": ["sleep", "1000"],
                                "securityContext": {"privileged": True},
                            }
                        ],
                    },
                },
            },
        }
    )
    workspace.ready("work")
    agent = workspace.wait(
        workspace.core.list_namespaced_pod,
        lambda each: each.status.phase == "Running",
        what="agent running",
        label_selector="app=agent",
    ).metadata.name
    script = (
        "p=$(ps -o pid,args | awk '$2 == \"sleep\" && $3 == 31415 { print $1 }')"
        " && test -x /proc/$p/root/bin/sleep && grep -q stack /proc/$p/maps"
        " && nsenter -t $p -m -p tr '\\0' ' ' < /proc/$p/cmdline"
    )
    assert workspace.exec(agent, "sh", "-c", script).output == "sleep 31415 "


def test_runtime_default_seccomp_filter_is_active(workspace: Workspace) -> None:
    """A pod that asks for RuntimeDefault runs under a filter; one that does not, does not."""
    script = "grep Seccomp: /proc/self/status"
    workspace.apply(
        pod("filtered", script, securityContext={"seccompProfile": {"type": "RuntimeDefault"}}), pod("plain", script)
    )
    workspace.ended("filtered")
    workspace.ended("plain")
    assert workspace.logs("filtered").split() == ["Seccomp:", "2"]
    assert workspace.logs("plain").split() == ["Seccomp:", "0"]


def test_restricted_namespace_admits_only_restricted_pods(workspace: Workspace) -> None:
    """Pod security admission is on: it refuses a plain pod and lets a hardened one run."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    workspace.core.patch_namespace(workspace.namespace, {"metadata": {"labels": labels}})
    with pytest.raises(kubernetes.utils.FailToCreateError, match="violates PodSecurity"):
        workspace.apply(pod("plain", "exit 0"))
    workspace.apply(pod("hardened", "id -u", container={"securityContext": RESTRICTED}))
    assert workspace.ended("hardened").status.phase == "Succeeded"
    assert workspace.logs("hardened") == "65534\n"


def test_service_reaches_its_pod(workspace: Workspace) -> None:
    """A pod talks to another one through a service's address."""
    server = pod("server", "while :; do echo served | nc -l -p 8080; done")
    server["metadata"]["labels"] = {"app": "server"}
    service = {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": 8080}]}
    workspace.apply(server, {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "server"}, "spec": service})
    workspace.ready("server")
    client = 'until nc -w 2 "$SERVER_SERVICE_HOST" 80 </dev/null | grep served; do :; done'
    workspace.apply(pod("client", client))
    workspace.ended("client", seconds=30)
    assert workspace.logs("client") == "served\n"


def test_pods_outlive_a_restart_of_every_program(workspace: Workspace) -> None:
    """A pod runs on, and can be entered, after kubelet, containerd and the API server were restarted."""
    workspace.apply(pod("app", "exec sleep 1000"))
    before = workspace.ready("app").status.container_statuses[0].container_id
    for program in ("kubelet", "containerd", "kube-apiserver"):
        workspace.cluster.restart(program)
    workspace.cluster.wait_until_serving("kubelet")
    after = workspace.ready("app").status.container_statuses[0]
    assert (after.container_id, after.restart_count) == (before, 0)
    assert workspace.exec("app", "cat", "/proc/1/comm").output == "sleep\n"

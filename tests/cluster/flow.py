"""What the tests of whole flows share: the examples' manifests, the store's volume, questions to a server and to the API."""

from __future__ import annotations

import json
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from cluster.appimage import app_image
from cluster.kube.layout import BUSYBOX_IMAGE, CHECKOUT
from cluster.workspace import Manifest, Workspace, kubernetes

EXAMPLES = CHECKOUT / "examples/kubernetes"
SIGNALS = Path("/var/lib/chrek/signals")
START = "nvidia.com/checkpoint-start"
RESULT = "nvidia.com/checkpoint-result"


def example(workspace: Workspace, name: str, *, image: str | None = None) -> Manifest:
    """Load an example; images, namespace and, without a GPU here, the GPU request are changed and nothing else."""
    manifest: Manifest = yaml.safe_load((EXAMPLES / name).read_text())
    manifest["metadata"]["namespace"] = workspace.namespace
    spec = pod_spec(manifest)
    for container in spec["containers"]:
        container["image"] = image or app_image(workspace.cluster)
        container.get("resources", {}).get("limits", {}).pop("nvidia.com/gpu", None)
    for container in spec.get("initContainers", ()):
        if container["image"].startswith("busybox"):
            container["image"] = BUSYBOX_IMAGE
    return manifest


def pod_spec(manifest: Manifest) -> Manifest:
    """The pod's part of a Pod, Job or Deployment."""
    spec: Manifest = manifest["spec"]
    return spec["template"]["spec"] if "template" in spec else spec


def job(name: str, checkpoint_id: str, *, image: str, **container: Any) -> Manifest:
    """A checkpoint pod without privilege, volumes or long waits; `container` changes its main container."""
    main = {
        "name": "main",
        "image": image,
        "securityContext": {"allowPrivilegeEscalation": False},
        "readinessProbe": {"exec": {"command": ["cat", "/tmp/ready"]}, "periodSeconds": 1},
        "env": [
            {"name": "DYN_CHECKPOINT_SIGNAL_FILE", "value": "/tmp/signal.done"},
            {"name": "DYN_CHECKPOINT_READY_FILE", "value": "/tmp/ready"},
            {"name": "DYN_CHECKPOINT_HASH", "value": checkpoint_id},
            {"name": "DYN_CHECKPOINT_LOCATION", "value": f"/checkpoints/{checkpoint_id}"},
            {"name": "DYN_CHECKPOINT_STORAGE_TYPE", "value": "pvc"},
        ],
    }
    return _pod(name, {"nvidia.com/checkpoint-source": "true"}, {**main, **container})


def restored(name: str, checkpoint_id: str, *, image: str, **container: Any) -> Manifest:
    """A pod that its node's agent restores; no privilege, no volume."""
    main = {
        "name": "main",
        "image": image,
        "securityContext": {"allowPrivilegeEscalation": False},
        "readinessProbe": {"tcpSocket": {"port": 8000}, "periodSeconds": 1},
        "env": [{"name": "DYN_CHECKPOINT_HASH", "value": checkpoint_id}],
    }
    return _pod(name, {"nvidia.com/checkpoint-restore": "true"}, {**main, **container})


def _pod(name: str, labels: dict[str, str], main: Manifest) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels},
        "spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 5, "containers": [main]},
    }


def host_volume(name: str, store: Path) -> Manifest:
    """A volume on a folder of the node, for claims of the storage class *name*."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "100Gi"},
            "accessModes": ["ReadWriteMany"],
            "storageClassName": name,
            "hostPath": {"path": str(store), "type": "DirectoryOrCreate"},
        },
    }


def claim(workspace: Workspace, store: Path) -> None:
    """Make the claim ``chrek-pvc`` on a folder of the node."""
    name = f"{workspace.namespace}-store"
    size = {"storage": "1Gi"}
    workspace.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": {
                "capacity": size,
                "accessModes": ["ReadWriteMany"],
                "storageClassName": "",
                "persistentVolumeReclaimPolicy": "Retain",
                "claimRef": {"namespace": workspace.namespace, "name": "chrek-pvc"},
                "hostPath": {"path": str(store)},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "chrek-pvc"},
            "spec": {
                "accessModes": ["ReadWriteMany"],
                "storageClassName": "",
                "volumeName": name,
                "resources": {"requests": size},
            },
        },
    )


def remove_signals() -> None:
    """Take the node's folder of signals away."""
    shutil.rmtree(SIGNALS.parent, ignore_errors=True)


def ask(pod: Any, path: str = "/") -> dict[str, Any]:  # noqa: ANN401 - the client's model
    """Ask the server in a pod."""
    with urllib.request.urlopen(f"http://{pod.status.pod_ip}:8000{path}", timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def token(log: str) -> str:
    """The token of the model that a server has loaded."""
    return log.partition("model loaded: ")[2].split()[0]


def wait_event(workspace: Workspace, pod: str, reason: str, *, seconds: float = 60) -> str:
    """Wait for an event of the agent on a pod; return its message."""
    found = workspace.wait(
        workspace.core.list_namespaced_event,
        lambda event: event.reason == reason,
        what=f"event {reason} on {pod}",
        seconds=seconds,
        field_selector=f"involvedObject.name={pod}",
    )
    return str(found.message)


def events(workspace: Workspace, pod: str) -> list[str]:
    """The reasons of all events of the agent on a pod, in their order."""
    found = workspace.core.list_namespaced_event(workspace.namespace, field_selector=f"involvedObject.name={pod}").items
    ours = [each for each in found if each.reporting_component == "chrek-agent"]
    return [each.reason for each in sorted(ours, key=lambda each: each.event_time)]


def wait_annotation(workspace: Workspace, pod: str, name: str, *, seconds: float = 60) -> str:
    """Wait until the agent has annotated a pod; return the value."""
    found = workspace.wait_pod(
        pod,
        lambda each: name in (each.metadata.annotations or {}),
        what=f"annotation {name} of {pod}",
        seconds=seconds,
    )
    return str(found.metadata.annotations[name])


def pod_of_job(workspace: Workspace, name: str, *, seconds: float = 60) -> str:
    """The name of a job's pod."""
    found = workspace.wait(
        workspace.core.list_namespaced_pod,
        lambda _: True,
        what=f"pod of job {name}",
        seconds=seconds,
        label_selector=f"job-name={name}",
    )
    return str(found.metadata.name)


def wait_job(workspace: Workspace, name: str, condition: str, *, seconds: float = 120) -> Any:  # noqa: ANN401
    """Wait until a job has a condition, Complete or Failed."""
    return workspace.wait(
        kubernetes.client.BatchV1Api(workspace.api).list_namespaced_job,
        lambda job: any(each.type == condition and each.status == "True" for each in job.status.conditions or []),
        what=f"job {name} {condition}",
        seconds=seconds,
        field_selector=f"metadata.name={name}",
    )

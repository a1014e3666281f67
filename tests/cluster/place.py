"""A namespace with an agent and one captured checkpoint, made once for all tests of a module."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import flow
from cluster.agents import Agent
from cluster.appimage import app_image
from cluster.kube import Cluster
from cluster.workspace import Manifest, Workspace

NOTHING = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


@dataclass(frozen=True)
class Place:
    """A namespace with an agent and a checkpoint ``one``, whose server had that token."""

    workspace: Workspace
    agent: Agent
    image: str
    token: str

    def restored(self, name: str, checkpoint_id: str = "one", **container: Any) -> Manifest:
        """A pod to be restored."""
        return flow.restored(name, checkpoint_id, image=self.image, **container)

    def start(self, manifest: Manifest) -> str:
        """Apply a pod, wait until it serves; return how it started."""
        name: str = manifest["metadata"]["name"]
        self.workspace.apply(manifest)
        self.workspace.ready(name)
        return flow.wait_annotation(self.workspace, name, flow.START)

    def ask(self, name: str, path: str = "/") -> dict[str, Any]:
        """Ask a pod's server."""
        return flow.ask(self.workspace.core.read_namespaced_pod(name, self.workspace.namespace), path)


@contextlib.contextmanager
def make_place(cluster: Cluster, folder: Path, name: str, **settings: Any) -> Iterator[Place]:
    """Start an agent, capture an unprivileged pod as checkpoint ``one``."""
    namespace = f"{name}-{os.getpid()}"
    with Workspace.make(cluster, namespace) as workspace:
        # Privileged pods and volumes of the host are refused by the API server here.
        labels = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "baseline"}}}
        workspace.core.patch_namespace(namespace, labels)
        with Agent(workspace, folder, **settings) as agent:
            image = app_image(cluster)
            workspace.apply(flow.job("source", "one", image=image, securityContext=NOTHING))
            result = flow.wait_annotation(workspace, "source", flow.RESULT)
            assert result.startswith("created "), flow.wait_event(workspace, "source", "CheckpointFailed", seconds=5)
            assert workspace.ended("source").status.phase == "Succeeded"
            yield Place(workspace, agent, image, flow.token(workspace.logs("source")))

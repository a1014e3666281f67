"""The guide's two manifests, as they stand: a job is captured, a pod restores itself from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import flow
from cluster.agents import Agent
from cluster.workspace import Workspace


@pytest.fixture
def agent(workspace: Workspace, tmp_path: Path) -> Iterator[Agent]:
    """An agent whose store is the claim chrek-pvc."""
    settings = {"signals": {"host_path": str(flow.SIGNALS), "mounted_at": str(flow.SIGNALS)}}
    with Agent(workspace, tmp_path, **settings) as it:
        flow.claim(workspace, it.store)
        yield it
    workspace.core.delete_persistent_volume(f"{workspace.namespace}-store")
    flow.remove_signals()


def test_guide(workspace: Workspace, agent: Agent) -> None:
    """The job is captured and ends well, the pod restores itself with the same model, and a second job is skipped."""
    job = flow.example(workspace, "guide/checkpoint-job.yaml")
    workspace.apply(job)
    source = flow.pod_of_job(workspace, "checkpoint-my-model")
    flow.wait_job(workspace, "checkpoint-my-model", "Complete")
    assert flow.wait_annotation(workspace, source, flow.RESULT).startswith("created ")
    assert flow.events(workspace, source) == ["CheckpointStarted", "CheckpointCreated"]
    signal = json.loads((flow.SIGNALS / "my-checkpoint.done").read_text())
    assert (signal["success"], signal["checkpoint_id"]) == (True, "abc123def456")
    assert signal["checkpoint_path"] == "/checkpoints/abc123def456"
    assert (agent.store / "abc123def456" / "checkpoint.done").exists()

    workspace.apply(flow.example(workspace, "guide/restore-pod.yaml"))
    workspace.ready("my-app-restored")
    start = flow.wait_annotation(workspace, "my-app-restored", flow.START)
    assert start.startswith("restored seconds="), workspace.logs("my-app-restored")
    pod = workspace.core.read_namespaced_pod("my-app-restored", workspace.namespace)
    answer = flow.ask(pod)
    assert answer["token"] == flow.token(workspace.logs(source))
    assert answer["host"] == "my-app-restored"
    assert "chrek: start=restored reason=none" in workspace.logs("my-app-restored")
    assert flow.events(workspace, "my-app-restored") == ["Restored"]
    assert agent.metric("chrek_starts_total", mode="restored") == 1

    job["metadata"]["name"] = "again"
    workspace.apply(job)
    flow.wait_job(workspace, "again", "Complete")
    assert flow.events(workspace, flow.pod_of_job(workspace, "again")) == ["CheckpointSkipped"]

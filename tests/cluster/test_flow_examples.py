"""The project's own examples, applied as they are: a job without privilege, three replicas behind a Service, no rebuild."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from cluster import flow
from cluster.agents import Agent
from cluster.appimage import agent_image, app_image, plain_image
from cluster.workspace import Manifest, Workspace, is_ready


@pytest.fixture
def agent(workspace: Workspace, tmp_path: Path) -> Iterator[Agent]:
    """An agent for the namespace."""
    with Agent(workspace, tmp_path) as it:
        yield it


def _documents(workspace: Workspace, name: str) -> list[Manifest]:
    found: list[Manifest] = list(yaml.safe_load_all((flow.EXAMPLES / name).read_text()))
    for each in found:
        each["metadata"]["namespace"] = workspace.namespace
        if each["kind"] in {"Deployment", "Job", "Pod"}:
            for container in flow.pod_spec(each)["containers"]:
                container["image"] = app_image(workspace.cluster)
    return found


def _ask(url: str) -> Any:  # noqa: ANN401 - JSON
    """Ask a Service, anew as long as its rules are not in the kernel yet: a first packet that none matches stays lost."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                return yaml.safe_load(answer.read())
        except OSError:
            if time.monotonic() > deadline:
                raise


def test_three_replicas_of_one_checkpoint(workspace: Workspace, agent: Agent) -> None:
    """The job completes; three replicas run from its checkpoint and answer behind a Service with the same model."""
    workspace.apply(*_documents(workspace, "checkpoint-job.yaml"))
    flow.wait_job(workspace, "checkpoint-my-model", "Complete")
    token = flow.token(workspace.logs(flow.pod_of_job(workspace, "checkpoint-my-model")))
    workspace.apply(*_documents(workspace, "restored-deployment.yaml"))
    ready: set[str] = set()

    def three(pod: Any) -> bool:  # noqa: ANN401 - the client's model
        if is_ready(pod):
            ready.add(pod.metadata.name)
        return len(ready) == 3

    workspace.wait(workspace.core.list_namespaced_pod, three, what="three replicas ready", label_selector="app=my-app")
    for name in sorted(ready):
        assert flow.wait_annotation(workspace, name, flow.START).startswith("restored ")
    service = workspace.core.read_namespaced_service("my-app", workspace.namespace)
    hosts = set()
    for _ in range(60):
        said = _ask(f"http://{service.spec.cluster_ip}/")
        assert said["token"] == token
        hosts.add(said["host"])
        if hosts == ready:
            break
    assert hosts == ready
    assert agent.metric("chrek_starts_total", mode="restored") == 3


def test_failed_checkpoint_is_a_failed_job(workspace: Workspace, agent: Agent) -> None:
    """A refused checkpoint ends the example's job at once, without another try, and says why."""
    (job,) = _documents(workspace, "checkpoint-job.yaml")
    job["spec"]["template"]["metadata"]["labels"]["nvidia.com/checkpoint-hash"] = "another"
    workspace.apply(job)
    failed = flow.wait_job(workspace, "checkpoint-my-model", "Failed")
    assert failed.status.failed == 1
    assert any(each.reason == "PodFailurePolicy" for each in failed.status.conditions)
    source = flow.pod_of_job(workspace, "checkpoint-my-model")
    assert flow.wait_event(workspace, source, "CheckpointRefused").startswith("ID_MISMATCH: ")
    assert "ID_MISMATCH" in agent.log


def test_no_rebuild(workspace: Workspace, agent: Agent) -> None:
    """An unmodified image is captured and restored with the example's init container, volume and prefixed command."""
    (pod,) = _documents(workspace, "no-rebuild.yaml")
    (job,) = _documents(workspace, "checkpoint-job.yaml")
    assert agent_image(workspace.cluster) == pod["spec"]["initContainers"][0]["image"]
    image = plain_image(workspace.cluster)
    (main,), (source,) = pod["spec"]["containers"], flow.pod_spec(job)["containers"]
    main["image"] = source["image"] = image
    source |= {name: main[name] for name in ("command", "volumeMounts")}
    flow.pod_spec(job).update({name: pod["spec"][name] for name in ("initContainers", "volumes")})
    workspace.apply(job)
    flow.wait_job(workspace, "checkpoint-my-model", "Complete")
    token = flow.token(workspace.logs(flow.pod_of_job(workspace, "checkpoint-my-model")))
    workspace.apply(pod)
    ready = workspace.ready("my-app")
    assert flow.wait_annotation(workspace, "my-app", flow.START).startswith("restored ")
    assert flow.ask(ready)["token"] == token
    assert agent.metric("chrek_restore_operations_total", outcome="restored") == 1

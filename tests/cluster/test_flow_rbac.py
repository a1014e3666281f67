"""An agent that lacks one of the chart's rights: it says which, goes on with what it can, and catches up once it has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from chrek.kube import Api, CheckpointLease
from chrekcli import until
from cluster import flow
from cluster.agents import Agent
from cluster.appimage import app_image
from cluster.rights import RULES, Rule, grant, without
from cluster.workspace import Workspace

BLOCKING = [rule for rule in RULES if rule[0] == "leases" and rule[1] != "delete"]
"""Without these nobody can know that another node does not write the same checkpoint: the capture waits."""


@pytest.fixture
def agent(workspace: Workspace, tmp_path: Path, rule: Rule) -> Iterator[Agent]:
    """An agent without one right; it may never be ready."""
    it = Agent(workspace, tmp_path, kubeconfig=without(workspace, tmp_path, rule))
    it.start(ready=False)
    yield it
    assert it.stop() == 0


def _said(agent: Agent, rule: Rule) -> bool:
    """Whether the log names verb, resource and cure, and the metric counts it."""
    resource, verb = rule
    words = (f'cannot {verb} resource "{resource}"', f"Grant the agent's service account {verb} of {resource}")
    counted = agent.metric("chrek_api_failures_total", status="403") >= 1
    return counted and any(all(each in line for each in words) for line in agent.log.splitlines())


BLIND = [("pods", "list"), ("pods", "watch")]


@pytest.mark.parametrize("rule", BLIND, ids=" ".join)
def test_nothing_is_seen(agent: Agent, rule: Rule, workspace: Workspace, tmp_path: Path) -> None:
    """Blind for pods it lives, is not ready and says why, tries again at a calm pace, and catches up once it may see."""
    workspace.apply(flow.job("job", "id", image=app_image(workspace.cluster)))
    until(lambda: _said(agent, rule), "the log names what is missing")
    until(lambda: f'cannot {rule[1]} resource "pods"' in agent.get("/readyz")[1], "the reason of not being ready")
    assert agent.get("/readyz")[0] == 503
    assert agent.get("/healthz")[0] == 200
    assert agent.metric("chrek_api_failures_total", status="403") < 20
    grant(workspace, tmp_path)
    assert flow.wait_annotation(workspace, "job", flow.RESULT).startswith("created ")
    assert agent.get("/readyz")[0] == 200


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in BLOCKING + BLIND], ids=" ".join)
def test_captures_go_on(agent: Agent, rule: Rule, workspace: Workspace) -> None:
    """What the right is not needed for is done all the same, once; what could not be said elsewhere is in the log."""
    workspace.apply(flow.job("job", "id", image=app_image(workspace.cluster)))
    assert workspace.ended("job").status.phase == "Succeeded"
    until(lambda: _said(agent, rule), "the log names what is missing")
    if rule != ("pods", "patch"):
        assert flow.wait_annotation(workspace, "job", flow.RESULT).startswith("created ")
    if rule != ("events", "create"):
        flow.wait_event(workspace, "job", "CheckpointCreated")
        assert flow.events(workspace, "job") == ["CheckpointStarted", "CheckpointCreated"]
    assert (agent.store / "id" / "checkpoint.done").exists()
    until(lambda: agent.metric("chrek_checkpoint_operations_total", outcome="created") == 1, "the count of it")


@pytest.mark.parametrize("rule", BLOCKING, ids=" ".join)
def test_capture_waits_for_the_right(agent: Agent, rule: Rule, workspace: Workspace, tmp_path: Path) -> None:
    """Without the lease nothing is written; the application waits unharmed and is captured once the right is there."""
    admin = Api.connect(workspace.cluster.kubeconfig)
    if rule[1] in {"watch", "update"}:
        holder = "another-node" if rule[1] == "watch" else workspace.cluster.node
        CheckpointLease(admin, namespace=workspace.namespace, checkpoint_id="id", holder=holder, duration=2)._create()
    admin.close()
    workspace.apply(flow.job("job", "id", image=app_image(workspace.cluster)))
    until(lambda: _said(agent, rule), "the log names what is missing")
    assert not (agent.store / "id").exists()
    grant(workspace, tmp_path)
    assert flow.wait_annotation(workspace, "job", flow.RESULT).startswith("created ")
    assert workspace.ended("job").status.phase == "Succeeded"
    assert flow.events(workspace, "job") == ["CheckpointStarted", "CheckpointCreated"]

"""What the agent says about a pod is what people see."""

from __future__ import annotations

import pytest

from chrek.errors import Reason, Refused
from chrek.kube import Api, EventReason, Events
from chrek.kube.api import ApiFailed
from chrek.kube.pods import Pod, from_model
from cluster.workspace import Workspace, pod


def _app(workspace: Workspace) -> Pod:
    workspace.apply(pod("app", "exec sleep 1000"))
    return from_model(workspace.ready("app"))


def test_event_is_shown_by_describe(workspace: Workspace) -> None:
    """`kubectl describe pod` shows type, reason, component and message, cut to what the server takes."""
    app = _app(workspace)
    events = Events(Api.connect(workspace.cluster.kubeconfig), component="chrek-agent", node=workspace.cluster.node)
    events.post(app, EventReason.CHECKPOINT_CREATED, "Checkpoint abc created in 1.2 s.")
    events.post_error(app, EventReason.CHECKPOINT_REFUSED, Refused(Reason.IO_URING_IN_USE, "x" * 2000))
    shown = workspace.cluster.kubectl("describe", "pod", "app", "--namespace", workspace.namespace)
    line = next(each for each in shown.splitlines() if "CheckpointCreated" in each)
    assert line.split()[0] == "Normal"
    assert "chrek-agent" in line
    assert "Checkpoint abc created in 1.2 s." in line
    refused = next(each for each in shown.splitlines() if "CheckpointRefused" in each)
    assert refused.split()[0] == "Warning"
    assert "IO_URING_IN_USE: xxx" in refused
    assert refused.rstrip().endswith(Reason.IO_URING_IN_USE.cure)


def test_event_is_said_once_for_a_container(workspace: Workspace) -> None:
    """An agent that starts again and says the same about the same container adds nothing."""
    app = _app(workspace)
    for _ in range(3):
        events = Events(Api.connect(workspace.cluster.kubeconfig), component="chrek-agent", node="n")
        events.post(app, EventReason.CHECKPOINT_SKIPPED, "There already.", container_id="c1")
    events.post(app, EventReason.CHECKPOINT_SKIPPED, "There already.", container_id="c2")
    found = workspace.core.list_namespaced_event(workspace.namespace, field_selector="reason=CheckpointSkipped").items
    assert len(found) == 2


def test_missing_permission_is_told_with_the_servers_words(workspace: Workspace) -> None:
    """A service account without the chart's role gets API_FAILED with 403 and what was refused."""
    app = _app(workspace)
    token = workspace.cluster.kubectl("create", "token", "default", "--namespace", workspace.namespace).strip()
    api = Api.connect(workspace.cluster.kubeconfig)
    configuration = api.core.api_client.configuration
    configuration.cert_file = configuration.key_file = None
    configuration.api_key = {"BearerToken": f"Bearer {token}", "authorization": f"Bearer {token}"}
    with pytest.raises(ApiFailed, match=r"403 Forbidden.*cannot create resource") as caught:
        Events(Api(configuration), component="chrek-agent", node="n").post(app, EventReason.RESTORED, "x")
    assert (caught.value.status, caught.value.reason) == (403, Reason.API_FAILED)

"""What ChReK sees of a pod, read from the official client's own model."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from chrek.agent.node import require_supported
from chrek.errors import Reason, Refused
from chrek.kube.pods import Pod, from_model

client: Any = importlib.import_module("kubernetes.client")


def pod(**spec: Any) -> Pod:
    """A pod as the API server would send it, with *spec* in its specification."""
    containers = spec.pop("containers", [client.V1Container(name="main", image="app:1")])
    return from_model(
        client.V1Pod(
            metadata=client.V1ObjectMeta(name="app", namespace="team", uid="u", resource_version="1"),
            spec=client.V1PodSpec(containers=containers, **spec),
            status=client.V1PodStatus(phase="Running"),
        )
    )


@pytest.mark.parametrize(
    ("spec", "feature"),
    [
        ({"share_process_namespace": True}, "shareProcessNamespace: true"),
        ({"host_pid": True}, "hostPID: true"),
        ({"host_ipc": True}, "hostIPC: true"),
        ({"host_users": False}, "hostUsers: false"),
        ({"runtime_class_name": "gvisor"}, "runtimeClassName: gvisor"),
        ({"runtime_class_name": "kata-qemu"}, "runtimeClassName: kata-qemu"),
        ({"runtime_class_name": "runsc"}, "runtimeClassName: runsc"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pod_that_is_not_supported(spec: dict[str, Any], feature: str) -> None:
    """Each feature that nothing works with is refused by the name that it has in the pod's manifest."""
    with pytest.raises(Refused) as caught:
        require_supported(pod(**spec))
    assert caught.value.reason is Reason.POD_NOT_SUPPORTED
    assert feature in caught.value.message


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"share_process_namespace": False},
        {"host_pid": False, "host_users": True},
        {"host_network": True, "host_ipc": False},
        {"runtime_class_name": "nvidia"},
    ],
)
def test_pod_that_is_supported(spec: dict[str, Any]) -> None:
    """The same fields with values that change nothing, and the node's network, are no hindrance."""
    require_supported(pod(**spec))


def test_native_sidecars_are_told_from_init_containers() -> None:
    """An init container that is restarted always is a sidecar; one that ends is none of the pod's running ones."""
    inits = [
        client.V1Container(name="proxy", image="proxy:1", restart_policy="Always"),
        client.V1Container(name="prepare", image="app:1"),
    ]
    found = pod(init_containers=inits)
    assert [(each.name, each.sidecar) for each in found.containers] == [("main", False), ("proxy", True)]


@pytest.mark.parametrize(
    ("probe", "seconds"),
    [
        (None, None),
        ({}, 21.0),
        ({"period_seconds": 1, "failure_threshold": 1}, 1.0),
        ({"period_seconds": 5, "failure_threshold": 4, "timeout_seconds": 2}, 17.0),
    ],
)
def test_patience_of_a_liveness_probe(probe: dict[str, int] | None, seconds: float | None) -> None:
    """A probe bears all its failures but the last one's period, and then that one's own time-out; the API's defaults count."""
    liveness = None if probe is None else client.V1Probe(**probe)
    (found,) = pod(containers=[client.V1Container(name="main", liveness_probe=liveness)]).containers
    assert found.liveness_seconds == seconds


def test_variable_without_a_value() -> None:
    """An empty variable is empty; one whose value comes from elsewhere is there and has none yet."""
    source = client.V1EnvVarSource(field_ref=client.V1ObjectFieldSelector(field_path="metadata.name"))
    env = [
        client.V1EnvVar(name="A", value="x"),
        client.V1EnvVar(name="B"),
        client.V1EnvVar(name="C", value_from=source),
    ]
    (found,) = pod(containers=[client.V1Container(name="main", env=env)]).containers
    assert found.variables == {"A": "x", "B": "", "C": None}

"""The chart renders what the API server takes, refuses nonsense, and installs, upgrades and goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from chrek.kube import Api, CheckpointLease, EventReason, Events, PodWatch, annotate
from chrek.kube.api import ApiFailed
from chrek.kube.leases import lease_name
from chrek.kube.pods import from_model
from cluster.kube import ClusterError
from cluster.kube.processes import wait_for
from cluster.rights import CHART, RULES, Rule, render, without
from cluster.workspace import Manifest, Workspace, pod

VALUES: dict[str, dict[str, Any]] = {
    "default": {},
    "guide": {"storage": {"pvc": {"size": "100Gi", "storageClass": "your-storage-class"}}},
    "cluster": {"scope": "cluster", "shareWith": {"team-a": ["team-b"]}},
    "existing claim": {"storage": {"pvc": {"existingClaim": "models"}}},
    "one node": {"storage": {"pvc": {"accessMode": "ReadWriteOnce", "storageClass": "-"}}},
    "bare": {
        "rbac": {"create": False},
        "serviceAccount": {"create": False, "name": "mine"},
        "seccomp": {"install": False},
        "networkPolicy": {"enabled": False},
        "tolerations": [],
    },
    "full": {
        "image": {"repository": "registry.example:5000/team/chrek-agent", "digest": "sha256:" + "0" * 64},
        "imagePullSecrets": [{"name": "pull"}],
        "containerRuntime": {"socket": "/run/k3s/containerd/containerd.sock"},
        "metrics": {"port": 9500, "service": {"enabled": True}},
        "tracing": {"endpoint": "http://collector:4318"},
        "runtimeClassName": "nvidia",
        "priorityClassName": "system-node-critical",
        "nodeSelector": {"gpu": "yes"},
        "affinity": {"nodeAffinity": {}},
        "podAnnotations": {"a": "b"},
        "podLabels": {"c": "d"},
        "extraEnv": [{"name": "X", "value": "1"}],
        "resources": {"requests": {"cpu": "1"}, "limits": {"cpu": "2"}},
        "updateStrategy": {"maxUnavailable": "10%"},
    },
}


def one(manifests: list[Manifest], kind: str, name: str = "chrek-agent") -> Manifest:
    """The object of that kind and name."""
    return next(each for each in manifests if each["kind"] == kind and each["metadata"]["name"] == name)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_rendering_is_taken_by_the_api_server(workspace: Workspace, tmp_path: Path, values: dict[str, Any]) -> None:
    """Lint has nothing to say, and every object passes the API server's own strict validation."""
    manifests = render(workspace, tmp_path, values)
    workspace.cluster.helm("lint", "--strict", CHART, "--values", str(tmp_path / "values.json"))
    workspace.cluster.kubectl(
        "apply", "--dry-run=server", "--validate=strict", "--namespace", workspace.namespace, "--filename=-",
        stdin=yaml.safe_dump_all(manifests),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"storage": {"pvc": {"size": "lots"}}}, "/storage/pvc/size"),
        ({"storage": {"pvc": {"acessMode": "ReadWriteMany"}}}, "acessMode"),
        ({"storage": {"type": "s3"}}, "/storage/type"),
        ({"storage": {"mountPath": "checkpoints"}}, "/storage/mountPath"),
        ({"image": {"digest": "latest"}}, "/image/digest"),
        ({"scope": "everything"}, "/scope"),
        ({"capture": {"perNode": 0}}, "/capture/perNode"),
        ({"metrics": {"port": 80}}, "/metrics/port"),
        ({"unknown": 1}, "unknown"),
        ({"serviceAccount": {"create": False}}, "serviceAccount.name is needed"),
    ],
)
def test_wrong_value_is_refused_by_name(
    workspace: Workspace, tmp_path: Path, values: dict[str, Any], complaint: str
) -> None:
    """A misspelt, impossible or reserved value stops helm, and the message names it."""
    with pytest.raises(ClusterError, match=complaint):
        render(workspace, tmp_path, values)


def test_agent_pod_is_what_the_contract_says(workspace: Workspace, tmp_path: Path) -> None:
    """Names, volumes and the environment for people are the documented ones, and no memory limit throttles writes."""
    manifests = render(workspace, tmp_path, {})
    spec = one(manifests, "DaemonSet")["spec"]["template"]["spec"]
    volumes = {each["name"]: each for each in spec["volumes"]}
    assert volumes["signal-dir"]["hostPath"]["path"] == "/var/lib/chrek/signals"
    assert volumes["checkpoints"]["persistentVolumeClaim"]["claimName"] == "chrek-pvc"
    (agent,) = spec["containers"]
    assert {"name": "CHREK_STORE", "value": "/checkpoints"} in agent["env"]
    assert "limits" not in agent["resources"]
    claim = one(manifests, "PersistentVolumeClaim", "chrek-pvc")["spec"]
    assert (claim["accessModes"], claim["resources"]["requests"]["storage"]) == (["ReadWriteMany"], "100Gi")
    config = json.loads(one(manifests, "ConfigMap")["data"]["agent.json"])
    assert (config["captures_per_gpu"], config["captures_per_node"], config["deadline_seconds"]) == (1, 2, 900)
    assert config["retries"] == 0


def test_pod_monitor_points_at_the_metrics_port(workspace: Workspace, tmp_path: Path) -> None:
    """On request there is a PodMonitor, whose port exists."""
    manifests = render(workspace, tmp_path, {"metrics": {"podMonitor": {"enabled": True, "labels": {"release": "p"}}}})
    monitor = one(manifests, "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    ports = one(manifests, "DaemonSet")["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert endpoint["port"] in {each["name"] for each in ports}
    assert monitor["metadata"]["labels"]["release"] == "p"


def test_install_upgrade_uninstall(workspace: Workspace) -> None:
    """The guide's install works; an upgrade rolls the agent; uninstall leaves the claim and nothing else."""
    helm, kubectl = workspace.cluster.helm, workspace.cluster.kubectl
    place = ("--namespace", workspace.namespace)
    nowhere = ("--set", "nodeSelector.runs-on=no-node")
    size = ("--set", "storage.pvc.size=1Gi", "--set", "storage.pvc.storageClass=your-storage-class")
    said = helm("install", "chrek", CHART, *place, "--create-namespace", *size, *nowhere)
    assert "kubectl rollout status daemonset/chrek-agent" in said
    assert "checkpoint-enable" in said
    before = kubectl("get", "daemonset", "chrek-agent", *place, "-o", "jsonpath={.metadata.generation}")
    helm("upgrade", "chrek", CHART, *place, *size, *nowhere, "--set", "capture.perNode=3")
    assert kubectl("get", "daemonset", "chrek-agent", *place, "-o", "jsonpath={.metadata.generation}") > before
    kinds = "daemonset,configmap,networkpolicy,role,rolebinding,serviceaccount"
    helm("uninstall", "chrek", *place, "--wait")
    assert "chrek" not in kubectl("get", kinds, *place, "-o", "name")
    assert "chrek-pvc" in kubectl("get", "persistentvolumeclaim", *place, "-o", "name")


# --- the least that works ------------------------------------------------------------------------------------------


def test_rules_are_all_there_are(workspace: Workspace, tmp_path: Path) -> None:
    """The chart grants exactly the rules that the next test removes one by one, in either scope."""
    for scope in ("namespace", "cluster"):
        manifests = render(workspace, tmp_path, {"scope": scope})
        granted = [
            (resource, verb)
            for role in manifests
            if role["kind"] in {"Role", "ClusterRole"}
            for rule in role["rules"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        ]
        assert sorted(granted) == sorted(RULES)
    assert one(manifests, "ClusterRole", f"chrek-agent-{workspace.namespace}")


@pytest.fixture
def restricted_api(workspace: Workspace, tmp_path: Path) -> Iterator[Callable[[Rule], Api]]:
    """Makes connections as the chart's service account with one rule taken away."""
    made: list[Api] = []

    def make(removed: Rule) -> Api:
        made.append(Api.connect(without(workspace, tmp_path, removed)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def _watch_once(workspace: Workspace, api: Api) -> None:
    """Follow pods until the first is seen; raises what stands in the way."""
    trouble: list[str] = []
    watch = PodWatch(
        api,
        node=workspace.cluster.node,
        namespace=workspace.namespace,
        on_pod=lambda _: None,
        on_gone=lambda _: None,
        on_trouble=trouble.append,
    )
    watch.start()
    try:
        wait_for("trouble", 10, lambda: bool(trouble))
    finally:
        watch.stop()
    raise ApiFailed(trouble[0], status=403)


def _use(workspace: Workspace, api: Api, rule: Rule) -> None:
    """Do what the agent needs the rule for."""
    admin = Api.connect(workspace.cluster.kubeconfig)
    mine = CheckpointLease(api, namespace=workspace.namespace, checkpoint_id="id", holder="node-a", duration=2)
    other = CheckpointLease(admin, namespace=workspace.namespace, checkpoint_id="id", holder="node-b", duration=2)
    if rule in {("pods", "list"), ("pods", "watch")}:
        _watch_once(workspace, api)
    elif rule[0] in {"pods", "events"}:
        workspace.apply(pod("app", "exec sleep 1000"))
        app = from_model(workspace.ready("app"))
        if rule[0] == "pods":
            annotate(api, app, {"nvidia.com/checkpoint-start": "restored"})
        else:
            Events(api, component="chrek-agent", node=app.node).post(app, EventReason.RESTORED, "Restored in 1 s.")
    elif rule[1] == "watch":
        other._create()
        with mine:
            pass
    elif rule[1] == "update":
        CheckpointLease(admin, namespace=workspace.namespace, checkpoint_id="id", holder="node-a", duration=2)._create()
        with mine:
            pass
    elif rule[1] == "delete":
        with mine:
            pass
        # Giving it back is best effort: without the permission it stays until it runs out.
        admin.coordination.read_namespaced_lease(lease_name("id"), workspace.namespace)
        mine._delete_ours()
    else:
        with mine:
            pass


@pytest.mark.parametrize("rule", RULES, ids=" ".join)
def test_without_any_one_rule_something_fails(
    workspace: Workspace, restricted_api: Callable[[Rule], Api], rule: Rule
) -> None:
    """Each rule is needed: what it is for is refused by the API server, which names the verb and the resource."""
    api = restricted_api(rule)
    with pytest.raises(ApiFailed, match=rf"403.*cannot {rule[1]} resource.*{rule[0]}"):
        _use(workspace, api, rule)

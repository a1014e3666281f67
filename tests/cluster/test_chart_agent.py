"""The chart's own agent, from its own image, takes and restores checkpoints with the guide's own manifests."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from chrek.system import procfs
from chrek.system.ids import HostPid
from chrekcli import until
from cluster import flow
from cluster.appimage import APPS
from cluster.builder import Builder
from cluster.kube import Cluster, ClusterError
from cluster.kube.layout import CHECKOUT, KUBELET_ROOT
from cluster.workspace import Workspace, kubernetes

pytestmark = pytest.mark.timeout(900)
CHART = str(CHECKOUT / "deploy" / "helm" / "charts" / "chrek")
BASE, ENABLED, AGENT = "localhost/my-app:1", "localhost/my-app:checkpoint-enabled", "localhost/chrek-agent:0.1.0"


@dataclass(frozen=True)
class Installed:
    """A namespace in which the chart is installed."""

    workspace: Workspace
    store: Path

    def kubectl(self, *words: str) -> str:
        """Run kubectl in the namespace."""
        return self.workspace.cluster.kubectl("--namespace", self.workspace.namespace, *words)


@pytest.fixture(scope="module")
def installed(cluster: Cluster) -> Iterator[Installed]:
    """Build both images, then install the chart as the guide does."""
    builder = Builder(cluster)
    builder.make_debian()
    builder.make_plain(BASE, command=["python3", "/app/server.py"], app=APPS)
    done = builder.checkpoint_enable(BASE, ENABLED)
    assert done.status == 0, done.output
    done = builder.build("--target", "agent", "--tag", AGENT)
    assert done.status == 0, done.output
    for image in (ENABLED, AGENT):
        builder.load(image)
    name = f"my-app-{os.getpid()}"
    store = cluster.layout.run / f"{name}-store"
    flow.remove_signals()
    with Workspace.make(cluster, name) as workspace:
        workspace.apply(flow.host_volume(name, store))
        values = ["storage.pvc.size=100Gi", f"storage.pvc.storageClass={name}"]
        values.append(f"containerRuntime.storage={cluster.layout.containerd_root}")
        options = [word for value in values for word in ("--set", value)]
        cluster.helm("install", "chrek", CHART, "--namespace", name, *options, "--wait", "--timeout=120s")
        try:
            yield Installed(workspace, store)
        finally:
            cluster.helm("uninstall", "chrek", "--namespace", name)
            workspace.core.delete_persistent_volume(name)
            flow.remove_signals()


def test_agent_is_ready_with_everything_it_needs(installed: Installed) -> None:
    """`chrek doctor` in the agent's pod finds nothing missing, and `chrek list` the store."""
    doctor = installed.kubectl("exec", "daemonset/chrek-agent", "--", "chrek", "doctor", "--json")
    said = json.loads(doctor)
    assert said["ok"], said["findings"]
    assert "No checkpoints" in installed.kubectl("exec", "daemonset/chrek-agent", "--", "chrek", "list")


def test_seccomp_profile_is_on_the_node(installed: Installed) -> None:
    """A pod that names the installed profile runs under it."""
    profile = KUBELET_ROOT / "seccomp" / "chrek" / "block-io-uring.json"
    assert json.loads(profile.read_text())["defaultAction"] == "SCMP_ACT_ALLOW"
    manifest = flow.restored("filtered", "none", image=ENABLED)
    manifest["metadata"]["labels"] = {}
    (main,) = manifest["spec"]["containers"]
    main["env"] = []
    main["securityContext"] = {
        "seccompProfile": {"type": "Localhost", "localhostProfile": "chrek/block-io-uring.json"},
    }
    installed.workspace.apply(manifest)
    installed.workspace.ready("filtered")
    assert "Seccomp:\t2" in installed.workspace.exec("filtered", "cat", "/proc/1/status").output


def test_guide_from_job_to_restored_pod(installed: Installed) -> None:
    """The guide's Job completes, `chrek list` shows its checkpoint, and the guide's Pod goes on from there."""
    workspace = installed.workspace
    workspace.apply(flow.example(workspace, "guide/checkpoint-job.yaml", image=ENABLED))
    workspace.wait(
        kubernetes.client.BatchV1Api(workspace.api).list_namespaced_job,
        lambda job: any(each.type == "Complete" and each.status == "True" for each in job.status.conditions or []),
        what="checkpoint job complete",
        seconds=120,
    )
    said = flow.events(workspace, flow.pod_of_job(workspace, "checkpoint-my-model"))
    assert "CheckpointCreated" in said, said
    token = flow.token(installed.kubectl("logs", "job/checkpoint-my-model", "--container=main"))
    assert "abc123def456" in installed.kubectl("exec", "daemonset/chrek-agent", "--", "chrek", "list")
    workspace.apply(flow.example(workspace, "guide/restore-pod.yaml", image=ENABLED))
    workspace.ready("my-app-restored")
    assert flow.wait_annotation(workspace, "my-app-restored", flow.START).startswith("restored")
    pod = workspace.core.read_namespaced_pod("my-app-restored", workspace.namespace)
    workspace.wait_log("my-app-restored", "serving")
    assert flow.ask(pod)["token"] == token


def test_unprivileged_pod_is_captured_and_restored_by_the_agent(installed: Installed) -> None:
    """Neither pod has a privilege or a volume, and the second goes on from where the first was captured."""
    workspace = installed.workspace
    workspace.apply(flow.job("source", "unprivileged", image=ENABLED))
    assert workspace.ended("source").status.phase == "Succeeded", workspace.logs("source")
    token = flow.token(workspace.logs("source"))
    workspace.apply(flow.restored("restored", "unprivileged", image=ENABLED))
    pod = workspace.ready("restored")
    assert flow.wait_annotation(workspace, "restored", flow.START).startswith("restored")
    assert flow.ask(pod)["token"] == token
    words = ("exec", "daemonset/chrek-agent", "--", "chrek", "gc", "--max-count", "0", "--dry-run", "--json")
    kept = {each["id"] for each in json.loads(installed.kubectl(*words))["kept"]}
    assert "unprivileged" in kept


def _worker(installed: Installed) -> HostPid:
    """The agent's process that captures, once there is one."""
    found: list[HostPid] = []

    def look() -> bool:
        pods = installed.workspace.core.list_namespaced_pod(
            installed.workspace.namespace, label_selector="app.kubernetes.io/name=chrek"
        ).items
        groups = [each.metadata.uid for each in pods] + [each.metadata.uid.replace("-", "_") for each in pods]
        for name in filter(str.isdigit, os.listdir("/proc")):
            pid = HostPid(int(name))
            ours = any(group in (procfs.read_text(pid, "cgroup") or "") for group in groups)
            if ours and any(word.endswith("/agent/worker.py") for word in procfs.command_line(pid)):
                found.append(pid)
        return bool(found)

    until(look, "a capture is under way")
    return found[0]


def test_upgrade_with_a_capture_under_way(installed: Installed) -> None:
    """The old agent undoes its capture and ends, the application lives, the new one captures it: one CheckpointCreated."""
    workspace = installed.workspace
    job = flow.job("upgraded", "upgraded", image=ENABLED)
    job["spec"]["containers"][0]["env"].append({"name": "MODEL_MB", "value": "256"})
    workspace.apply(job)
    worker = _worker(installed)
    # Held in the middle, so that the upgrade finds it there.
    os.kill(worker, signal.SIGSTOP)
    try:
        old = workspace.core.list_namespaced_pod(
            workspace.namespace, label_selector="app.kubernetes.io/name=chrek"
        ).items[0]
        place = ("--namespace", workspace.namespace)
        workspace.cluster.helm("upgrade", "chrek", CHART, *place, "--reuse-values", "--set", "capture.retries=1")
        name = old.metadata.name
        workspace.wait_pod(name, lambda pod: pod.metadata.deletion_timestamp is not None, what="old agent told to end")
    finally:
        os.kill(worker, signal.SIGCONT)
    installed.kubectl("rollout", "status", "daemonset/chrek-agent", "--timeout=120s")
    assert flow.wait_annotation(workspace, "upgraded", flow.RESULT, seconds=120).startswith("created ")
    assert workspace.ended("upgraded").status.phase == "Succeeded"
    assert flow.events(workspace, "upgraded") == ["CheckpointStarted", "CheckpointCreated"]
    assert not list((installed.store / ".staging").iterdir())
    workspace.apply(flow.restored("after-upgrade", "upgraded", image=ENABLED))
    workspace.ready("after-upgrade")
    assert flow.wait_annotation(workspace, "after-upgrade", flow.START).startswith("restored")


def test_uninstall_needs_no_agent_to_delete_pods(installed: Installed) -> None:
    """Nothing that ChReK puts on pods (finalizers above all) keeps them from being deleted."""
    with pytest.raises(ClusterError, match="NotFound"):
        installed.kubectl("get", "pod", "nobody")
    for each in installed.workspace.core.list_namespaced_pod(installed.workspace.namespace).items:
        assert not each.metadata.finalizers or each.metadata.owner_references

"""A store that is full or cannot be written, and signal files that a container cannot take itself."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from chrek.store import Store
from chrekcli import chrek, chrek_json
from cluster import flow
from cluster.agents import Agent
from cluster.appimage import app_image
from cluster.rights import without
from cluster.workspace import Manifest, Workspace, pod
from sample_store import publish


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_store(workspace: Workspace, tmp_path: Path, small: Path) -> None:
    """A checkpoint that does not fit is refused before the application is touched, with the bytes that are missing."""
    with Agent(workspace, tmp_path, store=str(small)) as agent:
        workspace.apply(flow.job("full", "full", image=app_image(workspace.cluster)))
        assert flow.wait_annotation(workspace, "full", flow.RESULT).startswith("refused/NO_SPACE ")
        ended = workspace.ended("full").status.container_statuses[0].state.terminated
        assert ended.exit_code == 172
        assert agent.metric("chrek_checkpoint_operations_total", outcome="refused", reason="NO_SPACE") == 1


def test_store_that_cannot_be_written(workspace: Workspace, tmp_path: Path, small: Path) -> None:
    """With a read-only store the agent is not ready, and a capture fails with the file system's own words."""
    with Agent(workspace, tmp_path, store=str(small)) as agent:
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        workspace.apply(flow.job("readonly", "readonly", image=app_image(workspace.cluster)))
        assert flow.wait_annotation(workspace, "readonly", flow.RESULT).startswith("failed/WRITE_FAILED ")
        assert "Read-only" in flow.wait_event(workspace, "readonly", "CheckpointFailed")
        assert workspace.ended("readonly").status.container_statuses[0].state.terminated.exit_code == 170
        assert agent.get("/readyz")[0] == 503


def test_signal_file_behind_a_read_only_mount(workspace: Workspace, tmp_path: Path) -> None:
    """Where a container mounts the node's folder of signals read-only, the agent writes through its own mount of it."""
    job = flow.job("signalled", "signalled", image=app_image(workspace.cluster))
    (main,) = job["spec"]["containers"]
    main["env"][0]["value"] = "/checkpoint-signal/signalled.done"
    main["volumeMounts"] = [{"name": "signal", "mountPath": "/checkpoint-signal", "readOnly": True}]
    folder = {"path": str(flow.SIGNALS), "type": "DirectoryOrCreate"}
    job["spec"]["volumes"] = [{"name": "signal", "hostPath": folder}]
    signals = {"host_path": str(flow.SIGNALS), "mounted_at": str(flow.SIGNALS)}
    with Agent(workspace, tmp_path, signals=signals):
        try:
            workspace.apply(job)
            assert flow.wait_annotation(workspace, "signalled", flow.RESULT).startswith("created ")
            assert workspace.ended("signalled").status.phase == "Succeeded"
            assert json.loads((flow.SIGNALS / "signalled.done").read_text())["success"] is True
        finally:
            flow.remove_signals()


def _with_id(name: str, checkpoint_id: str, *, script: str = "exec sleep 1000", **metadata: object) -> Manifest:
    """A pod that names an id, and of which the agent wants nothing."""
    env = [{"name": "DYN_CHECKPOINT_HASH", "value": checkpoint_id}] if checkpoint_id else []
    manifest = pod(name, script, container={"env": env})
    manifest["metadata"] |= metadata
    return manifest


def test_collection_keeps_what_pods_name(workspace: Workspace, tmp_path: Path) -> None:
    """`chrek gc` deletes no checkpoint that a pod names which has not ended, wherever it runs; unknown ids stop it."""
    with Store.open(tmp_path / "store", create=True) as store:
        for name in ("running", "waiting", "labelled", "ended", "nobody"):
            publish(store, name)
    workspace.apply(
        _with_id("runs", "running"),
        {**(waits := _with_id("waits", "waiting")), "spec": {**waits["spec"], "nodeSelector": {"no": "such-node"}}},
        _with_id("label", "", labels={"nvidia.com/checkpoint-hash": "labelled"}),
        _with_id("done", "ended", script="exit 0"),
    )
    workspace.ended("done")
    collect = ("gc", "--max-count", "0", "--kubeconfig", str(without(workspace, tmp_path, ("pods", "patch"))))
    denied = chrek(*collect, store=tmp_path / "store")
    assert denied.returncode == 1
    assert "API_FAILED" in denied.stderr
    assert "--ignore-pods" in denied.stderr
    collect = ("gc", "--max-count", "0", "--kubeconfig", str(workspace.cluster.kubeconfig))
    said = chrek_json(*collect, store=tmp_path / "store")
    assert {each["id"] for each in said["kept"]} == {"running", "waiting", "labelled"}
    assert {each["name"] for each in said["actions"]} == {"ended", "nobody"}
    unknown = _with_id("unknown", "")
    field = {"fieldRef": {"fieldPath": "metadata.name"}}
    unknown["spec"]["containers"][0]["env"] = [{"name": "DYN_CHECKPOINT_HASH", "valueFrom": field}]
    workspace.apply(unknown)
    refused = chrek(*collect, store=tmp_path / "store")
    assert refused.returncode == 1
    assert f"Pod {workspace.namespace}/unknown takes the id" in refused.stderr
    assert not chrek_json(*collect, "--ignore-pods", "--keep", "running", store=tmp_path / "store")["kept"][1:]

"""What goes wrong on a cluster: every row of `situations.ALL` is made, and every column of it is asserted."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from chrek.artifact.manifest import read_manifest
from cluster import faults, flow
from cluster.agents import Agent
from cluster.appimage import COMMAND, app_image, other_image
from cluster.kube import Cluster
from cluster.kube.layout import BUSYBOX_IMAGE
from cluster.kube.processes import wait_for
from cluster.place import Place
from cluster.situations import (
    ALL,
    ENTRYPOINT,
    HERE,
    NOTHING,
    WITNESS,
    WRONG_ID,
    App,
    Fault,
    Kind,
    Situation,
    commands_of,
)
from cluster.terminal import AGENT_POD, Terminal, agent_pod
from cluster.workspace import Manifest, Workspace, is_ready

ROW = {row.name: row for row in ALL}
ROWS = [row for row in ALL if row.where == HERE]
WRONG = [row for row in ROWS if row.exit_code == 2]
CHECKPOINTS = [row for row in ROWS if row.kind is Kind.CHECKPOINT and row not in WRONG]
RESTORES = [row for row in ROWS if row.kind is Kind.RESTORE and row not in WRONG]


@dataclass(frozen=True)
class Scene(Place):
    """An agent with a store of its own file system, a claim on it, a checkpoint ``one``, and somebody who types."""

    terminal: Terminal

    def job(self, name: str, checkpoint_id: str) -> Manifest:
        """A checkpoint pod whose application prints its signal file."""
        return flow.job(name, checkpoint_id, image=self.image, args=[ENTRYPOINT, "sh", "-c", WITNESS])

    def pod(self, row: Situation) -> Manifest:
        """The pod of a row."""
        make = self.job if row.kind is Kind.CHECKPOINT else self.restored
        manifest = make(row.name, row.id)
        row.change.apply(manifest)
        if row.fault is Fault.SIDECAR:
            sidecar = {"name": "proxy", "image": BUSYBOX_IMAGE, "command": ["sleep", "1000"]}
            manifest["spec"]["containers"].append(sidecar)
        if row.fault is Fault.IMAGE:
            _main(manifest)["image"] = other_image(self.workspace.cluster)
        return manifest

    def remove(self, name: str) -> None:
        """Let a pod go at once."""
        self.workspace.core.delete_namespaced_pod(name, self.workspace.namespace, grace_period_seconds=0)


@pytest.fixture(scope="module")
def place(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """One agent and one checkpoint for all."""
    folder = tmp_path_factory.mktemp("situations")
    image = app_image(cluster)
    with (
        Workspace.make(cluster, f"situations-{os.getpid()}") as workspace,
        faults.mounted_store(folder) as store,
        faults.stand_in_driver(folder),
        Agent(workspace, folder, store=str(store)) as agent,
    ):
        flow.claim(workspace, store)
        (store / "models").mkdir()
        (store / "models" / "weights").write_text("one")
        try:
            workspace.apply(agent_pod(workspace, agent, folder, image=image))
            args = [ENTRYPOINT, "sh", "-c", WITNESS]
            workspace.apply(flow.job("source", "one", image=image, args=args, securityContext=NOTHING))
            assert flow.wait_annotation(workspace, "source", flow.RESULT).startswith("created ")
            workspace.ended("source")
            agent_is_there(workspace)
            token = flow.token(workspace.logs("source"))
            yield Scene(workspace, agent, image, token, Terminal.open(workspace, folder))
        finally:
            workspace.core.delete_persistent_volume(f"{workspace.namespace}-store")


def agent_is_there(workspace: Workspace) -> None:
    """Wait for the DaemonSet's pod."""
    workspace.wait(workspace.core.list_namespaced_pod, is_ready, what="agent's pod", label_selector=f"app={AGENT_POD}")


@pytest.mark.parametrize("row", CHECKPOINTS, ids=lambda row: row.name)
def test_checkpoint(place: Scene, row: Situation) -> None:
    """Signal file, events, codes, exit status, termination message and application are as the table says."""
    with faults.made(row.fault, place.agent.store, row.id):
        place.workspace.apply(place.pod(row))
        log = _outcome(place, row)
        _check_told(place, row)
        _check_signal(place, row, log)
        _check_commands(place, row)
    assert (place.agent.store / row.id).exists() == (row.next_pod not in ("", "cold/NOT_FOUND"))
    if "CheckpointCreated" in row.events:
        text = (place.agent.store / row.id / "manifest.json").read_bytes()
        assert read_manifest(text).volumes == ()  # the store, mounted in the pod, is nobody's own
    # It starts while the next rows are made.
    place.workspace.apply(place.restored(f"{row.name}-next", row.id))
    if row.exit_code is None:
        place.remove(row.name)


@pytest.mark.parametrize("row", CHECKPOINTS, ids=lambda row: row.name)
def test_next_pod(place: Scene, row: Situation) -> None:
    """A pod that was to be restored from the row's checkpoint, after `test_checkpoint`, has started as the table says."""
    start = flow.wait_annotation(place.workspace, f"{row.name}-next", flow.START)
    assert start.startswith(f"{row.next_pod} "), start
    place.remove(f"{row.name}-next")


@pytest.fixture(scope="module")
def after_wrong(place: Scene) -> str:
    """All pods that end at once, together; how a pod starts that names their checkpoint."""
    place.workspace.apply(*(place.pod(row) for row in WRONG))
    start = place.start(place.restored("after-wrong", WRONG_ID))
    place.remove("after-wrong")
    return start


@pytest.mark.parametrize("row", WRONG, ids=lambda row: row.name)
def test_wrong_environment(place: Scene, after_wrong: str, row: Situation) -> None:
    """A missing or malformed variable ends the container before the application starts, and is named."""
    _outcome(place, row)
    _check_told(place, row)
    _check_commands(place, row)
    assert after_wrong.startswith(row.next_pod)
    assert next(iter(row.change.env)) in place.workspace.logs(row.name)


@pytest.mark.parametrize("row", RESTORES, ids=lambda row: row.name)
def test_restore(place: Scene, row: Situation) -> None:
    """How the pod starts, what is said of it, and whose model it serves are as the table says."""
    if row.fault is Fault.GPUS and faults.no_stand_in():
        pytest.skip(faults.no_stand_in())
    if row.source is not None:
        source = place.job(f"{row.name}-source", row.id)
        row.source.apply(source)
        place.workspace.apply(source)
        result = flow.wait_annotation(place.workspace, f"{row.name}-source", flow.RESULT)
        assert result.startswith("created "), result
    with faults.made(row.fault, place.agent.store, row.id):
        place.workspace.apply(place.pod(row))
        if row.exit_code is None:
            start = _started(place, row)
            assert start.startswith(f"{row.next_pod} "), start
            assert (place.ask(row.name)["token"] == place.token) == (row.app is App.RESTORED)
        else:
            _outcome(place, row)
        _check_told(place, row)
        _check_commands(place, row)
    place.remove(row.name)


def _check_next_pod(place: Scene, row: Situation) -> None:
    """Start a pod that is to be restored from the row's checkpoint."""
    start = place.start(place.restored(f"{row.name}-next", row.id))
    assert start.startswith(f"{row.next_pod} "), start
    place.remove(f"{row.name}-next")


def _started(place: Scene, row: Situation) -> str:
    place.workspace.ready(row.name)
    return flow.wait_annotation(place.workspace, row.name, flow.START)


def _outcome(place: Scene, row: Situation) -> str:
    """Wait until it is known what came of it; check how the container is; return its log."""
    workspace = place.workspace
    main = "server" if row.fault is Fault.SIDECAR else "main"
    if row.exit_code is not None:
        (status,) = workspace.ended(row.name).status.container_statuses
        assert status.state.terminated.exit_code == row.exit_code, status.state.terminated
        said = status.state.terminated.message or ""
        assert said.startswith(row.ending), said
        assert bool(said) == bool(row.ending), said
    elif row.app is App.SERVES:
        workspace.ready(row.name)
    else:
        workspace.wait_pod(row.name, _runs, what=f"{row.name} runs")
        workspace.wait_log(row.name, "model loaded", container=main)
    if row.events:
        flow.wait_event(workspace, row.name, row.events[-1])
    elif row.name == "never-ready":
        _wait_for_failed_probes(place, row.name)
    log = workspace.logs(row.name, main)
    if row.app is App.WAITS:
        assert (
            workspace.exec(row.name, "sh", "-c", "grep -l server.py /proc/[0-9]*/cmdline", container=main).status == 0
        )
        assert workspace.exec(row.name, "test", "-e", "/tmp/signal.done", container=main).status == 1
    assert ("checkpoint finished" in log) == (row.app is App.TOLD)
    assert ("model loaded" in log) == (row.app is not App.NEVER)
    return log


def _check_told(place: Scene, row: Situation) -> None:
    """Compare the agent's events, the code in them, and its annotation."""
    told = tuple(flow.events(place.workspace, row.name))
    # A container that ends at once is seen by the agent, or is not.
    assert told == row.events or (row.exit_code == 2 and told == ("CheckpointRefused",)), told
    warned = [each for each in row.events if each.endswith(("Refused", "Failed"))]
    if warned:
        message = flow.wait_event(place.workspace, row.name, warned[-1])
        assert message.startswith(f"{row.code}: "), message
        assert message.endswith(tuple(".)")), message
    if row.signal != "none":
        result = flow.wait_annotation(place.workspace, row.name, flow.RESULT)
        assert result.startswith(f"{row.result} container="), result
    if row.kind is Kind.RESTORE and row.exit_code is None and row.code:
        said = place.workspace.exec(row.name, "cat", "/dev/termination-log").output
        assert said.startswith(row.ending), said


def _check_signal(place: Scene, row: Situation, log: str) -> None:
    """Compare the signal file, as the application printed it."""
    printed = log.rpartition("checkpoint finished\n")[2]
    if row.signal == "none":
        assert row.app is not App.TOLD
        return
    signal, _ = json.JSONDecoder().raw_decode(printed)
    assert signal["success"] is (row.signal == "success"), signal
    assert signal.get("reason", "success") == row.signal, signal
    assert signal["checkpoint_id"] == (row.id if row.signal == "success" else signal["checkpoint_id"])
    if not signal["success"]:
        assert signal["error"].startswith(f"{row.code}: "), signal
    pod = place.workspace.core.read_namespaced_pod(row.name, place.workspace.namespace)
    assert signal["pod_uid"] == pod.metadata.uid


def _check_commands(place: Scene, row: Situation) -> None:
    """Type what the troubleshooting page says, and find what it shows."""
    for command in commands_of(row):
        typed = command.run.replace("POD", row.name).replace("ID", row.id)
        printed = place.terminal.run(typed)
        assert command.shows in printed, f"$ {typed}\n{printed}"


def _runs(pod: Any) -> bool:  # noqa: ANN401 - the client's model
    statuses = pod.status.container_statuses
    return bool(statuses) and all(each.state.running for each in statuses)


def _wait_for_failed_probes(place: Scene, name: str) -> None:
    place.workspace.wait(
        place.workspace.core.list_namespaced_event,
        lambda event: event.reason == "Unhealthy" and (event.count or 0) >= 2,
        what="failed probes",
        field_selector=f"involvedObject.name={name}",
    )


def _main(manifest: Manifest) -> Manifest:
    main: Manifest = manifest["spec"]["containers"][0]
    return main


def _variable(manifest: Manifest, name: str, value: str | None) -> None:
    env = _main(manifest)["env"]
    env[:] = [each for each in env if each["name"] != name]
    if value is not None:
        env.append({"name": name, "value": value})


def test_unclear_container(place: Scene) -> None:
    """Of several containers none of which is named main, none is captured, until an annotation names one."""
    manifest = flow.job("several", "several", image=place.image)
    _main(manifest)["name"] = "server"
    sidecar = {"name": "proxy", "image": BUSYBOX_IMAGE, "command": ["sleep", "1000"]}
    manifest["spec"]["containers"].append(sidecar)
    place.workspace.apply(manifest)
    assert flow.wait_event(place.workspace, "several", "CheckpointRefused").startswith("CONTAINER_UNCLEAR: ")
    named = {"metadata": {"annotations": {"nvidia.com/checkpoint-container": "server"}}}
    place.workspace.core.patch_namespaced_pod("several", place.workspace.namespace, named)
    assert flow.wait_annotation(place.workspace, "several", flow.RESULT).startswith("created ")


def test_replace(place: Scene) -> None:
    """With the annotation a checkpoint of something else is replaced, and the new one is restored."""
    for name, mode in (("first", "1"), ("newer", "2")):
        manifest = flow.job(f"replace-{name}", "replaced", image=place.image)
        _main(manifest)["args"] = [*COMMAND, mode]
        manifest["metadata"]["annotations"] = {"nvidia.com/checkpoint-replace": "true"}
        place.workspace.apply(manifest)
        assert flow.wait_annotation(place.workspace, f"replace-{name}", flow.RESULT).startswith("created ")
    assert place.start(place.restored("replaced", "replaced")).startswith("restored ")
    assert place.ask("replaced")["token"] == flow.token(place.workspace.logs("replace-newer"))


def test_two_pods_of_one_id(place: Scene) -> None:
    """Of two pods of one id that are ready together one is captured and the other skipped; both end well."""
    for name in ("twin-a", "twin-b"):
        place.workspace.apply(flow.job(name, "twins", image=place.image))
    results = {
        flow.wait_annotation(place.workspace, name, flow.RESULT).split()[0]: name for name in ("twin-a", "twin-b")
    }
    assert results.keys() == {"created", "skipped"}
    for name in ("twin-a", "twin-b"):
        assert place.workspace.ended(name).status.phase == "Succeeded"
    row = replace(ROW["twin"], name=results["skipped"], checkpoint_id="twins")
    _check_told(place, row)
    _check_commands(place, row)
    _check_next_pod(place, row)


def test_crash_loop_is_given_up(place: Scene) -> None:
    """After three restored starts in a row that lived less than a minute the next one is cold."""
    manifest = place.restored("loop")
    manifest["spec"]["restartPolicy"] = "Always"
    place.workspace.apply(manifest)
    for _ in range(3):
        place.workspace.ready("loop")
        assert flow.wait_annotation(place.workspace, "loop", flow.START).startswith("restored ")
        with pytest.raises((OSError, http.client.HTTPException)):
            place.ask("loop", "/exit")
        place.workspace.wait_pod("loop", lambda pod: not _ready(pod), what="loop down")
    found = place.workspace.wait_pod(
        "loop",
        lambda pod: (pod.metadata.annotations or {}).get(flow.START, "").startswith("cold/RESTORE_GIVEN_UP "),
        what="a cold start",
        seconds=180,
    )
    assert found
    row = ROW["loop"]
    assert tuple(flow.events(place.workspace, "loop"))[-len(row.events) :] == row.events
    _check_commands(place, row)
    place.remove("loop")


def _ready(pod: Any) -> bool:  # noqa: ANN401 - the client's model
    return any(each.type == "Ready" and each.status == "True" for each in pod.status.conditions or [])


def test_waiting_for_a_checkpoint(place: Scene) -> None:
    """A pod that may wait for its checkpoint is restored as soon as there is one."""
    manifest = place.restored("patient", "late")
    _variable(manifest, "WAIT_FOR_CHECKPOINT", "true")
    _variable(manifest, "CHREK_AGENT_TIMEOUT", "60")
    place.workspace.apply(manifest)
    place.workspace.apply(flow.job("late", "late", image=place.image))
    assert flow.wait_annotation(place.workspace, "late", flow.RESULT).startswith("created ")
    place.workspace.ready("patient")
    assert flow.wait_annotation(place.workspace, "patient", flow.START).startswith("restored ")
    _check_told(place, ROW["patient"])
    _check_commands(place, ROW["patient"])


def test_metrics_and_health(place: Scene) -> None:
    """What was done is counted, and both health checks say ok."""
    assert place.agent.get("/healthz") == (200, "ok\n")
    assert place.agent.get("/readyz") == (200, "ok\n")
    assert place.agent.get("/nothing")[0] == 404
    assert place.agent.metric("chrek_checkpoint_operations_total", outcome="created") >= 1
    assert place.agent.metric("chrek_operations_in_progress", operation="checkpoint") == 0
    assert place.agent.metric("chrek_checkpoint_size_bytes_sum") > 20e6


def test_pod_deleted_during_a_capture(place: Scene) -> None:
    """Nothing is published of it, and the agent goes on."""
    manifest = flow.job("deleted", "deleted", image=place.image)
    _variable(manifest, "MODEL_MB", "400")
    place.workspace.apply(manifest)
    flow.wait_event(place.workspace, "deleted", "CheckpointStarted", seconds=60)
    place.workspace.core.delete_namespaced_pod("deleted", place.workspace.namespace)
    place.workspace.wait_gone("deleted")
    wait_for("the capture's end", 30, lambda: place.agent.metric("chrek_operations_in_progress") == 0)
    _check_told(place, ROW["deleted"])
    _check_commands(place, ROW["deleted"])
    _check_next_pod(place, ROW["deleted"])
    assert not (place.agent.store / ".staging" / "deleted").exists()

"""What goes wrong on a cluster: what everybody is told of it, how containers end, and what the next pod does."""

from __future__ import annotations

import http.client
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from cluster import flow
from cluster.appimage import COMMAND
from cluster.kube import Cluster
from cluster.kube.layout import BUSYBOX_IMAGE
from cluster.kube.processes import wait_for
from cluster.place import Place, make_place
from cluster.workspace import Manifest


@pytest.fixture(scope="module")
def place(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One agent and one checkpoint for all."""
    with make_place(cluster, tmp_path_factory.mktemp("agent"), "situations") as it:
        yield it


def _main(manifest: Manifest) -> Manifest:
    main: Manifest = manifest["spec"]["containers"][0]
    return main


def _variable(manifest: Manifest, name: str, value: str | None) -> None:
    env = _main(manifest)["env"]
    env[:] = [each for each in env if each["name"] != name]
    if value is not None:
        env.append({"name": name, "value": value})


def _no_probe(manifest: Manifest) -> None:
    del _main(manifest)["readinessProbe"]


def _other_label(manifest: Manifest) -> None:
    manifest["metadata"]["labels"]["nvidia.com/checkpoint-hash"] = "another"


def _shared_processes(manifest: Manifest) -> None:
    manifest["spec"]["shareProcessNamespace"] = True


def _other_volume(manifest: Manifest) -> None:
    manifest["spec"]["volumes"] = [{"name": "other", "emptyDir": {}}]
    _main(manifest)["volumeMounts"] = [{"name": "other", "mountPath": "/checkpoints"}]


def _other_command(manifest: Manifest) -> None:
    _main(manifest)["args"] = [*COMMAND, "--other"]
    _variable(manifest, "DYN_CHECKPOINT_HASH", "one")
    _variable(manifest, "DYN_CHECKPOINT_LOCATION", "/checkpoints/one")


def _bad_allow(manifest: Manifest) -> None:
    manifest["metadata"]["annotations"] = {"nvidia.com/checkpoint-allow": "PRIVILEGE_EXCEEDED"}


def _mistyped_allow(manifest: Manifest) -> None:
    manifest["metadata"]["annotations"] = {"nvidia.com/checkpoint-allow": "MEMORY"}


@dataclass(frozen=True)
class Case:
    """A checkpoint pod with a fault, the code of its refusal, and how its container ends."""

    name: str
    fault: Callable[[Manifest], None]
    code: str
    status: int = 172


REFUSED = [
    Case("probe", _no_probe, "NO_READINESS_PROBE"),
    Case("label", _other_label, "ID_MISMATCH"),
    Case("shared", _shared_processes, "POD_NOT_SUPPORTED"),
    Case("volume", _other_volume, "STORE_MISMATCH"),
    Case("taken", _other_command, "ID_IN_USE_DIFFERENT"),
    Case("allow", _bad_allow, "PRIVILEGE_EXCEEDED"),
    Case("typo", _mistyped_allow, "BAD_VALUE", status=170),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused_checkpoint(place: Place, case: Case) -> None:
    """A pod that cannot be captured is told at once: signal file, event with the code, exit code, annotation."""
    manifest = flow.job(case.name, f"id-{case.name}", image=place.image)
    case.fault(manifest)
    place.workspace.apply(manifest)
    assert flow.wait_annotation(place.workspace, case.name, flow.RESULT).startswith(f"refused/{case.code} ")
    assert flow.wait_event(place.workspace, case.name, "CheckpointRefused").startswith(f"{case.code}: ")
    ended = place.workspace.ended(case.name).status.container_statuses[0].state.terminated
    assert ended.exit_code == case.status, ended
    assert case.code in (ended.message or "")
    assert not (place.agent.store / f"id-{case.name}").exists()


@pytest.mark.parametrize(
    ("name", "variable", "value"),
    [
        ("missing", "DYN_CHECKPOINT_LOCATION", None),
        ("malformed", "DYN_CHECKPOINT_HASH", "../../etc"),
        ("boolean", "DEBUG", "perhaps"),
        ("s3", "DYN_CHECKPOINT_STORAGE_TYPE", "s3"),
    ],
)
def test_wrong_environment_ends_with_2(place: Place, name: str, variable: str, value: str | None) -> None:
    """A missing or malformed variable ends the container before the application starts, and names the variable."""
    manifest = flow.job(f"env-{name}", "environment", image=place.image)
    _variable(manifest, variable, value)
    place.workspace.apply(manifest)
    ended = place.workspace.ended(f"env-{name}").status.container_statuses[0].state.terminated
    assert ended.exit_code == 2
    assert variable in place.workspace.logs(f"env-{name}")


def test_unclear_container(place: Place) -> None:
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


def test_replace(place: Place) -> None:
    """With the annotation a checkpoint of something else is replaced, and the new one is restored."""
    for name, mode in (("first", "1"), ("newer", "2")):
        manifest = flow.job(f"replace-{name}", "replaced", image=place.image)
        _main(manifest)["args"] = [*COMMAND, mode]
        manifest["metadata"]["annotations"] = {"nvidia.com/checkpoint-replace": "true"}
        place.workspace.apply(manifest)
        assert flow.wait_annotation(place.workspace, f"replace-{name}", flow.RESULT).startswith("created ")
    assert place.start(place.restored("replaced", "replaced")).startswith("restored ")
    assert place.ask("replaced")["token"] == flow.token(place.workspace.logs("replace-newer"))


def test_two_pods_of_one_id(place: Place) -> None:
    """Of two pods of one id that are ready together one is captured and the other skipped; both end well."""
    for name in ("twin-a", "twin-b"):
        place.workspace.apply(flow.job(name, "twins", image=place.image))
    results = {flow.wait_annotation(place.workspace, name, flow.RESULT).split()[0] for name in ("twin-a", "twin-b")}
    assert results == {"created", "skipped"}
    for name in ("twin-a", "twin-b"):
        assert place.workspace.ended(name).status.phase == "Succeeded"


def test_damaged_checkpoint(place: Place) -> None:
    """A checkpoint with a changed byte is not restored; the pod starts cold and everybody is told."""
    source = (place.agent.store / "one").resolve()
    shard = source / "memory" / "shard-00"
    before = shard.read_bytes()
    damaged = bytearray(before)
    damaged[len(damaged) // 2] ^= 0xFF
    shard.write_bytes(damaged)
    try:
        start = place.start(place.restored("damaged"))
    finally:
        shard.write_bytes(before)
    assert start.startswith("cold/CORRUPT "), start
    assert place.ask("damaged")["token"] != place.token


def test_changed_manifest(place: Place) -> None:
    """A checkpoint whose manifest was changed is refused by name, and the pod starts cold."""
    manifest = (place.agent.store / "one").resolve() / "manifest.json"
    before = manifest.read_bytes()
    manifest.write_bytes(before.replace(b'"format_version"', b'"format_versio_"', 1))
    try:
        start = place.start(place.restored("unreadable"))
    finally:
        manifest.write_bytes(before)
    assert start.startswith("cold/CORRUPT "), start


def test_planted_files(place: Place) -> None:
    """A pipe as the ready file is no ready file; a signal path that leads out through a link is not followed."""
    manifest = flow.job("planted", "planted", image=place.image)
    script = "mkfifo /tmp/fifo; ln -s /etc /tmp/way; sleep 1000"
    _main(manifest)["args"] = [COMMAND[0], "bash", "-c", script]
    _main(manifest)["readinessProbe"] = {"exec": {"command": ["test", "-p", "/tmp/fifo"]}, "periodSeconds": 1}
    _variable(manifest, "DYN_CHECKPOINT_READY_FILE", "/tmp/fifo")
    _variable(manifest, "DYN_CHECKPOINT_SIGNAL_FILE", "/tmp/way/signal")
    place.workspace.apply(manifest)
    place.workspace.ready("planted")
    # Another capture goes from beginning to end meanwhile: nothing hangs on the pipe.
    place.workspace.apply(flow.job("beside", "beside", image=place.image))
    assert flow.wait_annotation(place.workspace, "beside", flow.RESULT).startswith("created ")
    assert flow.events(place.workspace, "planted") == []
    done = place.workspace.exec("planted", "bash", "-c", "rm /tmp/fifo; echo ready > /tmp/fifo")
    assert done.status == 0
    flow.wait_annotation(place.workspace, "planted", flow.RESULT)
    inside = place.workspace.exec("planted", "cat", "/etc/signal")
    assert "planted" in inside.output
    assert not (place.agent.store.parent / "signal").exists()


def test_crash_loop_is_given_up(place: Place) -> None:
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
    assert "RestoreGivenUp" in flow.events(place.workspace, "loop")


def _ready(pod: Any) -> bool:  # noqa: ANN401 - the client's model
    return any(each.type == "Ready" and each.status == "True" for each in pod.status.conditions or [])


def test_waiting_for_a_checkpoint(place: Place) -> None:
    """A pod that may wait for its checkpoint is restored as soon as there is one."""
    manifest = place.restored("patient", "late")
    _variable(manifest, "WAIT_FOR_CHECKPOINT", "true")
    _variable(manifest, "CHREK_AGENT_TIMEOUT", "60")
    place.workspace.apply(manifest)
    place.workspace.apply(flow.job("late", "late", image=place.image))
    assert flow.wait_annotation(place.workspace, "late", flow.RESULT).startswith("created ")
    place.workspace.ready("patient")
    assert flow.wait_annotation(place.workspace, "patient", flow.START).startswith("restored ")


def test_metrics_and_health(place: Place) -> None:
    """What was done is counted, and both health checks say ok."""
    assert place.agent.get("/healthz") == (200, "ok\n")
    assert place.agent.get("/readyz") == (200, "ok\n")
    assert place.agent.get("/nothing")[0] == 404
    assert place.agent.metric("chrek_checkpoint_operations_total", outcome="created") >= 1
    assert place.agent.metric("chrek_operations_in_progress", operation="checkpoint") == 0
    assert place.agent.metric("chrek_checkpoint_size_bytes_sum") > 20e6


def test_agent_killed_during_a_capture(place: Place) -> None:
    """The application lives on, and the next agent captures it."""
    manifest = flow.job("long", "long", image=place.image)
    _variable(manifest, "MODEL_MB", "200")
    place.workspace.apply(manifest)
    flow.wait_event(place.workspace, "long", "CheckpointStarted", seconds=60)
    place.agent.stop(signal.SIGKILL)
    place.agent.start()
    assert flow.wait_annotation(place.workspace, "long", flow.RESULT).startswith("created ")
    assert place.workspace.ended("long").status.phase == "Succeeded"
    assert flow.events(place.workspace, "long").count("CheckpointCreated") == 1
    marker = json.loads((place.agent.store / "long" / "checkpoint.done").read_text())
    assert marker["success"] is True


def test_pod_deleted_during_a_capture(place: Place) -> None:
    """Nothing is published of it, and the agent goes on."""
    manifest = flow.job("deleted", "deleted", image=place.image)
    _variable(manifest, "MODEL_MB", "400")
    place.workspace.apply(manifest)
    flow.wait_event(place.workspace, "deleted", "CheckpointStarted", seconds=60)
    place.workspace.core.delete_namespaced_pod("deleted", place.workspace.namespace)
    place.workspace.wait_gone("deleted")
    wait_for("the capture's end", 30, lambda: place.agent.metric("chrek_operations_in_progress") == 0)
    place.workspace.apply(flow.job("afterwards", "afterwards", image=place.image))
    assert flow.wait_annotation(place.workspace, "afterwards", flow.RESULT).startswith("created ")
    assert not (place.agent.store / ".staging" / "deleted").exists()


def test_failing_readiness_probe(place: Place) -> None:
    """A pod that is never ready is never captured, however long its ready file has been there."""
    manifest = flow.job("never", "never", image=place.image)
    _main(manifest)["readinessProbe"] = {"exec": {"command": ["false"]}, "periodSeconds": 1}
    place.workspace.apply(manifest)
    failing = place.workspace.wait(
        place.workspace.core.list_namespaced_event,
        lambda event: event.reason == "Unhealthy" and (event.count or 0) >= 3,
        what="three failed probes",
        field_selector="involvedObject.name=never",
    )
    assert failing
    assert place.workspace.exec("never", "test", "-f", "/tmp/ready").status == 0
    assert flow.events(place.workspace, "never") == []

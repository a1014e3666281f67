"""The agent restores pods that have no privilege, no volume and no CRIU of their own; one checkpoint serves all tests here."""

from __future__ import annotations

import http.client
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from chrek.system import initpublish
from cluster import flow
from cluster.agents import Agent
from cluster.appimage import app_image
from cluster.kube import Cluster
from cluster.place import NOTHING, Place, make_place
from cluster.workspace import Workspace, pod


@pytest.fixture(scope="module")
def place(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One capture of an unprivileged pod, for all."""
    with make_place(cluster, tmp_path_factory.mktemp("agent"), "agent") as it:
        yield it


def test_pod_without_any_capability_is_restored(place: Place) -> None:
    """It serves the captured model under its own name, and has no capability, a filter and no new privileges."""
    start = place.start(place.restored("bare", securityContext=NOTHING))
    assert start.startswith("restored seconds="), place.workspace.logs("bare")
    answer = place.ask("bare")
    assert (answer["token"], answer["host"]) == (place.token, "bare")
    assert flow.events(place.workspace, "bare") == ["Restored"]
    inside = place.workspace.exec("bare", "cat", f"/proc/{answer['pid']}/status").output
    fields = dict(line.split(":\t", 1) for line in inside.splitlines())
    assert {name: int(fields[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")} == dict.fromkeys(
        ("CapEff", "CapPrm", "CapBnd"), 0
    )
    assert (fields["Seccomp"], fields["NoNewPrivs"]) == ("2", "1")
    groups = [place.workspace.exec("bare", "cat", f"/proc/{pid}/cgroup").output for pid in (1, answer["pid"])]
    assert groups[0] == groups[1]


def test_exit_status_goes_through_the_kubelet(place: Place) -> None:
    """A restored application's own exit status is the container's."""
    place.start(place.restored("exits"))
    with pytest.raises((OSError, http.client.HTTPException)):
        place.ask("exits", "/exit")
    ended = place.workspace.ended("exits")
    assert ended.status.container_statuses[0].state.terminated.exit_code == 3


def test_restored_pod_is_captured_and_restored_again(place: Place) -> None:
    """A restored pod that asks for a checkpoint of another id gets one, and a third pod runs from that."""
    again = place.restored("second")
    again["metadata"]["labels"] |= {"nvidia.com/checkpoint-source": "true", "nvidia.com/checkpoint-hash": "two"}
    assert place.start(again).startswith("restored ")
    assert flow.wait_annotation(place.workspace, "second", flow.RESULT).startswith("created ")
    assert place.ask("second")["token"] == place.token
    assert place.start(place.restored("third", "two")).startswith("restored ")
    assert place.ask("third")["token"] == place.token


def test_no_checkpoint_starts_cold_at_once(place: Place) -> None:
    """Where there is no checkpoint the agent says so, and the pod does not wait for its deadline."""
    start = place.start(place.restored("none", "absent"))
    how, _, seconds = start.partition(" seconds=")
    assert how == "cold/NOT_FOUND"
    assert float(seconds) < 15
    assert flow.events(place.workspace, "none") == ["StartedCold"]


def test_less_memory_is_refused_and_starts_cold(place: Place) -> None:
    """A container with less memory than the application had is not restored, and everybody is told."""
    small = place.restored("small", resources={"limits": {"memory": "32Mi"}})
    small["spec"]["containers"][0]["env"].append({"name": "MODEL_MB", "value": "1"})
    assert place.start(small).startswith("cold/MEMORY_LIMIT ")
    assert place.ask("small")["token"] != place.token
    assert flow.events(place.workspace, "small") == ["RestoreRefused", "StartedCold"]


def test_failed_capture_ends_the_wait(place: Place) -> None:
    """A pod that waits for a checkpoint starts cold, with the capture's own reason, as soon as the capture is refused."""
    patient = place.restored("patient", "in-vain")
    wait = {"WAIT_FOR_CHECKPOINT": "true", "RESTORE_WAIT_TIMEOUT": "3000"}
    patient["spec"]["containers"][0]["env"] += [{"name": name, "value": value} for name, value in wait.items()]
    place.workspace.apply(patient)
    place.workspace.wait_pod("patient", lambda pod: pod.status.phase == "Running", what="patient runs")
    job = flow.job("refused", "in-vain", image=place.image)
    del job["spec"]["containers"][0]["readinessProbe"]
    place.workspace.apply(job)
    place.workspace.ready("patient")
    assert flow.wait_annotation(place.workspace, "patient", flow.START).startswith("cold/NO_READINESS_PROBE ")
    assert flow.wait_event(place.workspace, "patient", "RestoreRefused").startswith("NO_READINESS_PROBE: ")
    again = flow.job("good", "in-vain", image=place.image)
    place.workspace.apply(again)
    assert flow.wait_annotation(place.workspace, "good", flow.RESULT).startswith("created ")
    assert list((place.agent.store / ".failed").iterdir()) == []


def test_two_agents_of_one_node(place: Place, tmp_path: Path) -> None:
    """Side by side, as in a rolling update, they do and tell of each capture and each restore once."""
    numbers = range(3)
    with Agent(place.workspace, tmp_path, store=str(place.agent.store)) as other:
        restored = [each.metric("chrek_restore_operations_total", outcome="restored") for each in (place.agent, other)]
        for number in numbers:
            place.workspace.apply(flow.job(f"both-{number}", f"both-{number}", image=place.image))
            place.workspace.apply(place.restored(f"beside-{number}"))
        for number in numbers:
            source, pod = f"both-{number}", f"beside-{number}"
            assert flow.wait_annotation(place.workspace, source, flow.RESULT).startswith("created ")
            assert place.workspace.ended(source).status.phase == "Succeeded"
            assert flow.wait_annotation(place.workspace, pod, flow.START).startswith("restored ")
        after = [each.metric("chrek_restore_operations_total", outcome="restored") for each in (place.agent, other)]
        assert sum(after) - sum(restored) == len(numbers)
    for number in numbers:
        assert flow.events(place.workspace, f"both-{number}") == ["CheckpointStarted", "CheckpointCreated"]
        assert flow.events(place.workspace, f"beside-{number}") == ["Restored"]
        assert place.ask(f"beside-{number}")["token"] == place.token
        generations = place.agent.store / ".generations" / f"both-{number}"
        assert [each.name for each in generations.iterdir()] == ["1"]


def test_older_bundle(place: Place) -> None:
    """For a pod whose bundle reads the first format only, that is what the agent writes; it restores from it as ever."""
    own = Path(initpublish.__file__).read_text()
    older = own.replace(f"READS_FORMAT = {initpublish.READS_FORMAT}\n", "READS_FORMAT = 1\n")
    assert older != own
    place.workspace.apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "older"}, "data": {"initpublish.py": older}}
    )
    mounted = "/opt/chrek/lib/chrek/system/initpublish.py"
    mount = {"name": "older", "mountPath": mounted, "subPath": "initpublish.py"}
    job = flow.job("older", "older", image=place.image, volumeMounts=[mount])
    job["spec"]["volumes"] = [{"name": "older", "configMap": {"name": "older"}}]
    place.workspace.apply(job)
    assert flow.wait_annotation(place.workspace, "older", flow.RESULT).startswith("created ")
    assert json.loads((place.agent.store / "older" / "manifest.json").read_text())["format_version"] == 1
    assert place.start(place.restored("from-older", "older")).startswith("restored ")
    assert place.ask("from-older")["token"] == flow.token(place.workspace.logs("older"))


def test_killed_agent_repeats_nothing(place: Place) -> None:
    """An agent that is killed and started again tells no event twice, and captures nothing again."""
    before = flow.events(place.workspace, "source")
    created = (place.agent.store / "one" / "checkpoint.done").read_bytes()
    place.agent.stop(signal.SIGKILL)
    place.agent.start()
    assert place.start(place.restored("after")).startswith("restored ")
    assert flow.events(place.workspace, "source") == before
    assert (place.agent.store / "one" / "checkpoint.done").read_bytes() == created


def test_restricted_namespace(cluster: Cluster, tmp_path: Path) -> None:
    """A non-root pod that the restricted standard admits is captured and restored."""
    with Workspace.make(cluster, f"restricted-{os.getpid()}") as workspace, Agent(workspace, tmp_path) as agent:
        labels = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
        workspace.core.patch_namespace(workspace.namespace, labels)
        nobody = {**NOTHING, "runAsNonRoot": True, "runAsUser": 65534}
        image = app_image(cluster)
        workspace.apply(flow.job("source", "one", image=image, securityContext=nobody))
        assert flow.wait_annotation(workspace, "source", flow.RESULT).startswith("created ")
        place = Place(workspace, agent, image, flow.token(workspace.logs("source")))
        assert place.start(place.restored("pod", securityContext=nobody)).startswith("restored ")
        assert place.ask("pod")["token"] == place.token


def test_shared_memory_outlives_a_container(place: Place) -> None:
    """What a container leaves in /dev/shm is there at its next start: the count of short lives relies on that."""
    manifest = pod("lives", "[ -e /dev/shm/x ] && exec sleep 1000; touch /dev/shm/x", restartPolicy="Always")
    place.workspace.apply(manifest)
    found = place.workspace.wait_pod(
        "lives",
        lambda each: any(
            status.restart_count and status.state.running for status in each.status.container_statuses or []
        ),
        what="a second start that stays",
    )
    assert found.status.container_statuses[0].restart_count == 1


def test_damage_that_the_application_finds(place: Place) -> None:
    """A restored application that ends with 171 is not restored again: the next start is cold, at once."""
    manifest = place.restored("unusable")
    manifest["spec"]["restartPolicy"] = "Always"
    assert place.start(manifest).startswith("restored ")
    with pytest.raises((OSError, http.client.HTTPException)):
        place.ask("unusable", "/exit/171")
    place.workspace.wait_pod(
        "unusable",
        lambda pod: (pod.metadata.annotations or {}).get(flow.START, "").startswith("cold/RESTORE_GIVEN_UP "),
        what="a cold start",
        seconds=120,
    )
    place.workspace.ready("unusable")
    assert place.ask("unusable")["token"] != place.token

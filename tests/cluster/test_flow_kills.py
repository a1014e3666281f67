"""The agent is killed at every step of a capture and of a restore; what its successor finds, and what everybody is told."""

from __future__ import annotations

import hashlib
import json
import random
import signal
from collections.abc import Iterator

import pytest

from chrek.artifact import Level
from chrek.store import Store, open_checkpoint
from cluster import flow
from cluster.kube import Cluster
from cluster.place import NOTHING, Place, make_place

PHASE = "call:Captures._phase:phase="
CAPTURE = {
    "lease": "return:CheckpointLease.__enter__",
    "preflight": f"{PHASE}preflight",
    "dump": f"{PHASE}dump",
    "frozen": f"{PHASE}frozen",
    "finish": f"{PHASE}finish",
    "publish": f"{PHASE}publish",
    "published": "call:Captures._created",
    "signalled": "return:Captures._signal",
    "told": "call:Captures._note",
}
ALONE = ["dump", "frozen", "publish"]
"""Phases at which the worker is left behind, too, and has to find out."""

RESTORE_PHASE = "call:Restores._run.<locals>.on_phase:phase="
RESTORE = {
    "claimed": f"{RESTORE_PHASE}open",
    "criu": f"{RESTORE_PHASE}criu",
    "fill": f"{RESTORE_PHASE}fill",
    "hand-over": f"{RESTORE_PHASE}hand over",
    "report": "call:Restores._report:pod={pod}",
}


@pytest.fixture(scope="module")
def place(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One agent and one checkpoint for all."""
    with make_place(cluster, tmp_path_factory.mktemp("agent"), "kills") as it:
        yield it


CASES = [(name, False) for name in CAPTURE] + [(name, True) for name in ALONE]


@pytest.mark.parametrize(("step", "alone"), CASES, ids=[f"{name}{'-alone' * alone}" for name, alone in CASES])
def test_killed_during_a_capture(place: Place, step: str, alone: bool) -> None:
    """The application lives, the next agent captures it or says what the first had not: once, and nothing is left behind."""
    name = f"{step}-alone" if alone else step
    place.agent.stop(signal.SIGKILL)
    place.agent.start(until=CAPTURE[step], alone=alone)
    place.workspace.apply(flow.job(name, name, image=place.image, securityContext=NOTHING))
    assert place.agent.wait() == -signal.SIGKILL
    made = place.agent.store / name / "checkpoint.done"
    before = made.read_text() if step in {"published", "signalled", "told"} else None
    place.agent.start()
    assert flow.wait_annotation(place.workspace, name, flow.RESULT).startswith("created ")
    assert place.workspace.ended(name).status.phase == "Succeeded", place.workspace.logs(name)
    assert flow.events(place.workspace, name) == ["CheckpointStarted", "CheckpointCreated"]
    marker = json.loads(made.read_text())
    assert marker["success"] is True
    assert before is None or made.read_text() == before
    assert list((place.agent.store / ".staging").iterdir()) == []
    with Store.open(place.agent.store) as store, open_checkpoint(store, name) as checkpoint:
        assert checkpoint.verify(Level.FULL).ok
    if step in {"dump", "frozen"}:
        # It was stopped twice, and its memory is right.
        assert place.start(place.restored(f"from-{name}", name)).startswith("restored ")
        answer = place.ask(f"from-{name}")
        assert answer["token"] == flow.token(place.workspace.logs(name))
        assert answer["digest"] == _digest(answer["token"])


def _digest(token: str) -> str:
    """The digest of the model that the tests' server makes of a token."""
    numbers = random.Random(token)
    return hashlib.sha256(b"".join(numbers.randbytes(1 << 20) for _ in range(24))).hexdigest()


@pytest.mark.parametrize("step", ["signalled", "told"])
def test_killed_during_a_refusal(place: Place, step: str) -> None:
    """The pod has ended upon its signal file when the next agent comes, which says once what it was refused for."""
    name = f"no-{step}"
    place.agent.stop(signal.SIGKILL)
    place.agent.start(until=CAPTURE[step])
    job = flow.job(name, name, image=place.image, securityContext=NOTHING)
    del job["spec"]["containers"][0]["readinessProbe"]
    place.workspace.apply(job)
    assert place.agent.wait() == -signal.SIGKILL
    assert place.workspace.ended(name).status.container_statuses[0].state.terminated.exit_code == 172
    place.agent.start()
    assert flow.wait_annotation(place.workspace, name, flow.RESULT).startswith("refused/NO_READINESS_PROBE ")
    assert flow.wait_event(place.workspace, name, "CheckpointRefused").startswith("NO_READINESS_PROBE: ")
    assert flow.events(place.workspace, name) == ["CheckpointRefused"]


KILLED = [(name, False) for name in RESTORE] + [("criu", True), ("fill", True)]


@pytest.mark.parametrize(("step", "alone"), KILLED, ids=[f"{name}{'-alone' * alone}" for name, alone in KILLED])
def test_killed_during_a_restore(place: Place, step: str, alone: bool) -> None:
    """The pod serves, restored or from a cold start that says why, and is told of once; a restore that was left to itself works."""
    name = f"r-{step}-alone" if alone else f"r-{step}"
    place.agent.stop(signal.SIGKILL)
    place.agent.start(until=RESTORE[step].format(pod=f"{place.workspace.namespace}/{name}"), alone=alone)
    place.workspace.apply(place.restored(name, securityContext=NOTHING))
    assert place.agent.wait() == -signal.SIGKILL
    place.agent.start()
    place.workspace.ready(name)
    start = flow.wait_annotation(place.workspace, name, flow.START)
    restored = start.startswith("restored ")
    if alone or step == "report":
        assert restored, place.agent.log
    assert restored or start.startswith("cold/RESTORE_FAILED "), start
    assert (place.ask(name)["token"] == place.token) is restored
    flow.wait_event(place.workspace, name, "Restored" if restored else "RestoreFailed")
    assert flow.events(place.workspace, name) == (["Restored"] if restored else ["StartedCold", "RestoreFailed"])
    assert place.workspace.logs(name).count("chrek: start=") == 1

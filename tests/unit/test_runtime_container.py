"""What the runtimes answer is read the same, whichever runtime it is."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from chrek.errors import ChrekError, Reason, Refused
from chrek.runtime import Runtime
from chrek.runtime.container import from_status
from chrek.runtime.messages import ImageSpec, Metadata, Mount, Pair, State, Status, StatusResponse
from chrek.runtime.sockets import candidates, existing

DIGEST = "sha256:" + "0" * 64


def answer(info: object, *, state: State = State.RUNNING) -> StatusResponse:
    """A verbose answer that has been over the wire."""
    labels = {
        "io.kubernetes.container.name": "main",
        "io.kubernetes.pod.name": "app-0",
        "io.kubernetes.pod.namespace": "team",
        "io.kubernetes.pod.uid": "u-1",
    }
    status = Status(
        id="abc",
        metadata=Metadata("main", 2),
        state=int(state),
        started_at=1_700_000_000_000_000_000,
        image=ImageSpec("app:1"),
        image_ref=f"registry/app@{DIGEST}",
        labels=[Pair(key, value) for key, value in labels.items()],
        mounts=[Mount("/data", "/host/data", readonly=True)],
        log_path="/var/log/pods/x/main/2.log",
    )
    return StatusResponse.decode(StatusResponse(status, [Pair("info", json.dumps(info))]).encode())


# The keys that CRI-O's createContainerInfo writes; it has no snapshotter.
CRIO = {
    "sandboxID": "s",
    "pid": 4242,
    "privileged": False,
    "runtimeSpec": {"process": {"args": ["python3", "app.py"], "env": ["A=1", "EMPTY=", "A=2"]}},
}


def test_answer_of_crio() -> None:
    """Process id, spec, environment and image digest come from CRI-O's answer; later variables win."""
    container = from_status(answer(CRIO))
    assert container.pid == 4242
    assert container.command == ("python3", "app.py")
    assert container.environment == {"A": "2", "EMPTY": ""}
    assert container.image_digest == DIGEST
    assert (container.snapshotter, container.attempt, container.pod_uid) == (None, 2, "u-1")
    assert container.mounts[0].read_only


@pytest.mark.parametrize("state", [State.CREATED, State.EXITED, State.UNKNOWN])
def test_container_that_does_not_run_is_refused(state: State) -> None:
    """Only a running container is described; CREATED is recognised although a zero is not sent."""
    with pytest.raises(Refused) as caught:
        from_status(answer(CRIO, state=state))
    assert caught.value.reason is Reason.CONTAINER_GONE


@pytest.mark.parametrize("info", [{}, {"pid": 0, "runtimeSpec": {}}, {"pid": 5}, {"pid": "5", "runtimeSpec": {}}, []])
def test_answer_without_process_or_spec_is_an_error(info: object) -> None:
    """A runtime that does not say the process id or the spec is reported, never guessed."""
    with pytest.raises(ChrekError) as caught:
        from_status(answer(info))
    assert caught.value.reason is Reason.RUNTIME_UNREACHABLE


def test_sockets_are_looked_for_where_the_distributions_put_them(tmp_path: Path) -> None:
    """k3s, RKE2 and CRI-O are found below the host's root; a configured endpoint is the only one tried."""
    names = {str(path) for path in candidates(root=Path("/host"))}
    assert {"/host/run/k3s/containerd/containerd.sock", "/host/run/crio/crio.sock"} <= names
    assert candidates("unix:///run/x.sock", root=Path("/host")) == [Path("/host/run/x.sock")]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        assert existing([tmp_path / "none", tmp_path, tmp_path / "s"]) == [tmp_path / "s"]


def test_no_socket_at_all_is_reported_with_the_places(tmp_path: Path) -> None:
    """The error lists where was looked."""
    with pytest.raises(ChrekError, match=r"run/crio/crio\.sock") as caught:
        Runtime.find(root=tmp_path)
    assert caught.value.reason is Reason.RUNTIME_UNREACHABLE


def test_socket_that_speaks_no_cri_is_reported_with_what_it_said(tmp_path: Path) -> None:
    """A socket that nobody serves is named with gRPC's own status."""
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    with pytest.raises(ChrekError, match="UNAVAILABLE") as caught:
        Runtime.find(str(path).lstrip("/"), timeout=60)
    assert caught.value.reason is Reason.RUNTIME_UNREACHABLE

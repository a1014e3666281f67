"""One node at a time writes a checkpoint."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from chrek.errors import CaptureFailed, Reason, Refused
from chrek.kube import Api, CheckpointLease
from chrek.kube.leases import lease_name
from chrekcli import until
from cluster.workspace import Workspace

SHORT = 2
"""Seconds of a lease that nobody renews."""
LIVE = 12
"""Of one that is renewed: every four seconds, so that a busy machine has eight to come late."""
LONG = 600


@pytest.fixture
def api(workspace: Workspace) -> Iterator[Api]:
    """A connection as administrator."""
    connection = Api.connect(workspace.cluster.kubeconfig)
    yield connection
    connection.close()


def lease(
    workspace: Workspace, api: Api, holder: str, checkpoint_id: str = "Model_1", *, duration: int = LIVE
) -> CheckpointLease:
    """A lease with an id that is no name of an object."""
    return CheckpointLease(
        api, namespace=workspace.namespace, checkpoint_id=checkpoint_id, holder=holder, duration=duration
    )


def _leases(workspace: Workspace, api: Api) -> list[str]:
    return [each.metadata.name for each in api.coordination.list_namespaced_lease(workspace.namespace).items]


def test_second_node_is_refused_while_the_first_is_alive(workspace: Workspace, api: Api) -> None:
    """It is told who writes; another id is free; afterwards nothing is left."""
    with lease(workspace, api, "node-a") as first:
        with pytest.raises(Refused, match="node-a") as caught, lease(workspace, api, "node-b"):
            pass
        assert caught.value.reason is Reason.CAPTURE_IN_PROGRESS
        with lease(workspace, api, "node-b", "another"):
            assert len(_leases(workspace, api)) == 2
        first.check()
    assert _leases(workspace, api) == []


def test_lease_of_a_dead_node_is_taken_over(workspace: Workspace, api: Api) -> None:
    """Nobody renews: after its duration, and not before, another node has it."""
    dead = lease(workspace, api, "node-a", duration=SHORT)
    dead._create()
    started = time.monotonic()
    with lease(workspace, api, "node-b", duration=SHORT) as second:
        assert time.monotonic() - started >= SHORT - 0.5
        second.check()


@pytest.mark.timeout(LONG // 2)
def test_restarted_agent_goes_on_with_its_own_lease_at_once(workspace: Workspace, api: Api) -> None:
    """The same holder does not wait for itself."""
    lease(workspace, api, "node-a", duration=LONG)._create()
    with lease(workspace, api, "node-a", duration=LONG) as again:
        again.check()


def test_holder_that_was_overtaken_learns_it(workspace: Workspace, api: Api) -> None:
    """A holder whose lease somebody else has is told before it publishes, and does not delete the other's."""
    first = lease(workspace, api, "node-a", duration=SHORT)
    with first:
        # Without a resource version: a renewal meanwhile is no conflict.
        body = {"spec": {"holderIdentity": "node-b"}}
        api.coordination.patch_namespaced_lease(lease_name("Model_1"), workspace.namespace, body)
        assert first._lost.wait(60)
        with pytest.raises(CaptureFailed) as caught:
            first.check()
    assert caught.value.reason is Reason.LEASE_LOST
    assert first._read().spec.holder_identity == "node-b"


def test_two_agents_of_one_node_share_a_lease(workspace: Workspace, api: Api) -> None:
    """One that finds the other writing leaves its lease alone; one that goes on after the other keeps it."""
    first, second = lease(workspace, api, "node-a"), lease(workspace, api, "node-a")
    with first:
        busy = Refused(Reason.CAPTURE_IN_PROGRESS, "The first one writes.")
        with pytest.raises(Refused, match="first one"), second:
            raise busy
        assert len(_leases(workspace, api)) == 1
        second.__enter__()
    assert len(_leases(workspace, api)) == 1
    second.check()
    second.__exit__(None, None, None)
    assert _leases(workspace, api) == []


def test_deleted_lease_is_made_again(workspace: Workspace, api: Api) -> None:
    """A lease that somebody deletes by hand is no reason to give a capture up."""
    with lease(workspace, api, "node-a") as held:
        api.coordination.delete_namespaced_lease(lease_name("Model_1"), workspace.namespace)
        until(lambda: _leases(workspace, api), "a lease")
        held.check()
    assert _leases(workspace, api) == []


def test_lease_survives_a_short_absence_of_the_api_server_and_not_a_long_one(workspace: Workspace, api: Api) -> None:
    """Renewals that fail for less than the duration are made up for; longer ones count as lost."""
    with lease(workspace, api, "node-a", "x", duration=30) as held:
        workspace.cluster.stop("kube-apiserver", grace=0)
        held._stop.wait(30 / 3 + 1)  # over one renewal, at the least
        workspace.cluster.start("kube-apiserver")
        held.check()
        written = held._read().spec.renew_time
        until(lambda: held._read().spec.renew_time != written, "a renewal")
        held.check()
    with lease(workspace, api, "node-a", duration=SHORT) as short:
        workspace.cluster.stop("kube-apiserver", grace=0)
        try:
            assert short._lost.wait(60)
        finally:
            workspace.cluster.start("kube-apiserver")


def test_of_many_at_once_one_wins(workspace: Workspace, api: Api) -> None:
    """Eight nodes that start together: one has the lease, seven are refused."""
    barrier, finish = threading.Barrier(8), threading.Event()
    outcomes: list[str] = []

    def node(number: int) -> None:
        barrier.wait()
        try:
            with lease(workspace, api, f"node-{number}"):
                outcomes.append("won")
                finish.wait(60)
        except Refused:
            outcomes.append("refused")
            if outcomes.count("refused") == 7:
                finish.set()

    threads = [threading.Thread(target=node, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(outcomes) == ["refused"] * 7 + ["won"]

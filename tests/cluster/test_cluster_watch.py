"""The agent's view of its node's pods holds through whatever happens to the API server."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from chrek.kube import Api, Pod, PodWatch, annotate
from chrek.kube.api import ApiFailed
from chrek.kube.watch import WATCH_SECONDS
from cluster.workspace import Workspace, pod


@dataclass
class Seen:
    """What a watch has handed over, in order."""

    states: queue.Queue[tuple[str, Pod]] = field(default_factory=queue.Queue)
    trouble: queue.Queue[str] = field(default_factory=queue.Queue)

    def wait(self, kind: str, wanted: Callable[[Pod], bool], *, seconds: float = 60) -> Pod:
        """The next state of that kind that is as wanted."""
        deadline = time.monotonic() + seconds
        while True:
            found, state = self.states.get(timeout=max(0.01, deadline - time.monotonic()))
            if found == kind and wanted(state):
                return state

    def names(self) -> set[str]:
        """Names of everything handed over so far; takes it out of the queue."""
        found = set()
        while not self.states.empty():
            found.add(self.states.get()[1].name)
        return found


@pytest.fixture
def api(workspace: Workspace) -> Iterator[Api]:
    """A connection as administrator."""
    connection = Api.connect(workspace.cluster.kubeconfig)
    yield connection
    connection.close()


@pytest.fixture
def watching(workspace: Workspace, api: Api) -> Iterator[tuple[PodWatch, Seen]]:
    """A watch of the test's namespace on the only node."""
    seen = Seen()
    watch = PodWatch(
        api,
        node=workspace.cluster.node,
        namespace=workspace.namespace,
        on_pod=lambda each: seen.states.put(("pod", each)),
        on_gone=lambda each: seen.states.put(("gone", each)),
        on_trouble=seen.trouble.put,
    )
    watch.start()
    assert watch.wait_until_synced(30)
    yield watch, seen
    watch.stop()


def test_pod_is_followed_from_creation_to_deletion(workspace: Workspace, watching: tuple[PodWatch, Seen]) -> None:
    """Each state arrives with what the agent needs: uid, labels, variables, probe, container id, readiness."""
    watch, seen = watching
    probe = {"exec": {"command": ["true"]}, "periodSeconds": 1}
    manifest = pod("app", "exec sleep 1000", container={"env": [{"name": "A", "value": "1"}], "readinessProbe": probe})
    manifest["metadata"]["labels"] = {"nvidia.com/checkpoint-source": "true"}
    workspace.apply(manifest)
    ready = seen.wait("pod", lambda each: each.ready)
    assert (ready.namespace, ready.node, ready.phase) == (workspace.namespace, workspace.cluster.node, "Running")
    assert ready.labels["nvidia.com/checkpoint-source"] == "true"
    (container,) = ready.containers
    assert (container.variables, container.readiness_probe, container.running) == ({"A": "1"}, True, True)
    assert container.id.startswith("containerd://")
    assert [each.uid for each in watch.pods()] == [ready.uid]
    workspace.core.delete_namespaced_pod("app", workspace.namespace)
    assert seen.wait("pod", lambda each: each.deleting).uid == ready.uid
    assert seen.wait("gone", lambda _: True).uid == ready.uid


def test_pods_of_other_nodes_and_namespaces_never_arrive(workspace: Workspace, watching: tuple[PodWatch, Seen]) -> None:
    """The server selects: a pod bound elsewhere, or in another namespace, costs this node nothing."""
    _, seen = watching
    elsewhere = pod("elsewhere", "exit 0", nodeName="another-node")
    workspace.apply(elsewhere)
    with Workspace.make(workspace.cluster, f"{workspace.namespace}-other") as other:
        other.apply(pod("foreign", "exit 0"))
        other.ended("foreign")
    workspace.apply(pod("here", "exit 0"))
    seen.wait("pod", lambda each: each.name == "here" and each.phase == "Succeeded")
    assert seen.names() <= {"here"}


def test_nothing_is_lost_over_a_restart_of_the_api_server(
    workspace: Workspace, watching: tuple[PodWatch, Seen]
) -> None:
    """A pod deleted and one created around a killed API server both arrive; meanwhile attempts are spaced."""
    _, seen = watching
    workspace.apply(pod("before", "exec sleep 1000"))
    before = seen.wait("pod", lambda each: each.ready)
    workspace.cluster.stop("kube-apiserver", grace=0)
    down = time.monotonic()
    seen.trouble.get(timeout=30)
    seen.trouble.get(timeout=30)
    workspace.cluster.start("kube-apiserver")
    attempts = 2 + seen.trouble.qsize()
    assert attempts < 5 + (time.monotonic() - down), "the API server was asked more than about once a second"
    workspace.core.delete_namespaced_pod("before", workspace.namespace)
    workspace.apply(pod("after", "exec sleep 1000"))
    assert seen.wait("gone", lambda _: True).uid == before.uid
    seen.wait("pod", lambda each: each.name == "after" and each.ready)


def test_deletion_is_told_after_the_server_forgot_it(workspace: Workspace, api: Api) -> None:
    """With a resource version that is too old the watch lists anew, and a pod that is gone by then is reported."""
    seen = Seen()
    watch: Any = PodWatch(
        api,
        node=workspace.cluster.node,
        namespace=workspace.namespace,
        on_pod=lambda each: seen.states.put(("pod", each)),
        on_gone=lambda each: seen.states.put(("gone", each)),
        on_trouble=seen.trouble.put,
    )
    workspace.apply(pod("app", "exec sleep 1000"))
    workspace.ready("app")
    watch.start()
    known = seen.wait("pod", lambda _: True)
    watch.stop()
    workspace.core.delete_namespaced_pod("app", workspace.namespace)
    workspace.wait_gone("app")
    # A restarted API server's cache starts now: it does not know versions from before.
    workspace.cluster.restart("kube-apiserver")
    watch._stopping.clear()
    watch._informer._resource_version = "1"
    watch.start()
    try:
        assert seen.wait("gone", lambda _: True).uid == known.uid
    finally:
        watch.stop()


@pytest.mark.timeout(WATCH_SECONDS - 60)  # a stop that waits for the watch's own end fails
def test_stop_returns_at_once_while_the_api_server_is_away(
    workspace: Workspace, watching: tuple[PodWatch, Seen]
) -> None:
    """Neither a quiet watch nor a pause between attempts holds up the end, and no attempt follows it."""
    watch, seen = watching
    workspace.cluster.stop("kube-apiserver", grace=0)
    try:
        seen.trouble.get(timeout=30)
        watch.stop()
        assert seen.trouble.qsize() <= 1  # one that was under way
    finally:
        workspace.cluster.start("kube-apiserver")


@pytest.mark.timeout(WATCH_SECONDS - 60)  # a stop that was forgotten waits for the watch's own end
def test_stop_right_after_the_first_list_returns_at_once(workspace: Workspace, api: Api) -> None:
    """A stop between the watch's request and its answer is not forgotten."""
    for _ in range(20):
        watch = PodWatch(
            api,
            node=workspace.cluster.node,
            namespace=workspace.namespace,
            on_pod=lambda _: None,
            on_gone=lambda _: None,
            on_trouble=lambda _: None,
        )
        watch.start()
        assert watch.wait_until_synced(30)
        watch.stop()


def test_annotation_reaches_this_pod_and_no_successor(workspace: Workspace, api: Api) -> None:
    """An annotation is set; a pod of the same name but another uid is left alone."""
    workspace.apply(pod("app", "exec sleep 1000"))
    workspace.ready("app")
    seen: queue.Queue[Pod] = queue.Queue()
    watch = PodWatch(
        api,
        node=workspace.cluster.node,
        namespace=workspace.namespace,
        on_pod=seen.put,
        on_gone=lambda _: None,
        on_trouble=lambda _: None,
    )
    watch.start()
    first = seen.get(timeout=30)
    watch.stop()
    annotate(api, first, {"nvidia.com/checkpoint-start": "restored"})
    read = workspace.core.read_namespaced_pod("app", workspace.namespace)
    assert read.metadata.annotations["nvidia.com/checkpoint-start"] == "restored"
    workspace.core.delete_namespaced_pod("app", workspace.namespace)
    workspace.wait_gone("app")
    workspace.apply(pod("app", "exec sleep 1000"))
    with pytest.raises(ApiFailed) as caught:
        annotate(api, first, {"nvidia.com/checkpoint-start": "restored"})
    assert caught.value.status == 422

"""One agent for all namespaces: each has a store of its own, and none gets another's checkpoints unless it is shared."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import flow
from cluster.agents import Agent
from cluster.appimage import app_image
from cluster.kube import Cluster
from cluster.workspace import Workspace

_numbers = itertools.count(1)


@pytest.fixture
def namespaces(cluster: Cluster) -> Iterator[tuple[Workspace, Workspace, Workspace]]:
    """Three namespaces: an owner, a friend and a stranger."""
    number = next(_numbers)
    names = [f"{name}-{os.getpid()}-{number}" for name in ("owner", "friend", "stranger")]
    with (
        Workspace.make(cluster, names[0]) as owner,
        Workspace.make(cluster, names[1]) as friend,
        Workspace.make(cluster, names[2]) as stranger,
    ):
        yield owner, friend, stranger


def test_namespaces_are_tenants(tmp_path: Path, namespaces: tuple[Workspace, Workspace, Workspace]) -> None:
    """The owner's checkpoint is restored in a namespace it is shared with; elsewhere the same id is not there."""
    owner, friend, stranger = namespaces
    image = app_image(owner.cluster)
    shared = {owner.namespace: [friend.namespace]}
    with Agent(owner, tmp_path, scope="cluster", share_with=shared) as agent:
        owner.apply(flow.job("source", "one", image=image))
        assert flow.wait_annotation(owner, "source", flow.RESULT).startswith("created ")
        assert (agent.store / "namespaces" / owner.namespace / "one" / "checkpoint.done").exists()
        for workspace, start in ((owner, "restored "), (friend, "restored "), (stranger, "cold/NOT_FOUND ")):
            workspace.apply(flow.restored("pod", "one", image=image))
            assert flow.wait_annotation(workspace, "pod", flow.START).startswith(start)


def test_checkpoint_of_another_namespace_is_refused(
    tmp_path: Path, namespaces: tuple[Workspace, Workspace, Workspace]
) -> None:
    """Where two releases use one volume, a checkpoint is still its own namespace's: the manifest says whose."""
    owner, _, stranger = namespaces
    image = app_image(owner.cluster)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with Agent(owner, tmp_path / "first") as agent:
        owner.apply(flow.job("source", "one", image=image))
        assert flow.wait_annotation(owner, "source", flow.RESULT).startswith("created ")
        with Agent(stranger, tmp_path / "second", store=str(agent.store)):
            stranger.apply(flow.restored("pod", "one", image=image))
            assert flow.wait_annotation(stranger, "pod", flow.START).startswith("cold/TENANT_MISMATCH ")
            assert flow.wait_event(stranger, "pod", "RestoreRefused").startswith("TENANT_MISMATCH: ")

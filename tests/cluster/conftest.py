"""One cluster for the session, one namespace for each test."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING

import pytest

from cluster.kube import Cluster, Layout, missing
from cluster.kube.lifecycle import borrowed
from cluster.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator

_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the first test of a session the time to compile a cluster, minutes on a new machine."""
    # Those that start and remove clusters of their own come first: later one is there for everybody.
    items.sort(key=lambda item: item.path.name != "test_cluster_lifecycle.py" and item.path.parent.name == "cluster")
    here = os.path.dirname(__file__) + os.sep
    for item in items:
        if str(item.path).startswith(here):
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(900))
            # The Kubernetes client leaves its connections to the garbage collector.
            item.add_marker(pytest.mark.filterwarnings("ignore:Exception ignored in. <ssl.SSLSocket"))


def require(layout: Layout) -> None:
    """Skip with the reason where no cluster can be had; fail where CHREK_REQUIRE_CLUSTER says there must be one."""
    absent = missing(layout)
    if absent:
        message = "no test cluster here: " + "; ".join(absent)
        if os.environ.get("CHREK_REQUIRE_CLUSTER"):
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The session's cluster: the one that `up` has started, or one that ends with the session."""
    layout = Layout()
    require(layout)
    with borrowed(layout) as it:
        yield it


@pytest.fixture
def workspace(cluster: Cluster) -> Iterator[Workspace]:
    """A namespace of the test's own."""
    with Workspace.make(cluster, f"test-{os.getpid()}-{next(_numbers)}") as it:
        yield it

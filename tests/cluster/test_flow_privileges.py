"""A checkpoint of a pod with more rights in a pod with fewer: refused, or restored without them, as its owner says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cluster import flow
from cluster.kube import Cluster
from cluster.place import NOTHING, Place, make_place

ALLOW = "PRIVILEGE_EXCEEDED"


@pytest.fixture(scope="module")
def place(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """An agent, and a checkpoint ``more`` of a pod with a runtime's usual capabilities and no seccomp profile."""
    with make_place(cluster, tmp_path_factory.mktemp("privileges"), "privileges") as made:
        made.workspace.apply(flow.job("with-more", "more", image=made.image, securityContext={}))
        assert flow.wait_annotation(made.workspace, "with-more", flow.RESULT).startswith("created ")
        yield made


def lines(place: Place, name: str) -> dict[str, str]:
    """Return the status of the pod's restored server, as its container shows it."""
    text = place.workspace.exec(name, "sh", "-c", "cat /proc/[0-9]*/status").output
    servers = [part for part in text.split("Name:\t") if part.startswith("python")]
    assert servers
    return dict(line.split(":\t", 1) for line in servers[-1].splitlines() if ":\t" in line)


def test_refused(place: Place) -> None:
    """Without a word of the pod's, more rights than it has are refused, and it starts cold."""
    assert place.start(place.restored("refused", "more", securityContext=NOTHING)).startswith(f"cold/{ALLOW} ")
    message = flow.wait_event(place.workspace, "refused", "RestoreRefused")
    assert message.startswith(f"{ALLOW}: ")
    assert "CAP_" in message


@pytest.mark.parametrize("way", ["annotation", "variable"])
def test_allowed(place: Place, way: str) -> None:
    """With the code in the pod's annotation or environment it is restored, with nothing that the pod has not."""
    manifest = place.restored(way, "more", securityContext=NOTHING)
    if way == "annotation":
        manifest["metadata"]["annotations"] = {"nvidia.com/checkpoint-allow": ALLOW}
    else:
        manifest["spec"]["containers"][0]["env"].append({"name": "CHREK_ALLOW", "value": ALLOW})
    assert place.start(manifest).startswith("restored ")
    found = lines(place, way)
    assert {found[f"Cap{name}"].strip("0") for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {""}
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")


def test_what_stays_refused(place: Place) -> None:
    """What keeps tenants apart is no pod's to allow, in a restore neither."""
    manifest: dict[str, Any] = place.restored("tenant", "more", securityContext=NOTHING)
    manifest["metadata"]["annotations"] = {"nvidia.com/checkpoint-allow": "TENANT_MISMATCH"}
    assert place.start(manifest).startswith("cold/TENANT_MISMATCH ")

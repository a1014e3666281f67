"""The agent's settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chrek.agent.config import Config, load
from chrek.errors import Reason, UsageError


def _load(folder: Path, settings: object) -> Config:
    file = folder / "agent.json"
    file.write_text(json.dumps(settings))
    return load(file, node="n", namespace="ns")


def test_defaults_without_a_file() -> None:
    """Without a file there are one capture a GPU, two a node, 15 minutes each and no retries."""
    config = load(None, node="n", namespace="ns")
    assert (config.captures_per_gpu, config.captures_per_node, config.deadline_seconds, config.retries) == (
        1,
        2,
        900,
        0,
    )


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"captures_per_nod": 1}, "captures_per_nod"),
        ({"node": "other"}, "node"),
        ({"captures_per_node": 0}, "too small"),
        ({"captures_per_node": "2"}, "type int"),
        ({"port": True}, "type int"),
        ({"scope": "everywhere"}, "namespace, cluster"),
        ({"verify": "never"}, "full, sampled, off"),
        ({"share_with": {"a": "b"}}, "lists"),
        ({"signals": []}, "object"),
        (["a"], "object"),
    ],
)
def test_wrong_setting_is_named(tmp_path: Path, settings: object, complaint: str) -> None:
    """A setting that is unknown, of another type or out of range is refused by name."""
    with pytest.raises(UsageError, match=complaint) as caught:
        _load(tmp_path, settings)
    assert caught.value.reason is Reason.BAD_VALUE


@pytest.mark.parametrize(("node", "namespace"), [(None, "ns"), ("n", None), ("", "ns")])
def test_place_must_be_known(node: str | None, namespace: str | None) -> None:
    """An agent that does not know its node or namespace does not start."""
    with pytest.raises(UsageError, match=r"NODE_NAME|POD_NAMESPACE"):
        load(None, node=node, namespace=namespace)


def test_namespaces_are_tenants(tmp_path: Path) -> None:
    """A checkpoint is for its own namespace and those it is shared with, in that direction only."""
    config = _load(tmp_path, {"share_with": {"a": ["b"]}})
    assert config.may_use(owner="a", user="a")
    assert config.may_use(owner="a", user="b")
    assert not config.may_use(owner="b", user="a")
    assert not config.may_use(owner=None, user="a")


def test_each_namespace_has_its_part_of_a_wide_store(tmp_path: Path) -> None:
    """Cluster-wide, checkpoints are below namespaces/<namespace>; else the store is one namespace's."""
    assert _load(tmp_path, {"scope": "cluster", "store": "/s/"}).store_of("a") == "/s/namespaces/a"
    assert _load(tmp_path, {"store": "/s"}).store_of("a") == "/s"

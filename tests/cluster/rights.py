"""The chart's service account with less rights than the chart gives it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from cluster.kube.layout import CHECKOUT
from cluster.kube.processes import wait_for
from cluster.workspace import Manifest, Workspace, kubernetes

CHART = str(CHECKOUT / "deploy" / "helm" / "charts" / "chrek")
Rule = tuple[str, str]
"""Resource and verb."""

RULES: list[Rule] = [
    ("pods", "list"),
    ("pods", "watch"),
    ("pods", "patch"),
    ("events", "create"),
    ("leases", "get"),
    ("leases", "watch"),
    ("leases", "create"),
    ("leases", "update"),
    ("leases", "delete"),
]


def render(workspace: Workspace, tmp_path: Path, values: dict[str, Any]) -> list[Manifest]:
    """What helm makes of these values."""
    file = tmp_path / "values.json"
    file.write_text(json.dumps(values))
    text = workspace.cluster.helm("template", "chrek", CHART, "--namespace", workspace.namespace, "--values", str(file))
    return [document for document in yaml.safe_load_all(text) if document]


def without(workspace: Workspace, tmp_path: Path, removed: Rule) -> Path:
    """Make the chart's service account with one rule taken away; return a kubeconfig with a token of it."""
    manifests = render(workspace, tmp_path, {})
    for kind in ("ServiceAccount", "Role", "RoleBinding"):
        for manifest in (each for each in manifests if each["kind"] == kind):
            if kind == "Role":
                _take_away(manifest, removed)
            workspace.apply(manifest)
    for rule in RULES:
        if rule != removed:
            wait_for(f"permission {rule}", 30, functools.partial(_may, workspace, *rule))
    assert not _may(workspace, *removed)
    config = yaml.safe_load(workspace.cluster.kubeconfig.read_text())
    token = workspace.cluster.kubectl("create", "token", "chrek-agent", "--namespace", workspace.namespace).strip()
    config["users"] = [{"name": each["name"], "user": {"token": token}} for each in config["users"]]
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


def grant(workspace: Workspace, tmp_path: Path) -> None:
    """Give the chart's roles back as they are in the chart."""
    for manifest in (each for each in render(workspace, tmp_path, {}) if each["kind"] == "Role"):
        workspace.cluster.kubectl(
            "replace", "--namespace", workspace.namespace, "--filename=-", stdin=yaml.safe_dump(manifest)
        )


def _take_away(role: Manifest, removed: Rule) -> None:
    for rule in role["rules"]:
        if removed[0] in rule["resources"]:
            rule["verbs"] = [verb for verb in rule["verbs"] if verb != removed[1]]
    role["rules"] = [rule for rule in role["rules"] if rule["verbs"]]


def _may(workspace: Workspace, resource: str, verb: str) -> bool:
    attributes = {
        "namespace": workspace.namespace,
        "verb": verb,
        "group": "coordination.k8s.io" if resource == "leases" else "",
        "resource": resource,
    }
    user = f"system:serviceaccount:{workspace.namespace}:chrek-agent"
    review = kubernetes.client.AuthorizationV1Api(workspace.api).create_subject_access_review(
        {"spec": {"user": user, "resourceAttributes": attributes}}
    )
    return bool(review.status.allowed)

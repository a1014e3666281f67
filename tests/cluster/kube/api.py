"""The few calls to the API server that bringing it up needs, without a client library."""

from __future__ import annotations

import http.client
import json
import ssl
from typing import Any

from .layout import API_PORT, NODE_IP, Layout


def call(layout: Layout, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """Ask the API server as administrator; gives the status and the decoded answer.

    Raises:
        OSError, http.client.HTTPException: nobody answers (yet).
    """
    tls = ssl.create_default_context(cafile=str(layout.pki / "ca.crt"))
    tls.load_cert_chain(layout.pki / "admin.crt", layout.pki / "admin.key")
    connection = http.client.HTTPSConnection(NODE_IP, API_PORT, context=tls, timeout=10)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        is_json = (answer.getheader("Content-Type") or "").startswith("application/json")
        return answer.status, json.loads(text) if is_json else text.decode()
    finally:
        connection.close()


def answers(layout: Layout, path: str) -> bool:
    """Whether a GET of `path` succeeds."""
    try:
        status, _ = call(layout, "GET", path)
    except (OSError, http.client.HTTPException):
        return False
    return status == http.HTTPStatus.OK


def node_is_ready(layout: Layout, node: str) -> bool:
    """Whether the node has registered and calls itself Ready."""
    try:
        status, answer = call(layout, "GET", f"/api/v1/nodes/{node}")
    except (OSError, http.client.HTTPException):
        return False
    if status != http.HTTPStatus.OK:
        return False
    conditions = answer["status"].get("conditions", [])
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def kubelet_knows_its_pods(layout: Layout, node: str) -> bool:
    """Whether the kubelet answers and has every pod of its node; after a restart it first has none."""
    try:
        status, wanted = call(layout, "GET", f"/api/v1/pods?fieldSelector=spec.nodeName={node}")
        kubelet_status, known = call(layout, "GET", f"/api/v1/nodes/{node}/proxy/pods")
    except (OSError, http.client.HTTPException):
        return False
    if (status, kubelet_status) != (http.HTTPStatus.OK, http.HTTPStatus.OK):
        return False
    return _uids(wanted) <= _uids(known)


def _uids(listing: dict[str, Any]) -> set[str]:
    return {item["metadata"]["uid"] for item in listing.get("items") or []}

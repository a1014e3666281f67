"""Certificates and kubeconfigs, made by openssl.

Every component has a certificate of its own, as on a real cluster, so that RBAC and the node authorizer are
what a test meets. Key identifiers are set because Python 3.13's default TLS context insists on them.
"""

from __future__ import annotations

import base64
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .errors import ClusterError
from .layout import API_PORT, API_SERVICE_IP, NODE, NODE_IP, Layout

_CLIENT = "extendedKeyUsage=clientAuth"
_DAYS = "30"
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Identity:
    """A certificate: its file name, subject and extension."""

    name: str
    subject: str
    extension: str = _CLIENT
    kubeconfig: bool = True


def _server(*names: str) -> str:
    return "subjectAltName=" + ",".join(names)


IDENTITIES = (
    Identity("admin", "/O=system:masters/CN=admin"),
    Identity("controller-manager", "/CN=system:kube-controller-manager"),
    Identity("scheduler", "/CN=system:kube-scheduler"),
    Identity("proxy", "/CN=system:kube-proxy"),
    Identity("kubelet", f"/O=system:nodes/CN=system:node:{NODE}"),
    Identity("apiserver-kubelet", "/O=system:masters/CN=apiserver-kubelet", kubeconfig=False),
    Identity(
        "apiserver",
        "/CN=kube-apiserver",
        _server(
            "DNS:kubernetes",
            "DNS:kubernetes.default",
            "DNS:kubernetes.default.svc",
            f"IP:{NODE_IP}",
            f"IP:{API_SERVICE_IP}",
        ),
        kubeconfig=False,
    ),
    Identity("kubelet-server", f"/CN={NODE}", _server(f"DNS:{NODE}", f"IP:{NODE_IP}"), kubeconfig=False),
)


def write(layout: Layout) -> None:
    """Make the authority, every identity's key and certificate, and the kubeconfigs.

    Raises:
        ClusterError: openssl failed.
    """
    layout.pki.mkdir(parents=True, mode=0o700)
    config = layout.pki / "openssl.cnf"
    config.write_text("[req]\ndistinguished_name = dn\n[dn]\n")
    _openssl(
        layout, "req", "-x509", *_KEY, "-keyout", "ca.key", "-out", "ca.crt", "-days", _DAYS,
        "-subj", "/CN=chrek-test-cluster", "-addext", "basicConstraints=critical,CA:TRUE",
        "-addext", "keyUsage=critical,keyCertSign,cRLSign", "-addext", "subjectKeyIdentifier=hash",
    )  # fmt: skip
    for identity in IDENTITIES:
        _certificate(layout, identity)
        if identity.kubeconfig:
            _kubeconfig(layout, identity)
    _openssl(layout, "genrsa", "-out", "sa.key", "2048")
    _openssl(layout, "rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub")


def _certificate(layout: Layout, identity: Identity) -> None:
    _openssl(
        layout, "req", "-x509", *_KEY, "-CA", "ca.crt", "-CAkey", "ca.key", "-days", _DAYS,
        "-keyout", f"{identity.name}.key", "-out", f"{identity.name}.crt", "-subj", identity.subject,
        "-addext", identity.extension, "-addext", "subjectKeyIdentifier=hash",
        "-addext", "authorityKeyIdentifier=keyid",
    )  # fmt: skip


def _kubeconfig(layout: Layout, identity: Identity) -> None:
    name = identity.name
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [
            {
                "name": "test",
                "cluster": {
                    "server": f"https://{NODE_IP}:{API_PORT}",
                    "certificate-authority-data": _base64(layout.pki / "ca.crt"),
                },
            }
        ],
        "users": [
            {
                "name": name,
                "user": {
                    "client-certificate-data": _base64(layout.pki / f"{name}.crt"),
                    "client-key-data": _base64(layout.pki / f"{name}.key"),
                },
            }
        ],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
    }
    target = layout.run / f"{name}.kubeconfig"
    target.touch(mode=0o600)
    target.write_text(json.dumps(document, indent=1))


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _openssl(layout: Layout, verb: str, *arguments: str) -> None:
    config = ["-config", "openssl.cnf"] if verb == "req" else []
    done = subprocess.run(
        ["openssl", verb, *config, *arguments], cwd=layout.pki, capture_output=True, text=True, check=False, umask=0o077
    )
    if done.returncode != 0:
        message = f"openssl {verb} failed: {done.stderr.strip()[-500:]}"
        raise ClusterError(message)

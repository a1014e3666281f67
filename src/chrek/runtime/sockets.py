"""Where container runtimes listen.

The paths are the documented defaults of each distribution. The agent's own view of the host's ``/run`` may
lie below another root, and two runtimes may be there (Docker's containerd beside the kubelet's): the caller
takes the first that speaks CRI.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

DEFAULTS = (
    # containerd as packaged, kubeadm, the managed clouds
    "run/containerd/containerd.sock",
    # k3s and RKE2
    "run/k3s/containerd/containerd.sock",
    # CRI-O, OpenShift
    "run/crio/crio.sock",
    # k0s
    "run/k0s/containerd.sock",
    # MicroK8s
    "var/snap/microk8s/common/run/containerd.sock",
    # Docker behind cri-dockerd
    "run/cri-dockerd.sock",
)


def candidates(configured: str | None = None, *, root: Path = Path("/")) -> list[Path]:
    """Return the sockets to try, in order: only the configured one if there is one, else each default.

    A configured value may be written as the kubelet's ``--container-runtime-endpoint`` is (``unix:///run/...``).
    """
    names: Iterable[str] = DEFAULTS if configured is None else [configured.removeprefix("unix://").lstrip("/")]
    return [root / name for name in names]


def existing(paths: Iterable[Path]) -> list[Path]:
    """Return those of *paths* that are sockets."""
    return [path for path in paths if path.is_socket()]

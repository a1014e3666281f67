"""Where everything lies, and which addresses the cluster takes.

The node's address is the address of a bridge: pods hang on the bridge, the API server and the kubelet
listen only on it, and services are routed to it. Nothing the cluster does leaves the machine, and a pod's
packet to anywhere else fails at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[3]
"""The root of the source tree, which holds ``.cache``."""

NODE = "node1"
BRIDGE = "chrek-kube0"
NODE_IP = "10.244.0.1"
POD_RANGE = "10.244.0.0/24"
SERVICE_RANGE = "10.96.0.0/16"
API_SERVICE_IP = "10.96.0.1"
API_PORT = 6443
ETCD_PORT = 23790
PAUSE_IMAGE = "localhost/pause:1"
BUSYBOX_IMAGE = "localhost/busybox:1"

CRI_SOCKET = Path("/run/containerd/containerd.sock")
CONTAINERD_STATE = Path("/run/containerd")
KUBELET_ROOT = Path("/var/lib/kubelet")
CNI_PLUGINS = Path("/usr/lib/cni")
CNI_CACHE = Path("/var/lib/cni")
POD_LOGS = (Path("/var/log/pods"), Path("/var/log/containers"))


@dataclass(frozen=True)
class Layout:
    """The two folders of a cluster: `cache` outlives it, `run` is one cluster's and goes with it."""

    cache: Path = CHECKOUT / ".cache" / "cluster"
    run: Path = Path("/run/chrek-cluster")

    @property
    def binaries(self) -> Path:
        """kubeone, containerd, its shim and ctr."""
        return self.cache / "bin"

    @property
    def kubeone(self) -> Path:
        """All of Kubernetes, etcd and helm."""
        return self.binaries / "kubeone"

    @property
    def images(self) -> Path:
        """Image archives that every new cluster imports."""
        return self.cache / "images"

    @property
    def containerd_root(self) -> Path:
        """Unpacked images and layers: on disk, since /run may be memory."""
        return self.cache / "containerd"

    @property
    def pki(self) -> Path:
        """Certificates and keys."""
        return self.run / "pki"

    @property
    def logs(self) -> Path:
        """One file a process."""
        return self.run / "log"

    @property
    def kubeconfig(self) -> Path:
        """The cluster administrator's."""
        return self.run / "admin.kubeconfig"

    @property
    def ready(self) -> Path:
        """A file that exists from the moment the cluster is up until it goes down."""
        return self.run / "ready"

    @property
    def kept(self) -> Path:
        """A file that says that a person started this cluster: test sessions use it and leave it up."""
        return self.run / "kept"

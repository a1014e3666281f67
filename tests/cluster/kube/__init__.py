"""A real one-node Kubernetes for tests, started from nothing but Debian packages and Go modules.

The official builds are published through channels that a build machine may not reach, so the cluster is
compiled: all of Kubernetes' programs in one binary, and containerd (``go/``). Everything is the real
thing, run as plain processes on this machine: certificates, RBAC, a kubelet, a network plugin, services.

Rejected: kind, k3s and minikube need published images; envtest has no kubelet, and nearly everything that
ChReK does happens below the kubelet.

A cluster is one folder (`Layout.run`) plus what its processes make in the kernel. `down` removes both,
also what a killed `up` left. Only one cluster exists on a machine, because containerd's and the kubelet's
paths are the standard ones, as the manifests of real DaemonSets expect.
"""

from .cluster import Cluster
from .errors import ClusterError
from .layout import Layout
from .lifecycle import down, running, up
from .needs import missing

__all__ = ["Cluster", "ClusterError", "Layout", "down", "missing", "running", "up"]

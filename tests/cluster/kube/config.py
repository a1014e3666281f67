"""The configuration files of containerd, the network plugin, the kubelet and kube-proxy.

JSON is YAML, so these are plain dictionaries; only containerd reads TOML. What is set differs from a real
node's defaults only for a reason that is written here.
"""

from __future__ import annotations

import json

from .layout import (
    BRIDGE,
    CNI_PLUGINS,
    CONTAINERD_STATE,
    CRI_SOCKET,
    NODE,
    NODE_IP,
    PAUSE_IMAGE,
    POD_RANGE,
    SERVICE_RANGE,
    Layout,
)

_CONTAINERD = """\
version = 3
root = "{root}"
state = "{state}"
oom_score = 0
disabled_plugins = [
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.erofs", "io.containerd.snapshotter.v1.blockfile", "io.containerd.nri.v1.nri",
  "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing",
]

[grpc]
  address = "{socket}"

[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{pause}"

[plugins."io.containerd.cri.v1.runtime"]
  # Without CAP_SYS_RESOURCE a pod's oom_score_adj cannot be set below containerd's own.
  restrict_oom_score_adj = true
  disable_apparmor = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["{cni}"]
  conf_dir = "{run}/cni"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
  SystemdCgroup = false

[plugins."io.containerd.internal.v1.opt"]
  path = "{root}/opt"
"""


def write(layout: Layout) -> None:
    """Write every configuration file into the cluster's folder."""
    (layout.run / "cni").mkdir()
    containerd = _CONTAINERD.format(
        root=layout.containerd_root,
        state=CONTAINERD_STATE,
        socket=CRI_SOCKET,
        pause=PAUSE_IMAGE,
        cni=CNI_PLUGINS,
        run=layout.run,
    )
    (layout.run / "containerd.toml").write_text(containerd)
    for name, document in (
        ("cni/10-bridge.conflist", _network(layout)),
        ("kubelet.yaml", _kubelet(layout)),
        ("kube-proxy.yaml", _proxy(layout)),
    ):
        (layout.run / name).write_text(json.dumps(document, indent=1))


def _network(layout: Layout) -> dict[str, object]:
    bridge = {
        "type": "bridge",
        "bridge": BRIDGE,
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(layout.run / "ipam"),
            "ranges": [[{"subnet": POD_RANGE, "gateway": NODE_IP}]],
            # No default route: a pod reaches pods and services, anything else fails at once.
            "routes": [{"dst": SERVICE_RANGE}],
        },
    }
    return {"cniVersion": "0.4.0", "name": "chrek-test", "plugins": [bridge]}


def _kubelet(layout: Layout) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": NODE_IP,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(layout.pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": f"unix://{CRI_SOCKET}",
        "cgroupDriver": "cgroupfs",
        # Kubernetes 1.35 and later refuse cgroup v1 by default; build machines still have it.
        "failCgroupV1": False,
        "failSwapOn": False,
        # The defaults, -999, need CAP_SYS_RESOURCE.
        "oomScoreAdj": 0,
        "makeIPTablesUtilChains": False,
        "clusterDNS": [],
        "resolvConf": "",
        "volumePluginDir": str(layout.run / "volume-plugins"),
        "tlsCertFile": str(layout.pki / "kubelet-server.crt"),
        "tlsPrivateKeyFile": str(layout.pki / "kubelet-server.key"),
        "rotateCertificates": False,
        # A build machine's disk may be nearly full; that must neither evict pods nor remove images.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {
            "memory.available": "64Mi",
            "nodefs.available": "0%",
            "nodefs.inodesFree": "0%",
            "imagefs.available": "0%",
        },
        "enforceNodeAllocatable": ["pods"],
        # Faster than a real node's, so that tests wait less.
        "nodeStatusUpdateFrequency": "5s",
        "syncFrequency": "20s",
        "kubeAPIQPS": 300,
        "kubeAPIBurst": 600,
    }


def _proxy(layout: Layout) -> dict[str, object]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(layout.run / "proxy.kubeconfig")},
        # All its rules are in one table, which is easy to remove again.
        "mode": "nftables",
        "clusterCIDR": POD_RANGE,
        "hostnameOverride": NODE,
        "oomScoreAdj": 0,
        "bindAddress": NODE_IP,
        "nodePortAddresses": [f"{NODE_IP}/32"],
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }

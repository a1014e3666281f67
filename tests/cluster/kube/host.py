"""What a cluster changes on its host outside its own folder, and how that is taken back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from . import processes
from .errors import ClusterError
from .layout import (
    BRIDGE,
    CNI_CACHE,
    CONTAINERD_STATE,
    KUBELET_ROOT,
    NODE_IP,
    POD_LOGS,
    POD_RANGE,
    SERVICE_RANGE,
    Layout,
)

_SYSCTLS = (
    # the bridge plugin
    "net/ipv4/ip_forward",
    # the kubelet (protectKernelDefaults off)
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
_NETNS = Path("/run/netns")
_CGROUPS = Path("/sys/fs/cgroup")
FOLDERS = (CONTAINERD_STATE, KUBELET_ROOT, CNI_CACHE, *POD_LOGS)
"""Standard folders that a cluster makes and takes away; a machine that has them already is somebody's node."""


def remember(layout: Layout) -> None:
    """Note what `restore` will need, before anything is changed."""
    kept = {name: Path("/proc/sys", name).read_text() for name in _SYSCTLS if Path("/proc/sys", name).exists()}
    existing = [str(folder) for folder in (*FOLDERS, _NETNS) if folder.exists()]
    (layout.run / "host.json").write_text(json.dumps({"sysctls": kept, "folders": existing}))


def prepare() -> None:
    """Make the bridge with the node's address, the route of the services, and the kubelet's shared mount."""
    length = POD_RANGE.partition("/")[2]
    _command("ip", "link", "add", BRIDGE, "type", "bridge")
    _command("ip", "address", "add", f"{NODE_IP}/{length}", "dev", BRIDGE)
    _command("ip", "link", "set", BRIDGE, "up")
    _command("ip", "route", "add", SERVICE_RANGE, "dev", BRIDGE, "src", NODE_IP)
    CONTAINERD_STATE.mkdir(exist_ok=True)
    KUBELET_ROOT.mkdir(exist_ok=True)
    # `mountPropagation: Bidirectional` wants a shared mount; the host's own root is left as it is.
    _command("mount", "--bind", str(KUBELET_ROOT), str(KUBELET_ROOT))
    _command("mount", "--make-rshared", str(KUBELET_ROOT))


def restore(layout: Layout) -> None:
    """Take back everything, also what pods left; works on a half-made cluster as well.

    Raises:
        ClusterError: something is still mounted in a folder that would have to be deleted. A volume may be
            a folder of the host, so nothing is deleted then.
    """
    _kill_pods()
    _unmount(layout)
    for family in ("ip", "ip6"):
        _try("nft", "delete", "table", family, "kube-proxy")
    _try("ip", "link", "delete", BRIDGE)
    for group in _pod_cgroups():
        for folder, _, _ in os.walk(group, topdown=False):
            Path(folder).rmdir()
    left = _mounts(layout)
    if left:
        message = f"still mounted, so nothing was deleted: {', '.join(left)}; unmount them and run `down` again"
        raise ClusterError(message)
    before = _before(layout)
    for name, value in before.sysctls.items():
        Path("/proc/sys", name).write_text(value)
    for handle in _NETNS.glob("cni-*"):
        handle.unlink()
    if str(_NETNS) not in before.folders and _NETNS.exists() and not any(_NETNS.iterdir()):
        _NETNS.rmdir()
    _delete(layout.containerd_root, *(folder for folder in FOLDERS if str(folder) not in before.folders))


def forget(layout: Layout) -> None:
    """Remove the cluster's folder: the last step, since it holds what the others need."""
    _delete(layout.run)


@dataclass(frozen=True)
class _Before:
    sysctls: dict[str, str]
    folders: frozenset[str]


def _before(layout: Layout) -> _Before:
    try:
        noted = json.loads((layout.run / "host.json").read_text())
    except FileNotFoundError:
        # Stopped before anything was changed.
        return _Before({}, frozenset(str(folder) for folder in (*FOLDERS, _NETNS)))
    return _Before(noted["sysctls"], frozenset(noted["folders"]))


def _pod_cgroups() -> list[Path]:
    """The kubelet's tree in each hierarchy (cgroup v1) or in the one (v2)."""
    return [path for path in (_CGROUPS / "kubepods", *_CGROUPS.glob("*/kubepods")) if path.is_dir()]


def _kill_pods() -> None:
    pids: set[int] = set()
    for group in _pod_cgroups():
        for listing in group.rglob("cgroup.procs"):
            pids.update(int(pid) for pid in listing.read_text().split())
    processes.end(pids, grace=0)


def _mounts(layout: Layout) -> list[str]:
    """Mount points of the cluster, deepest first."""
    ours = (
        f"{KUBELET_ROOT}/",
        f"{CONTAINERD_STATE}/",
        f"{layout.containerd_root}/",
        f"{layout.run}/",
        "/run/netns/cni-",
    )
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    found = [point for point in points if f"{point}/".startswith(ours) or point.startswith(ours[-1])]
    return sorted(found, reverse=True)


def _unmount(layout: Layout) -> None:
    for point in _mounts(layout):
        if _try("umount", point) != 0:
            _try("umount", "--lazy", point)


def _delete(*folders: Path) -> None:
    for folder in folders:
        if folder.exists():
            _command("rm", "-rf", "--one-file-system", str(folder))


def _command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        message = f"`{' '.join(words)}` failed: {done.stderr.strip()}"
        raise ClusterError(message)


def _try(*words: str) -> int:
    if shutil.which(words[0]) is None:
        return 127
    return subprocess.run(words, capture_output=True, check=False).returncode

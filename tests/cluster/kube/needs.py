"""What a machine must have before a cluster can be built and started here, each with its cure."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from . import build, processes
from .layout import CNI_PLUGINS, CRI_SOCKET, KUBELET_ROOT, Layout

PACKAGES = {
    "runc": "runc",
    "nft": "nftables",
    "ip": "iproute2",
    "openssl": "openssl",
    "busybox": "busybox-static",
    "buildah": "buildah",
    "debootstrap": "debootstrap",
}
"""Program and the Debian package it comes in."""
CNI_PACKAGE = "containernetworking-plugins"
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21}
_SETUP = "run `python3 -m tests.cluster.kube setup`"


def missing(layout: Layout) -> list[str]:
    """What is missing, in sentences; empty when a cluster can be built and started."""
    if platform.system() != "Linux":
        return ["this is not Linux"]
    if os.geteuid() != 0:
        return ["not root: containers, mounts and network links need it"]
    return [*_tools(), *_go(layout), *_kernel(), *_foreign(layout)]


def packages() -> list[str]:
    """Debian packages that are not installed."""
    absent = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    return absent if (CNI_PLUGINS / "bridge").exists() else [*absent, CNI_PACKAGE]


def _tools() -> list[str]:
    absent = packages()
    return [f"not installed: {', '.join(absent)}; {_SETUP}"] if absent else []


def _go(layout: Layout) -> list[str]:
    if build.is_current(layout):
        return []
    if shutil.which("go") is None:
        return ["no Go compiler, and no earlier build in .cache: install Go 1.26 or later"]
    version = subprocess.run(["go", "env", "GOVERSION"], capture_output=True, text=True, check=False).stdout.strip()
    numbers = version.removeprefix("go").split(".")[:2]
    if len(numbers) == 2 and all(part.isdecimal() for part in numbers) and [int(n) for n in numbers] < [1, 26]:
        return [f"Go is {version}; Kubernetes 1.36 needs 1.26 or later"]
    return []


def _kernel() -> list[str]:
    found = []
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:\t")[2].split()[0], 16)
    found += [f"root without {name}" for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]
    if "\toverlay\n" not in Path("/proc/filesystems").read_text() and shutil.which("modprobe"):
        subprocess.run(["modprobe", "overlay"], capture_output=True, check=False)
    if "\toverlay\n" not in Path("/proc/filesystems").read_text():
        found.append("the kernel has no overlay file system")
    if shutil.which("nft") and subprocess.run(["nft", "list", "tables"], capture_output=True, check=False).returncode:
        found.append("nftables do not work in this kernel (`nft list tables` fails)")
    groups = Path("/sys/fs/cgroup")
    if not os.access(groups, os.W_OK) or not any(groups.iterdir()):
        found.append("cgroups are not mounted for writing at /sys/fs/cgroup")
    return found


def _foreign(layout: Layout) -> list[str]:
    """Signs that the standard paths belong to somebody else."""
    if layout.run.exists() or processes.alive(layout):
        return []
    if CRI_SOCKET.exists():
        return [f"another containerd has {CRI_SOCKET}; stop it, or use a machine without one"]
    if KUBELET_ROOT.exists() and any(KUBELET_ROOT.iterdir()):
        return [f"{KUBELET_ROOT} is in use: this machine seems to be a node of a cluster already"]
    return []

"""The OCI runtime configuration of a test's container.

Unprivileged containers get what a Kubernetes pod of the restricted kind gets or less: runc's three default
capabilities, no_new_privs, masked and read-only paths. Privileged ones get all that this machine has to give.
Neither raises a resource limit or an oom_score_adj: that takes CAP_SYS_RESOURCE, which not every machine gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from containers.needs import effective_capabilities

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_CAPABILITIES = ("CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE")  # of `runc spec`
MASKED = (
    *("/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list"),
    *("/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"),
)
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
# linux/capability.h, in the order of their bits.
CAPABILITIES = (
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP"),
    *("LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER"),
    *("SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE"),
    *("SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP"),
    *("MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF"),
    "CHECKPOINT_RESTORE",
)

Json = dict[str, Any]


@dataclass(frozen=True)
class Mount:
    """One more mount of a container."""

    target: str
    source: str
    kind: str
    options: tuple[str, ...]

    @classmethod
    def bind(cls, source: Path | str, target: str, *, read_only: bool = False) -> Mount:
        """Show a directory or a file of the host in the container."""
        return cls(target, str(source), "bind", ("rbind", "ro" if read_only else "rw"))

    @classmethod
    def tmpfs(cls, target: str, *options: str) -> Mount:
        """Mount an empty tmpfs, as an emptyDir of medium Memory is one."""
        return cls(target, "tmpfs", "tmpfs", ("nosuid", "nodev", "mode=1777", *options))

    def json(self) -> Json:
        """Return the entry of config.json."""
        return {"destination": self.target, "source": self.source, "type": self.kind, "options": list(self.options)}


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a test asks of a container."""

    args: Sequence[str]
    hostname: str
    privileged: bool = False
    uid: int = 0
    gid: int | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    mounts: Sequence[Mount] = ()
    seccomp: Json | None = None
    capabilities: Sequence[str] | None = None
    no_new_privs: bool | None = None
    read_only: bool = False
    memory: int | None = None
    pids: int | None = None


def available_capabilities() -> list[str]:
    """Return the names of all capabilities that this process can hand on."""
    mask = effective_capabilities()
    return [f"CAP_{name}" for bit, name in enumerate(CAPABILITIES) if mask >> bit & 1]


def _process(wish: Wish) -> Json:
    capabilities = wish.capabilities
    if capabilities is None:
        capabilities = available_capabilities() if wish.privileged else DEFAULT_CAPABILITIES
    kinds = ("bounding", "permitted", "effective") if wish.uid == 0 else ("bounding",)
    env = {"PATH": PATH, "HOME": "/root" if wish.uid == 0 else "/", **wish.env}
    return {
        "terminal": False,
        "user": {"uid": wish.uid, "gid": wish.uid if wish.gid is None else wish.gid},
        "args": list(wish.args),
        "env": [f"{name}={value}" for name, value in env.items()],
        "cwd": wish.cwd,
        "capabilities": {kind: list(capabilities) for kind in kinds},
        "noNewPrivileges": not wish.privileged if wish.no_new_privs is None else wish.no_new_privs,
    }


def _mounts(wish: Wish, source: Path) -> list[Json]:
    sys_mode = "rw" if wish.privileged else "ro"
    plain = ("nosuid", "noexec", "nodev")
    kernel = [
        Mount("/proc", "proc", "proc", ()),
        Mount("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
        Mount("/dev/pts", "devpts", "devpts", (*plain[:2], "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")),
        Mount("/dev/shm", "shm", "tmpfs", (*plain, "mode=1777", "size=1g")),
        Mount("/dev/mqueue", "mqueue", "mqueue", plain),
        Mount("/sys", "sysfs", "sysfs", (*plain, sys_mode)),
        Mount.bind(source, "/opt/chrek/lib", read_only=True),
    ]
    return [entry.json() for entry in (*kernel, *wish.mounts)]


def config(wish: Wish, *, root: Path, source: Path, cgroup: str) -> Json:
    """Return config.json (OCI runtime specification 1.0.2)."""
    resources: Json = {"devices": [{"allow": wish.privileged, "access": "rwm"}]}
    if wish.memory is not None:
        resources["memory"] = {"limit": wish.memory}
    if wish.pids is not None:
        resources["pids"] = {"limit": wish.pids}
    linux: Json = {
        "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")],
        "resources": resources,
        "cgroupsPath": cgroup,
        "maskedPaths": [] if wish.privileged else list(MASKED),
        "readonlyPaths": [] if wish.privileged else list(READ_ONLY),
    }
    if wish.seccomp is not None:
        linux["seccomp"] = wish.seccomp
    return {
        "ociVersion": "1.0.2",
        "process": _process(wish),
        "root": {"path": str(root), "readonly": wish.read_only},
        "hostname": wish.hostname,
        "mounts": _mounts(wish, source),
        "linux": linux,
    }

"""What this machine has of what ChReK needs, each thing looked at for itself.

A finding is ``ok``, a ``warning`` (something works less well, or for fewer applications) or ``missing``
(captures or restores fail), the last two with what to do. Every check really does what it is about where that
is harmless: it opens the file, asks the program, makes the control group.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from chrek.criu.bundle import Bundle
from chrek.engine.container import closing_fd
from chrek.engine.estimate import PIPE_BYTES, lazy_limit
from chrek.errors import ChrekError
from chrek.system import cgroups, enter, initstate, mounts, procfs


class Level(Enum):
    """How good a finding is."""

    OK = "ok"
    WARNING = "warning"
    MISSING = "missing"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what is there, and what to do about it (empty when nothing)."""

    name: str
    level: Level
    text: str
    cure: str = ""


REQUIRED_CAPABILITIES = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "FOWNER": 3,
    "KILL": 5,
    "SETGID": 6,
    "SETUID": 7,
    "SETPCAP": 8,
    "NET_ADMIN": 12,
    "SYS_PTRACE": 19,
    "SYS_ADMIN": 21,
}
"""linux/capability.h. NET_ADMIN: repair mode of TCP sockets."""

WANTED_CAPABILITIES = {
    "SYS_RESOURCE": (24, "applications whose processes have several users, and raising limits"),
    "CHECKPOINT_RESTORE": (40, "choosing process ids without more privileges"),
    "SYS_CHROOT": (18, "entering the mount namespaces of containers"),
    "MKNOD": (27, "device files and deletions in a container's changes"),
}

MINIMUM_KERNEL = (5, 6)
"""openat2(2), pidfd_getfd(2), fsopen(2)."""

_FREE_BYTES = 1 << 30
_CRIU_SECONDS = 60


def examine(store: str) -> Iterator[Finding]:
    """Look at everything, in the order of what the rest depends on."""
    for check in CHECKS:
        yield from check()
    yield from _store(store)


def _ok(name: str, text: str) -> Finding:
    return Finding(name, Level.OK, text)


def _warning(name: str, text: str, cure: str) -> Finding:
    return Finding(name, Level.WARNING, text, cure)


def _missing(name: str, text: str, cure: str) -> Finding:
    return Finding(name, Level.MISSING, text, cure)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None


# --- the machine ------------------------------------------------------------------------------------


def _machine() -> Iterator[Finding]:
    found = f"{platform.system()} on {platform.machine()}"
    if found == "Linux on x86_64":
        yield _ok("machine", found)
    else:
        yield _missing("machine", found, "Use a Linux machine with an x86-64 processor.")
    release = platform.release()
    version = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    if version >= MINIMUM_KERNEL:
        yield _ok("kernel", f"Linux {release}")
    else:
        yield _missing("kernel", f"Linux {release} is too old", "Use Linux 5.6 or newer.")
    own = procfs.status(os.getpid())
    if own is not None and own.seccomp:
        text = "this program runs under a seccomp filter, which CRIU and what it restores would inherit"
        yield _warning("seccomp", text, "Run it outside the container, or with seccomp unconfined.")


def _rights() -> Iterator[Finding]:
    if os.geteuid() != 0:
        yield _missing(
            "root", f"this is user {os.geteuid()}", "Run `sudo chrek doctor`, and captures and restores too."
        )
    else:
        yield _ok("root", "yes")
    own = procfs.status(os.getpid())
    held = own.capabilities.get("CapEff", 0) if own else 0
    lacking = [f"CAP_{name}" for name, bit in REQUIRED_CAPABILITIES.items() if not held >> bit & 1]
    if lacking:
        yield _missing(
            "capabilities", f"lacking {', '.join(lacking)}", "Run as root outside a container, or privileged."
        )
    else:
        yield _ok("capabilities", "all that are required")
    for name, (bit, purpose) in WANTED_CAPABILITIES.items():
        if not held >> bit & 1:
            text = f"CAP_{name} is lacking: {purpose}"
            yield _warning("capabilities", text, "A privileged process on an ordinary machine has it.")


def _kernel_features() -> Iterator[Finding]:
    needed = {
        f"/proc/self/task/{os.getpid()}/children": "CONFIG_PROC_CHILDREN",
        "/proc/sys/kernel/ns_last_pid": "CONFIG_CHECKPOINT_RESTORE",
        "/proc/self/ns/pid": "CONFIG_PID_NS",
        "/proc/self/timens_offsets": "CONFIG_TIME_NS",
    }
    lacking = [option for path, option in needed.items() if not os.path.exists(path)]
    if lacking:
        cure = "Use a distribution's kernel, or build one with these options."
        yield _missing("kernel options", f"lacking {', '.join(lacking)}", cure)
    else:
        yield _ok("kernel options", "checkpoint/restore, PID and time namespaces")
    yield _ns_last_pid()
    scope = _read("/proc/sys/kernel/yama/ptrace_scope")
    if scope == "3":
        cure = "Set kernel.yama.ptrace_scope to 2 or less in /etc/sysctl.d and boot again (3 cannot be lowered)."
        yield _missing("ptrace", "Yama forbids all tracing (ptrace_scope 3)", cure)
    else:
        yield _ok("ptrace", "no Yama" if scope is None else f"Yama's ptrace_scope is {scope}, which root may pass")
    disabled = _read("/proc/sys/kernel/io_uring_disabled")
    if disabled == "2":
        yield _ok("io_uring", "off on this machine")
    else:
        yield _ok("io_uring", "on; applications under ChReK's init do not see it (CRIU cannot dump it)")


def _ns_last_pid() -> Finding:
    """Restored processes get their ids back by way of this file; containers often have it read-only."""
    try:
        with closing_fd(enter.open_proc()) as proc:
            os.close(os.open("sys/kernel/ns_last_pid", os.O_RDWR, dir_fd=proc))
    except OSError as error:
        cure = "Run as root outside a container, or privileged."
        return _missing("process ids", f"ns_last_pid cannot be written: {error.strerror or error}", cure)
    return _ok("process ids", "can be chosen")


def _proc() -> Iterator[Finding]:
    mine = [mount for mount in mounts.mounts(os.getpid()) if mount.point == "/proc" and mount.kind == "proc"]
    options = {option for mount in mine[-1:] for option in (*mount.options, *mount.super_options)}
    if not mine:
        yield _missing("/proc", "is not mounted", "mount -t proc proc /proc")
    elif "subset=pid" in options:
        yield _missing("/proc", "is mounted with subset=pid", "Mount it without that option.")
    elif any(option.startswith("hidepid=") and option not in {"hidepid=0", "hidepid=off"} for option in options):
        yield _ok("/proc", "hides processes of others from users (hidepid); root sees them")
    else:
        yield _ok("/proc", "shows all processes")


# --- programs ---------------------------------------------------------------------------------------


def _criu() -> Iterator[Finding]:
    try:
        bundle = Bundle.find()
        version = ".".join(map(str, bundle.version()))
        bundle.require()
    except ChrekError as error:
        yield _missing("CRIU", error.message, error.cure)
        return
    yield _ok("CRIU", f"{version} at {bundle.path}")
    if os.geteuid() != 0:
        yield _warning("CRIU's own check", "not run: it needs root", "Run `sudo chrek doctor`.")
        return
    with tempfile.TemporaryDirectory() as empty:
        try:
            done = subprocess.run(
                bundle.command("check"),
                capture_output=True,
                text=True,
                check=False,
                cwd=empty,
                env={"PATH": empty, "CRIU_LIBS_DIR": empty},
                timeout=_CRIU_SECONDS,
            )
        except subprocess.TimeoutExpired:
            yield _missing("CRIU's own check", f"no answer in {_CRIU_SECONDS} s", "Run `criu check` by hand.")
            return
    if done.returncode == 0:
        yield _ok("CRIU's own check", "looks good")
        return
    errors = re.findall(r"(?:Error|Warn) *\([^)]*\): *(.*)", done.stderr) or done.stderr.strip().splitlines()
    yield _missing("CRIU's own check", "; ".join(errors[-3:]), "The kernel lacks what the message names.")


def _programs() -> Iterator[Finding]:
    for name, purpose in (("runc", "`--container`"), ("containerd", "Kubernetes")):
        path = shutil.which(name)
        yield _ok(name, path or f"not installed; only {purpose} needs it")


# --- limits and places ------------------------------------------------------------------------------


def _limits() -> Iterator[Finding]:
    most = lazy_limit()
    text = f"a lazy dump of up to {most >> 30} GiB"
    if most < 4 << 30:
        cure = "Raise the hard limit of open files (ulimit -Hn, LimitNOFILE=); larger ones are dumped plainly, slower."
        yield _warning("open files", text, cure)
    else:
        yield _ok("open files", text)
    size = int(_read("/proc/sys/fs/pipe-max-size") or 0)
    if size < PIPE_BYTES:
        cure = f"sysctl fs.pipe-max-size={PIPE_BYTES}"
        yield _warning("pipes", f"fs.pipe-max-size is {size}: a lazy dump needs more of them", cure)
    else:
        yield _ok("pipes", f"fs.pipe-max-size is {size}")


def _control_groups() -> Iterator[Finding]:
    known = cgroups.hierarchies()
    if not known:
        text = "no control groups are mounted: CRIU shares its limits with this program"
        yield _warning("control groups", text, "mount -t cgroup2 none /sys/fs/cgroup")
        return
    version = "version 2" if all(not hierarchy.controllers for hierarchy in known) else "version 1 (or both)"
    if os.geteuid() != 0:
        yield _ok("control groups", version)
        return
    with cgroups.OwnGroup(f"doctor-{os.getpid()}") as group:
        made = len(group.descriptors)
    if made:
        yield _ok("control groups", f"{version}, and own groups can be made")
    else:
        text = f"{version}, but no group can be made: whoever kills this program's group kills CRIU with it"
        yield _warning("control groups", text, "Mount /sys/fs/cgroup writable.")


def _file_systems() -> Iterator[Finding]:
    if "overlay" in (_read("/proc/filesystems") or "").split():
        yield _ok("overlay", "the kernel has it")
    else:
        text = "the kernel has it not, or not yet: file changes of containers cannot be saved"
        yield _warning("overlay", text, "modprobe overlay")
    try:
        with tempfile.TemporaryFile(dir="/tmp"):
            pass
    except OSError as error:
        yield _missing("/tmp", f"cannot be written: {error.strerror}", "CRIU needs a writable /tmp.")
    else:
        yield _ok("/tmp", "can be written")


def _gpu() -> Iterator[Finding]:
    if not os.path.exists("/dev/nvidiactl"):
        yield _ok("GPU", "no NVIDIA driver here; applications without GPU need none")
        return
    from chrek.cuda.driver import Driver  # noqa: PLC0415 - it loads libcuda

    try:
        driver = Driver()
        driver.require()
    except ChrekError as error:
        yield _warning("GPU", error.message, error.cure)
        return
    version = _read("/sys/module/nvidia/version") or "unknown"
    where = "also on other GPUs than the checkpoint's" if driver.takes_map() else "on the same GPUs only"
    yield _ok("GPU", f"driver {version}, CUDA {driver.cuda_version_text()}: processes can be restored {where}")


def _inits() -> Iterator[Finding]:
    count = len(initstate.find_inits())
    yield _ok("applications", f"{count} run under ChReK's init here")


def _store(path: str) -> Iterator[Finding]:
    place = path
    while not os.path.isdir(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place) or "."
    if not os.access(place, os.W_OK | os.X_OK):
        yield _missing("store", f"{place} cannot be written", "Choose another with --store or CHREK_STORE.")
        return
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        yield _missing("store", f"{place} cannot be written: {error.strerror}", "Choose another with --store.")
        return
    info = os.statvfs(place)
    free = info.f_bavail * info.f_frsize
    there = path if place == path else f"{path} (made by the first checkpoint)"
    text = f"{there}, {free / (1 << 30):.1f} GiB free"
    if free < _FREE_BYTES:
        yield _warning("store", text, "Free space: a checkpoint is about as large as the application's memory.")
    else:
        yield _ok("store", text)
    if place == path:
        yield from _locks(path)
        yield from _checkpoints(path)


def _locks(path: str) -> Iterator[Finding]:
    import fcntl  # noqa: PLC0415 - this check's own

    with suppress(OSError), tempfile.TemporaryFile(dir=path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            cure = "Use a file system with flock, or mount it with locking."
            yield _missing("store's locks", f"the file system refuses them: {error.strerror}", cure)


def _checkpoints(path: str) -> Iterator[Finding]:
    """Say which of the store's checkpoints can be restored on this machine, as far as no container decides it."""
    from chrek.engine.compatibility import machine_lacks  # noqa: PLC0415 - not without a store
    from chrek.store import Store, list_checkpoints, open_checkpoint  # noqa: PLC0415

    good = 0
    try:
        with Store.open(path) as store:
            for listed in list_checkpoints(store):
                name = f"checkpoint {listed.checkpoint_id}"
                try:
                    with open_checkpoint(store, listed.checkpoint_id) as checkpoint:
                        lack = machine_lacks(checkpoint.manifest)
                except ChrekError as error:
                    yield _warning(name, f"{error.reason.code}: {error.message}", error.cure)
                    continue
                if lack is None:
                    good += 1
                else:
                    yield _warning(name, f"cannot be restored here: {lack[0].code}: {lack[1]}", lack[0].cure)
    except ChrekError as error:
        yield _warning("checkpoints", error.message, error.cure)
    else:
        yield _ok("checkpoints", f"{good} can be restored on this machine")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    *(_machine, _rights, _kernel_features, _proc, _criu, _programs, _limits, _control_groups, _file_systems),
    *(_gpu, _inits),
)

"""What a test needs of the machine, and the reason that is printed where the machine lacks it."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from containers.layout import REPO

_CAPABILITIES = {"CAP_SYS_ADMIN": 21}  # linux/capability.h


def bundle() -> Path:
    """Return the directory of the CRIU bundle that `make setup` lays out."""
    return Path(os.environ.get("CHREK_CRIU_BUNDLE") or Path(sys.prefix) / "share/chrek/criu")


def effective_capabilities() -> int:
    """Return the capability set of this process as a bit mask."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _capability(name: str) -> str | None:
    held = effective_capabilities() >> _CAPABILITIES[name] & 1
    return None if held else f"needs {name}, which this machine does not give (a privileged node does)"


def _program(name: str) -> str | None:
    return None if shutil.which(name) else f"needs {name}, which is not installed (make setup)"


def _root() -> str | None:
    return None if os.geteuid() == 0 else "needs root: containers, mounts and CRIU"


def _linux() -> str | None:
    found = f"{platform.system()} on {platform.machine()}"
    return None if found == "Linux on x86_64" else f"needs Linux on x86_64; this is {found}"


@functools.cache
def _base() -> str | None:
    done = subprocess.run([sys.executable, str(REPO / "tools/setup-base")], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"needs the base root file system: {done.stderr.strip()[-200:]}"


@functools.cache
def _criu() -> str | None:
    place = bundle()
    if not (place / "bundle.json").exists():
        return f"needs the CRIU bundle, which is not in {place} (make setup)"
    argv = [f"{place}/ld.so", "--inhibit-cache", "--library-path", f"{place}/lib", f"{place}/criu", "check"]
    with tempfile.TemporaryDirectory() as scratch:  # CRIU keeps what it found of the kernel where it is started
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env={"PATH": scratch}, cwd=scratch)
    return None if done.returncode == 0 else f"needs CRIU to work here: {done.stderr.strip()[-200:]}"


def _cgroup2() -> str | None:
    found = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    return None if found else "needs cgroup v2 alone; this machine has v1 (or both)"


def _containers() -> str | None:
    return _linux() or _root() or _program("runc") or _base()


_CHECKS: dict[str, Callable[[], str | None]] = {
    "linux": _linux,
    "root": _root,
    "containers": _containers,
    "criu": lambda: _linux() or _root() or _criu(),
    "cgroup2": _cgroup2,
    "cap_sys_admin": lambda: _capability("CAP_SYS_ADMIN"),
}


def needs(*things: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test, or as ``pytestmark`` a module, where something is missing, and says what.

    A thing is one of "linux", "root", "containers" (root, runc and the base root file system), "criu" (the bundle,
    and `criu check` content), "cgroup2", "cap_sys_admin"; anything else is the name of a program.
    """
    for thing in things:
        reason = _CHECKS[thing]() if thing in _CHECKS else _program(thing)
        if reason is not None:
            return pytest.mark.skipif(condition=True, reason=reason)
    return pytest.mark.skipif(condition=False, reason="")

"""Where the harness keeps things, and how what a killed run left behind is found and removed.

Everything stands in one directory of the cache: a directory for each container, named with a common prefix and the
process that owns it, and runc's state. A run that was killed leaves containers whose owner is gone; the next run
removes those and touches no others, so that two runs can go on at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

PREFIX = "chrek-test-"
REPO = Path(__file__).resolve().parents[2]
SOURCE = REPO / "src"
CACHE = REPO / ".cache"
STATE = CACHE / "containers"
RUNC_STATE = STATE / "runc"

_OVERLAYFS_MAGIC = 0x794C7630  # linux/magic.h
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


class _StatFs(ctypes.Structure):
    _fields_ = [("f_type", ctypes.c_long), ("rest", ctypes.c_long * 31)]


def mount(kind: str, target: Path, options: str) -> None:
    """Mount a file system that has no device; raises OSError."""
    if _libc.mount(kind.encode(), bytes(target), kind.encode(), 0, options.encode()):
        errno = ctypes.get_errno()
        raise OSError(errno, f"mount {kind} ({options}): {os.strerror(errno)}", str(target))


def unmount(target: Path) -> None:
    """Take a mount away at once, in use or not; nothing happens where none is."""
    _libc.umount2(bytes(target), _MNT_DETACH)


def _is_overlay(path: Path) -> bool:
    found = _StatFs()
    _libc.statfs(bytes(path), ctypes.byref(found))
    return bool(found.f_type == _OVERLAYFS_MAGIC)


@functools.cache
def base_root() -> Path:
    """Return the read-only root file system of all containers, made on first use (a few seconds, then cached)."""
    argv = [sys.executable, str(REPO / "tools/setup-base")]
    said = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Path(said.rpartition("ready in ")[2].strip())


@functools.cache
def state() -> Path:
    """Return the directory of this machine's containers, ready for overlay upper directories."""
    RUNC_STATE.mkdir(parents=True, exist_ok=True)
    if _is_overlay(STATE):  # a machine that is itself a container: an overlay's upper layer cannot lie on an overlay
        mount("tmpfs", STATE, "mode=755")
        RUNC_STATE.mkdir(parents=True, exist_ok=True)
    return STATE


def runc(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run runc with the harness's own state directory."""
    argv = ["runc", "--root", str(RUNC_STATE), *words]
    return subprocess.run(argv, check=check, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def remove(name: str) -> None:
    """Remove a container by name, with its mounts and files, whatever state it is in."""
    if (RUNC_STATE / name).exists():
        runc("delete", "--force", name, check=False)
        shutil.rmtree(RUNC_STATE / name, ignore_errors=True)
    home = STATE / name
    unmount(home / "rootfs")
    shutil.rmtree(home, ignore_errors=True)


def _owner_lives(name: str) -> bool:
    owner = name.removeprefix(PREFIX).split("-")[0]
    return owner.isdigit() and Path("/proc", owner).exists()


def remove_leftovers(*, every: bool = False) -> list[str]:
    """Remove the containers of runs that are gone (or all of them); return their names."""
    names: set[str] = set()
    for place in (STATE, RUNC_STATE):
        with contextlib.suppress(FileNotFoundError):
            names.update(entry.name for entry in place.iterdir() if entry.name.startswith(PREFIX))
    gone = sorted(name for name in names if every or not _owner_lives(name))
    for name in gone:
        remove(name)
    return gone


if __name__ == "__main__":
    print("\n".join(remove_leftovers(every=True)))  # noqa: T201
    unmount(STATE)

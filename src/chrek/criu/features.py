"""What CRIU finds out about the kernel, asked for once a boot instead of at every start.

CRIU begins by probing the kernel (``criu check`` takes 0.10 s with it, 0.04 s without; CRIU 4.2.1, 2-core EPYC), and keeps the
result in ``/run/criu.kdat``: read unchecked, from the mount namespace it works in, so from a file that a
container can plant. The bundle's CRIU looks for ``criu.kdat`` in its working directory instead, which CRIU enters
before it looks and which is always a directory of ours; `lend` puts the cache there.

The cache is made outside any container, by this program's own run of ``criu check``, and kept in a directory
that only we can write to, under a name of this boot and this CRIU. Where that is impossible CRIU probes as ever.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from chrek.criu.bundle import Bundle

NAME: Final = "criu.kdat"
KEPT: Final = Path("/run/chrek")
MEMORY: Final = Path("/dev/shm")
"""CRIU writes its cache to a memory file system only: elsewhere it might survive the kernel it describes."""

_MOST: Final = 1 << 16
"""Bytes a cache may have; CRIU 4.2.1's has 912."""

_LONGEST: Final = 30.0

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def path_of(bundle: Bundle, kept: Path = KEPT) -> Path:
    """Return where this boot's cache for this CRIU is kept."""
    info = (bundle.path / "criu").stat()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    facts = f"{boot} {os.uname().release} {info.st_dev} {info.st_ino} {info.st_size} {info.st_mtime_ns}"
    return kept / f"{NAME}-{hashlib.sha256(facts.encode()).hexdigest()[:32]}"


def load(bundle: Bundle, kept: Path = KEPT) -> bytes | None:
    """Return the cache, None when there is none or somebody else may have written it."""
    try:
        file = path_of(bundle, kept)
        if not _is_ours(file.parent.lstat(), stat.S_ISDIR):
            return None
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return os.read(fd, _MOST) or None if _is_ours(os.fstat(fd), stat.S_ISREG) else None
        finally:
            os.close(fd)
    except OSError:
        return None


def prepare(bundle: Bundle, kept: Path = KEPT) -> bool:
    """Probe the kernel and keep what CRIU found; return whether there is a cache now.

    To be called outside containers: what is found in one may be what the container shows.
    """
    if load(bundle, kept) is not None:
        return True
    with suppress(OSError):
        kept.mkdir(mode=0o700, exist_ok=True)
        if not _is_ours(kept.lstat(), stat.S_ISDIR):
            return False
        found = _probe(bundle)
        if found:
            _keep(path_of(bundle, kept), found)
            return True
    return False


@contextmanager
def lend(bundle: Bundle, directory: int, kept: Path = KEPT) -> Iterator[bool]:
    """Put the cache into CRIU's working directory for the length of a block; tell whether there is one."""
    found = load(bundle, kept)
    _remove(directory)
    if found is not None:
        with suppress(OSError), os.fdopen(os.open(NAME, _CREATE, 0o600, dir_fd=directory), "wb") as file:
            file.write(found)
    try:
        yield found is not None
    finally:
        _remove(directory)


def _probe(bundle: Bundle) -> bytes | None:
    with tempfile.TemporaryDirectory(prefix="chrek-kdat-", dir=MEMORY) as name:
        environment = {"PATH": name, "CRIU_LIBS_DIR": name}
        # Its verdict is not ours: here, as for `criu check` without options, missing features are no failure.
        command = bundle.command("check")
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(command, cwd=name, env=environment, capture_output=True, check=False, timeout=_LONGEST)
        try:
            return (Path(name) / NAME).read_bytes()
        except OSError:
            return None


def _keep(file: Path, found: bytes) -> None:
    for old in file.parent.glob(f"{NAME}-*"):
        old.unlink(missing_ok=True)  # of an earlier boot or bundle
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(fresh, _CREATE, 0o600), "wb") as target:
            target.write(found)
        fresh.rename(file)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def _remove(directory: int) -> None:
    # Without a cache CRIU writes one itself where the working directory lies in memory.
    for name in (NAME, f"{NAME}.tmp"):
        with suppress(OSError):
            os.unlink(name, dir_fd=directory)


def _is_ours(info: os.stat_result, kind: Callable[[int], bool]) -> bool:
    return kind(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o022

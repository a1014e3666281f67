"""A container full of traps: nothing of it is run, loaded, read or followed by the privileged side.

Every file that a loader, CRIU, or a tool it might call is known to look for is planted. Programs leave a
mark when they run; what is opened is reported by the kernel for the container's whole file system.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chrek.store.layout import Store
from chrek.system import procfs
from chrek.system.initstate import application
from containers import Container, needs
from system import cycle
from system.cycle import Make
from system.opens import Opens

pytestmark = [needs("containers", "criu", "cap_sys_admin"), pytest.mark.timeout(240)]

HERE = Path(__file__).parent
PROGRAMS = ("iptables", "iptables-restore", "ip6tables", "nft", "ip", "tar", "sh", "criu", "modprobe", "nsenter")
TRAPS = (
    *("/etc/ld.so.preload", "/etc/ld.so.cache", "/etc/criu/default.conf", "/root/.criu/default.conf", "/run/criu.kdat"),
    *("/etc/iproute2/rt_protos", "/etc/connlabel.conf", "/etc/xtables.conf", "/etc/nsswitch.conf", "/etc/gnutls/config"),
    *("/usr/lib/criu/trap.so", "/usr/local/lib/criu/trap.so"),
    *("/etc/localtime", "/etc/passwd", "/etc/hosts", "/etc/resolv.conf"),
)
@pytest.fixture
def layer(tmp_path: Path) -> Path:
    """Return a layer that puts a program of each name first in PATH, which leaves a mark where it runs."""
    place = tmp_path / "layer/usr/local/sbin"
    place.mkdir(parents=True)
    for name in PROGRAMS:
        (place / name).write_text("#!/bin/bash\ntouch /tmp/ran-$(basename $0) /ran\n")
        (place / name).chmod(0o755)
    return tmp_path / "layer"


def plant(container: Container, outside: Path) -> None:
    """Put the traps into a running container's own files, as its workload could."""
    evil = shutil.which("true")
    for trap in TRAPS:
        path = container.root / trap.lstrip("/")
        if trap.startswith("/etc/") and path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(Path(evil or "/bin/true").read_bytes() if trap.endswith(".so") else b"/usr/lib/criu/trap.so\n")
    for link in ("tmp/criu-restore.log", "tmp/restore.log", "tmp/dump.log", "dump.log", "restore.log"):
        (container.root / link).symlink_to(outside)


def run(program: str, container: Container, store: Store, *, without_program: bool = False) -> set[str]:
    """Run a program of this folder; return what others than the container's processes opened of its root meanwhile."""
    own = {int(pid) for pid in procfs.members("pid", container.pid1)}
    argv = [sys.executable, str(HERE / program), str(container.pid1), store.path, "one", ""]
    with Opens(container.root) as opens:
        process = subprocess.Popen(argv)
        assert process.wait(60) == 0
    others = own | {process.pid} if without_program else own
    return {path for pid, _, path in opens.seen if pid not in others}


def test_nothing_of_the_container_is_used(container: Make, store: Store, layer: Path, tmp_path: Path) -> None:
    """Neither a capture nor a restore runs a planted program, opens a planted file, or follows a planted link."""
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    source = cycle.start(container, cycle.app("beat"), lower=layer)
    plant(source, outside)
    opened = run("capturer.py", source, store)
    # Both programs read the heads of files that the application has mapped, to know them again.
    mapped = {mapping.path for pid in procfs.tree(application(source.pid1)) for mapping in procfs.mappings(pid)}
    read = {path for path in map(in_container, opened) if not (source.root / path.lstrip("/")).is_dir()}
    assert {path for path in read if not path.startswith("/tmp/.criu.")} <= mapped, read - mapped
    assert not marks(source)
    source.delete()

    copy = cycle.waiting(container, cycle.app("beat"), lower=layer)
    plant(copy, outside)
    # The restoring program itself writes these files: they are among the source's changes.
    opened = run("restorer.py", copy, store, without_program=True)
    copy.wait_for("ok restored")
    assert not set(map(in_container, opened)) & {*TRAPS}, opened
    assert not marks(copy)
    assert outside.read_text() == "untouched"


def in_container(path: str) -> str:
    """Return a path of the host's view of the container's mounted root as the container names it."""
    _, found, inner = path.partition("/rootfs/")
    return f"/{inner}" if found else path


def marks(container: Container) -> list[Path]:
    """Return what planted programs left where they ran."""
    return [*(container.root / "tmp").glob("ran-*"), *container.root.glob("ran")]

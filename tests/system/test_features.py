"""What processes have and do, through capture and restore: real containers, stock CRIU.

Each feature is a small program in ``apps/``. It is captured while it runs; the source runs on and checks
itself; then it is restored, twice, in containers that are unprivileged and have other host names.
"""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import pytest

from chrek.criu.images import read_all, read_one
from chrek.criu.messages import Core, PstreeEntry
from chrek.store.layout import Store
from chrek.store.opening import open_checkpoint
from chrek.system import procfs
from chrek.system.ids import HostPid
from chrek.system.initstate import application
from chrek.system.runs import union
from containers import Container, Mount, needs
from system import cycle
from system.cycle import Make

pytestmark = needs("containers", "criu")

FEATURES = sorted(path.stem.removeprefix("feature_") for path in cycle.APPS.glob("feature_*.py"))
ALONE = {"tcp_outside"}


@pytest.mark.parametrize("mode", ["lazy", "plain"])
@pytest.mark.parametrize("name", [name for name in FEATURES if name not in ALONE])
def test_feature_survives(name: str, mode: str, container: Make, store: Store) -> None:
    """What the feature's own first line says holds in the source afterwards and in two restored copies."""
    source = cycle.start(container, cycle.app(name))
    cycle.capture(source, store, mode=mode)
    source.exec(["touch", "/tmp/go"])
    source.wait_for("ok source")
    source.delete()
    for _ in range(2):
        copy = cycle.waiting(container, cycle.app(name))
        cycle.restore(copy, store)
        copy.wait_for("ok restored")
        copy.wait_for("chrek: start=restored")
        copy.delete()


@pytest.mark.parametrize("mode", ["lazy", "plain"])
@pytest.mark.parametrize("name", ["queue", "prefork", "threads"])
def test_memory_is_equal(name: str, mode: str, container: Make, store: Store) -> None:
    """The digest of every process's whole memory, stopped, is the same before a capture and after a restore."""
    source = cycle.start(container, cycle.app(name))
    cycle.capture(source, store, "probe", mode=mode)
    kernels = rseq_areas(store)
    before = stopped(source, kernels)
    cycle.capture(source, store, mode=mode)
    assert stopped(source, kernels) == before
    source.delete()
    copy = cycle.waiting(container, cycle.app(name))
    cycle.restore(copy, store)
    assert stopped(copy, kernels) == before


def rseq_areas(store: Store) -> dict[int, list[tuple[int, int]]]:
    """Return, by process, where the kernel itself writes: the CPU and node number of each thread."""
    with open_checkpoint(store, "probe") as checkpoint:
        images = os.open("images", os.O_RDONLY, dir_fd=checkpoint.fd)
    try:
        tree = read_all(images, "pstree.img", PstreeEntry)
        cores = {(e.pid, thread): read_one(images, f"core-{thread}.img", Core) for e in tree for thread in e.threads}
    finally:
        os.close(images)
    found: dict[int, list[tuple[int, int]]] = {}
    for (pid, _), core in cores.items():
        if core.thread is not None and core.thread.rseq is not None:
            found.setdefault(pid, []).append((core.thread.rseq.abi_pointer, core.thread.rseq.abi_size))
    return found


def stopped(container: Container, kernels: dict[int, list[tuple[int, int]]]) -> dict[tuple[int, int, int], str]:
    """Stop an application and return the digest of each stretch of its memory, by process and addresses.

    Neighbouring areas are one stretch: the kernel may join them once they are made anew. What the kernel
    itself writes counts as zeros.
    """
    tree = procfs.tree(application(container.pid1))
    for pid in tree:
        os.kill(pid, signal.SIGSTOP)
    container.until(lambda: all(_is_stopped(pid) for pid in tree), what="the application to stop")
    found = {}
    for pid in tree:
        state = procfs.status(pid)
        assert state is not None
        areas = [area for area in procfs.mappings(pid) if not area.path.startswith(("[vvar", "[vdso", "[vsyscall"))]
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            for start, length in union((area.start, area.end - area.start) for area in areas):
                parts = [os.pread(memory.fileno(), 1 << 20, at) for at in range(start, start + length, 1 << 20)]
                content = bytearray(b"".join(parts)[:length])
                for pointer, size in kernels.get(state.ns_pid, ()):
                    if start <= pointer < start + length:
                        content[pointer - start : pointer - start + size] = bytes(size)
                found[int(state.ns_pid), start, length] = hashlib.sha256(content).hexdigest()
    return found


def _is_stopped(pid: HostPid) -> bool:
    return all((procfs.read_text(pid, f"task/{thread}/stat") or "T) T").rsplit(")", 1)[1].split()[0] == "T"
               for thread in procfs.threads(pid))


def test_client_outside(container: Make, store: Store) -> None:
    """A connection whose other end is outside the tree is closed in the restored application, not in the source."""
    source = container(
        cycle.app("tcp_outside"), mounts=[Mount.bind(cycle.APPS, "/apps", read_only=True)]
    )
    source.wait_for("listening")
    with source.connect(8080) as client:
        client.sendall(b"hello")
        source.wait_for("ready")
        outcome = cycle.capture(source, store)
        assert any("TCP" in warning for warning in outcome.warnings)
        source.exec(["touch", "/tmp/go"])
        source.wait_for("ok source")
    copy = cycle.waiting(container, cycle.app("tcp_outside"))
    cycle.restore(copy, store)
    copy.wait_for("ok restored")


def test_client_in_the_queue(container: Make, store: Store) -> None:
    """A client that is connected and not yet accepted is no reason to fail, and is served by the source afterwards."""
    code = "import socket,time; s=socket.create_server(('0.0.0.0', 8080)); print('ready', flush=True)\nimport os\n"
    code += "while not os.path.exists('/tmp/go'): time.sleep(.01)\nc,_=s.accept(); c.sendall(b'served'); time.sleep(100)"
    source = cycle.start(container, [cycle.INIT, "--", "python3", "-c", code])
    with source.connect(8080) as client:
        cycle.capture(source, store)
        source.exec(["touch", "/tmp/go"])
        assert client.recv(10) == b"served"


def test_three_generations(container: Make, store: Store) -> None:
    """A restored application is captured again and restored, and again; its seccomp filters do not grow."""
    source = cycle.start(container, cycle.app("beat"))
    filters = _filters(application(source.pid1))
    cycle.capture(source, store, "generation-0")
    for generation in range(3):
        copy = cycle.waiting(container, cycle.app("beat"), f"generation-{generation}")
        cycle.restore(copy, store, f"generation-{generation}")
        copy.wait_for(f" {copy.name}\n")
        assert _filters(application(copy.pid1)) == filters
        cycle.capture(copy, store, f"generation-{generation + 1}")


def _filters(pid: int) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line for line in lines if line.startswith("Seccomp_filters"))

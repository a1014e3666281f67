"""GPU applications through the whole engine: captured while they run on, restored, the same answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chrek.artifact import Level
from chrek.cuda.inventory import Nvml
from chrek.engine import capture as capturing
from chrek.errors import Reason, Refused
from chrek.store.layout import Store
from chrek.store.opening import open_checkpoint
from chrek.system import procfs
from chrek.system.initstate import application
from containers import needs
from gpu import life
from gpu.life import answers, command
from system.pidns import INIT, Contained

pytestmark = [pytest.mark.timeout(240), needs("criu")]

CAPTURER = Path(__file__).parents[1] / "system/capturer.py"
WORKLOADS = Path(__file__).with_name("workloads.py")
SMALL = 0.3
STEPS = [
    *("phase:gpu save", "phase:dump", "answer:query-ext-files", "phase:frozen", "after:memory"),
    *("phase:gpu resume", "phase:finish"),
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Return an empty store."""
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened


@pytest.mark.parametrize("gigabytes", [0.5, 2])
def test_transparent(gigabytes: float, store: Store, tmp_path: Path) -> None:
    """Without the application's help: the source answers on, and a restored copy gives the same answers."""
    with Contained(command(gigabytes), env=life.cold(tmp_path)) as source:
        expected = answers(source)
        life.capture(source, store)
        assert answers(source, 20) == expected
    with Contained(command(gigabytes), env=life.to_restore(tmp_path)) as copy:
        life.restore(copy, store)
        assert answers(copy, 20) == expected
        life.until(lambda: "start=restored" in copy.stderr(), what="the init to say how it started")


def test_two_at_once(store: Store, tmp_path: Path) -> None:
    """Two restores from one checkpoint side by side on one GPU: both give the answers of the source, which still runs."""
    # The driver's socket has a name, of which a network has only one.
    own = "libc.unshare(0x40000000)"
    with Contained(command(SMALL), env=life.cold(tmp_path), before=own) as source:
        expected = answers(source)
        life.capture(source, store)
        first, second = (Contained(command(SMALL), env=life.to_restore(tmp_path), before=own) for _ in range(2))
        with first as one, second as other:
            life.restore(one, store)
            life.restore(other, store)
            for process in (one, other, source):
                assert answers(process, 10) == expected


def pooled(store: Store, place: Path) -> tuple[Contained, set[str]]:
    """Start a pool's owner; it and its answers, once it is ready to be checkpointed."""
    source = Contained(command(SMALL, "pooled"), env=life.contract(place, store))
    words = [source.line().split() for _ in range(6)]
    life.until((place / "ready").exists, what="the ready file")
    return source, {one[2] for one in words if one[:1] == ["answer"]}


def test_pooled(store: Store, tmp_path: Path) -> None:
    """Weights in a pool: blobs in the checkpoint, equal answers of the source afterwards and of two copies."""
    source, expected = pooled(store, tmp_path)
    with source:
        life.capture(source, store)
        (tmp_path / "signal").write_text('{"success": true}')
        assert answers(source) == expected
    with open_checkpoint(store, life.ID) as checkpoint:
        assert any(path.startswith("gpu/weights.") for path in checkpoint.manifest.files)
        assert checkpoint.verify(Level.FULL).ok
    assert not list(Path(store.path).glob(".handover/*"))
    (tmp_path / "signal").unlink()
    for _ in range(2):
        with Contained(command(SMALL, "pooled"), env=life.to_restore(tmp_path)) as copy:
            life.restore(copy, store)
            assert answers(copy) == expected


def test_restored_from_inside(store: Store, tmp_path: Path) -> None:
    """A container with the privileges for it and the store in sight restores itself, pool included."""
    source, expected = pooled(store, tmp_path)
    with source:
        life.capture(source, store)
    environment = {**life.to_restore(tmp_path), "DYN_CHECKPOINT_PATH": store.path}
    with Contained(command(SMALL, "pooled"), env=environment) as copy:
        assert answers(copy) == expected
        life.until(lambda: "start=restored" in copy.stderr(), what="the init to say how it started")


def test_damaged_block(store: Store, tmp_path: Path) -> None:
    """A pool notices a damaged block by its digest and names the file; the container can start cold."""
    source, expected = pooled(store, tmp_path)
    with source:
        life.capture(source, store)
    blob = max((Path(store.path) / life.ID).glob("gpu/*/blobs/*"), key=lambda path: path.stat().st_size)
    with blob.open("r+b") as file:
        file.seek(4096)
        byte = file.read(1)
        file.seek(4096)
        file.write(bytes([byte[0] ^ 1]))
    with open_checkpoint(store, life.ID) as checkpoint:
        problems = checkpoint.verify(Level.FULL).problems
    assert [problem.path for problem in problems] == [f"gpu/{blob.parts[-3]}/blobs/{blob.name}"]
    with Contained(command(SMALL, "pooled"), env=life.to_restore(tmp_path)) as copy:
        life.restore(copy, store)
        assert copy.wait(60) != 0
        assert "PoolCorrupt" in copy.stderr()
        assert blob.name[:12] in copy.stderr()
    with Contained(command(SMALL, "pooled"), env=life.cold(tmp_path)) as other:
        assert answers(other) == expected


def settled(source: Contained) -> bool:
    """Whether no process of the application is stopped or traced any more."""
    states = [procfs.read_text(pid, "status") or "" for pid in procfs.tree(application(source.pid))]
    return all("TracerPid:\t0" in text and "State:\tt" not in text and "State:\tT" not in text for text in states)


def test_engine_killed_at_each_gpu_step(store: Store, tmp_path: Path) -> None:
    """Wherever the engine is killed, the next capture drives back what it left, works, and the answers stay the same."""
    with Contained(command(SMALL), env=life.cold(tmp_path)) as source:
        expected = answers(source)
        for step in STEPS:
            argv = [sys.executable, str(CAPTURER), str(source.pid), store.path, life.ID, step]
            victim = subprocess.run(argv, capture_output=True, check=False)
            assert victim.returncode == -signal.SIGKILL, (step, victim.stderr)
            life.until(lambda: settled(source), what=f"the application to run again after {step}")
            life.capture(source, store)
            assert answers(source) == expected, step
    with Contained(command(SMALL), env=life.to_restore(tmp_path)) as copy:
        life.restore(copy, store)
        assert answers(copy) == expected


@pytest.mark.slow
def test_twenty_restores(store: Store, tmp_path: Path) -> None:
    """Twenty restores in a row from one checkpoint: neither the copies' GPU memory nor the engine's own memory grows."""
    with Contained(command(SMALL), env=life.cold(tmp_path)) as source:
        expected = answers(source)
        life.capture(source, store)
    on_gpu, resident, files = [], [], []
    for _ in range(20):
        with Contained(command(SMALL), env=life.to_restore(tmp_path)) as copy:
            life.restore(copy, store)
            assert answers(copy) == expected
            on_gpu.append(sum(use.bytes or 0 for use in Nvml().read().of(procfs.tree(copy.pid))))
        resident.append(rss())
        files.append(len(os.listdir("/proc/self/fd")))
        print("on the GPU", on_gpu[-1], "engine", resident[-1], "files", files[-1])  # noqa: T201 - figures for the log
    assert max(on_gpu) - min(on_gpu) < 32 << 20
    assert resident[-1] - resident[4] < 16 << 20
    assert files[-1] <= files[4]


def rss() -> int:
    """Return this process's resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("case", "reason", "gpus"),
    [
        ("managed", Reason.MANAGED_MEMORY, 1),
        ("ipc", Reason.CUDA_IPC, 1),
        ("forked", Reason.GPU_FD_INHERITED, 1),
        ("peer", Reason.GPU_PEER_ACCESS, 2),
        ("nccl", Reason.NCCL_TRANSPORT, 2),
    ],
)
def test_refused(case: str, reason: Reason, gpus: int, store: Store, tmp_path: Path) -> None:
    """What the driver would save and never bring back is refused by name; the application works on."""
    there = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if there < gpus:
        pytest.skip(f"needs {gpus} GPUs; this machine has {there}")
    argv = [*INIT, sys.executable, str(WORKLOADS), case]
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb", buffering=0) as asking, Contained(argv, env=life.cold(tmp_path), stdin=reading) as source:
        os.close(reading)
        assert source.line() == "ready", source.stderr()
        asking.write(b"\n")
        before = source.line()
        with pytest.raises(Refused) as refusal:
            capturing.capture(capturing.Request(pid1=source.pid, store=store, checkpoint_id=life.ID))
        assert refusal.value.reason is reason, refusal.value
        asking.write(b"\n")
        assert source.line() == before

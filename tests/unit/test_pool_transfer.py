"""A pool's contents to files and back, against the stand-in of the driver."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from chrek.workload.pool import (
    CudaError,
    Options,
    PoolCorrupt,
    PoolError,
    Region,
    TensorPool,
    handover_directory,
    load,
    save,
)
from chrek.workload.pool.cuda import SIGNATURES, Cuda
from chrek.workload.pool.digest import reference
from chrek.workload.pool.layout import BLOBS, BLOCK, from_json
from chrek.workload.pool.places import home
from gpu import cudastandin

pytestmark = pytest.mark.skipif(cudastandin.compiler() is None, reason="needs a C compiler for the stand-in driver")

MIB = 1 << 20
SIZES = (1, 2 * MIB + 1, 9 * MIB)
MANY = (*SIZES, 2 * MIB, 66 * MIB)


@pytest.fixture
def standin(tmp_path: Path) -> Iterator[cudastandin.StandIn]:
    """A driver with two GPUs."""
    with cudastandin.machine(tmp_path, gpus=2) as made:
        yield made


def make_pool(standin: cudastandin.StandIn, *, contents: bool = True, direct: str = "auto") -> TensorPool:
    """A pool over the stand-in; three threads, so that they have to share."""
    options = Options(threads=3, direct=direct, chunk=MIB)
    return TensorPool(contents=contents, library=str(standin.library), options=options)


def own(base: Path, name: str = "weights") -> Path:
    """The directory of this process's pool."""
    return base / home(name)


def write(address: int, data: bytes) -> None:
    """Write to "GPU" memory, as a kernel would."""
    ctypes.memmove(address, data, len(data))


def fill_pool(pool: TensorPool, sizes: tuple[int, ...] = SIZES, *, seed: int = 1) -> dict[int, bytes]:
    """Allocate and fill; what each address holds."""
    chance = random.Random(seed)
    held = {}
    for number, size in enumerate(sizes):
        address = pool.allocate(size, device=number % 2)
        write(address, data := chance.randbytes(size))
        held[address] = data
    return held


def intact(held: dict[int, bytes]) -> bool:
    """Whether every address holds what it held."""
    return all(ctypes.string_at(address, len(data)) == data for address, data in held.items())


@pytest.mark.parametrize("direct", ["auto", "off", "on"])
def test_round_trip(standin: cudastandin.StandIn, tmp_path: Path, direct: str) -> None:
    """Contents leave, no GPU memory stays, and everything is back at its address afterwards."""
    pool = make_pool(standin, direct=direct)
    held = fill_pool(pool, MANY)
    pool.offload(str(tmp_path / "gpu"))
    assert (standin.live, pool.resident) == (0, False)
    pool.onload(str(tmp_path / "gpu"))
    assert (standin.live, pool.resident) == (len(MANY), True)
    assert intact(held)


def test_without_the_kernel_sha256_takes_its_place(standin: cudastandin.StandIn, tmp_path: Path) -> None:
    """A driver that cannot load the digest kernel costs speed, not safety."""
    standin.fail("cuModuleLoadData", 221)
    pool = make_pool(standin)
    held = fill_pool(pool)
    pool.offload(str(tmp_path))
    assert json.loads((own(tmp_path) / "index.json").read_text())["digest"] == "sha256"
    pool.onload(str(tmp_path))
    assert intact(held)
    pool.offload(str(tmp_path))
    damage(tmp_path)
    with pytest.raises(PoolCorrupt, match="not those that were saved"):
        pool.onload(str(tmp_path))


def damage(directory: Path) -> Path:
    """Change one byte of one blob."""
    blob = max((own(directory) / BLOBS).iterdir(), key=lambda path: path.stat().st_size)
    with blob.open("r+b") as file:
        file.seek(blob.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    return blob


def test_a_damaged_block_is_noticed(standin: cudastandin.StandIn, tmp_path: Path) -> None:
    """One flipped bit is an error that names the file; the pool stays offloaded and can be loaded from a good copy."""
    pool = make_pool(standin)
    held = fill_pool(pool)
    pool.offload(str(tmp_path))
    blob = damage(tmp_path)
    with pytest.raises(PoolCorrupt, match=blob.name):
        pool.onload(str(tmp_path))
    assert (pool.resident, standin.live) == (False, 0)
    damage(tmp_path)  # the same bit again
    pool.onload(str(tmp_path))
    assert intact(held)


def test_a_file_cut_short(standin: cudastandin.StandIn, tmp_path: Path) -> None:
    """A file of the wrong size is not taken for the pool's."""
    pool = make_pool(standin)
    fill_pool(pool)
    pool.offload(str(tmp_path))
    os.truncate(next((own(tmp_path) / BLOBS).iterdir()), MIB)
    with pytest.raises(PoolError, match="lacks 1 of"):
        pool.onload(str(tmp_path))


WAY_OUT = (
    "cuCtxSynchronize",
    "cuMemHostRegister_v2",
    "cuStreamCreate",
    "cuEventCreate",
    "cuMemcpyDtoHAsync_v2",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuEventQuery",
    "cuLaunchKernel",
    "cuCtxSetCurrent",
    "cuDevicePrimaryCtxRetain",
)


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("call", WAY_OUT)
def test_a_failing_call_on_the_way_out(standin: cudastandin.StandIn, tmp_path: Path, call: str, skip: int) -> None:
    """The application keeps its data in place, and the next attempt works."""
    pool = make_pool(standin)
    held = fill_pool(pool)
    standin.fail(call, 999, skip=skip, times=1)
    with contextlib.suppress(CudaError):
        pool.offload(str(tmp_path))
    if pool.resident:
        assert intact(held)
        pool.offload(str(tmp_path))
    standin.forgive()  # a call that is made less often has not failed yet
    pool.onload(str(tmp_path))
    assert intact(held)
    assert not [name for name in os.listdir(own(tmp_path) / BLOBS) if name.startswith(".")]


@pytest.mark.parametrize("call", ["cuMemUnmap", "cuMemRelease"])
def test_a_failure_while_memory_is_dropped(standin: cudastandin.StandIn, tmp_path: Path, call: str) -> None:
    """What was dropped before the failure is loaded again."""
    pool = make_pool(standin)
    held = fill_pool(pool)
    standin.fail(call, 999, skip=1, times=1)
    with pytest.raises(CudaError):
        pool.offload(str(tmp_path))
    assert pool.resident
    assert intact(held)


WAY_BACK = (
    "cuMemCreate",
    "cuMemMap",
    "cuMemSetAccess",
    "cuMemcpyHtoDAsync_v2",
    "cuMemHostRegister_v2",
    "cuEventRecord",
    "cuStreamSynchronize",
    "cuLaunchKernel",
)


@pytest.mark.parametrize("call", WAY_BACK)
def test_a_failing_call_on_the_way_back(standin: cudastandin.StandIn, tmp_path: Path, call: str) -> None:
    """The pool stays offloaded, no memory is lost, and the next attempt works."""
    pool = make_pool(standin)
    held = fill_pool(pool)
    pool.offload(str(tmp_path))
    standin.fail(call, 2, skip=1)
    with pytest.raises(CudaError, match=call):
        pool.onload(str(tmp_path))
    assert (pool.resident, standin.live) == (False, 0)
    standin.forgive()
    pool.onload(str(tmp_path))
    assert intact(held)


def test_every_driver_call_is_in_the_stand_in(standin: cudastandin.StandIn) -> None:
    """The stand-in has each function that the pool binds."""
    library = ctypes.CDLL(str(standin.library))
    assert [name for name in SIGNATURES if not hasattr(library, name)] == []


def test_a_kernel_that_only_one_device_has(standin: cudastandin.StandIn, tmp_path: Path) -> None:
    """If one of two devices cannot digest, all blocks have the other kind of digest."""
    standin.fail("cuModuleLoadData", 221, skip=1)
    pool = make_pool(standin)
    held = fill_pool(pool)
    pool.offload(str(tmp_path))
    assert from_json((own(tmp_path) / "index.json").read_text()).digest == "sha256"
    pool.onload(str(tmp_path))
    assert intact(held)


def test_what_a_killed_process_left(standin: cudastandin.StandIn, tmp_path: Path) -> None:
    """Half written files of a process with the same id do not stand in the way, and are gone afterwards."""
    blobs = own(tmp_path) / BLOBS
    blobs.mkdir(parents=True)
    for number in range(3):
        (blobs / f".writing-{number}").write_bytes(b"x" * 9 * MIB)
    (blobs / ("0" * 64)).touch()
    pool = make_pool(standin)
    held = fill_pool(pool)
    pool.offload(str(tmp_path))
    pool.onload()
    assert intact(held)
    index = from_json((own(tmp_path) / "index.json").read_text())
    assert set(os.listdir(blobs)) == {blob.name for blob in index.stored()}


def test_zeros_are_in_no_file(standin: cudastandin.StandIn, tmp_path: Path) -> None:
    """Blocks of zeros take no room and are zeros again, also where memory comes back dirty."""
    pool = make_pool(standin)
    address = pool.allocate(3 * BLOCK)
    write(address + BLOCK, b"x")
    empty = pool.allocate(BLOCK)
    report = pool.offload(str(tmp_path))
    assert report.moved == BLOCK
    pool.onload(str(tmp_path))
    assert ctypes.string_at(address, 3 * BLOCK) == bytes(BLOCK) + b"x" + bytes(2 * BLOCK - 1)
    assert ctypes.string_at(empty, BLOCK) == bytes(BLOCK)


def test_a_pool_of_nothing(standin: cudastandin.StandIn, tmp_path: Path) -> None:
    """A pool without allocations goes out and back."""
    pool = make_pool(standin)
    assert pool.offload(str(tmp_path)).moved == 0
    assert pool.onload(str(tmp_path)).moved == 0


def test_equal_contents_are_stored_once(standin: cudastandin.StandIn, tmp_path: Path) -> None:
    """The same weights in one pool, saved again, or known from another checkpoint are not written again."""
    pool = make_pool(standin)
    data = random.Random(3).randbytes(4 * MIB)
    for _ in range(3):
        write(pool.allocate(4 * MIB), data)
    assert pool.offload(str(tmp_path / "a")).moved == 4 * MIB
    pool.onload()
    assert pool.offload(str(tmp_path / "a")).moved == 0
    pool.onload()
    pool.known = (str(tmp_path / "none"), str(own(tmp_path / "a")))
    assert pool.offload(str(tmp_path / "b")).moved == 0
    blob = next((own(tmp_path / "b") / BLOBS).iterdir())
    assert blob.stat().st_nlink == 2


def test_changed_contents_replace_the_old_files(standin: cudastandin.StandIn, tmp_path: Path) -> None:
    """Saving over an earlier state leaves only the files of the new one; other pools have their own."""
    pool, other = make_pool(standin), TensorPool("adapters", library=str(standin.library))
    held = fill_pool(pool, (2 * MIB, 2 * MIB))
    fill_pool(other, (2 * MIB,), seed=9)
    other.offload(str(tmp_path))
    pool.offload(str(tmp_path))
    pool.onload()
    write(next(iter(held)), b"changed")
    pool.offload(str(tmp_path))
    assert len(os.listdir(own(tmp_path) / BLOBS)) == 2
    assert len(os.listdir(own(tmp_path, "adapters") / BLOBS)) == 1


def test_caches_are_dropped_and_not_saved(standin: cudastandin.StandIn) -> None:
    """A pool without contents writes nothing and needs no directory; its addresses have memory again."""
    pool = make_pool(standin, contents=False)
    address = pool.allocate(4 * MIB)
    pool.offload()
    assert standin.live == 0
    pool.onload()
    write(address, b"used again")


def test_allocating_and_freeing_around_a_checkpoint(standin: cudastandin.StandIn, tmp_path: Path) -> None:
    """Memory may be freed while it is away, and allocated before and after it is back."""
    pool = make_pool(standin)
    held = fill_pool(pool)
    pool.offload(str(tmp_path))
    gone = next(iter(held))
    pool.free(gone)
    del held[gone]
    new = pool.allocate(2 * MIB)
    write(new, b"new")
    pool.onload()
    held |= {new: b"new", pool.allocate(5): b""}
    assert intact(held)
    for address in held:
        pool.free(address)
    assert (pool.size, standin.live) == (0, 0)


def test_offloading_twice_is_an_error(standin: cudastandin.StandIn, tmp_path: Path) -> None:
    """A second offload would save memory that is not there."""
    pool = make_pool(standin)
    fill_pool(pool)
    pool.offload(str(tmp_path))
    with pytest.raises(PoolError, match="already offloaded"):
        pool.offload(str(tmp_path))


def test_freeing_what_is_not_the_pools(standin: cudastandin.StandIn) -> None:
    """An address of somebody else is named."""
    with pytest.raises(PoolError, match="0x1000 is no allocation"):
        make_pool(standin).free(0x1000)


def test_out_of_memory_in_a_callback(standin: cudastandin.StandIn) -> None:
    """PyTorch's callback answers null and keeps the cause; nothing is raised through C."""
    pool = make_pool(standin)
    standin.fail("cuMemCreate", 2)
    assert pool._on_allocate(2 * MIB, 0, None) == 0
    pool._on_free(0x1000, 0, 0, None)
    assert "cuMemCreate failed" in pool.failures[0]
    assert "no allocation" in pool.failures[1]
    assert standin.live == 0


def test_a_full_disk(standin: cudastandin.StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space while streaming: the error says so, the data stays in place, no half file is left."""
    pool = make_pool(standin)
    held = fill_pool(pool)
    genuine, count = os.pwrite, iter(range(100))

    def full(fd: int, data: memoryview, offset: int) -> int:
        if next(count) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return genuine(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(PoolError, match="No space left on device"):
        pool.offload(str(tmp_path))
    assert intact(held)
    assert pool.resident
    assert not [name for name in os.listdir(own(tmp_path) / BLOBS) if name.startswith(".")]


def test_too_little_space_is_seen_before_writing(
    standin: cudastandin.StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that cannot hold the pool is refused with both numbers."""
    pool = make_pool(standin)
    fill_pool(pool)
    stat = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*stat[:4], 10, *stat[5:])))
    with pytest.raises(PoolError, match=r"GB free; the pool needs 0\.0 GB"):
        pool.offload(str(tmp_path))


def test_digest_against_the_definition(standin: cudastandin.StandIn, tmp_path: Path) -> None:
    """The kernel's digests are those of the definition."""
    pool = make_pool(standin)
    data = random.Random(5).randbytes(MIB // 4) + bytes(2 * MIB - MIB // 4)
    write(pool.allocate(len(data)), data)
    pool.offload(str(tmp_path))
    index = from_json((own(tmp_path) / "index.json").read_text())
    assert index.blobs[0].blocks[0].digest == reference(data)


def test_the_order_of_words_counts() -> None:
    """Swapped words, a moved word and a changed one all change the digest."""
    data = bytes(range(64))
    others = [data[8:16] + data[:8] + data[16:], data[8:] + data[:8], b"\1" + data[1:]]
    assert len({reference(one) for one in [data, *others]}) == 4


def test_where_files_are_looked_for(
    standin: cudastandin.StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restore: where the marker says, then the published checkpoint, then the handover directory."""
    monkeypatch.setenv("DYN_CHECKPOINT_LOCATION", str(tmp_path / "store" / "model-1"))
    monkeypatch.setenv("DYN_RESTORE_MARKER_FILE", str(tmp_path / "marker"))
    handover = Path(handover_directory())
    assert handover == tmp_path / "store/.handover/model-1/gpu"
    pool = make_pool(standin)
    held = fill_pool(pool, (2 * MIB,))
    for place in ("elsewhere/gpu", "store/model-1/gpu"):
        pool.offload()
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        handover.rename(tmp_path / place)
        if place.startswith("elsewhere"):
            (tmp_path / "marker").write_text(json.dumps({"gpu_directory": str(tmp_path / place)}))
        pool.onload()
        assert intact(held)
        (tmp_path / "marker").unlink(missing_ok=True)
    pool.offload()
    pool.onload()
    assert intact(held)


def test_no_place_for_the_files(standin: cudastandin.StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any directory the error names the variables; missing files name every directory looked at."""
    monkeypatch.delenv("DYN_CHECKPOINT_LOCATION", raising=False)
    monkeypatch.delenv("CHREK_POOL_DIRECTORY", raising=False)
    with pytest.raises(PoolError, match="CHREK_POOL_DIRECTORY or DYN_CHECKPOINT_LOCATION"):
        handover_directory()
    monkeypatch.setenv("CHREK_POOL_DIRECTORY", str(tmp_path / "own"))
    pool = make_pool(standin)
    fill_pool(pool, (2 * MIB,))
    pool.offload()
    (tmp_path / "own").rename(tmp_path / "lost")
    with pytest.raises(PoolError, match=r"own/weights\.\d+ lacks 1 of 1 files"):
        pool.onload()


@pytest.mark.parametrize("direct", ["auto", "off", "on"])
def test_regions_of_other_owners(standin: cudastandin.StandIn, tmp_path: Path, direct: str) -> None:
    """Memory that a framework maps itself is saved and loaded, in any size that is a multiple of 16."""
    cuda = Cuda(str(standin.library))
    data = random.Random(7).randbytes(9 * MIB + 48)
    memory = ctypes.create_string_buffer(data, len(data) + 16)
    start = -(-ctypes.addressof(memory) // 16) * 16
    write(start, data)
    options = Options(threads=2, chunk=MIB, direct=direct)
    regions = [Region(0, start, 9 * MIB), Region(0, start + 9 * MIB, 48)]
    index, report = save(cuda, regions, str(tmp_path), pool="other", options=options)
    assert report.moved == len(data)
    ctypes.memset(start, 0, len(data))
    load(cuda, index, str(tmp_path), options=options)
    assert ctypes.string_at(start, len(data)) == data
    assert from_json((tmp_path / "index.json").read_text()) == index


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".", "a.json"])
def test_names_that_are_none(name: str) -> None:
    """A pool's name becomes a file name."""
    with pytest.raises(PoolError, match="cannot be a pool's name"):
        TensorPool(name)


def test_no_threads_are_left(standin: cudastandin.StandIn, tmp_path: Path) -> None:
    """A transfer ends its threads, also when it fails: a checkpoint must not find them."""
    pool = make_pool(standin)
    fill_pool(pool)
    standin.fail("cuEventSynchronize", 700, skip=1, times=1)
    with pytest.raises(CudaError):
        pool.offload(str(tmp_path))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("chrek-pool")]

"""Before a capture and before a restore: what is found, what is refused, and that nothing is touched."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chrek.cuda.abi import Code, ProcessState
from chrek.cuda.driver import GpuUuid
from chrek.cuda.gpumap import GIB, Gpu
from chrek.cuda.preflight import before_capture, before_restore, container_minors, remaining_devices, uses_gpu
from chrek.errors import Reason, Refused
from chrek.system.ids import HostPid
from gpu import cudastandin

pytestmark = pytest.mark.skipif(cudastandin.compiler() is None, reason="needs a C compiler for the stand-in driver")

H100 = "NVIDIA H100 80GB HBM3"
DRIVER = "580.159.04"


@pytest.fixture
def standin(tmp_path: Path) -> cudastandin.StandIn:
    """A machine with two GPUs, its library under the driver's name."""
    built = cudastandin.build(tmp_path)
    return cudastandin.StandIn(tmp_path, built.rename(tmp_path / "libcuda.so.1"), gpus=2)


@pytest.fixture
def user(standin: cudastandin.StandIn) -> Iterator[HostPid]:
    """A process with the driver's library mapped and initialised."""
    code = f"import ctypes; ctypes.CDLL({str(standin.library)!r}); print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    standin.add(process.pid, mib=30 * 1024)
    yield HostPid(process.pid)
    process.communicate(b"\n")


@pytest.fixture
def other() -> Iterator[HostPid]:
    """A process without GPUs."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield HostPid(process.pid)
    process.communicate(b"\n")


def gpu(number: int, *, model: str = H100, used: int = 0) -> Gpu:
    """A GPU of the stand-in, by its number from 1."""
    return Gpu(GpuUuid(bytes([number]) * 16), model, 80 * GIB, used=used)


def test_a_tree_without_gpus_needs_no_library(other: HostPid) -> None:
    """No driver is loaded, so a machine without one can checkpoint it; a process that ended uses nothing."""
    assert before_capture([other], driver="nowhere.so", nvml="nowhere.so") is None
    assert not uses_gpu(HostPid(2**22 - 1))


def test_a_tree_with_gpus(standin: cudastandin.StandIn, user: HostPid, other: HostPid) -> None:
    """The users are found among all processes, with what the driver will move; nothing is called on them."""
    library = str(standin.library)
    found = before_capture([other, user], driver=library, nvml=library)
    assert found is not None
    state, tree = found
    assert (tree.pids, tree.driver, tree.moved) == ((user,), DRIVER, 30 * GIB)
    assert sum(standin.process(user).calls[1:]) == 0
    assert remaining_devices(tree.pids) == {}
    state.resume(state.capture(tree.pids))
    assert standin.state(user) == ProcessState.RUNNING


def test_memory_that_does_not_fit(standin: cudastandin.StandIn, user: HostPid) -> None:
    """Refused before the driver is called, unless the user allows it."""
    library = str(standin.library)

    def ask(*allow: Reason) -> object:
        return before_capture([user], memory_limit=16 * GIB, allow=allow, driver=library, nvml=library)

    with pytest.raises(Refused) as caught:
        ask()
    assert caught.value.reason is Reason.MEMORY_LIMIT
    assert ask(Reason.MEMORY_LIMIT) is not None
    assert sum(standin.process(user).calls[1:]) == 0


def test_a_driver_library_that_is_not_there(standin: cudastandin.StandIn, user: HostPid) -> None:
    """A tree that uses GPUs on a machine whose driver ChReK cannot load is refused by name."""
    with pytest.raises(Refused) as caught:
        before_capture([user], driver="nowhere.so")
    assert caught.value.reason is Reason.GPU_DRIVER_MISSING


def test_the_gpus_of_a_container() -> None:
    """The /dev of this machine is looked at without failing; without GPUs there are none."""
    assert all(Path(f"/dev/nvidia{minor}").exists() for minor in container_minors(HostPid(os.getpid())))


def test_a_restore_on_the_same_gpus(standin: cudastandin.StandIn) -> None:
    """No map is needed."""
    library = str(standin.library)
    _, gpu_map = before_restore([gpu(1), gpu(2)], DRIVER, driver=library, nvml=library)
    assert gpu_map == {}


def test_a_restore_on_another_gpu(standin: cudastandin.StandIn) -> None:
    """The container's own GPUs are the only ones to choose from."""
    library = str(standin.library)
    _, gpu_map = before_restore([gpu(1)], DRIVER, minors=[1], driver=library, nvml=library)
    assert gpu_map == {gpu(1).uuid: gpu(2).uuid}
    with pytest.raises(Refused, match="here is no GPU"):
        before_restore([gpu(1)], DRIVER, minors=[], driver=library, nvml=library)


def test_an_older_driver_restores_in_place_only(standin: cudastandin.StandIn) -> None:
    """A map needs CUDA 13; the same GPUs do not."""
    library = str(standin.library)
    standin.shared.version = 12080
    before_restore([gpu(1)], DRIVER, driver=library, nvml=library)
    with pytest.raises(Refused, match="needs NVIDIA driver 580") as caught:
        before_restore([gpu(1)], DRIVER, minors=[1], driver=library, nvml=library)
    assert caught.value.reason is Reason.GPU_DRIVER_TOO_OLD


@pytest.mark.parametrize(
    ("saved", "driver", "reason"),
    [
        ([gpu(1)], "570.1", Reason.DRIVER_MISMATCH),
        ([gpu(1), gpu(2), gpu(3)], DRIVER, Reason.GPU_MISMATCH),
        ([gpu(1, model="NVIDIA A100")], DRIVER, Reason.GPU_MISMATCH),
        ([gpu(1, used=81 * GIB)], DRIVER, Reason.GPU_MISMATCH),
    ],
)
def test_what_does_not_fit_here(standin: cudastandin.StandIn, saved: list[Gpu], driver: str, reason: Reason) -> None:
    """Another driver, too few GPUs, another model, too little memory."""
    library = str(standin.library)
    with pytest.raises(Refused) as caught:
        before_restore(saved, driver, driver=library, nvml=library)
    assert caught.value.reason is reason


def test_a_driver_that_only_hangs_at_start(standin: cudastandin.StandIn) -> None:
    """The driver's start goes on beside other work: nobody waits for it here."""
    library = str(standin.library)
    standin.fail("cuInit", Code.SYSTEM_NOT_READY, hang_ms=60_000)
    state, _ = before_restore([gpu(1)], DRIVER, driver=library, nvml=library)
    assert state.driver.ready(0) is None
    standin.release()
    assert state.driver.ready(10) == Code.SYSTEM_NOT_READY

"""The driver's part of a capture and a restore, against the stand-in of the driver."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from chrek.cuda import evidence
from chrek.cuda.abi import Code, ProcessState
from chrek.cuda.driver import Driver, GpuUuid
from chrek.cuda.sequence import Deadlines, GpuState
from chrek.errors import CaptureFailed, ChrekError, Reason, Refused, RestoreFailed
from chrek.system.ids import HostPid
from gpu import cudastandin

pytestmark = pytest.mark.skipif(cudastandin.compiler() is None, reason="needs a C compiler for the stand-in driver")

QUICK = Deadlines(init=60, query=60, lock=60, checkpoint=60, restore=60, unlock=60)
"""For calls that come back: on a busy machine a thread may have to wait for its turn."""
SHORT = 3.0
"""For one call that never comes back beside one that has to."""
STEPS = ("Lock", "Checkpoint")


@pytest.fixture
def standin(tmp_path: Path) -> Iterator[cudastandin.StandIn]:
    """A driver with one GPU and no process."""
    with cudastandin.machine(tmp_path) as made:
        yield made


@pytest.fixture
def pids() -> Iterator[list[HostPid]]:
    """Two living processes."""
    with_pipe = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
    yield [HostPid(process.pid) for process in with_pipe]
    for process in with_pipe:
        process.communicate(b"\n")


def gpu_state(standin: cudastandin.StandIn, deadlines: Deadlines = QUICK) -> GpuState:
    """The sequence over a stand-in."""
    return GpuState(Driver(str(standin.library)), deadlines=deadlines)


def test_finds_the_processes_with_cuda(standin: cudastandin.StandIn, pids: list[HostPid]) -> None:
    """A process without CUDA is left out, and so is one that has ended."""
    standin.add(pids[0])
    found = gpu_state(standin).find([*pids, HostPid(2**22 - 1)])
    assert [(p.pid, p.state) for p in found] == [(pids[0], ProcessState.RUNNING)]


def test_capture_and_resume(standin: cudastandin.StandIn, pids: list[HostPid]) -> None:
    """A capture leaves every process checkpointed, and resume leaves it running."""
    for pid in pids:
        standin.add(pid)
    state = gpu_state(standin)
    held = state.capture(pids)
    assert [standin.state(pid) for pid in pids] == [ProcessState.CHECKPOINTED] * 2
    assert set(held.seconds) == {"lock", "checkpoint"}
    state.resume(held)
    assert [standin.state(pid) for pid in pids] == [ProcessState.RUNNING] * 2


def test_lock_has_a_timeout_below_the_deadline(standin: cudastandin.StandIn, pids: list[HostPid]) -> None:
    """The driver gives up waiting for busy work before ChReK gives up waiting for the driver."""
    standin.add(pids[0])
    gpu_state(standin).capture(pids)
    assert 0 < standin.process(pids[0]).timeout_ms < QUICK.lock * 1000


@pytest.mark.parametrize("call", STEPS)
@pytest.mark.parametrize("code", [*[code for code in Code if code != Code.SUCCESS], 998, 12345])
def test_every_code_at_every_step_is_unwound(
    standin: cudastandin.StandIn, pids: list[HostPid], call: str, code: int
) -> None:
    """Whatever one process answers at whatever step, all processes run on and the message names the call."""
    for pid in pids:
        standin.add(pid)
    standin.fail(f"cuCheckpointProcess{call}", code, pid=pids[1])
    with pytest.raises(CaptureFailed, match=f"cuCheckpointProcess{call} for process {pids[1]} gave") as caught:
        gpu_state(standin).capture(pids)
    assert [standin.state(pid) for pid in pids] == [ProcessState.RUNNING] * 2
    busy = call == "Lock" and code == Code.NOT_READY
    assert caught.value.reason is (Reason.GPU_BUSY if busy else Reason.GPU_CALL_FAILED)


def test_the_drivers_own_name_for_an_unknown_code(standin: cudastandin.StandIn, pids: list[HostPid]) -> None:
    """A code that this program does not know is named by the driver."""
    standin.add(pids[0])
    standin.fail("cuCheckpointProcessLock", 998)
    with pytest.raises(CaptureFailed, match="CUDA_ERROR_STANDIN"):
        gpu_state(standin).capture(pids)


@pytest.mark.parametrize("call", ["Restore", "Unlock"])
def test_a_process_that_does_not_come_back_is_named(
    standin: cudastandin.StandIn, pids: list[HostPid], call: str
) -> None:
    """If unwinding itself fails the error is GPU_STUCK and names the process; the other one runs."""
    for pid in pids:
        standin.add(pid)
    standin.fail("cuCheckpointProcessCheckpoint", Code.UNKNOWN, pid=pids[0])
    standin.fail(f"cuCheckpointProcess{call}", Code.INVALID_VALUE, pid=pids[1])
    with pytest.raises(CaptureFailed, match=f"process {pids[1]}: it stays") as caught:
        gpu_state(standin).capture(pids)
    assert caught.value.reason is Reason.GPU_STUCK
    assert standin.state(pids[0]) == ProcessState.RUNNING


def test_an_unwinding_that_fails_once_is_tried_again(standin: cudastandin.StandIn, pids: list[HostPid]) -> None:
    """One error on the way back does not leave the process locked."""
    standin.add(pids[0])
    standin.fail("cuCheckpointProcessUnlock", Code.NOT_READY, times=1)
    state = gpu_state(standin)
    state.resume(state.capture(pids))
    assert standin.state(pids[0]) == ProcessState.RUNNING


@pytest.mark.parametrize("call", STEPS)
def test_a_call_that_hangs_ends_at_the_deadline(standin: cudastandin.StandIn, pids: list[HostPid], call: str) -> None:
    """The other process is driven back at once, the hanging one as soon as its call returns."""
    for pid in pids:
        standin.add(pid)
    standin.fail(f"cuCheckpointProcess{call}", -1, pid=pids[1], hang_ms=60_000, times=1)
    state = gpu_state(standin, dataclasses.replace(QUICK, **{call.lower(): SHORT}))
    with pytest.raises(CaptureFailed, match="has not come back") as caught:
        state.capture(pids)
    assert caught.value.reason is Reason.GPU_STUCK
    assert standin.state(pids[0]) == ProcessState.RUNNING
    standin.release()
    for thread in threading.enumerate():
        if thread.name == f"chrek-cuda-{pids[1]}":
            thread.join(60)
    assert standin.state(pids[1]) == ProcessState.RUNNING


@pytest.mark.parametrize("left", [ProcessState.LOCKED, ProcessState.CHECKPOINTED])
def test_leftovers_of_a_killed_agent(standin: cudastandin.StandIn, pids: list[HostPid], left: int) -> None:
    """What a killed agent left locked or checkpointed is driven back, and a capture works then."""
    standin.add(pids[0], state=left)
    state = gpu_state(standin)
    assert state.drive_back(pids) == ()
    assert standin.state(pids[0]) == ProcessState.RUNNING
    standin.process(pids[0]).state = left
    assert state.capture(pids).pids == (pids[0],)


@pytest.mark.parametrize("left", [ProcessState.FAILED, ProcessState.CHECKPOINTING, 77])
def test_states_without_a_way_back(standin: cudastandin.StandIn, pids: list[HostPid], left: int) -> None:
    """A failed process, or one in a state that this program does not know, is refused before any call."""
    standin.add(pids[0])
    standin.add(pids[1], state=left)
    with pytest.raises(CaptureFailed, match="from which no call leads back") as caught:
        gpu_state(standin).capture(pids)
    assert caught.value.reason is Reason.GPU_STUCK
    assert standin.process(pids[0]).calls[1] == 0


def test_restore_with_a_map(standin: cudastandin.StandIn, pids: list[HostPid]) -> None:
    """The map reaches the driver with a pair for every GPU."""
    standin.shared.gpus = 2
    standin.set_gpu(0)
    standin.set_gpu(1)
    standin.add(pids[0], state=ProcessState.CHECKPOINTED)
    first, second = GpuUuid(b"\1" * 16), GpuUuid(b"\2" * 16)
    gpu_state(standin).restore([pids[0]], {first: second, second: first})
    assert (standin.state(pids[0]), standin.process(pids[0]).map_pairs) == (ProcessState.RUNNING, 2)


@pytest.mark.parametrize("call", ["Restore", "Unlock"])
def test_a_restore_that_fails(standin: cudastandin.StandIn, pids: list[HostPid], call: str) -> None:
    """A failure after CRIU is RestoreFailed, so that the tree is ended and started cold."""
    standin.add(pids[0], state=ProcessState.CHECKPOINTED)
    standin.fail(f"cuCheckpointProcess{call}", Code.INVALID_VALUE)
    with pytest.raises(RestoreFailed, match=f"cuCheckpointProcess{call}"):
        gpu_state(standin).restore([pids[0]])


def test_no_process_is_unlocked_before_all_are_restored(standin: cudastandin.StandIn, pids: list[HostPid]) -> None:
    """When one process does not come back, none has been let run."""
    for pid in pids:
        standin.add(pid, state=ProcessState.CHECKPOINTED)
    standin.fail("cuCheckpointProcessRestore", Code.UNKNOWN, pid=pids[0])
    with pytest.raises(RestoreFailed):
        gpu_state(standin).restore(pids)
    assert standin.process(pids[1]).calls[4] == 0


def test_a_missing_library() -> None:
    """Without the driver's library the refusal names it."""
    with pytest.raises(Refused) as caught:
        Driver("libcuda-nowhere.so.1")
    assert caught.value.reason is Reason.GPU_DRIVER_MISSING


def test_an_old_driver(tmp_path: Path) -> None:
    """A driver without one of the calls is refused with the version that has it."""
    machine = cudastandin.StandIn(tmp_path, cudastandin.build(tmp_path, old=True))
    with pytest.raises(Refused, match="GetRestoreThreadId") as caught:
        Driver(str(machine.library)).require()
    assert caught.value.reason is Reason.GPU_DRIVER_TOO_OLD
    assert "570" in caught.value.cure


def test_an_older_driver_restores_in_place_only(standin: cudastandin.StandIn) -> None:
    """A map needs CUDA 13; the same GPUs do not."""
    standin.shared.version = 12080
    driver = Driver(str(standin.library))
    driver.require(gpu_map={})
    with pytest.raises(Refused, match=r"this is CUDA 12\.8") as caught:
        driver.require(gpu_map={GpuUuid(b"\1" * 16): GpuUuid(b"\2" * 16)})
    assert caught.value.reason is Reason.GPU_DRIVER_TOO_OLD


def test_a_process_is_known_by_the_library(standin: cudastandin.StandIn, pids: list[HostPid]) -> None:
    """A checkpointed process holds no device, so its mapped library tells; others and ended ones do not."""
    library = standin.library.rename(standin.library.with_name("libcuda.so.1"))
    code = f"import ctypes; ctypes.CDLL({str(library)!r}); print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    assert evidence.uses_driver(HostPid(process.pid))
    assert evidence.remaining_devices([HostPid(process.pid)]) == {}
    process.communicate(b"\n")
    assert not evidence.uses_driver(HostPid(process.pid))
    assert not evidence.uses_driver(pids[0])


def test_cuinit_that_fails_or_hangs(standin: cudastandin.StandIn, pids: list[HostPid]) -> None:
    """The driver's cuInit is waited for with a deadline, and its code is told."""
    standin.fail("cuInit", Code.SYSTEM_NOT_READY, times=1)
    with pytest.raises(CaptureFailed, match="SYSTEM_NOT_READY"):
        gpu_state(standin).find(pids)
    standin.fail("cuInit", -1, hang_ms=60_000)
    with pytest.raises(CaptureFailed, match="has not come back"):
        gpu_state(standin, Deadlines(init=0.1)).find(pids)


def test_a_machine_without_a_device(standin: cudastandin.StandIn, pids: list[HostPid]) -> None:
    """A driver without any GPU finds no process and is no failure."""
    standin.fail("cuInit", Code.NO_DEVICE)
    assert gpu_state(standin).find(pids) == ()


def test_a_state_that_cannot_be_read(standin: cudastandin.StandIn, pids: list[HostPid]) -> None:
    """A living process for which the driver does not answer stops the capture: it might use a GPU."""
    standin.add(pids[0])
    standin.fail("cuCheckpointProcessGetState", Code.NOT_PERMITTED)
    with pytest.raises(ChrekError, match="NOT_PERMITTED"):
        gpu_state(standin).capture(pids)


def test_the_environment_is_read_at_load(standin: cudastandin.StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """No later call of the stand-in reads the environment, which this process may be changing at that moment."""
    library = ctypes.CDLL(str(standin.library))
    monkeypatch.setenv("CHREK_STANDIN", "/nowhere")
    assert library.cuInit(0) == 0
    standin.fail("cuInit", Code.SYSTEM_NOT_READY)
    assert library.cuInit(0) == Code.SYSTEM_NOT_READY


def test_the_restore_thread(standin: cudastandin.StandIn) -> None:
    """The thread that the driver works in can be asked for."""
    standin.add(os.getpid())
    assert Driver(str(standin.library)).restore_thread(HostPid(os.getpid())) == (Code.SUCCESS, os.getpid())

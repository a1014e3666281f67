"""The binding and the stand-in against NVIDIA's own header, bindings and driver."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import pytest

from chrek.cuda import abi
from chrek.cuda.abi import Code, ProcessState
from chrek.cuda.driver import Driver, GpuUuid
from chrek.cuda.inventory import Nvml
from chrek.cuda.sequence import Deadlines, GpuState
from chrek.errors import CaptureFailed, Reason
from chrek.system.ids import HostPid
from gpu import cudastandin, harness

Start = Callable[[str], Popen[str]]

# Other people's libraries warn.
pytestmark = pytest.mark.filterwarnings("default")

LAYOUTS = {
    "CUcheckpointLockArgs": abi.LockArgs,
    "CUcheckpointCheckpointArgs": abi.CheckpointArgs,
    "CUcheckpointGpuPair": abi.GpuPair,
    "CUcheckpointRestoreArgs": abi.RestoreArgs,
    "CUcheckpointUnlockArgs": abi.UnlockArgs,
}


def header() -> Path:
    """The directory of cuda.h, or a skip."""
    places = [Path("/usr/local/cuda/include"), *(Path(p) for p in sys.path)]
    for place in places:
        for found in [place / "cuda.h", *sorted(place.glob("nvidia/cu*/include/cuda.h"))]:
            if found.exists():
                return found.parent
    pytest.skip("no cuda.h here")


def test_layouts_are_the_headers(tmp_path: Path) -> None:
    """Sizes of the argument structures, and where their fields lie, are those of cuda.h."""
    lines = [f'printf("{name} %zu\\n", sizeof({name}));' for name in LAYOUTS]
    fields = [("CUcheckpointRestoreArgs", "gpuPairs"), ("CUcheckpointRestoreArgs", "gpuPairsCount")]
    lines += [f'printf("{name}.{field} %zu\\n", offsetof({name}, {field}));' for name, field in fields]
    source = tmp_path / "layout.c"
    body = "".join(lines)
    source.write_text(
        f"#include <stdio.h>\n#include <stddef.h>\n#include <cuda.h>\nint main(void) {{ {body} return 0; }}\n"
    )
    compiler = cudastandin.compiler() or "nvcc"
    subprocess.run([compiler, "-I", str(header()), "-o", str(tmp_path / "layout"), str(source)], check=True)
    told = subprocess.run([str(tmp_path / "layout")], check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in (line.split() for line in told.splitlines())}
    assert found.pop("CUcheckpointRestoreArgs.gpuPairs") == abi.RestoreArgs.pairs.offset
    assert found.pop("CUcheckpointRestoreArgs.gpuPairsCount") == abi.RestoreArgs.pair_count.offset
    assert ctypes.sizeof(abi.RestoreArgs) >= found.pop("CUcheckpointRestoreArgs")
    assert found == {n: ctypes.sizeof(layout) for n, layout in LAYOUTS.items() if n != "CUcheckpointRestoreArgs"}


def test_numbers_are_those_of_nvidias_bindings() -> None:
    """States and codes have the values of cuda.bindings, where that is installed."""
    bindings = pytest.importorskip("cuda.bindings.driver")
    theirs = {state.name: state.value for state in bindings.CUprocessState}
    for state in ProcessState:
        assert theirs.get(f"CU_PROCESS_STATE_{state.name}", state.value) == state.value
    codes = {code.value: code.name for code in bindings.CUresult}
    for code in Code:
        if code.value in codes:
            assert codes[code.value] == ("CUDA_SUCCESS" if code == 0 else f"CUDA_ERROR_{code.name}")


def sequence(driver: Driver, pid: HostPid, stranger: HostPid, dead: HostPid) -> list[tuple[str, int, int]]:
    """Every call in every state; what the driver answered."""
    unknown = {GpuUuid(b"\x42" * 16): GpuUuid(b"\x43" * 16)}
    steps: list[tuple[str, Callable[[], int]]] = [
        ("state of a stranger", lambda: driver.state(stranger)[0]),
        ("state of nobody", lambda: driver.state(dead)[0]),
        ("lock a stranger", lambda: driver.lock(stranger, timeout_ms=1000)),
        ("lock nobody", lambda: driver.lock(dead, timeout_ms=1000)),
        ("unlock when running", lambda: driver.unlock(pid)),
        ("checkpoint when running", lambda: driver.checkpoint(pid)),
        ("restore when running", lambda: driver.restore(pid)),
        ("lock", lambda: driver.lock(pid, timeout_ms=10_000)),
        ("lock when locked", lambda: driver.lock(pid, timeout_ms=1000)),
        ("restore when locked", lambda: driver.restore(pid)),
        ("unlock when locked", lambda: driver.unlock(pid)),
        ("lock again", lambda: driver.lock(pid, timeout_ms=10_000)),
        ("checkpoint", lambda: driver.checkpoint(pid)),
        ("checkpoint when checkpointed", lambda: driver.checkpoint(pid)),
        ("lock when checkpointed", lambda: driver.lock(pid, timeout_ms=1000)),
        ("unlock when checkpointed", lambda: driver.unlock(pid)),
        ("restore with a wrong map", lambda: driver.restore(pid, unknown)),
        ("restore", lambda: driver.restore(pid)),
        ("unlock", lambda: driver.unlock(pid)),
        ("restore thread", lambda: driver.restore_thread(pid)[0]),
    ]
    answers = []
    for name, step in steps:
        code = step()
        answers.append((name, code, driver.state(pid)[1]))
    return answers


def test_the_stand_in_answers_as_the_driver(driver: Driver, start: Start, tmp_path: Path) -> None:
    """In every state every call gives the same code and leads to the same state, real or not."""
    process = start("plain")
    stranger = subprocess.Popen(["sleep", "1000"])
    dead = subprocess.Popen(["true"])
    dead.wait()
    machine = cudastandin.StandIn(tmp_path, cudastandin.build(tmp_path))
    machine.add(process.pid)
    pids = HostPid(process.pid), HostPid(stranger.pid), HostPid(dead.pid)
    try:
        real = sequence(driver, *pids)
        sys.stderr.write("".join(f"{one}\n" for one in real))
        assert real == sequence(Driver(str(machine.library)), *pids)
    finally:
        stranger.kill()
        stranger.wait()


def test_capture_and_resume_in_place(driver: Driver, start: Start) -> None:
    """Two processes are saved and brought back, and compute what they computed before."""
    first, second = start("plain"), start("pinned")
    pids = [HostPid(first.pid), HostPid(second.pid)]
    before = harness.ask(first), harness.ask(second)
    state = GpuState(driver)
    held = state.capture([*pids, HostPid(os.getpid())][:2])
    assert [driver.state(pid)[1] for pid in pids] == [ProcessState.CHECKPOINTED] * 2
    assert not nvidia_descriptors(first.pid)
    seconds = state.resume(held)
    sys.stderr.write(f"capture {dict(held.seconds)} resume {seconds}\n")
    assert (harness.ask(first), harness.ask(second)) == before


@pytest.mark.parametrize("case", ["cupy_plain", "jax_plain"])
def test_other_frameworks(driver: Driver, start: Start, case: str) -> None:
    """CuPy and JAX programs compute on as PyTorch's do, three times in a row."""
    process = start(case)
    before = harness.ask(process)
    state = GpuState(driver)
    for _ in range(3):
        state.resume(state.capture([HostPid(process.pid)]))
        assert harness.ask(process) == before


def nvidia_descriptors(pid: int) -> list[str]:
    """Descriptors of GPU devices that a process holds."""
    targets = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            targets.append(os.readlink(link))
    return [target for target in targets if target.startswith("/dev/nvidia")]


def test_a_busy_process(driver: Driver, start: Start) -> None:
    """Work that does not end in time gives GPU_BUSY, and the process runs on."""
    process = start("busy")
    harness.tell(process)
    assert process.stdout is not None
    process.stdout.readline()
    state = GpuState(driver, deadlines=Deadlines(lock=1.0))
    with pytest.raises(CaptureFailed) as caught:
        state.capture([HostPid(process.pid)])
    assert caught.value.reason is Reason.GPU_BUSY
    assert driver.state(HostPid(process.pid)) == (Code.SUCCESS, ProcessState.RUNNING)


@pytest.mark.parametrize("step", ["lock", "checkpoint"])
def test_leftovers_of_a_killed_agent(driver: Driver, start: Start, step: str) -> None:
    """A process that a killed program left locked or checkpointed is driven back and computes on."""
    process = start("plain")
    before = harness.ask(process)
    code = (
        "import os,sys; from chrek.cuda.driver import Driver; d=Driver(); d.ready(60); p=int(sys.argv[1]);"
        "d.lock(p,timeout_ms=5000); sys.argv[2]=='lock' or d.checkpoint(p); os.kill(os.getpid(),9)"
    )
    subprocess.run([sys.executable, "-c", code, str(process.pid), step], check=False)
    assert driver.state(HostPid(process.pid))[1] != ProcessState.RUNNING
    assert GpuState(driver).drive_back([HostPid(process.pid)]) == ()
    assert harness.ask(process) == before


def test_the_inventory(start: Start) -> None:
    """NVML names every GPU with its device node, and a process with what it has there."""
    process = start("plain")
    found = Nvml().read()
    assert found.driver.count(".") >= 1
    for gpu in found.gpus:
        assert Path(f"/dev/nvidia{gpu.minor}").exists()
        assert 0 < (gpu.free or 0) <= gpu.memory
    assert not found.mig
    sys.stderr.write(f"{found}\n")
    (use,) = found.of([HostPid(process.pid)])
    assert use.gpu == found.gpus[0].uuid
    minors = {int(t.removeprefix("/dev/nvidia")) for t in nvidia_descriptors(process.pid) if t[11:].isdigit()}
    assert [gpu.uuid for gpu in found.gpus_of(minors, [HostPid(process.pid)])] == [g.uuid for g in found.gpus]


def swapped() -> dict[GpuUuid, GpuUuid]:
    """A map that swaps the two GPUs of this machine; a skip on others."""
    uuids = [gpu.uuid for gpu in Nvml().read().gpus]
    if len(uuids) != 2:
        pytest.skip("needs two GPUs")
    return {uuids[0]: uuids[1], uuids[1]: uuids[0]}


@pytest.mark.parametrize("case", ["plain", "two"])
def test_on_the_other_gpu(driver: Driver, start: Start, case: str) -> None:
    """With a map of both GPUs a process comes back with its GPUs swapped, and computes what it computed."""
    gpu_map = swapped()
    process = start(case)
    pid = HostPid(process.pid)
    before, where = harness.ask(process), {use.gpu for use in Nvml().read().of([pid])}
    state = GpuState(driver)
    state.capture([pid])
    sys.stderr.write(f"{state.restore([pid], gpu_map)}\n")
    assert harness.ask(process) == before
    assert {use.gpu for use in Nvml().read().of([pid])} == {gpu_map[gpu] for gpu in where}


def test_nccl_with_its_transports_off(driver: Driver, start: Start) -> None:
    """Two ranks that NCCL connects through the network come back and reduce again."""
    swapped()
    process = start("NCCL_P2P_DISABLE=1,NCCL_SHM_DISABLE=1,NCCL_NVLS_ENABLE=0,nccl")
    assert harness.ask(process) == str(3.0 * (1 << 20))
    state = GpuState(driver)
    held = state.capture(harness.tree(process.pid))
    assert len(held.pids) == 2
    state.resume(held)
    assert harness.ask(process) == str(3.0 * (1 << 20))

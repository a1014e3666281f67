"""What must not be checkpointed is recognised in recordings of real processes, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from chrek.cuda import evidence
from chrek.cuda.detect import Certainty, Finding, context_minors, detect, refuse, visible_minors
from chrek.cuda.evidence import Evidence
from chrek.errors import Reason, Refused
from chrek.system.ids import HostPid

RECORDINGS = Path(__file__).parents[1] / "gpu" / "evidence"
NVLS_ALSO = {Reason.NCCL_TRANSPORT, Reason.NVLS_MULTICAST}

EXPECTED: dict[str, tuple[set[Reason], Certainty | None]] = {
    "plain": (set(), None),
    "plain-visible-1": (set(), None),
    "pinned": (set(), None),
    "pooled": (set(), None),
    "cupy_plain": (set(), None),
    "jax_plain": (set(), None),
    "nccl_one": (set(), None),
    "nccl-transports-off": (set(), None),
    "nccl-p2p-off": ({Reason.NCCL_TRANSPORT}, Certainty.LIKELY),
    "nccl": ({Reason.NCCL_TRANSPORT}, Certainty.LIKELY),
    "ipc": ({Reason.CUDA_IPC}, Certainty.CERTAIN),
    "managed": ({Reason.MANAGED_MEMORY}, Certainty.CERTAIN),
    "forked": ({Reason.GPU_FD_INHERITED}, Certainty.CERTAIN),
    "peer": ({Reason.GPU_PEER_ACCESS}, Certainty.LIKELY),
    # Looks exactly like `peer`: the price of never losing an application.
    "two": ({Reason.GPU_PEER_ACCESS}, Certainty.LIKELY),
}


def recording(name: str) -> tuple[Evidence, ...]:
    """The processes of a recording."""
    return evidence.parse((RECORDINGS / f"{name}.txt").read_text())


def test_every_recording_is_expected_to_say_something() -> None:
    """No recording lies there untested."""
    assert {path.stem for path in RECORDINGS.glob("*.txt")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_recordings(name: str) -> None:
    """Each recorded case gives its reason and certainty, and no other."""
    reasons, certainty = EXPECTED[name]
    found = detect(recording(name))
    assert {finding.reason for finding in found} == reasons
    assert {finding.certainty for finding in found} == ({certainty} if certainty else set())


def test_nvls_is_told_apart() -> None:
    """NCCL without its transports but with NVLS has a code of its own (recorded with NVLS off, edited)."""
    ranks = [replace(one, environment={**one.environment, "NCCL_NVLS_ENABLE": "1"}) for one in recording("nccl")]
    assert {finding.reason for finding in detect(ranks)} == NVLS_ALSO


def test_which_gpus_a_process_has_and_sees() -> None:
    """A context is told from a GPU that the driver merely sees; both are told from CUDA_VISIBLE_DEVICES."""
    (only_second,) = recording("plain-visible-1")
    assert (set(context_minors(only_second)), set(visible_minors(only_second))) == ({1}, {0, 1})
    (both,) = recording("two")
    assert set(context_minors(both)) == {0, 1}
    (single,) = recording("plain")
    assert (set(context_minors(single)), set(visible_minors(single))) == ({0}, {0})


def test_gpus_that_cannot_be_peers() -> None:
    """Where no two of the GPUs can reach each other a process with several is not refused."""
    assert detect(recording("two"), peers=[]) == ()
    assert detect(recording("two"), peers=[(1, 2)]) == ()
    assert [f.reason for f in detect(recording("two"), peers=[(0, 1)])] == [Reason.GPU_PEER_ACCESS]


def test_mig() -> None:
    """A context on a GPU that MIG cuts up is refused, one on another GPU is not."""
    assert [f.reason for f in detect(recording("plain"), mig_minors=[0])] == [Reason.MIG_IN_USE]
    assert detect(recording("plain"), mig_minors=[1]) == ()


def test_mps() -> None:
    """A client of MPS is known by its environment (not recorded)."""
    (one,) = recording("plain")
    client = replace(one, environment={"CUDA_MPS_PIPE_DIRECTORY": "/tmp/nvidia-mps"})
    assert [f.reason for f in detect([client])] == [Reason.MPS_IN_USE]


def test_descriptors_without_cuda() -> None:
    """A process that holds GPU devices and has no CUDA got them by fork or opened them itself: no call closes them."""
    (one,) = recording("plain")
    (finding,) = detect([replace(one, driver_state="none", maps=())])
    assert finding.reason is Reason.GPU_FD_INHERITED
    assert "/dev/nvidia" in finding.seen


def test_a_refusal_names_process_and_way_out() -> None:
    """The message says which process and what was seen; the cure how to avoid it and how to override it."""
    with pytest.raises(Refused, match=r"process \d+: /dev/shm/cuda\.shm\.\S+ is mapped \(certain\)") as caught:
        refuse(detect(recording("ipc")))
    assert caught.value.reason is Reason.CUDA_IPC
    assert "CHREK_ALLOW=CUDA_IPC" in caught.value.cure


def test_overrides() -> None:
    """Allowed reasons are handed back to be warned of; the rest still refuses, and tells every code."""
    ipc = detect(recording("ipc"))
    assert refuse(ipc, allow={Reason.CUDA_IPC}) == ipc
    managed = Finding(Reason.MANAGED_MEMORY, Certainty.CERTAIN, HostPid(1), "x")
    peer = Finding(Reason.GPU_PEER_ACCESS, Certainty.LIKELY, HostPid(1), "y")
    with pytest.raises(Refused, match="Also found: GPU_PEER_ACCESS") as caught:
        refuse([*ipc, managed, peer], allow={Reason.CUDA_IPC})
    assert caught.value.reason is Reason.MANAGED_MEMORY


@pytest.mark.parametrize("name", EXPECTED)
def test_recordings_round_trip(name: str) -> None:
    """The text of a recording says everything that the detectors look at."""
    processes = recording(name)
    assert evidence.parse("".join(one.text() for one in processes)) == processes


def test_reading_a_process(tmp_path: Path) -> None:
    """A live process is read as recordings are: shared memory, descriptors, environment, threads, parent."""
    shared = Path("/dev/shm") / f"chrek-evidence-{os.getpid()}"
    code = f"import mmap,os;f=open({str(shared)!r},'w+b');f.truncate(4096);m=mmap.mmap(f.fileno(),0);print(flush=True);input()"
    environment = {**os.environ, "NCCL_P2P_DISABLE": "1", "SECRET": "x"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    try:
        for _ in range(500):
            found = evidence.read(HostPid(process.pid), driver_state="none")
            if found.maps:
                break
            os.sched_yield()
    finally:
        process.communicate(b"\n")
        shared.unlink()
    assert found.parent == os.getpid()
    assert [one.path for one in found.maps if one.path.startswith("/dev/shm")] == [str(shared)]
    assert str(shared) in found.descriptors.values()
    assert found.environment == {"NCCL_P2P_DISABLE": "1"} | {
        name: value for name, value in os.environ.items() if name.startswith(evidence.VARIABLES)
    }
    assert found.threads
    assert not found.inherited


def test_inherited_descriptors_are_told_from_own_ones() -> None:
    """Descriptors that came by fork are the same open file; one that the child opened itself is not."""
    shared = os.open("/dev/null", os.O_RDONLY)
    own = os.open("/dev/null", os.O_RDONLY)
    done, hold = os.pipe()
    code = f"import os; os.read({done}, 1)"
    child = subprocess.Popen([sys.executable, "-c", code], pass_fds=[shared, done])
    try:
        assert evidence.same_file(child.pid, shared, os.getpid(), shared)
        assert not evidence.same_file(child.pid, shared, os.getpid(), own)
    finally:
        os.write(hold, b"x")
        child.wait()
        for number in (shared, own, done, hold):
            os.close(number)


def test_text_that_is_no_recording() -> None:
    """Anything else is an error, not an empty recording."""
    with pytest.raises((ValueError, IndexError, KeyError)):
        evidence.parse("map 1 2 3")

"""The GPUs of a machine and what processes have on them, from the stand-in of NVML."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from chrek.cuda.inventory import GIB, Nvml, Use, require_memory
from chrek.errors import CaptureFailed, Reason, Refused
from chrek.system.ids import HostPid
from gpu import cudastandin

pytestmark = pytest.mark.skipif(cudastandin.compiler() is None, reason="needs a C compiler for the stand-in driver")


@pytest.fixture
def standin(tmp_path: Path) -> Iterator[cudastandin.StandIn]:
    """A machine with two GPUs."""
    with cudastandin.machine(tmp_path, gpus=2) as made:
        yield made


def test_gpus_and_uses(standin: cudastandin.StandIn) -> None:
    """Model, memory, device node and the bytes of each process are read; GPUs of a process carry its use."""
    standin.add(os.getpid(), mib=3072)
    found = Nvml(str(standin.library)).read()
    assert found.driver == "580.159.04"
    assert [(gpu.model, gpu.memory, gpu.minor) for gpu in found.gpus] == [
        ("NVIDIA H100 80GB HBM3", 80 * GIB, 0),
        ("NVIDIA H100 80GB HBM3", 80 * GIB, 1),
    ]
    (use,) = found.of([HostPid(os.getpid())])
    assert (use.gpu, use.bytes) == (found.gpus[0].uuid, 3 * GIB)
    assert [(gpu.minor, gpu.used) for gpu in found.gpus_of([0, 1], [use.pid])] == [(0, 3 * GIB), (1, 0)]
    assert found.peers == {(0, 1), (1, 0)}


def test_mig_and_peers(standin: cudastandin.StandIn) -> None:
    """GPUs that are cut up by MIG are told apart; a GPU without MIG at all counts as whole."""
    standin.set_gpu(0, mig=-1)
    standin.set_gpu(1, mig=1)
    found = Nvml(str(standin.library)).read()
    assert found.mig == {1}
    assert not found.peers


def test_failures(standin: cudastandin.StandIn) -> None:
    """A missing library and an NVML that does not start are told apart."""
    with pytest.raises(Refused) as missing:
        Nvml("libnvidia-ml-nowhere.so.1")
    assert missing.value.reason is Reason.GPU_DRIVER_MISSING
    standin.fail("nvmlInit_v2", 9)
    with pytest.raises(CaptureFailed, match="nvmlInit_v2 gave NVML error 9"):
        Nvml(str(standin.library))


def test_memory_limit(standin: cudastandin.StandIn) -> None:
    """GPU memory that would not fit beside what the container uses is refused with the number to set."""
    gpu = Nvml(str(standin.library)).read().gpus[0].uuid
    uses = [Use(HostPid(1), gpu, 30 * GIB), Use(HostPid(2), gpu, None)]
    assert require_memory(uses, limit=None, current=0) == 30 * GIB
    assert require_memory(uses, limit=40 * GIB, current=10 * GIB) == 30 * GIB
    with pytest.raises(Refused, match=r"uses 10\.0 GiB of its limit of 32\.0 GiB, and 30\.0 GiB") as caught:
        require_memory(uses, limit=32 * GIB, current=10 * GIB)
    assert caught.value.reason is Reason.MEMORY_LIMIT
    assert "40Gi" in caught.value.cure

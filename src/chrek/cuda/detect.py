"""What the driver would checkpoint and never restore, seen before the first call.

A checkpoint call that succeeds can be a death sentence: with peer access between GPUs, with CUDA IPC,
with NCCL's direct transports it returns success, and the restore fails for good (measured on two H100,
driver 580). So each such case is looked for first, in what /proc and NVML say. A finding is *certain*
if what was seen occurs in no other case, *likely* if a harmless program can look the same; both refuse,
and the user who knows better overrides by code (`CHREK_ALLOW`).

Recorded on the GPU machine (``tests/gpu/evidence``; driver 580.159.04, CUDA 13.0, PyTorch 2.11) and what
they show:

- A context on GPU *n* is a writable shared mapping of ``/dev/nvidia<n>`` that is also readable; GPUs that
  the driver merely sees have descriptors, and write-only mappings.
- Peer access leaves no trace: one process with two GPUs looks the same with and without. So a process
  with contexts on several GPUs that could reach each other is refused as *likely*.
- CUDA IPC maps ``/dev/shm/cuda.shm.<uid>.<pid>.<n>`` in both processes: *certain*.
- Managed memory is a mapping of ``/dev/nvidia-uvm`` above 1 TiB; the driver's own are 2 MiB each, below
  64 GiB, one a context: *certain*.
- NCCL: PyTorch's process group has threads ``pt_nccl_*``. Transports leave no trace of their own, so the
  variables that turn them off are looked for; a program that sets them after its start is not seen to:
  *likely*. One rank alone, or ranks on one GPU each in separate trees, have no transport between them.
- Inherited descriptors are found with kcmp(2): *certain*.
- MIG is asked of NVML: *certain*. MPS is known by its variable alone: *likely*. Neither was recorded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import permutations

from chrek.cuda.evidence import Evidence, is_gpu_device
from chrek.errors import Reason, Refused
from chrek.system.ids import HostPid

UVM = "/dev/nvidia-uvm"
DEVICE = re.compile(r"/dev/nvidia(\d+)$")
IPC_FILE = re.compile(r"/dev/shm/cuda\.shm\.")
NCCL_THREAD = "pt_nccl_"
MANAGED_FROM = 1 << 40
"""Address above which no mapping of the driver's own was seen (those lie near 8 GiB)."""
TRANSPORTS_OFF = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
NVLS_OFF = ("NCCL_NVLS_ENABLE", "0")


class Certainty(Enum):
    """How sure a finding is."""

    CERTAIN = "certain"
    LIKELY = "likely"


@dataclass(frozen=True)
class Finding:
    """Something in a process that its GPU state would not survive."""

    reason: Reason
    certainty: Certainty
    pid: HostPid
    seen: str

    def __str__(self) -> str:
        return f"process {self.pid}: {self.seen} ({self.certainty.value})"


def context_minors(evidence: Evidence) -> frozenset[int]:
    """Device minors of the GPUs on which the process has a context."""
    readable = (one for one in evidence.maps if one.permissions.startswith("rw-s"))
    return frozenset(int(match[1]) for one in readable if (match := DEVICE.match(one.path)))


def visible_minors(evidence: Evidence) -> frozenset[int]:
    """Device minors of the GPUs that the process's driver sees; a map has to name each."""
    return frozenset(int(match[1]) for target in evidence.descriptors.values() if (match := DEVICE.match(target)))


# --- the detectors --------------------------------------------------------------------------------------
def _peer_access(processes: Sequence[Evidence], peers: Collection[tuple[int, int]] | None) -> Iterator[Finding]:
    for one in processes:
        minors = context_minors(one)
        if any(peers is None or pair in peers for pair in permutations(minors, 2)):
            seen = f"contexts on GPUs {', '.join(map(str, sorted(minors)))} in one process"
            yield Finding(Reason.GPU_PEER_ACCESS, Certainty.LIKELY, one.pid, seen)


def _cuda_ipc(processes: Sequence[Evidence]) -> Iterator[Finding]:
    for one in processes:
        if path := next((m.path for m in one.maps if IPC_FILE.match(m.path)), None):
            yield Finding(Reason.CUDA_IPC, Certainty.CERTAIN, one.pid, f"{path} is mapped")


def _managed_memory(processes: Sequence[Evidence]) -> Iterator[Finding]:
    for one in processes:
        if managed := sum(m.end - m.start for m in one.maps if m.path == UVM and m.start >= MANAGED_FROM):
            seen = f"{managed >> 20} MiB of managed memory"
            yield Finding(Reason.MANAGED_MEMORY, Certainty.CERTAIN, one.pid, seen)


def _nccl(processes: Sequence[Evidence]) -> Iterator[Finding]:
    ranks = [one for one in processes if any(name.startswith(NCCL_THREAD) for name in one.threads)]
    if len(ranks) < 2 and not any(len(context_minors(one)) > 1 for one in ranks):
        return
    for one in ranks:
        missing = [f"{n}={v}" for n, v in TRANSPORTS_OFF.items() if one.environment.get(n) != v]
        if missing:
            seen = f"a rank of NCCL beside others, started without {' '.join(missing)}"
            yield Finding(Reason.NCCL_TRANSPORT, Certainty.LIKELY, one.pid, seen)
        if one.environment.get(NVLS_OFF[0]) != NVLS_OFF[1]:
            seen = f"a rank of NCCL beside others, started without {'='.join(NVLS_OFF)}"
            yield Finding(Reason.NVLS_MULTICAST, Certainty.LIKELY, one.pid, seen)


def _inherited(processes: Sequence[Evidence]) -> Iterator[Finding]:
    for one in processes:
        stray = one.driver_state == "none" and any(is_gpu_device(t) for t in one.descriptors.values())
        if one.inherited or stray:
            numbers = one.inherited or [n for n, t in one.descriptors.items() if is_gpu_device(t)]
            names = ", ".join(f"{n} ({one.descriptors.get(n, '?')})" for n in sorted(numbers)[:3])
            seen = f"{len(numbers)} GPU descriptors inherited by fork, for example {names}"
            yield Finding(Reason.GPU_FD_INHERITED, Certainty.CERTAIN, one.pid, seen)


def _mps(processes: Sequence[Evidence]) -> Iterator[Finding]:
    for one in processes:
        if directory := one.environment.get("CUDA_MPS_PIPE_DIRECTORY"):
            seen = f"CUDA_MPS_PIPE_DIRECTORY={directory}"
            yield Finding(Reason.MPS_IN_USE, Certainty.LIKELY, one.pid, seen)


DETECTORS: tuple[Callable[[Sequence[Evidence]], Iterator[Finding]], ...] = (
    _cuda_ipc,
    _managed_memory,
    _nccl,
    _inherited,
    _mps,
)


def detect(
    processes: Sequence[Evidence],
    *,
    mig_minors: Collection[int] = (),
    peers: Collection[tuple[int, int]] | None = None,
) -> tuple[Finding, ...]:
    """Everything in a tree that its GPU state would not survive.

    `processes` are those with a context and those that hold GPU devices; `mig_minors` the GPUs that
    MIG cuts up; `peers` the pairs of GPUs that can reach each other's memory (None: it is not known).
    """
    found = list(_peer_access(processes, peers))
    found += [finding for detector in DETECTORS for finding in detector(processes)]
    for one in processes:
        if cut := context_minors(one) & set(mig_minors):
            seen = f"a context on GPU {min(cut)}, which MIG cuts up"
            found.append(Finding(Reason.MIG_IN_USE, Certainty.CERTAIN, one.pid, seen))
    return tuple(found)


def refuse(findings: Sequence[Finding], *, allow: Collection[Reason] = ()) -> tuple[Finding, ...]:
    """Raise `Refused` for the first finding that is not allowed; those that are allowed, to be warned of."""
    refused = [finding for finding in findings if finding.reason not in allow]
    if refused:
        first = refused[0].reason
        told = "; ".join(str(finding) for finding in refused if finding.reason is first)
        others = sorted({finding.reason.code for finding in refused} - {first.code})
        more = f" Also found: {', '.join(others)}." if others else ""
        cure = f"{first.cure} If you know better: CHREK_ALLOW={','.join([first.code, *others])}."
        raise Refused(first, f"{told}.{more}", cure=cure)
    return tuple(findings)

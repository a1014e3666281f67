"""Which processes of a tree use GPUs, and what speaks against their checkpoint or restore, before any call.

Both questions of a sequence are answered in one place each, `before_capture` and `before_restore`.
A tree without GPUs costs a look at its descriptors and mappings, and no driver library is loaded:
ChReK runs on machines that have none.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from chrek.cuda import abi, evidence
from chrek.cuda.detect import Finding, detect, refuse, visible_minors
from chrek.cuda.driver import Driver, GpuUuid
from chrek.cuda.gpumap import Gpu, check_driver, plan_map
from chrek.cuda.inventory import Inventory, Nvml, require_memory
from chrek.cuda.sequence import GpuProcess, GpuState
from chrek.errors import Reason, Refused
from chrek.system.ids import HostPid

LIBCUDA = re.compile(r"/libcuda\.so(\.\d+)*$")
NVIDIA_MAJOR = 195
"""Character device major of /dev/nvidia0 and its like (Linux's devices.txt)."""
CONTROL_MINORS = frozenset({254, 255})
"""nvidia-modeset and nvidiactl, which are no GPUs."""


@dataclass(frozen=True)
class GpuTree:
    """What a capture has to know about a tree that uses GPUs.

    `gpus` are all that the driver of any process sees; every one of them has to be named in a map.
    `moved` is what the driver will move into the container's memory, in bytes. `warnings` were found
    and allowed by the user.
    """

    processes: tuple[GpuProcess, ...]
    gpus: tuple[Gpu, ...]
    driver: str
    moved: int
    warnings: tuple[Finding, ...]

    @property
    def pids(self) -> tuple[HostPid, ...]:
        """The processes to lock and checkpoint."""
        return tuple(process.pid for process in self.processes)


def uses_gpu(pid: HostPid) -> bool:
    """Whether a process has the driver's library mapped or one of its devices open; False if it ended."""
    try:
        found = evidence.read(pid)
    except (FileNotFoundError, ProcessLookupError):
        return False
    mapped = any(LIBCUDA.search(one.path) for one in found.maps)
    return mapped or any(evidence.is_gpu_device(target) for target in found.descriptors.values())


def before_capture(
    pids: Iterable[HostPid],
    *,
    memory_limit: int | None = None,
    memory_current: int = 0,
    allow: Collection[Reason] = (),
    driver: str | None = None,
    nvml: str | None = None,
) -> tuple[GpuState, GpuTree] | None:
    """The sequence and what it is for, or None if no process uses a GPU.

    `memory_limit` and `memory_current` are the container's, in bytes; `allow` the reasons that the user
    overrides; `driver` and `nvml` other names of the two libraries. Raises `Refused` for what would not
    come back or does not fit, `CaptureFailed` if the driver does not answer. Nothing was touched then.
    """
    if not (users := [pid for pid in pids if uses_gpu(pid)]):
        return None
    loaded = Driver(driver) if driver else Driver()
    loaded.require()
    inventory = (Nvml(nvml) if nvml else Nvml()).read()
    state = GpuState(loaded)
    processes = state.find(users)
    seen = _look(users, processes)
    findings = detect(seen, mig_minors=inventory.mig, peers=inventory.peers)
    warnings = refuse(findings, allow=allow)
    tree = _describe(processes, seen, inventory, warnings)
    if Reason.MEMORY_LIMIT not in allow:
        uses = inventory.of(tree.pids)
        require_memory(uses, limit=memory_limit, current=memory_current)
    return state, tree


def _look(users: Iterable[HostPid], processes: Iterable[GpuProcess]) -> tuple[evidence.Evidence, ...]:
    states = {process.pid: abi.state_name(process.state) for process in processes}
    return tuple(evidence.read(pid, driver_state=states.get(pid, "none")) for pid in users)


def _describe(
    processes: tuple[GpuProcess, ...],
    seen: Iterable[evidence.Evidence],
    inventory: Inventory,
    warnings: tuple[Finding, ...],
) -> GpuTree:
    pids = [process.pid for process in processes]
    minors = {minor for one in seen for minor in visible_minors(one)}
    moved = sum(use.bytes or 0 for use in inventory.of(pids))
    return GpuTree(processes, inventory.gpus_of(minors, pids), inventory.driver, moved, warnings)


def remaining_devices(pids: Iterable[HostPid]) -> dict[HostPid, tuple[str, ...]]:
    """GPU devices that processes still hold after their checkpoint: CRIU cannot dump those."""
    held = {}
    for pid in pids:
        targets = evidence.read(pid).descriptors.values()
        if devices := tuple(sorted({target for target in targets if evidence.is_gpu_device(target)})):
            held[pid] = devices
    return held


def container_minors(pid: HostPid) -> frozenset[int]:
    """Device minors of the GPUs that the container of a process was given, from its /dev.

    Links in the container's /dev are not followed.
    """
    found = set()
    with os.scandir(f"/proc/{pid}/root/dev") as entries:
        for entry in entries:
            if entry.name.startswith("nvidia"):
                state = entry.stat(follow_symlinks=False)
                minor = os.minor(state.st_rdev)
                if stat.S_ISCHR(state.st_mode) and os.major(state.st_rdev) == NVIDIA_MAJOR:
                    found.add(minor)
    return frozenset(found - CONTROL_MINORS)


def before_restore(
    saved: Sequence[Gpu],
    saved_driver: str,
    *,
    minors: Collection[int] | None = None,
    allow: Collection[Reason] = (),
    driver: str | None = None,
    nvml: str | None = None,
) -> tuple[GpuState, Mapping[GpuUuid, GpuUuid]]:
    """The sequence and the map of GPUs for a restore on this machine; the driver's start is under way.

    `minors` are the GPUs that the container was given (None: all of this machine). Raises `Refused`
    for another driver, too few or other GPUs, too little memory, or a driver that cannot use a map.
    """
    loaded = Driver(driver) if driver else Driver()
    loaded.require()
    inventory = (Nvml(nvml) if nvml else Nvml()).read()
    if Reason.DRIVER_MISMATCH not in allow:
        check_driver(saved_driver, inventory.driver)
    here = [gpu for gpu in inventory.gpus if minors is None or gpu.minor in minors]
    wanted = [replace(gpu, used=0) for gpu in saved] if Reason.GPU_MISMATCH in allow else saved
    gpu_map = plan_map(wanted, here)
    if gpu_map and not loaded.takes_map():
        message = f"Restoring on other GPUs needs NVIDIA driver {abi.PAIRS_NEED_DRIVER}; here is {inventory.driver}."
        raise Refused(Reason.GPU_DRIVER_TOO_OLD, message)
    return GpuState(loaded), gpu_map

"""The GPU part of both sequences: the driver moves GPU state into the processes' memory and back.

A capture looks for processes that hold GPU devices, refuses what the driver would save and never bring
back, and takes all of them to the driver's checkpointed state before CRIU runs and back after it. A
restore works out which GPU here takes the place of which, before CRIU runs, and lets the driver put
the state back once the tree runs again; until then its GPU calls wait.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chrek.artifact import Gpu
from chrek.cuda import abi, detect, evidence, gpumap
from chrek.cuda.driver import Driver, GpuUuid
from chrek.cuda.inventory import LIBRARY, Inventory, Nvml, require_memory
from chrek.cuda.sequence import GpuState, Stuck
from chrek.engine.preflight import who
from chrek.errors import CaptureFailed, Reason, Refused
from chrek.system import cgroups, initstate, procfs

if TYPE_CHECKING:
    from chrek.artifact import Manifest
    from chrek.engine.container import Container
    from chrek.engine.preflight import Subject
    from chrek.engine.progress import Progress
    from chrek.system.ids import HostPid, NsPid


@dataclass(frozen=True)
class Use:
    """What a tree has on GPUs.

    Attributes:
        tree: all of its processes.
        pids: those with an initialised driver.
        gpus: the GPUs that they see, with what they use of each.
        bytes: GPU memory that the driver will move into the processes.
        warnings: findings that the user overrode.
    """

    state: GpuState
    tree: tuple[HostPid, ...]
    pids: tuple[HostPid, ...]
    gpus: tuple[Gpu, ...]
    bytes: int
    warnings: tuple[str, ...]


def look(subject: Subject, *, allow: Collection[Reason]) -> Use | None:
    """Look at the tree's GPU processes; None where none uses the driver.

    What an earlier capture that was killed left half way is found, too, and driven back first.

    Raises:
        Refused: the driver is missing or too old, or would not bring back what it saves.
        CaptureFailed: the driver does not answer.
    """
    holders = [pid for pid in subject.tree if evidence.uses_driver(pid)]
    if not holders:
        return None
    driver = Driver()
    driver.require()
    state = GpuState(driver)
    processes = state.find(subject.tree)
    if stuck := state.drive_back(p.pid for p in processes if p.state != abi.ProcessState.RUNNING):
        raise Refused(Reason.GPU_STUCK, "; ".join(map(str, stuck)) + ".")
    found = {process.pid: abi.state_name(process.state) for process in processes}
    if not found and not any(evidence.remaining_devices(holders).values()):
        return None  # the library is loaded and was never used
    seen = [evidence.read(pid, driver_state=found.get(pid, "none")) for pid in dict.fromkeys([*holders, *found])]
    inventory = Nvml().read()
    findings = detect.detect(seen, mig_minors=inventory.mig, peers=inventory.peers)
    warnings = [str(finding) for finding in detect.refuse(findings, allow=allow)]
    pid1 = subject.container.pid1
    needed = require_memory(
        inventory.of(found), limit=cgroups.memory_limit(pid1), current=cgroups.memory_used(pid1)
    )
    minors = {minor for one in seen for minor in detect.visible_minors(one)}
    gpus = tuple(_recorded(gpu, inventory.driver) for gpu in inventory.gpus_of(minors, found))
    return Use(state, tuple(subject.tree), tuple(found), gpus, needed, tuple(warnings))


def _recorded(gpu: gpumap.Gpu, driver: str) -> Gpu:
    return Gpu(uuid=str(gpu.uuid), model=gpu.model, driver=driver, memory=gpu.memory, used=gpu.used, minor=gpu.minor)


@contextmanager
def held(use: Use | None, progress: Progress) -> Iterator[None]:
    """Keep the tree's GPU state in its processes' memory meanwhile.

    Raises:
        CaptureFailed: every process was driven back to running, or ``GPU_STUCK`` names the one that was not.
    """
    if use is None:
        yield
        return
    with progress.phase("gpu save"):
        state = use.state.capture(use.pids)
    try:
        for pid, devices in evidence.remaining_devices(use.tree).items():
            message = f"{who(pid)} still holds {', '.join(devices)} after the driver has saved the GPU state."
            raise CaptureFailed(Reason.GPU_FD_INHERITED, message)
        yield
    finally:
        with progress.phase("gpu resume"):
            use.state.resume(state)


def drive_back_leftovers() -> tuple[Stuck, ...]:
    """Bring applications whose GPU state a killed capture left in the driver's hands back to running.

    Only applications under ChReK's init are looked at: others may be held by somebody else on purpose.
    Return those for which it failed; without a driver there are none.
    """
    if not Path("/dev/nvidiactl").exists():
        return ()
    users: list[HostPid] = []
    for pid1 in initstate.find_inits():
        with suppress(Refused):
            users += [pid for pid in procfs.tree(initstate.application(pid1)) if evidence.uses_driver(pid)]
    return GpuState(Driver()).drive_back(users) if users else ()


@dataclass(frozen=True)
class Plan:
    """How a restore brings GPU state back: which processes, and which GPU for which."""

    state: GpuState
    processes: tuple[NsPid, ...]
    gpu_map: Mapping[GpuUuid, GpuUuid]

    def restore(self, host_pids: Mapping[NsPid, HostPid], progress: Progress) -> None:
        """Let the driver put the state back and the processes run on.

        Raises:
            RestoreFailed: the tree must be killed.
        """
        with progress.phase("gpu restore"):
            self.state.restore([host_pids[pid] for pid in self.processes if pid in host_pids], self.gpu_map or None)


def plan(manifest: Manifest, container: Container) -> Plan | None:
    """Work out which GPU of the container takes the place of which; None for a checkpoint without GPUs.

    Raises:
        Refused: another driver, too few GPUs of a model, or one with too little free memory.
    """
    if not manifest.facts.gpus:
        return None
    driver = Driver()
    inventory = Nvml().read()
    gpumap.check_driver(manifest.facts.gpus[0].driver, inventory.driver)
    saved = [
        gpumap.Gpu(GpuUuid.parse(gpu.uuid), gpu.model, gpu.memory, gpu.minor, gpu.used) for gpu in manifest.facts.gpus
    ]
    gpu_map = gpumap.plan_map(saved, _given(container, inventory))
    driver.require(gpu_map=gpu_map)
    return Plan(GpuState(driver), manifest.application.gpu_processes, gpu_map)


def differing(manifest: Manifest, container: Container, *, library: str = LIBRARY) -> list[str]:
    """Say how a container's GPUs differ from a checkpoint's in model and driver; a checkpoint without GPUs fits any.

    How many there are is not looked at: a container may have more than its application uses.
    """
    saved = manifest.facts.gpus
    if not saved:
        return []
    try:
        inventory = Nvml(library).read()
    except (Refused, CaptureFailed) as error:
        return [f"its GPUs are {_models(gpu.model for gpu in saved)}, this pod's are not known: {error.message}"]
    found = []
    if saved[0].driver != inventory.driver:
        found.append(f"its driver is {saved[0].driver}, this node's {inventory.driver}")
    here = [gpu.model for gpu in _given(container, inventory)]
    if not {gpu.model for gpu in saved} <= set(here):
        found.append(f"its GPUs are {_models(gpu.model for gpu in saved)}, this pod's {_models(here)}")
    return found


def machine_lacks(manifest: Manifest, *, library: str = LIBRARY) -> tuple[Reason, str] | None:
    """Say which of a checkpoint's GPUs, or whose driver, this machine has not; what is free at the moment is not asked."""
    saved = manifest.facts.gpus
    if not saved:
        return None
    try:
        inventory = Nvml(library).read()
    except (Refused, CaptureFailed) as error:
        return error.reason, f"The checkpoint needs {len(saved)} x {_models(gpu.model for gpu in saved)}: {error.message}"
    if saved[0].driver != inventory.driver:
        text = f"The checkpoint needs NVIDIA's driver {saved[0].driver}; this machine has {inventory.driver}."
        return Reason.DRIVER_MISMATCH, text
    lacking = Counter(gpu.model for gpu in saved) - Counter(gpu.model for gpu in inventory.gpus)
    if not lacking:
        return None
    return Reason.GPU_MISMATCH, f"This machine lacks {', '.join(f'{count} x {model}' for model, count in lacking.items())}."


def _models(models: Iterable[str]) -> str:
    return ", ".join(sorted(set(models))) or "none"


def _given(container: Container, inventory: Inventory) -> list[gpumap.Gpu]:
    """Return the GPUs whose device nodes the container has."""
    names = set()
    with suppress(OSError):
        names = set(os.listdir(Path(f"/proc/{container.pid1}/root/dev")))
    return [gpu for gpu in inventory.gpus if f"nvidia{gpu.minor}" in names]


def ns_pids(use: Use | None) -> tuple[NsPid, ...]:
    """Return the GPU processes' ids inside the container."""
    states = [procfs.status(pid) for pid in use.pids] if use else []
    return tuple(state.ns_pid for state in states if state is not None)

"""Lock, checkpoint, restore, unlock: all GPU processes of a tree, undone from wherever it stops.

The driver knows four states that matter::

    running --lock--> locked --checkpoint--> checkpointed
       ^                | ^                       |
       +----unlock------+ +--------restore--------+

A capture takes every process of the tree with an initialised driver (an idle one costs nothing, a
forgotten one cannot be dumped) from running to checkpointed, all at once, lock before checkpoint: no
process may be saved while another still runs work that reaches it. If anything fails, every process
is driven back to running, whatever state it is in, and only then is the failure reported. A process
for which that fails too is the one thing that needs a person: `GPU_STUCK` names it.

The same way back serves an agent that finds what a killed one left (`GpuState.drive_back`): the state
is asked of the driver, never remembered.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from chrek.cuda import abi
from chrek.cuda.abi import Code, ProcessState
from chrek.cuda.calls import Outcome, everywhere
from chrek.cuda.driver import Driver, GpuUuid
from chrek.errors import CaptureFailed, ChrekError, Reason, RestoreFailed
from chrek.system.ids import HostPid


@dataclass(frozen=True)
class Deadlines:
    """Seconds each step may take for all processes together.

    The driver saves 2 to 3.3 GB/s and restores 5 to 9 GB/s for each process (H100, driver 580): ten
    minutes cover 1.2 TB in one process.
    """

    init: float = 60.0
    query: float = 20.0
    lock: float = 30.0
    checkpoint: float = 600.0
    restore: float = 600.0
    unlock: float = 60.0


@dataclass(frozen=True)
class GpuProcess:
    """A process with an initialised driver, and its state (a number this program may not know)."""

    pid: HostPid
    state: int


@dataclass(frozen=True)
class Stuck:
    """A process that could not be driven back to running, and why."""

    pid: HostPid
    why: str

    def __str__(self) -> str:
        return f"process {self.pid}: {self.why}"


@dataclass(frozen=True)
class Held:
    """Processes whose GPU state is in their own memory and whose GPUs are let go."""

    pids: tuple[HostPid, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)


class GpuState:
    """The driver's part of a capture and of a restore."""

    def __init__(self, driver: Driver, *, deadlines: Deadlines | None = None) -> None:
        self.driver = driver
        self.deadlines = deadlines or Deadlines()

    # --- finding --------------------------------------------------------------------------------------
    def find(self, pids: Iterable[HostPid]) -> tuple[GpuProcess, ...]:
        """The processes among `pids` in which CUDA is initialised.

        Raises `CaptureFailed` if the driver does not answer for a process that exists.
        """
        self._await_init()
        states: dict[HostPid, int] = {}

        def ask(pid: HostPid) -> int:
            code, states[pid] = self.driver.state(pid)
            return code

        outcomes = everywhere(ask, pids, seconds=self.deadlines.query)
        for outcome in outcomes:
            if outcome.code not in (Code.SUCCESS, Code.NOT_INITIALIZED) and _exists(outcome.pid):
                raise CaptureFailed(Reason.GPU_CALL_FAILED, self._text("cuCheckpointProcessGetState", outcome))
        return tuple(GpuProcess(o.pid, states[o.pid]) for o in outcomes if o.code == Code.SUCCESS)

    def _await_init(self) -> None:
        code = self.driver.ready(self.deadlines.init)
        if code is None:
            message = f"cuInit has not come back after {self.deadlines.init:g} s."
            raise CaptureFailed(Reason.GPU_CALL_FAILED, message)
        # A machine whose driver has no device can still tell that no process uses one.
        if code not in (Code.SUCCESS, Code.NO_DEVICE):
            raise CaptureFailed(Reason.GPU_CALL_FAILED, f"cuInit gave {self.driver.error_text(code)}.")

    # --- capture --------------------------------------------------------------------------------------
    def capture(self, pids: Iterable[HostPid]) -> Held:
        """Take every GPU process among `pids` to the checkpointed state.

        Raises `CaptureFailed` after every process was driven back to running; its reason is
        `GPU_STUCK` if one could not be.
        """
        processes = self.find(pids)
        self._clear_leftovers(processes)
        gpu_pids = tuple(process.pid for process in processes)
        seconds: dict[str, float] = {}
        try:
            self._step("lock", gpu_pids, seconds)
            self._step("checkpoint", gpu_pids, seconds)
        except _StepFailed as failure:
            raise self._after_unwinding(gpu_pids, failure) from failure
        except BaseException as error:
            if stuck := self.drive_back(gpu_pids):
                raise CaptureFailed(Reason.GPU_STUCK, _stuck_text(stuck)) from error
            raise
        return Held(gpu_pids, seconds)

    def _clear_leftovers(self, processes: Iterable[GpuProcess]) -> None:
        """What another program left half way is driven back first; what cannot be is refused."""
        if stuck := self.drive_back(p.pid for p in processes if p.state != ProcessState.RUNNING):
            raise CaptureFailed(Reason.GPU_STUCK, _stuck_text(stuck))

    def _step(self, name: str, pids: tuple[HostPid, ...], seconds: dict[str, float]) -> None:
        start = time.monotonic()
        allowed: float = getattr(self.deadlines, name)
        actions = {
            "lock": lambda pid: self.driver.lock(pid, timeout_ms=max(1, int(allowed * 800))),
            "checkpoint": self.driver.checkpoint,
        }
        outcomes = everywhere(actions[name], pids, seconds=allowed, late=self._drive_back_late)
        seconds[name] = time.monotonic() - start
        if failed := [outcome for outcome in outcomes if outcome.code != Code.SUCCESS]:
            raise _StepFailed(name, tuple(failed))

    def _after_unwinding(self, pids: tuple[HostPid, ...], failure: _StepFailed) -> CaptureFailed:
        """Drive back what can be; the error to raise."""
        out = {outcome.pid for outcome in failure.outcomes if outcome.code is None}
        stuck = self.drive_back(pid for pid in pids if pid not in out)
        call = f"cuCheckpointProcess{failure.name.capitalize()}"
        told = " ".join(self._text(call, outcome) for outcome in failure.outcomes)
        stuck += tuple(Stuck(pid, "the driver call has not come back; if it does, it is undone") for pid in sorted(out))
        if stuck:
            return CaptureFailed(Reason.GPU_STUCK, f"{told} {_stuck_text(stuck)}")
        busy = failure.name == "lock" and all(o.code == Code.NOT_READY for o in failure.outcomes)
        return CaptureFailed(Reason.GPU_BUSY if busy else Reason.GPU_CALL_FAILED, told)

    # --- back -----------------------------------------------------------------------------------------
    def resume(self, held: Held) -> dict[str, float]:
        """Restore and unlock the source after its dump; seconds of each step.

        Raises `CaptureFailed` with `GPU_STUCK` if a process does not come back.
        """
        try:
            return self._back(held.pids, None)
        except _StepFailed as failure:
            if stuck := self.drive_back(held.pids):
                raise CaptureFailed(Reason.GPU_STUCK, f"{self._told(failure)} {_stuck_text(stuck)}") from failure
            return {}

    def restore(self, pids: Iterable[HostPid], gpu_map: Mapping[GpuUuid, GpuUuid] | None = None) -> dict[str, float]:
        """Restore and unlock processes that CRIU has just brought back; seconds of each step.

        Raises `RestoreFailed`: the caller ends the tree then.
        """
        try:
            self._await_init()
            return self._back(tuple(pids), gpu_map)
        except _StepFailed as failure:
            raise RestoreFailed(Reason.GPU_CALL_FAILED, self._told(failure)) from failure
        except CaptureFailed as failure:
            raise RestoreFailed(failure.reason, failure.message) from failure

    def _back(self, pids: tuple[HostPid, ...], gpu_map: Mapping[GpuUuid, GpuUuid] | None) -> dict[str, float]:
        """Every process is restored before any is unlocked: none may run while another has no memory yet."""
        seconds: dict[str, float] = {}
        steps = (("restore", lambda pid: self.driver.restore(pid, gpu_map)), ("unlock", self.driver.unlock))
        for name, action in steps:
            start = time.monotonic()
            outcomes = everywhere(action, pids, seconds=getattr(self.deadlines, name))
            seconds[name] = time.monotonic() - start
            if failed := [outcome for outcome in outcomes if outcome.code != Code.SUCCESS]:
                raise _StepFailed(name, tuple(failed))
        return seconds

    def drive_back(self, pids: Iterable[HostPid]) -> tuple[Stuck, ...]:
        """Bring processes from any state to running; those for which it failed.

        Never raises for what the driver says. Processes that ended or have no CUDA count as done.
        """
        why: dict[HostPid, str] = {}

        def back(pid: HostPid) -> int:
            if (reason := self._one_back(pid)) is None:
                return Code.SUCCESS
            why[pid] = reason
            return Code.UNKNOWN

        allowed = self.deadlines.query + self.deadlines.restore + self.deadlines.unlock
        outcomes = everywhere(back, pids, seconds=allowed)
        return tuple(
            Stuck(o.pid, why.get(o.pid, f"the driver has not come back after {allowed:g} s"))
            for o in outcomes
            if o.code != Code.SUCCESS and _exists(o.pid)
        )

    def _drive_back_late(self, pid: HostPid) -> None:
        self._one_back(pid)

    def _one_back(self, pid: HostPid) -> str | None:
        """Why the process is not running, or None if it is; at most two steps lead back."""
        trouble = ""
        for _ in range(4):
            code, state = self.driver.state(pid)
            if code == Code.NOT_INITIALIZED or (code == Code.SUCCESS and state == ProcessState.RUNNING):
                return None
            if code != Code.SUCCESS:
                return f"its state could not be read: {self.driver.error_text(code)}"
            if state == ProcessState.CHECKPOINTED:
                name, code = "restore", self.driver.restore(pid)
            elif state == ProcessState.LOCKED:
                name, code = "unlock", self.driver.unlock(pid)
            else:
                return f"it is in the driver's state {abi.state_name(state)}, from which no call leads back"
            if code != Code.SUCCESS:
                trouble = f", {name} gave {self.driver.error_text(code)}"
        return f"it stays {abi.state_name(state)}{trouble}"

    # --- words ----------------------------------------------------------------------------------------
    def _told(self, failure: _StepFailed) -> str:
        call = f"cuCheckpointProcess{failure.name.capitalize()}"
        return " ".join(self._text(call, outcome) for outcome in failure.outcomes)

    def _text(self, call: str, outcome: Outcome) -> str:
        if outcome.code is None:
            return f"{call} for process {outcome.pid} has not come back after {outcome.seconds:g} s."
        return f"{call} for process {outcome.pid} gave {self.driver.error_text(outcome.code)}."


class _StepFailed(ChrekError):
    """Some processes did not take the step; never leaves this module."""

    def __init__(self, name: str, outcomes: tuple[Outcome, ...]) -> None:
        super().__init__(Reason.GPU_CALL_FAILED, f"{name} failed for {len(outcomes)} process(es).")
        self.name = name
        self.outcomes = outcomes


def _stuck_text(stuck: tuple[Stuck, ...]) -> str:
    return "Not driven back: " + "; ".join(str(one) for one in stuck) + "."


def _exists(pid: HostPid) -> bool:
    return os.path.exists(f"/proc/{pid}")

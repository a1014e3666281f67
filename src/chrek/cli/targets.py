"""Which running application a verb is about: by id, by process, or by a runc container."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chrek.cli.output import command_line, short
from chrek.errors import Reason, Refused
from chrek.system import initstate, procfs
from chrek.system.ids import HostPid

if TYPE_CHECKING:
    from chrek.system.initpublish import InitState

ID_VARIABLE = "CHREK_ID"
"""In PID 1's environment: the id that `chrek run` was given. A container's own variables come first."""


@dataclass(frozen=True)
class Target:
    """One init that runs here, and the id it answers to (empty: none)."""

    pid1: HostPid
    state: InitState
    checkpoint_id: str

    @property
    def words(self) -> str:
        """The application as people know it."""
        child = next((pid for pid in procfs.children(self.pid1)), None)
        command = command_line(procfs.command_line(child)) if child is not None else self.state.mode
        return f"--pid {self.pid1}: id {self.checkpoint_id or 'none'}, {short(command, 60)}"


def every() -> list[Target]:
    """Return all inits of this machine that we may look into."""
    found = []
    for pid in initstate.find_inits():
        with suppress(Refused):  # it has ended meanwhile
            found.append(target(pid))
    return found


def target(pid1: HostPid) -> Target:
    """Return what is known of an init.

    Raises:
        Refused: ``APP_NOT_FOUND``, when it is none.
    """
    state = initstate.read_state(pid1)
    own = (procfs.environment(pid1) or {}).get(ID_VARIABLE, "")
    return Target(pid1, state, state.checkpoint_id or own)


def find(checkpoint_id: str, *, pid: int | None, container: str | None) -> HostPid:
    """Return PID 1 of the application that is meant.

    Raises:
        Refused: ``APP_NOT_FOUND``, listing what there is, or ``NOT_SUPPORTED_HERE``.
    """
    if container is not None:
        pid = _of_container(container)
    if pid is not None:
        return _of_process(pid)
    found = every()
    matching = [each for each in found if each.checkpoint_id == checkpoint_id]
    if len(matching) == 1:
        return matching[0].pid1
    listed = "".join(f"\n  {each.words}" for each in matching or found)
    if matching:
        message = f"{len(matching)} applications of id {checkpoint_id!r} run here:{listed}"
        raise Refused(Reason.APP_NOT_FOUND, message, cure="Name one of them with --pid.")
    if found:
        message = f"No application of id {checkpoint_id!r} runs here. Others do:{listed}"
        raise Refused(Reason.APP_NOT_FOUND, message, cure="Name one of them with --pid, or start it with `chrek run`.")
    raise Refused(Reason.APP_NOT_FOUND, f"No application of id {checkpoint_id!r} runs here, nor any other.")


def find_waiting(checkpoint_id: str, *, pid: int | None, container: str | None) -> HostPid:
    """Return PID 1 of the container that waits for a restore.

    Raises:
        Refused: as `find`, or ``CLAIM_LOST`` when what is meant runs already.
    """
    waiting = [each for each in every() if each.checkpoint_id == checkpoint_id and each.state.mode == "waiting"]
    if pid is None and container is None and len(waiting) == 1:
        return waiting[0].pid1
    pid1 = find(checkpoint_id, pid=pid, container=container)
    mode = initstate.read_state(pid1).mode
    if mode in {"starting", "waiting"}:
        return pid1
    raise Refused(
        Reason.CLAIM_LOST,
        f"The container of PID {pid1} does not wait for a restore: its application runs (start: {mode}).",
        cure="Start it with DYN_CHECKPOINT_HASH in its environment, or give a command after -- to start it here.",
    )


def _of_process(pid: int) -> HostPid:
    """Return the init above a process, itself included: people know the application's pid, not PID 1's.

    Raises:
        Refused: ``APP_NOT_FOUND``.
    """
    at: int = pid
    while at > 0:
        try:
            initstate.read_state(HostPid(at))
        except Refused:
            state = procfs.status(at)
            at = state.parent if state else 0
        else:
            return HostPid(at)
    if procfs.status(pid) is None:
        raise Refused(Reason.APP_NOT_FOUND, f"There is no process {pid}.", cure="Look at the number again.")
    name = command_line(procfs.command_line(HostPid(pid)))
    message = f"Process {pid} ({short(name, 60)}) does not run under ChReK's init."
    raise Refused(Reason.APP_NOT_FOUND, message)


def _of_container(name: str) -> int:
    """Ask runc for the PID 1 of a container.

    Raises:
        Refused: ``NOT_SUPPORTED_HERE`` without runc, ``APP_NOT_FOUND`` when it knows no such running container.
    """
    if shutil.which("runc") is None:
        message = "`--container` asks runc, which is not installed here."
        raise Refused(Reason.NOT_SUPPORTED_HERE, message, cure="Install runc, or name PID 1 with --pid.")
    arguments = ["runc", *(["--root", root] if (root := os.environ.get("RUNC_ROOT")) else []), "state", name]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    try:
        state = json.loads(done.stdout)
        pid = int(state["pid"])
    except (ValueError, KeyError, TypeError):
        said = done.stderr.strip()[-200:] or "nothing"
        raise Refused(
            Reason.APP_NOT_FOUND,
            f"runc knows no container {name!r}; it said: {said}.",
            cure="`runc list` shows them; RUNC_ROOT names another state directory.",
        ) from None
    if not pid:
        raise Refused(Reason.APP_NOT_FOUND, f"The container {name!r} is {state.get('status', 'not running')}.")
    return pid

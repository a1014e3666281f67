"""Restore mode: who restores, how long to wait for it, and what follows when it does not work out.

From inside, when this process has the privileges and sees the checkpoint: a child process runs the
engine and hands over through the same mailbox as anybody else. Otherwise somebody outside does, the
node's agent, within ``CHREK_AGENT_TIMEOUT``.
"""

from __future__ import annotations

import os
import select
import sys
import time

from chrek.entrypoint.checkpointing import signal_file
from chrek.entrypoint.clearing import kill_all, undo_files
from chrek.entrypoint.environment import OnFailure
from chrek.entrypoint.handover import Ended, Failed, Handover, Restored
from chrek.entrypoint.letterbox import Letterbox
from chrek.entrypoint.lives import Lives
from chrek.entrypoint.report import age
from chrek.entrypoint.signals import ENDING, SIGPIPE, SIGXFSZ, read_signals
from chrek.entrypoint.steps import Container, cold, publish
from chrek.entrypoint.supervise import exit_code, supervise
from chrek.errors import ExitCode, Reason, RestoreFailed
from chrek.system.record import changed

TYPE_CHECKING = False  # see chrek.system.ids

if TYPE_CHECKING:
    from collections.abc import Mapping

_NEEDED = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "FOWNER": 3,
    "KILL": 5,
    "SETGID": 6,
    "SETUID": 7,
    "SETPCAP": 8,
    "SYS_PTRACE": 19,
    "SYS_ADMIN": 21,
}
"""Capabilities without which CRIU cannot restore from inside (linux/capability.h)."""

ENGINE_START_LIMIT = 60.0
"""Seconds until the engine's own process claims; a cold page cache on a slow disk takes a few."""
DEBUG_PAUSE = 300.0
_NOT_OURS = ("LD_PRELOAD", "LD_AUDIT", "LD_LIBRARY_PATH")
"""What would load the application's libraries into the engine."""


def restore(container: Container) -> int:
    """Restore the application or start it cold; supervise it; return the exit code."""
    letters = Letterbox()

    def show(mode: str, token: str, seconds: float | None) -> None:
        publish(container, mode, claim=token, deadline=seconds, mailbox=letters.writing if mode == "waiting" else None)

    handover = Handover(signals=container.signals, letters=letters, show=show, report=container.report)
    lives: list[Lives] = []
    try:
        outcome = _attempt(container, handover, lives)
    except Exception as error:  # noqa: BLE001 - a fault of ours must not keep the application from starting
        outcome = Failed(reason=Reason.RESTORE_FAILED, message=f"The init has a fault: {error!r}.", touched=True)
    if isinstance(outcome, Restored):
        for each in lives:
            each.begin(restored=True)
        code = _run(container, outcome, letters)
        if code == ExitCode.RESTORE_FAILED:
            container.report.line(f"the application ended with {code}: what was restored is damaged; the next start is cold")
            for each in lives:
                each.give_up()
        return code
    letters.close()
    if isinstance(outcome, Ended):
        container.report.line(f"signal {outcome.signal} ends the container before anything was restored")
        if os.getpid() != 1:  # of a PID namespace the kernel kills the rest
            kill_all()
        return 128 + outcome.signal
    if outcome.reason is Reason.RESTORE_GIVEN_UP:
        for each in lives:
            each.begin(restored=False)
    return _after_failure(container, outcome)


def _attempt(container: Container, handover: Handover, lives: list[Lives]) -> Restored | Failed | Ended:
    """Let somebody restore; return what came of it.

    `lives` gets the count of short lives, where this container restores itself.
    """
    settings = container.settings
    inside = may_restore(container.inherited.capabilities)
    if not _there(container):
        if settings.wait_for_checkpoint:
            late = (Reason.NOT_FOUND, f"No checkpoint {settings.checkpoint_id} in {settings.wait_timeout:g} s.")
            waited = handover.wait(settings.wait_timeout, late, until=lambda: _there(container) or _in_vain(container))
            if waited is not None:
                return waited
            if not _there(container):
                return _failed_capture(container)
        elif _is_mounted(settings.store):
            message = f"There is no {settings.checkpoint_dir}/checkpoint.done."
            return Failed(reason=Reason.NOT_FOUND, message=message, touched=False)
    if inside and _there(container):
        lives.append(Lives())
        if lives[0].given_up:
            message = f"The last {lives[0].count} restored starts lived less than a minute."
            return Failed(reason=Reason.RESTORE_GIVEN_UP, message=message, touched=False)
        late = (Reason.TIMEOUT, f"The restoring program did not begin within {ENGINE_START_LIMIT:g} s.")
        outcome = handover.wait(ENGINE_START_LIMIT, late, engine=_start_engine(container))
        if isinstance(outcome, Failed):
            outcome = changed(outcome, touched=True)  # the engine itself may still be there
    else:
        outcome = handover.wait(settings.agent_timeout, _nobody(container))
    assert outcome is not None, "only a wait for a file ends without an outcome"
    return outcome


def _nobody(container: Container) -> tuple[Reason, str]:
    seconds = container.settings.agent_timeout
    if _there(container):
        return Reason.NOT_ROOT, f"PID 1 lacks the privileges to restore, and no agent claimed it in {seconds:g} s."
    return Reason.NO_AGENT, f"No agent claimed the restore in {seconds:g} s."


def _run(container: Container, restored: Restored, letters: Letterbox) -> int:
    seconds = age()
    if restored.status is None:
        publish(container, "restored", application=restored.root, claim=restored.token, seconds=seconds)
    container.report.started("restored", "none", seconds)
    letters.close()
    status = restored.status
    if status is None:
        status = supervise(restored.root, container.signals, restored.kept)
    return exit_code(status)


def _after_failure(container: Container, failed: Failed) -> int:
    """Clear up, say why, and start cold or end."""
    settings, report = container.settings, container.report
    report.ending(f"not restored: {failed.reason.code}: {failed.message} {failed.reason.cure}")
    publish(container, "failed", reason=failed.reason.code)
    if failed.touched:
        left = kill_all()
        if left:
            report.line(f"processes {left} of the failed restore do not end")
        try:
            undo_files()
        except RestoreFailed as error:
            report.ending(str(error))
            return int(ExitCode.RESTORE_FAILED)
        if settings.debug:
            report.line(f"DEBUG: {DEBUG_PAUSE:g} s to look around; SIGTERM ends the container")
            ending = _pause(container.signals, DEBUG_PAUSE)
            if ending:
                return 128 + ending
    if settings.on_failure is OnFailure.FAIL and failed.reason is not Reason.NOT_FOUND:
        return int(ExitCode.RESTORE_FAILED)
    if settings.on_failure is OnFailure.FAIL and settings.wait_for_checkpoint:
        return int(ExitCode.RESTORE_FAILED)
    return cold(container, reason=failed.reason.code)


def _pause(signals: int, seconds: float) -> int:
    """Wait, or return the number of a signal that ends the container."""
    poll = select.poll()
    poll.register(signals, select.POLLIN)
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        poll.poll(left * 1000)
        for signal in read_signals(signals):
            if signal.number in ENDING:
                return signal.number
    return 0


def may_restore(capabilities: int) -> bool:
    """Return whether a process with these effective capabilities, and our user id, can restore from inside."""
    return os.geteuid() == 0 and all(capabilities >> number & 1 for number in _NEEDED.values())


def _there(container: Container) -> bool:
    return os.path.isfile(f"{container.settings.checkpoint_dir}/checkpoint.done")


def _failure_file(container: Container) -> str:
    """Return where the store says that the last capture of this id failed (``docs/format.md``)."""
    return f"{container.settings.store.rstrip('/')}/.failed/{container.settings.checkpoint_id}"


def _in_vain(container: Container) -> bool:
    """Return whether the capture of what is waited for has failed since this container's start."""
    try:
        return os.lstat(_failure_file(container)).st_mtime > time.time() - age()
    except OSError:
        return False


def _failed_capture(container: Container) -> Failed:
    fields = signal_file(_failure_file(container))
    reason = Reason.__members__.get(str(fields.get("reason")), Reason.NOT_FOUND)
    message = f"The capture that this container waits for failed: {fields.get('error') or 'no reason was given'}"
    return Failed(reason=reason, message=message, touched=False)


def _is_mounted(store: str) -> bool:
    """Return whether the store is a volume of this container: only then does its lacking a checkpoint say anything."""
    try:
        return os.stat(store).st_dev != os.stat("/").st_dev
    except OSError:
        return False


def _start_engine(container: Container) -> int:
    """Start the engine in a process of its own, with an ordinary signal mask; return its process id."""
    settings = container.settings
    program = f"{os.path.dirname(os.path.abspath(__file__))}/selfrestore.py"
    arguments = [sys.executable, "-I", "-S", program, settings.store, settings.checkpoint_id]
    return os.posix_spawn(
        sys.executable,
        arguments,
        engine_environment(container.inherited.mapping()),
        setsid=True,
        setsigmask=[],
        setsigdef=[SIGPIPE, SIGXFSZ],
    )


def engine_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the engine: the container's, without what loads code into it."""
    return {name: value for name, value in environ.items() if name not in _NOT_OURS}


__all__ = ["engine_environment", "may_restore", "restore"]

"""Start an application on a plain machine, from a checkpoint or cold: what `run` and `restore` share."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NoReturn

from chrek.cli import foreground, options
from chrek.cli.ending import Ended, explain
from chrek.cli.output import say
from chrek.cli.restoring import claim, restore_into
from chrek.cli.targets import ID_VARIABLE
from chrek.errors import ChrekError, ExitCode, Reason, UsageError
from chrek.system.ids import HostPid

NOWHERE = "/nonexistent"
"""The store as the init is told: it then looks for no checkpoint itself and waits to be restored."""

CLAIM_SECONDS = 60
"""How long the init waits for this program; it claims within milliseconds, on a swapping machine within seconds."""

MARKER = "/dev/shm/dynamo-restored"
"""Where the restored application finds its marker: /tmp is the whole machine's here, /dev/shm its own."""

_CONTAINERS_OWN = ("DYN_CHECKPOINT_HASH", "DYN_CHECKPOINT_PATH", "WAIT_FOR_CHECKPOINT", "RESTORE_WAIT_TIMEOUT", "DEBUG")
_CHECKPOINT_MODE = "DYN_CHECKPOINT_SIGNAL_FILE"


@dataclass(frozen=True)
class Start:
    """What to start and how."""

    verb: str
    checkpoint_id: str
    arguments: tuple[str, ...]
    store: str
    restore: Literal["no", "if possible", "must"]
    on_failure: Literal["cold", "fail"]
    verify: str
    allow: frozenset[Reason]
    timeout: float | None
    as_json: bool


def start(request: Start) -> NoReturn:
    """Start, wait for the end.

    Raises:
        Ended: with the application's own exit code.
        ChrekError: nothing was started.
    """
    if not request.arguments:
        message = f"No command to run: chrek {request.verb} ... -- COMMAND [ARGUMENT]..."
        raise UsageError(Reason.NO_COMMAND, message, cure="Give the application's command after --.")
    options.require_root(request.verb)
    restoring = _is_to_be_restored(request)
    engine: list[int] = []

    def beside(pid1: int) -> None:
        if restoring:
            engine.append(_restore_beside(request, HostPid(pid1)))

    environment = environment_of(request, os.environ, restoring=restoring)
    command = command_of(request.arguments, os.environ, environment)
    started = foreground.start(command, environment, beside)
    restorer = _Restorer(engine[0], HostPid(started.pid1)) if engine else None
    code = foreground.wait(started)
    restored = restorer is not None and restorer.code() == 0
    if request.as_json:
        how = "restored" if restored else "cold"
        sys.stderr.write(json.dumps({"id": request.checkpoint_id, "start": how, "exit_code": code}) + "\n")
    raise Ended(code)


def _is_to_be_restored(request: Start) -> bool:
    """Whether there is a checkpoint to begin with; one that cannot be used is reported.

    Raises:
        ChrekError: there must be one, and is none that can be used.
    """
    if request.restore == "no":
        return False
    if _CHECKPOINT_MODE in os.environ:
        say(f"{_CHECKPOINT_MODE} is set: this is checkpoint mode, in which nothing is restored")
        return False
    from chrek.store.opening import open_checkpoint

    try:
        with options.open_store(request.store) as store, open_checkpoint(store, request.checkpoint_id):
            return True
    except ChrekError as error:
        if request.restore == "must" or (request.on_failure == "fail" and error.reason is not Reason.NOT_FOUND):
            raise
        if error.reason is not Reason.NOT_FOUND:
            explain(error)
            say("starting cold instead")
        return False


def environment_of(request: Start, ours: Mapping[str, str], *, restoring: bool) -> dict[str, str]:
    """Return PID 1's environment, which a cold application inherits."""
    result = {**ours, ID_VARIABLE: request.checkpoint_id}
    result.setdefault("DYN_RESTORE_MARKER_FILE", MARKER)
    if _CHECKPOINT_MODE in ours and not restoring:
        result.setdefault("DYN_CHECKPOINT_HASH", request.checkpoint_id)
        result.setdefault("DYN_CHECKPOINT_LOCATION", f"{os.path.abspath(request.store)}/{request.checkpoint_id}")
        result.setdefault("DYN_CHECKPOINT_STORAGE_TYPE", "pvc")
        return result
    for name in _CONTAINERS_OWN[:2] if not restoring else _CONTAINERS_OWN:
        result.pop(name, None)
    result.pop("DYN_CHECKPOINT_STORAGE_TYPE", None)
    if restoring:
        result["DYN_CHECKPOINT_HASH"] = request.checkpoint_id
        result["DYN_CHECKPOINT_PATH"] = NOWHERE
        result["CHREK_AGENT_TIMEOUT"] = str(CLAIM_SECONDS)
        result["CHREK_ON_RESTORE_FAILURE"] = request.on_failure
    return result


def command_of(arguments: Sequence[str], ours: Mapping[str, str], environment: Mapping[str, str]) -> list[str]:
    """Return the command, given back what was kept from PID 1 because it would take it for its own (``DEBUG``)."""
    kept = [f"{name}={ours[name]}" for name in _CONTAINERS_OWN[2:] if name in ours and name not in environment]
    return ["/usr/bin/env", *kept, *arguments] if kept else list(arguments)


class _Restorer:
    """The restoring process, watched: an init that it has left without a word need not wait for it."""

    def __init__(self, pid: int, pid1: HostPid) -> None:
        self._pid = pid
        self._pid1 = pid1
        self._code = int(ExitCode.FAILED)
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="restorer", daemon=True).start()

    def code(self) -> int:
        """Wait for its end; return how it ended."""
        self._ended.wait()
        return self._code

    def _watch(self) -> None:
        # The main thread alone acts on signals.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        self._ended.set()
        if self._code:
            # An init that has been told already, or ends, gives no claim any more.
            with suppress(ChrekError), claim(self._pid1, patience=CLAIM_SECONDS) as mailbox:
                mailbox.failed(Reason.RESTORE_FAILED, f"The restoring program ended before it began ({self._code}).")


def _restore_beside(request: Start, pid1: HostPid) -> int:
    """Restore in a process of its own, which ends with the restore; return its id."""
    pid = os.fork()
    if pid:
        return pid
    code = int(ExitCode.FAILED)
    try:
        # Out of the terminal's foreground group: ^C is the application's, which its init forwards. What it has to
        # say is said all the same: where `stty tostop` is set, writing would stop it, half way through the restore.
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        code = _claim_and_restore(request, pid1)
    except BaseException as error:  # noqa: BLE001 - nothing may return into the caller's code in this process
        say(f"the restore failed unexpectedly: {error!r}")
    finally:
        sys.stderr.flush()
        os._exit(code)


def _claim_and_restore(request: Start, pid1: HostPid) -> int:
    deadline = None if request.timeout is None else time.monotonic() + request.timeout
    try:
        mailbox = claim(pid1, patience=CLAIM_SECONDS / 2)
    except ChrekError as error:
        explain(error)
        return int(error.exit_code)
    with mailbox:
        try:
            restore_into(
                mailbox,
                pid1,
                store=request.store,
                checkpoint_id=request.checkpoint_id,
                verify=request.verify,
                allow=request.allow,
                deadline=deadline,
                quiet=request.as_json,
            )
        except ChrekError as error:
            return int(error.exit_code)  # the init says it
    return int(ExitCode.DONE)

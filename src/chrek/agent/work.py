"""The agent's side of a worker process (`chrek.agent.worker`): start it, follow it, stop it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from chrek.artifact import written
from chrek.criu.bundle import VARIABLE, Bundle
from chrek.errors import CaptureFailed, ChrekError, ExitCode, Reason, Refused, RestoreFailed, UsageError

_PROGRAM: Final = Path(__file__).with_name("worker.py")
GRACE: Final = 30.0
"""Seconds beyond the deadline for a worker to undo what it did; then it is killed, and CRIU undoes the rest."""

_KINDS: Final = {
    int(ExitCode.USAGE): UsageError,
    int(ExitCode.CAPTURE_FAILED): CaptureFailed,
    int(ExitCode.RESTORE_FAILED): RestoreFailed,
    int(ExitCode.REFUSED): Refused,
}


class Stop:
    """A switch that makes a worker undo itself, from any thread, before or while it runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self.asked = ""

    def ask(self, why: str) -> None:
        """Stop the work."""
        with self._lock:
            self.asked = self.asked or why
            self._signal(signal.SIGTERM)

    def attach(self, process: subprocess.Popen[bytes]) -> None:
        """Name the process; one that was asked for too early is stopped at once."""
        with self._lock:
            self._process = process
            if self.asked:
                self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it the hard way."""
        with self._lock:
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        # A process that was waited for is never signalled: Popen looks itself.
        if self._process is not None:
            self._process.send_signal(number)


def run(request: Mapping[str, object], *, stop: Stop, on_phase: Callable[[str], None]) -> dict[str, Any]:
    """Run a worker to its end and return its outcome.

    Raises:
        ChrekError: what the worker said, or that it died.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_PROGRAM)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # A bare interpreter knows no installation prefix to look for CRIU below.
        env={**os.environ, VARIABLE: str(Bundle.find().path), **_format(request)},
        # Its traceback, should there be one, belongs into the agent's log.
        stderr=None,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stop.attach(process)
    deadline = float(request["deadline"]) + GRACE  # type: ignore[arg-type]
    watchdog = threading.Timer(deadline, stop.kill)
    watchdog.daemon = True
    watchdog.start()
    began = time.monotonic()
    last: dict[str, Any] = {}
    phase = "start"
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        for line in process.stdout:
            last = json.loads(line)
            if "phase" in last and last["phase"] != phase:
                phase = last["phase"]
                on_phase(phase)
        process.wait()
    finally:
        watchdog.cancel()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        if process.poll() is None:
            stop.kill()
            process.wait()
        process.stdout.close()
    if "outcome" in last:
        return dict(last["outcome"])
    error = last.get("error")
    if stop.asked and (error is None or error["reason"] == Reason.CAPTURE_INTERRUPTED.code):
        # A worker without an error died of the signal itself: it was not ready for it yet.
        raise CaptureFailed(Reason.CAPTURE_INTERRUPTED, f"The capture was stopped: {stop.asked.rstrip('.')}.")
    if error is not None:
        raise _error(error)
    raise _died(request, process.returncode, phase, time.monotonic() - began)


def _format(request: Mapping[str, object]) -> dict[str, str]:
    return {written.VARIABLE: str(request["format"])} if "format" in request else {}


def _error(fields: Mapping[str, Any]) -> ChrekError:
    kind = _KINDS.get(fields["code"], ChrekError)
    return kind(Reason[fields["reason"]], fields["message"], cure=fields["cure"])


def _died(request: Mapping[str, object], code: int, phase: str, seconds: float) -> ChrekError:
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    message = f"The agent's worker ended with {how} in phase {phase} after {seconds:.1f} s."
    if request["verb"] == "capture":
        return CaptureFailed(Reason.CAPTURE_INTERRUPTED, message, cure="Look at the agent's log on the pod's node.")
    return RestoreFailed(Reason.RESTORE_FAILED, message, cure="Look at the agent's log on the pod's node.")

"""The application's three steps in one call: say that it is ready, wait, learn what it has become.

A process that is checkpointed goes on twice: in the container it was checkpointed in, and in every
container it is restored in. Both continue inside `checkpoint_point`, with the same memory, and tell
themselves apart by two files:

* the restore marker, which a restore writes before the process runs again. It is looked at first: the
  signal file of the checkpoint may well be visible to a restored process, on a volume that pods share.
* the signal file, which is written when the checkpoint is finished, or has failed.

The files are looked for by polling. inotify would be quieter, but a watch on an overlay file system is
something CRIU cannot always dump, and the very process that waits is the one to be dumped. Reacting within
20 ms costs 0.6 % of a core on a 2-core virtual machine (``benchmarks/workload_poll.py``).

Without ``DYN_CHECKPOINT_SIGNAL_FILE`` in the environment nothing happens and the answer is ``COLD``:
the same program runs without ChReK.
"""

from __future__ import annotations

import enum
import json
import os
import time
import traceback
from typing import Any, Callable, Dict, Iterable, NamedTuple, Optional, Tuple  # noqa: UP035 - Python 3.9

from chrek.workload import hooks, pod

SIGNAL_FILE = "DYN_CHECKPOINT_SIGNAL_FILE"
READY_FILE = "DYN_CHECKPOINT_READY_FILE"
MARKER_FILE = "DYN_RESTORE_MARKER_FILE"
DEFAULT_MARKER = "/tmp/dynamo-restored"

READY_TEXT = "ready\nchrek.workload\n"
"""The second line tells a restore that the process itself writes this file again, once its hooks are done."""
POLL_SECONDS = 0.015
"""Between two looks at the marker; with the scheduler's slack this stays under 20 ms."""
_SIGNAL_EVERY = 8
"""The signal file is looked at in every eighth of them: nobody waits for that one."""
_HALF_WRITTEN_SECONDS = 2.0
UNUSABLE = 171
"""How a restored process ends whose state turned out to be damaged: "a cold start would work", in ChReK's exit codes.

A hook says so with an exception that has a true `state_unusable`, as a pool whose contents are not what was saved does.
The agent then starts the container cold instead of restoring the same state again.
"""

Hook = Callable[[], Any]


class Outcome(enum.Enum):
    """How this process came to be where it is.

    ``COLD``: started ordinarily, no checkpoint was asked for: serve.
    ``CHECKPOINTED``: a checkpoint of it was taken and this is the original: exit with 0.
    ``RESTORED``: it goes on from a checkpoint, possibly in another container: serve.
    """

    COLD = "cold"
    CHECKPOINTED = "checkpointed"
    RESTORED = "restored"


class CheckpointFailed(Exception):
    """The checkpoint was not taken; the process is unharmed and may go on or end.

    `reason` is the stable code, if the signal file gives one; `refused` says that nothing was tried.
    """

    def __init__(self, message: str, *, reason: str = "", refused: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.refused = refused


class _Identity(NamedTuple):
    """Tells a file from another one of the same name."""

    device: int
    inode: int
    mtime_ns: int


def checkpoint_point(
    *,
    before: Iterable[Hook] = (),
    after: Iterable[Hook] = (),
    refresh: bool = True,
    timeout: Optional[float] = None,  # noqa: UP045 - Python 3.9
) -> Outcome:
    """Offer this process for a checkpoint and return how it goes on. Call it once, warmed up.

    `before` are called before the ready file is written: let go of what should not be in a checkpoint.
    `after` are called after a restore and before the ready file is written again: connect again, read
    tokens again. With `refresh` those of `chrek.workload.hooks.REFRESH` are called first: host name,
    pod variables, random seeds, clocks. A hook that raises ends the call with its exception; one that finds after
    a restore that the state is damaged (see `UNUSABLE`) ends the process instead.

    `timeout` in seconds, None for ever; raises `CheckpointFailed` when it is over, when the signal file
    says that the checkpoint failed, and `OSError` when the ready file cannot be written.
    """
    signal_file = os.environ.get(SIGNAL_FILE)
    if not signal_file:
        return Outcome.COLD
    ready_file = os.environ.get(READY_FILE)
    marker = os.environ.get(MARKER_FILE, DEFAULT_MARKER)
    for hook in before:
        hook()
    hooks.remember_clocks()
    stale = _identity(marker)
    if ready_file:
        write_ready(ready_file)
    if _wait(marker, stale, signal_file, timeout) is Outcome.CHECKPOINTED:
        return Outcome.CHECKPOINTED
    try:
        for hook in (*(hooks.REFRESH if refresh else ()), *after):
            hook()
    except Exception as error:
        if not getattr(error, "state_unusable", False):
            raise
        traceback.print_exc()
        raise SystemExit(UNUSABLE) from error
    _ready_again(ready_file)
    return Outcome.RESTORED


def write_ready(path: str) -> None:
    """Write the ready file: it is there complete or not at all."""
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(temporary, "w", encoding="ascii") as file:
            file.write(READY_TEXT)
        os.replace(temporary, path)
    except OSError:
        _remove(temporary)
        raise


def read_marker() -> Dict[str, Any]:  # noqa: UP006 - Python 3.9
    """Return what the restore wrote about itself; empty when this process was not restored."""
    fields = _read_json(os.environ.get(MARKER_FILE, DEFAULT_MARKER))
    return fields if isinstance(fields, dict) else {}


def _wait(marker: str, stale: Optional[_Identity], signal_file: str, timeout: Optional[float]) -> Outcome:  # noqa: UP045
    deadline = None if timeout is None else time.monotonic() + timeout
    count = 0
    while True:
        # A marker that was there before the process was ready is another one's.
        found = _identity(marker)
        if found is not None and found != stale:
            return Outcome.RESTORED
        if count % _SIGNAL_EVERY == 0 and os.path.exists(signal_file):
            _check(signal_file)
            return Outcome.CHECKPOINTED
        if deadline is not None and time.monotonic() > deadline:
            raise CheckpointFailed(f"no checkpoint was taken within {timeout:g} s", reason="TIMEOUT")
        count += 1
        time.sleep(POLL_SECONDS)


def _check(signal_file: str) -> None:
    """Raise `CheckpointFailed` unless the signal file says that the checkpoint is good."""
    deadline = time.monotonic() + _HALF_WRITTEN_SECONDS
    while True:
        fields = _read_json(signal_file)
        if isinstance(fields, dict) and "success" in fields:
            break
        if time.monotonic() > deadline:
            raise CheckpointFailed(f"{signal_file} does not say how the checkpoint went")
        time.sleep(POLL_SECONDS)
    if fields["success"] is not True:
        raise CheckpointFailed(
            str(fields.get("error") or f"{signal_file} gives no error"),
            reason=str(fields.get("reason") or ""),
            refused=fields.get("refused") is True,
        )


def _ready_again(ready_file: Optional[str]) -> None:  # noqa: UP045 - Python 3.9
    """Write the ready file of the container this process was restored in, if that one has such a probe."""
    environ = pod.environment()
    if environ is None:
        # PID 1 does not let itself be read: a file too many does no harm, and one too few a pod that is never ready.
        if ready_file:
            try:
                write_ready(ready_file)
            except OSError:
                return
    elif environ.get(READY_FILE):
        write_ready(environ[READY_FILE])


def _identity(path: str) -> Optional[_Identity]:  # noqa: UP045 - Python 3.9
    try:
        found = os.stat(path)
    except OSError:
        return None
    return _Identity(found.st_dev, found.st_ino, found.st_mtime_ns)


def _read_json(path: str) -> Any:  # noqa: ANN401 - JSON
    try:
        with open(path, "rb") as file:
            return json.loads(file.read(1 << 20))
    except (OSError, ValueError):
        return None


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return


__all__: Tuple[str, ...] = ("CheckpointFailed", "Outcome", "checkpoint_point", "read_marker", "write_ready")  # noqa: UP006

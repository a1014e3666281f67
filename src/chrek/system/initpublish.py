"""How a container's init says what it is doing: the writing half, light enough for PID 1.

The state is one JSON object of at most 4096 bytes in a sealed memfd named ``chrek-init``, held open
by the init and found by others through ``/proc/PID/fd``. That needs no volume, no writable directory
and no privilege in the container, and it disappears with the process. Sealed, because a reader may
then take it for what it is: nobody can change, grow or shrink it under the reader's eyes. Every new
state is a new memfd put over the same descriptor number by one dup2(2): a reader sees the old state
or the new one.

`chrek.system.initstate` is the reading half.

Modes, and what may follow::

    starting ── waiting ── claimed ── accepted ── restored
        │           │          │          │
        │           └──────────┴──────────┴───── failed ── cold
        └── cold

``failed`` is published while the remains of a restore are being killed; from then on no restore is
taken any more.
"""

from __future__ import annotations

import _json
import fcntl
import os

from chrek.system.ids import NsPid
from chrek.system.record import record

VERSION = 1
NAME = "chrek-init"
SIZE_MAX = 4096
MODES = ("starting", "waiting", "claimed", "accepted", "restored", "failed", "cold")

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_MFD_NOEXEC_SEAL = 0x8
"""Linux 6.3; without it a kernel with vm.memfd_noexec=2 refuses the memfd."""

READS_FORMAT = 2
"""The newest format of checkpoints that the bundle of this init reads."""

LETTER_MAX = 4096
"""PIPE_BUF of Linux: a letter in the mailbox is written whole or not at all."""
HEARTBEAT_LIMIT = 10.0
"""Seconds without a letter after which a claimed restore counts as lost."""

_HIGH = 1000
"""Where the init's long-lived descriptors go: out of the way of what programs count up from 3."""


@record
class Process:
    """A process as its own PID namespace numbers it.

    `start` is field 22 of ``/proc/PID/stat`` in clock ticks, as the init sees it. The kernel adds the
    *reader's* time namespace offset to it (do_task_stat() in fs/proc/array.c), whatever namespace the
    process itself is in, so two start times that one reader saw can be compared, and only those.
    """

    pid: NsPid
    start: int


@record
class InitState:
    """What an init has published.

    Attributes:
        mode: one of `MODES`.
        init: the init itself.
        app: the application, once there is one.
        checkpoint_id: the id to restore or to write; empty when the environment names none.
        mailbox: the descriptor, in the init, of the mailbox's write end; None when it takes no mail.
        claim: the token of the restore that has been granted the claim.
        deadline: seconds that this mode may last before the init goes on without; None is for ever.
        reason: the reason code of a cold start, empty when nothing kept it from restoring.
        seconds: from the start of the init to the start of the application.
        reads_format: the newest format of checkpoints that its bundle reads; one that does not say so reads the first.
    """

    mode: str
    init: Process
    app: Process | None = None
    checkpoint_id: str = ""
    mailbox: int | None = None
    claim: str = ""
    deadline: float | None = None
    reason: str = ""
    seconds: float | None = None
    reads_format: int = READS_FORMAT


class Publisher:
    """Holds the descriptor that others read the state from."""

    def __init__(self) -> None:
        self._slot: int | None = None

    def publish(self, state: InitState) -> None:
        """Replace the published state; raise `OSError` if the kernel refuses a memfd."""
        data = encode(state)
        memfd = _memfd()
        try:
            os.write(memfd, data)
            fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, SEALS)
            if self._slot is None:
                self._slot = high(memfd)
            else:
                os.dup2(memfd, self._slot, inheritable=False)
        finally:
            os.close(memfd)


def high(descriptor: int) -> int:
    """Return a close-on-exec copy of a descriptor above those that programs expect to be theirs."""
    for lowest in (_HIGH, 200, 3):
        try:
            return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, lowest)
        except OSError:  # past RLIMIT_NOFILE
            continue
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 0)


def process(pid: int) -> Process:
    """Return a process with its start time as this process sees it; raise `OSError` when it is gone."""
    with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
        return Process(pid=NsPid(pid), start=int(file.readall().rpartition(b")")[2].split()[19]))


def encode(state: InitState) -> bytes:
    """Return the state as JSON; raise `ValueError` when it is too long."""
    # By hand: importing json costs 1.3 MB in every container, this needs numbers, strings and null.
    fields: dict[str, object] = {"version": VERSION, **state.__dict__}
    data = _value(fields).encode()
    if len(data) > SIZE_MAX:
        raise ValueError(f"init state of {len(data)} bytes, more than {SIZE_MAX}")
    return data


def _value(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return _json.encode_basestring_ascii(value)
    if isinstance(value, int | float):
        return repr(value)
    fields = value if isinstance(value, dict) else value.__dict__
    return (
        "{" + ", ".join(f"{_json.encode_basestring_ascii(name)}: {_value(item)}" for name, item in fields.items()) + "}"
    )


def _memfd() -> int:
    try:
        return os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _MFD_NOEXEC_SEAL)
    except OSError:
        return os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)

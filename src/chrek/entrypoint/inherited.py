"""What the runtime gave this process, before Python changed it.

The application must find all of it as if no init were there. Three things have to be read back,
because the interpreter changes them before its first line runs:

* SIGPIPE and SIGXFSZ are set to be ignored. Whether they were ignored before cannot be known any
  more; the default is assumed, which is what runtimes give. Every other ignored signal (a SIGHUP
  under nohup) is taken from ``/proc/self/status`` and stays ignored.
* ``LC_CTYPE`` is added to the environment in the C locale (PEP 538). The environment as the kernel
  has it is read from ``/proc/self/environ``: exact bytes, duplicates and order kept. A shell that ran before
  has changed it too (it drops names with a dot, adds PWD and PATH), so it hands the original on.
* Arguments are decoded. They are read from ``/proc/self/cmdline`` for the same reason.

The rest (descriptors, working directory, ids, umask, limits, priority, OOM score) is never touched.
"""

from __future__ import annotations

import os

from chrek.entrypoint.signals import SIGPIPE, SIGXFSZ, bit
from chrek.system.record import record

TYPE_CHECKING = False  # see chrek.system.ids

if TYPE_CHECKING:
    from collections.abc import Sequence


_HANDED_ON_FD = 9
_HANDED_ON = b"CHREK_ENVIRONMENT_FD=%d" % _HANDED_ON_FD
"""Set by ``smart-entrypoint.sh``: there the environment comes as the runtime gave it, in base64."""


@record
class Inherited:
    """The start of this process: signal masks as kernel bit sets, environment as raw entries."""

    blocked: int
    ignored: int
    capabilities: int
    environ: tuple[bytes, ...]
    has_stderr: bool

    def variable(self, name: bytes) -> bytes | None:
        """Return the first value of a variable, as getenv(3) does."""
        prefix = name + b"="
        return next((entry[len(prefix) :] for entry in self.environ if entry.startswith(prefix)), None)

    def mapping(self) -> dict[str, str]:
        """Return the environment decoded; the first of several values counts."""
        pairs = (os.fsdecode(entry).partition("=") for entry in reversed(self.environ))
        return {name: value for name, equals, value in pairs if equals}


def inherited(blocked: int) -> Inherited:
    """Read everything; `blocked` is the signal mask before the init blocked all."""
    status = _status()
    return Inherited(
        blocked=blocked,
        ignored=int(status.get(b"SigIgn", b"0"), 16) & ~(bit(SIGPIPE) | bit(SIGXFSZ)),
        capabilities=int(status.get(b"CapEff", b"0"), 16),
        environ=_environ(),
        has_stderr=_is_open(2),
    )


def command(arguments: Sequence[str]) -> tuple[bytes, ...]:
    """Return the raw bytes of the last `len(arguments)` arguments of this process."""
    if not arguments:
        return ()
    raw = (_read("/proc/self/cmdline") or b"").split(b"\0")[:-1]
    if len(raw) < len(arguments):
        return tuple(os.fsencode(item) for item in arguments)
    return tuple(raw[-len(arguments) :])


def _environ() -> tuple[bytes, ...]:
    raw = _read("/proc/self/environ")
    if raw is None:
        return tuple(name + b"=" + value for name, value in os.environb.items())
    own = tuple(raw.removesuffix(b"\0").split(b"\0")) if raw else ()
    if _HANDED_ON not in own:
        return own
    return _handed_on() or tuple(entry for entry in own if entry != _HANDED_ON)


def _handed_on() -> tuple[bytes, ...]:
    """Return the environment that the entrypoint's shell found; empty when there is none to be read."""
    import binascii  # noqa: PLC0415 - only where a shell came before

    try:
        with open(_HANDED_ON_FD, "rb", buffering=0) as file:
            raw = binascii.a2b_base64(file.readall())
    except (OSError, ValueError):
        return ()
    return tuple(raw.removesuffix(b"\0").split(b"\0")) if raw else ()


def _status() -> dict[bytes, bytes]:
    lines = (line.partition(b":") for line in (_read("/proc/self/status") or b"").splitlines())
    return {name: value.strip() for name, _, value in lines}


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except OSError:
        return None  # no /proc here, or not for us


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True

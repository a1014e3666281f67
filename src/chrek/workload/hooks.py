"""Ready-made hooks: what a process should renew after it was restored somewhere else.

Each is a function without arguments, for `checkpoint_point(after=…)`; those in `REFRESH` are called by
default. They change what the standard library and ``os.environ`` show; copies that the application took
for itself are its own to renew.
"""

from __future__ import annotations

import gc
import os
import random
import socket
import sys
import time
from typing import Callable, Tuple  # noqa: UP035 - Python 3.9

from chrek.workload import pod

POD_VARIABLES = (
    "HOSTNAME",
    "POD_IP",
    "POD_IPS",
    "POD_NAME",
    "POD_NAMESPACE",
    "POD_UID",
    "NODE_NAME",
    "NODE_IP",
    "HOST_IP",
)
"""What pods usually take from the downward API."""

_clocks = (0.0, 0.0)


def remember_clocks() -> None:
    """Note the clocks at the checkpoint; `checkpoint_point` does it."""
    global _clocks  # noqa: PLW0603 - one process is checkpointed once at a time
    _clocks = (time.time(), time.monotonic())


def seconds_away() -> float:
    """Return how long this process did not exist, in seconds: from its checkpoint to its restore.

    The monotonic clock goes on where it stopped (a restored process has a time namespace of its own),
    the wall clock has moved. Expire caches, tokens and leases by this.
    """
    wall, monotonic = _clocks
    return max(0.0, (time.time() - wall) - (time.monotonic() - monotonic))


def refresh_hostname() -> None:
    """Make ``HOSTNAME`` the name of the host this process is on now."""
    if "HOSTNAME" in os.environ:
        os.environ["HOSTNAME"] = socket.gethostname()


def refresh_pod_variables() -> None:
    """Take `POD_VARIABLES` from the container's PID 1: address, names and node of the pod this process is in now."""
    environ = pod.environment() or {}
    for name in POD_VARIABLES:
        if name in environ:
            os.environ[name] = environ[name]


def reseed() -> None:
    """Seed `random`, numpy's global generator if numpy is loaded, and OpenSSL's from the kernel.

    Every restored copy would otherwise draw the same numbers. Generators that the application made
    itself, and torch's (which may be what makes its answers reproducible), are left alone.
    """
    random.seed(os.urandom(32))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(int.from_bytes(os.urandom(4), "little"))
    ssl = sys.modules.get("ssl")
    if ssl is not None:
        ssl.RAND_add(os.urandom(64), 64.0)


def refresh_clocks() -> None:
    """Read the time zone again; see `seconds_away` for the time that has passed."""
    time.tzset()


def trim_memory() -> None:
    """Before a checkpoint: give back what the garbage collector and the C library's heap still hold."""
    import ctypes  # noqa: PLC0415 - rarely wanted

    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # not glibc
        return


REFRESH: Tuple[Callable[[], None], ...] = (  # noqa: UP006 - Python 3.9
    refresh_hostname,
    refresh_pod_variables,
    reseed,
    refresh_clocks,
)

"""Capabilities, no_new_privs and securebits that images ask for: bounded by PID 1's, or reduced to them.

What PID 1 could give a child is the bound. Where the user allows it (``CHREK_ALLOW=PRIVILEGE_EXCEEDED``), a
thread that goes beyond it is cut down to the sets that PID 1 itself has. Cutting is safe here and nowhere else:
capability sets are ordered, and a process can lose a capability at any time, so one that lost some is a process
that could have been. User ids are not ordered (another user is not less, but somebody else).

PID 1's securebits cannot be read from outside: no file of /proc has them. Runtimes give none, and only
CAP_SETPCAP sets any but KEEP_CAPS, so without that capability only what restricts is taken from an image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chrek.errors import Reason, Refused

if TYPE_CHECKING:
    from chrek.criu.messages import Credentials
    from chrek.system.procfs import Status

SETS = {
    "bounding": "CapBnd",
    "permitted": "CapPrm",
    "effective": "CapEff",
    "ambient": "CapAmb",
    "inheritable": "CapInh",
}
"""The sets of an image, and their names in ``/proc/PID/status``."""

NAMES = (
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP"),
    *("LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER"),
    *("SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE"),
    *("SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP"),
    *("MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF"),
    "CHECKPOINT_RESTORE",
)
"""linux/capability.h, in the order of their bits."""

SETGID, SETUID, SETPCAP, SYS_NICE = 6, 7, 8, 23

_KEEP_CAPS, _KEEP_CAPS_LOCKED, _NO_SETUID_FIXUP = 1 << 4, 1 << 5, 1 << 2
_SECUREBITS = 0xFF
"""All bits of linux/securebits.h. NOROOT, NO_CAP_AMBIENT_RAISE and every lock of a bit that is not set restrict."""

_WORDS = 2

CURE = (
    "Give the restoring container the same security context as the captured one; or allow PRIVILEGE_EXCEEDED, which takes"
    " from the restored processes what this container does not have."
)


def exceeded(process: int, asked: str, has: str, *, cure: str | None = None) -> Refused:
    """Return the refusal of a process that asks for more than PID 1 has."""
    message = f"Process {process} of the checkpoint asks for {asked}; this container's PID 1 has {has}."
    return Refused(Reason.PRIVILEGE_EXCEEDED, message, cure=cure)


def mask(words: list[int]) -> int:
    """Return a set as a number; images have it in words of 32 bits, the lower first."""
    return sum(word << 32 * number for number, word in enumerate(words))


def bits(value: int) -> set[int]:
    """Return the numbers of the capabilities in a set."""
    return {number for number in range(value.bit_length()) if value >> number & 1}


def named(value: int) -> str:
    """Return the names of a set's capabilities, as people write them."""
    return ", ".join(f"CAP_{NAMES[bit]}" if bit < len(NAMES) else f"capability {bit}" for bit in sorted(bits(value)))


def check(process: int, creds: Credentials, limit: Status) -> None:
    """Check one thread's credentials against PID 1.

    Raises:
        Refused: ``PRIVILEGE_EXCEEDED``, or ``CORRUPT`` for sets that are none: CRIU would read past their end.
    """
    for name in SETS:
        if len(getattr(creds, name)) not in ({0, _WORDS} if name == "ambient" else {_WORDS}):
            raise Refused(Reason.CORRUPT, f"The {name} capabilities of process {process} are not {_WORDS} words.")
    for name, most in _bounds(limit).items():
        more = mask(getattr(creds, name)) & ~most
        if more:
            raise exceeded(process, f"the {name} capabilities {named(more)}", "not these", cure=CURE)
    if limit.no_new_privs and not creds.no_new_privs:
        raise exceeded(process, "new privileges at exec", "no_new_privs", cure=CURE)
    loose = _loose(creds, limit)
    if loose:
        raise exceeded(process, f"securebits {loose:#x}", "not these, nor CAP_SETPCAP", cure=CURE)


def reduce(creds: Credentials, limit: Status) -> tuple[int, list[str]]:
    """Cut credentials down to PID 1's where they exceed it; return the lost capabilities, and what else changed."""
    lost, changes = 0, []
    if any(mask(getattr(creds, name)) & ~most for name, most in _bounds(limit).items()):
        for name, key in SETS.items():
            had = mask(getattr(creds, name))
            left = had & limit.capabilities[key]
            lost |= had & ~left
            setattr(creds, name, [left & 0xFFFFFFFF, left >> 32])
    if limit.no_new_privs and not creds.no_new_privs:
        creds.no_new_privs = 1
        changes.append("no_new_privs set")
    loose = _loose(creds, limit)
    if loose:
        creds.securebits &= ~loose
        changes.append(f"securebits {loose:#x} cleared")
    return lost, changes


def _bounds(limit: Status) -> dict[str, int]:
    """Return for each set what a child of PID 1 could have in it."""
    bounding, permitted = limit.capabilities["CapBnd"], limit.capabilities["CapPrm"]
    # Root gains its bounding set at every exec, unless no_new_privs forbids; others keep what they have.
    reachable = bounding if 0 in limit.uids and not limit.no_new_privs else permitted | limit.capabilities["CapAmb"]
    return {
        "bounding": bounding,
        "permitted": reachable,
        "effective": reachable,
        "ambient": reachable,
        "inheritable": bounding | limit.capabilities["CapInh"],
    }


def _loose(creds: Credentials, limit: Status) -> int:
    """Return the securebits that loosen something, or mean nothing, and are not PID 1's to give."""
    loose = creds.securebits & ~_SECUREBITS
    if not limit.capabilities["CapPrm"] >> SETPCAP & 1:
        loose |= creds.securebits & _NO_SETUID_FIXUP
        if creds.securebits & _KEEP_CAPS:
            loose |= creds.securebits & _KEEP_CAPS_LOCKED
    return loose

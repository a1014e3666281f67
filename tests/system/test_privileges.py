"""What restored processes may do: never more than the container's PID 1; less than before where the user allows that."""

from __future__ import annotations

import os
import struct
from typing import Any

import pytest

from chrek.errors import ChrekError, Reason
from chrek.store.layout import Store
from chrek.system import procfs
from chrek.system.filters import seccomp_filters
from chrek.system.initstate import application
from containers import Container, needs
from containers.spec import DEFAULT_CAPABILITIES
from system import cycle
from system.cycle import Make

pytestmark = needs("containers", "criu")

ALLOWED = frozenset({Reason.PRIVILEGE_EXCEEDED})
APP = cycle.app("queue")


def profile(*names: str) -> dict[str, Any]:
    """Return a seccomp profile that answers these calls with an error."""
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [{"names": list(names), "action": "SCMP_ACT_ERRNO"}],
    }


def capture(make: Make, store: Store, **options: Any) -> None:
    """Capture the application in a container of that kind."""
    source = cycle.start(make, APP, **options)
    cycle.capture(source, store)
    source.delete()


def refused(make: Make, store: Store, allow: frozenset[Reason] = frozenset(), **options: Any) -> ChrekError:
    """Check that a container of that kind refuses the restore and starts cold."""
    copy = cycle.waiting(make, APP, **options)
    with pytest.raises(ChrekError) as caught:
        cycle.restore(copy, store, allow=allow)
    assert caught.value.reason is Reason.PRIVILEGE_EXCEEDED
    copy.wait_for("chrek: start=cold reason=PRIVILEGE_EXCEEDED")
    copy.delete()
    return caught.value


def threads(copy: Container) -> list[procfs.Status]:
    """Return the status of every thread of every restored process."""
    found = [procfs.status(thread) for pid in procfs.tree(application(copy.pid1)) for thread in procfs.threads(pid)]
    return [state for state in found if state is not None]


def test_capabilities(container: Make, store: Store) -> None:
    """More capabilities than PID 1 has are refused by name; when the user allows that, no thread keeps one of them."""
    more = [*DEFAULT_CAPABILITIES, "CAP_NET_ADMIN", "CAP_SYS_PTRACE"]
    capture(container, store, capabilities=more, no_new_privs=False)
    assert "CAP_NET_ADMIN" in refused(container, store, capabilities=[]).message
    copy = cycle.waiting(container, APP, capabilities=[])
    outcome = cycle.restore(copy, store, allow=ALLOWED)
    copy.wait_for("ok restored")
    said = next(warning for warning in outcome.warnings if warning.startswith("PRIVILEGE_EXCEEDED was allowed: "))
    for name in more:
        assert name in said
    assert "no_new_privs set" in said
    limit = procfs.status(copy.pid1)
    assert limit is not None
    found = threads(copy)
    assert len(found) >= 2
    for state in found:
        assert state.no_new_privs
        for name, mask in state.capabilities.items():
            assert mask & ~limit.capabilities[name] == 0, (state.name, name)


def test_what_fits_is_not_touched(container: Make, store: Store) -> None:
    """Where nothing exceeds PID 1, the allowance changes nothing."""
    capture(container, store)
    copy = cycle.waiting(container, APP)
    outcome = cycle.restore(copy, store, allow=ALLOWED)
    copy.wait_for("ok restored")
    assert not any("PRIVILEGE_EXCEEDED" in warning for warning in outcome.warnings)
    limit = procfs.status(copy.pid1)
    assert limit is not None
    assert all(state.capabilities == limit.capabilities for state in threads(copy))


def test_users_stay_refused(container: Make, store: Store) -> None:
    """Another user is not less than this one but somebody else: refused whatever is allowed."""
    capture(container, store)
    assert "user ids" in refused(container, store, ALLOWED, uid=1000).message


def test_the_same_profile(container: Make, store: Store) -> None:
    """Two containers with one profile have the same program, so what ran under it in one is restored in the other."""
    capture(container, store, seccomp=profile("acct"))
    copy = cycle.waiting(container, APP, seccomp=profile("acct"))
    cycle.restore(copy, store)
    copy.wait_for("ok restored")
    (needed,) = seccomp_filters(copy.pid1)
    for pid in procfs.tree(application(copy.pid1)):
        assert needed in seccomp_filters(pid)


def test_another_profile(container: Make, store: Store) -> None:
    """A filter that is not PID 1's is refused with a cure; when the user allows that, PID 1's is put beneath it."""
    capture(container, store, seccomp=profile("acct"))
    error = refused(container, store, seccomp=profile("acct", "reboot"))
    assert "1 that are not among them" in error.message
    assert "same seccomp profile and the same capabilities" in error.cure
    copy = cycle.waiting(container, APP, seccomp=profile("acct", "reboot"))
    outcome = cycle.restore(copy, store, allow=ALLOWED)
    copy.wait_for("ok restored")
    assert any("seccomp filters added" in warning for warning in outcome.warnings)
    needed = seccomp_filters(copy.pid1)
    for pid in procfs.tree(application(copy.pid1)):
        found = seccomp_filters(pid)
        assert found[:1] == needed
        assert len(found) > len(needed)
    # What was added is part of the next checkpoint, as if it had been there from the start.
    cycle.capture(copy, store, "two")
    copy.delete()
    again = cycle.waiting(container, APP, "two", seccomp=profile("acct", "reboot"))
    cycle.restore(again, store, "two")


def test_from_no_profile(container: Make, store: Store) -> None:
    """A privileged, unconfined application goes into a restricted container, when the user allows that, and is restricted."""
    capture(container, store, privileged=True)
    restricted: dict[str, Any] = {"capabilities": [], "seccomp": profile("acct", "mount", "reboot")}
    assert "capabilities" in refused(container, store, **restricted).message
    copy = cycle.waiting(container, APP, **restricted)
    cycle.restore(copy, store, allow=ALLOWED)
    copy.wait_for("ok restored")
    (needed,) = seccomp_filters(copy.pid1)
    for state in threads(copy):
        assert state.seccomp == 2
        assert state.no_new_privs
        assert state.capabilities["CapBnd"] == 0
        assert needed in seccomp_filters(state.pid)


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o755])
def test_programs_of_another_user(container: Make, store: Store, mode: int) -> None:
    """A program in the checkpoint that would give a user's container root's rights is refused, unless it gives none there."""
    user: dict[str, Any] = {"uid": 1000, "no_new_privs": False}
    source = cycle.start(container, APP, **user)
    source.exec(["cp", "/bin/dash", "/var/tmp/gain"], user="0:0")
    gain = source.root / "var/tmp/gain"
    gain.chmod(mode)
    if mode == 0o755:  # instead: the capability net_raw, permitted and effective (linux/capability.h, VFS_CAP_REVISION_2)
        os.setxattr(gain, "security.capability", struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0))
    cycle.capture(source, store)
    source.delete()
    assert "var/tmp/gain" in refused(container, store, **user).message
    copy = cycle.waiting(container, APP, uid=1000, no_new_privs=True)
    cycle.restore(copy, store, allow=ALLOWED)
    copy.wait_for("ok restored")

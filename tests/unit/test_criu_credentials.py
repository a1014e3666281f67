"""What images may ask for: bounded by a PID 1, for which this test's own process stands."""

from __future__ import annotations

import dataclasses
import os
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chrek.criu import capabilities, credentials
from chrek.criu.images import COMMON_MAGIC, Image, read_one
from chrek.criu.messages import (
    Core,
    Credentials,
    GhostFile,
    Inventory,
    NamespaceIds,
    PstreeEntry,
    Rlimit,
    Rlimits,
    Seccomp,
    SeccompFilter,
    TaskCore,
    ThreadCore,
)
from chrek.criu.seccomp import Filters
from chrek.errors import Reason, Refused
from chrek.system import procfs
from chrek.system.ids import HostPid
from chrek.system.procfs import Status
from chrek.system.protobuf import BYTES, Message, write_varint

ME = HostPid(os.getpid())
UNLIMITED = (1 << 64) - 1
SETGID, SETUID, SETPCAP, SYS_ADMIN, SYS_NICE, MAC_ADMIN, SYSLOG = 6, 7, 8, 21, 23, 33, 34
PROGRAM = struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000)
"""A seccomp filter that allows everything."""


@dataclasses.dataclass
class Place:
    """An image directory."""

    path: Path
    fd: int

    def write(self, name: str, *entries: Message | bytes) -> None:
        """Write an image of these entries."""
        encoded = [entry if isinstance(entry, bytes) else entry.encode() for entry in entries]
        Image(name, struct.pack("<II", COMMON_MAGIC, 1), encoded).write(self.fd)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Return an empty image directory."""
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield Place(tmp_path, fd)
    os.close(fd)


def me() -> Status:
    """Return the status of this process."""
    state = procfs.status(ME)
    assert state is not None
    return state


def words(mask: int) -> list[int]:
    """Return a capability set as images have it: two words, the lower first."""
    return [mask & 0xFFFFFFFF, mask >> 32]


def own_credentials() -> Credentials:
    """Return the credentials of this process, as an image would have them."""
    state = me()
    (uid, euid, suid, fsuid), (gid, egid, sgid, fsgid) = state.uids, state.gids
    return Credentials(
        uid=uid, euid=euid, suid=suid, fsuid=fsuid, gid=gid, egid=egid, sgid=sgid, fsgid=fsgid,
        inheritable=words(state.capabilities["CapInh"]),
        permitted=words(state.capabilities["CapPrm"]),
        effective=words(state.capabilities["CapEff"]),
        bounding=words(state.capabilities["CapBnd"]),
        ambient=words(state.capabilities["CapAmb"]),
        securebits=0,
        groups=list(state.groups),
        no_new_privs=int(state.no_new_privs),
        lsm_profile=credentials._label(ME),
    )  # fmt: skip


def task(*, hard: list[int] | None = None, score: int | None = None, state: int = 1) -> TaskCore:
    """Return a task that asks for these hard limits and this score; this process's own where none is given."""
    mine = int(procfs.read_text(ME, "oom_score_adj") or 0)
    limits = [Rlimit(soft=0, hard=each) for each in (credentials._hard_limits(ME) if hard is None else hard)]
    return TaskCore(state=state, comm="app", rlimits=Rlimits(limits), oom_score_adj=mine if score is None else score)


def seccomp_chain(place: Place, length: int) -> int | None:
    """Write that many filters, each followed by the one before; return the number of the last."""
    filters = [SeccompFilter(program=PROGRAM, previous=number - 1 if number else None) for number in range(length)]
    place.write("seccomp.img", Seccomp(filters))
    return length - 1 if length else None


def write_core(place: Place, creds: Credentials | None = None, the_task: TaskCore | None = None) -> None:
    """Write a core with these credentials, this process's own in everything that is not given."""
    last = seccomp_chain(place, me().seccomp_filters)
    thread = ThreadCore(creds=creds or own_credentials(), seccomp_mode=2 if last is not None else 0, seccomp_filter=last)
    place.write("core-7.img", Core(machine=1, task=the_task or task(), thread=thread))
    place.write("pstree.img", PstreeEntry(pid=7, ppid=0, pgid=7, sid=7, threads=[7]))


def refused(place: Place, reason: Reason) -> str:
    """Check the images against this process; return the words of the refusal."""
    with pytest.raises(Refused) as caught:
        credentials.bound_credentials(place.fd, ME)
    assert caught.value.reason is reason
    return str(caught.value)


# --- against this very process ----------------------------------------------------------------------


def test_own_credentials_pass(place: Place) -> None:
    """What PID 1 itself has is allowed, and the bounding capabilities of all images are returned."""
    write_core(place)
    bounding = me().capabilities["CapBnd"]
    assert credentials.bound_credentials(place.fd, ME).bounding == {bit for bit in range(64) if bounding >> bit & 1}


def test_hard_limits_are_in_the_kernels_order() -> None:
    """Limits are read in the order of the resources' numbers."""
    found = [resource.getrlimit(number)[1] & UNLIMITED for number in range(16)]
    assert credentials._hard_limits(ME) == found


def test_hard_limit(place: Place) -> None:
    """A hard limit above PID 1's is refused, naming the resource; a lower one is not."""
    own = credentials._hard_limits(ME)
    write_core(place, the_task=task(hard=[0] * 16))
    credentials.bound_credentials(place.fd, ME)
    own[resource.RLIMIT_NOFILE] += 1
    write_core(place, the_task=task(hard=own))
    assert f"hard limit {resource.RLIMIT_NOFILE} of " in refused(place, Reason.PRIVILEGE_EXCEEDED)


def test_oom_score(place: Place) -> None:
    """A process that would be killed later than PID 1 allows is refused."""
    own = int(procfs.read_text(ME, "oom_score_adj") or 0)
    write_core(place, the_task=task(score=min(own + 1, 1000)))
    credentials.bound_credentials(place.fd, ME)
    write_core(place, the_task=task(score=own - 1))
    assert "oom_score_adj" in refused(place, Reason.PRIVILEGE_EXCEEDED)


def test_a_capability_that_nobody_has(place: Place) -> None:
    """A capability that PID 1's bounding set lacks is refused in every set."""
    for name in ("bounding", "permitted", "effective", "ambient", "inheritable"):
        creds = own_credentials()
        getattr(creds, name)[1] |= 1 << 31
        write_core(place, creds)
        assert f"the {name} capabilities capability 63" in refused(place, Reason.PRIVILEGE_EXCEEDED)


def test_a_label_that_pid1_lacks(place: Place) -> None:
    """A security label that is not PID 1's is refused."""
    creds = own_credentials()
    creds.lsm_profile = "somebody_elses"
    write_core(place, creds)
    assert "somebody_elses" in refused(place, Reason.PRIVILEGE_EXCEEDED)


def test_no_credentials(place: Place) -> None:
    """A core without credentials is damaged, unless its process has ended: that one never runs again."""
    place.write("pstree.img", PstreeEntry(pid=7, ppid=0, pgid=7, sid=7, threads=[7]))
    place.write("core-7.img", Core(machine=1, task=task(), thread=ThreadCore()))
    assert "no credentials" in refused(place, Reason.CORRUPT)
    place.write("core-7.img", Core(machine=1, task=task()))
    assert "no credentials" in refused(place, Reason.CORRUPT)
    place.write("core-7.img", Core(machine=1))
    assert "no credentials" in refused(place, Reason.CORRUPT)
    for state in (2, 6):
        place.write("core-7.img", Core(machine=1, task=task(state=state)))
        assert credentials.bound_credentials(place.fd, ME).bounding == set()


def test_an_ended_process_with_credentials_is_checked(place: Place) -> None:
    """What a core says of a process that has ended is bounded as well, where it says something."""
    creds = own_credentials()
    creds.effective = words(1 << 63)
    write_core(place, creds, task(state=6))
    refused(place, Reason.PRIVILEGE_EXCEEDED)


@pytest.mark.parametrize("name", ["uid", "gid", "euid", "egid", "suid", "sgid", "fsuid", "fsgid", "securebits"])
def test_missing_ids(place: Place, name: str) -> None:
    """Credentials without one of the numbers they must have are damaged."""
    creds = own_credentials()
    setattr(creds, name, None)
    write_core(place, creds)
    assert f"Credentials.{name} is missing" in refused(place, Reason.CORRUPT)


def test_missing_hard_limit(place: Place) -> None:
    """A limit without its hard part is damaged."""
    broken: Any = Rlimit(soft=1)
    write_core(place, the_task=TaskCore(state=1, comm="app", rlimits=Rlimits([broken])))
    refused(place, Reason.CORRUPT)


def test_credentials_that_stand_twice(place: Place) -> None:
    """Two credentials in one core are refused: CRIU would merge them, and join the two lists of capabilities."""
    wicked, harmless = own_credentials(), own_credentials()
    wicked.effective, harmless.effective = words(UNLIMITED), []
    thread = ThreadCore(creds=wicked).encode() + ThreadCore(creds=harmless).encode()
    core = Core(machine=1, task=task()).encode() + write_varint(5 << 3 | BYTES) + write_varint(len(thread)) + thread
    place.write("core-7.img", core)
    assert "stands twice" in refused(place, Reason.CORRUPT)


def test_pid1_is_gone(place: Place) -> None:
    """Nothing is allowed against a PID 1 that is no more."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    write_core(place)
    with pytest.raises(Refused) as caught:
        credentials.bound_credentials(place.fd, HostPid(pid))
    assert caught.value.reason is Reason.CLAIM_LOST


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_cores(place: Place, data: st.DataObject) -> None:
    """A core with changed bytes is allowed or refused; no other exception comes out."""
    write_core(place)
    file = place.path / "core-7.img"
    damaged = bytearray(file.read_bytes())
    for at in data.draw(st.lists(st.integers(8, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[at] = data.draw(st.integers(0, 255))
    file.write_bytes(damaged)
    try:
        credentials.bound_credentials(place.fd, ME)
    except Refused as error:
        if error.reason not in {Reason.CORRUPT, Reason.PRIVILEGE_EXCEEDED}:
            raise


# --- against what other processes have --------------------------------------------------------------


def limited(*, permitted: int = 0, bounding: int = 0, **other: Any) -> Status:
    """Return the status of a PID 1 with these capabilities, user 1000 and groups 1000 and 2000."""
    capabilities = {"CapPrm": permitted, "CapEff": permitted, "CapBnd": bounding, "CapInh": 0, "CapAmb": 0}
    values: dict[str, Any] = {
        "uids": (1000,) * 4,
        "gids": (1000,) * 4,
        "groups": (2000,),
        "no_new_privs": False,
        "seccomp": 0,
        "seccomp_filters": 0,
        "capabilities": capabilities,
    }
    return dataclasses.replace(me(), **{**values, **other})


def plain(**other: Any) -> Credentials:
    """Return credentials of user 1000 without capabilities."""
    ids: dict[str, Any] = dict.fromkeys(("uid", "euid", "suid", "fsuid", "gid", "egid", "sgid", "fsgid"), 1000)
    ids |= {name: [0, 0] for name in ("bounding", "permitted", "effective", "inheritable")}
    # Decoded from bytes, as from an image.
    return Credentials.decode(Credentials(**{**ids, "securebits": 0, **other}).encode())


def exceeds(check: Callable[..., None], *arguments: object) -> bool:
    """Whether the check refuses for more privileges than PID 1 has."""
    try:
        check(7, *arguments)
    except Refused as error:
        if error.reason is not Reason.PRIVILEGE_EXCEEDED:
            raise
        return True
    return False


@pytest.mark.parametrize("name", ["uid", "euid", "suid", "fsuid"])
def test_users(name: str) -> None:
    """Another user needs CAP_SETUID in PID 1's permitted set; the group's capability does not help."""
    assert not exceeds(credentials._check_ids, plain(), limited())
    assert exceeds(credentials._check_ids, plain(**{name: 0}), limited())
    assert exceeds(credentials._check_ids, plain(**{name: 0}), limited(permitted=1 << SETGID))
    assert not exceeds(credentials._check_ids, plain(**{name: 0}), limited(permitted=1 << SETUID))


@pytest.mark.parametrize("name", ["gid", "egid", "sgid", "fsgid", "groups"])
def test_groups(name: str) -> None:
    """Another group needs CAP_SETGID; PID 1's supplementary groups are its own."""

    def ask(group: int) -> Credentials:
        return plain(**{name: [group] if name == "groups" else group})

    assert not exceeds(credentials._check_ids, ask(2000), limited())
    assert exceeds(credentials._check_ids, ask(0), limited())
    assert exceeds(credentials._check_ids, ask(0), limited(permitted=1 << SETUID))
    assert not exceeds(credentials._check_ids, ask(0), limited(permitted=1 << SETGID))


@pytest.mark.parametrize("name", ["permitted", "effective", "ambient"])
def test_capabilities_of_a_user(name: str) -> None:
    """A PID 1 that is not root gives its children what it is permitted, not all of its bounding set."""
    asked = plain(**{name: words(1 << SYS_ADMIN)})
    everything = 1 << SYS_ADMIN
    assert exceeds(capabilities.check, asked, limited(bounding=everything))
    assert not exceeds(capabilities.check, asked, limited(bounding=everything, permitted=everything))


def test_capabilities_of_root() -> None:
    """Root gains its bounding set at an exec, unless no_new_privs forbids that."""
    asked = plain(effective=words(1 << SYS_ADMIN), no_new_privs=1)
    root: dict[str, Any] = {"uids": (0,) * 4, "bounding": 1 << SYS_ADMIN}
    assert not exceeds(capabilities.check, asked, limited(**root))
    assert exceeds(capabilities.check, asked, limited(**root, no_new_privs=True))


@pytest.mark.parametrize("value", [None, 0, 1 << 32])
def test_no_new_privs(value: int | None) -> None:
    """Where PID 1 has no_new_privs, every process has it; a number that CRIU cuts to zero is zero."""
    asked = plain(no_new_privs=value)
    assert not exceeds(capabilities.check, asked, limited())
    assert exceeds(capabilities.check, asked, limited(no_new_privs=True))
    assert not exceeds(capabilities.check, plain(no_new_privs=1), limited(no_new_privs=True))


def test_words_of_capabilities_do_not_run_into_each_other() -> None:
    """A word wider than 32 bits, which CRIU cuts, cannot hide a capability of the next word."""
    hidden = plain(bounding=[1 << MAC_ADMIN, 1 << MAC_ADMIN - 32])
    assert exceeds(capabilities.check, hidden, limited(bounding=1 << SYSLOG))


@pytest.mark.parametrize(
    ("wanted", "label", "refused"),
    [
        (None, None, False),
        ("", None, False),
        ("unconfined", None, False),
        ("other", None, True),
        ("mine", "mine", False),
        (None, "mine", True),
        ("unconfined", "mine", True),
        ("other", "mine", True),
    ],
)
def test_labels(wanted: str | None, label: str | None, refused: bool) -> None:
    """A confined PID 1 has only children with its own label; an unconfined one has unconfined children."""
    assert exceeds(credentials._check_label, plain(lsm_profile=wanted), label) is refused


# --- what restricts stays, what loosens goes --------------------------------------------------------


@pytest.mark.parametrize("words", [[], [0], [0, 0, 0]])
@pytest.mark.parametrize("name", ["bounding", "permitted", "effective", "inheritable", "ambient"])
def test_sets_of_another_length(name: str, words: list[int]) -> None:
    """A set that is not two words, behind whose end CRIU would read, is damaged; an ambient one may be left out."""
    if name == "ambient" and not words:
        capabilities.check(7, plain(ambient=[]), limited())
        return
    with pytest.raises(Refused) as caught:
        capabilities.check(7, plain(**{name: words}), limited())
    assert caught.value.reason is Reason.CORRUPT


@pytest.mark.parametrize(
    ("securebits", "without", "with_setpcap"),
    [
        (0, False, False),
        (0b1, False, False),  # NOROOT
        (0b11, False, False),  # ... and locked
        (0b1100_0000, False, False),  # NO_CAP_AMBIENT_RAISE, locked
        (0b1000, False, False),  # NO_SETUID_FIXUP is off and locked so
        (0b10_0000, False, False),  # KEEP_CAPS is off and locked so
        (0b1_0000, False, False),  # KEEP_CAPS needs no capability
        (0b11_0000, True, False),  # ... but to lock it does
        (0b100, True, False),  # NO_SETUID_FIXUP
        (1 << 8, True, True),  # nothing
    ],
)
def test_securebits(securebits: int, without: bool, with_setpcap: bool) -> None:
    """Securebits that restrict are anybody's; those that loosen need CAP_SETPCAP, which alone can set them."""
    asked = plain(securebits=securebits)
    assert exceeds(capabilities.check, asked, limited()) is without
    assert exceeds(capabilities.check, asked, limited(permitted=1 << SETPCAP)) is with_setpcap


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_reduced_credentials(data: st.DataObject) -> None:
    """Whatever was asked for, what is left is allowed, nothing was added, and what was allowed before is untouched."""
    sets = st.integers(0, (1 << 41) - 1)
    bounding = data.draw(sets)
    limit = limited(
        permitted=data.draw(sets) & bounding,
        bounding=bounding,
        uids=(data.draw(st.sampled_from([0, 1000])),) * 4,
        no_new_privs=data.draw(st.booleans()),
    )
    asked = plain(
        **{name: words(data.draw(sets)) for name in capabilities.SETS},
        no_new_privs=data.draw(st.sampled_from([None, 0, 1])),
        securebits=data.draw(st.integers(0, 511)),
    )
    before = dataclasses.replace(asked)
    fitted = not exceeds(capabilities.check, asked, limit)
    lost, changes = capabilities.reduce(asked, limit)
    capabilities.check(7, asked, limit)
    assert (asked == before) is (not lost and not changes) is fitted
    for name in capabilities.SETS:
        now, then = (capabilities.mask(getattr(each, name)) for each in (asked, before))
        assert now & ~then == 0
        assert then & ~now & ~lost == 0
    assert asked.securebits & ~before.securebits == 0
    assert (asked.no_new_privs or 0) >= (before.no_new_privs or 0)


def test_reduced_images(place: Place) -> None:
    """What exceeds is taken from the images when the user allows that, each lost capability is named, and the rest stays."""
    creds = own_credentials()
    for name in ("bounding", "permitted", "effective", "inheritable"):
        getattr(creds, name)[1] |= 1 << 31
    write_core(place, creds)
    refused(place, Reason.PRIVILEGE_EXCEEDED)
    found = credentials.bound_credentials(place.fd, ME, cut=True)
    assert list(found.warnings) == ["PRIVILEGE_EXCEEDED was allowed: capability 63 taken (of processes 7)"]
    left = read_one(place.fd, "core-7.img", Core)
    assert left.thread is not None
    assert left.thread.creds == own_credentials()
    assert credentials.bound_credentials(place.fd, ME, cut=True).warnings == ()


@pytest.mark.parametrize(
    ("nice", "policy", "priority", "refused"),
    [(0, 0, 0, False), (19, 3, 0, False), (5, 5, 0, False), (-1, 0, 0, True), (0, 1, 1, True), (0, 2, 99, True), (0, 6, 0, True)],
)
def test_scheduling(nice: int, policy: int, priority: int, refused: bool) -> None:
    """A thread of higher priority than PID 1 and its limits allow is refused; CAP_SYS_NICE allows all."""
    core = Core(machine=1, thread=ThreadCore(sched_nice=nice, sched_policy=policy | 1 << 30, sched_priority=priority))
    assert exceeds(credentials._check_scheduling, core, limited(), [0] * 16, 0) is refused
    assert not exceeds(credentials._check_scheduling, core, limited(permitted=1 << SYS_NICE), [0] * 16, 0)
    assert not exceeds(credentials._check_scheduling, core, limited(), [99] * 16, 0) or policy == 6


@pytest.mark.parametrize("count", [0, 15, 17])
def test_limits_that_are_missing(place: Place, count: int) -> None:
    """A task without each of its limits is damaged: CRIU's own would stay in force."""
    write_core(place, the_task=task(hard=[0] * count))
    assert f"{count} limits" in refused(place, Reason.CORRUPT)


# --- seccomp ----------------------------------------------------------------------------------------

ONE, TWO, OWN = (struct.pack("<HBBI", 0x06, 0, 0, 0x50000 | number) for number in (1, 2, 3))
"""Filters that answer everything with an error."""


def chain_of(place: Place, programs: list[bytes], mode: int = 2, flags: list[int] | None = None) -> Core:
    """Write a chain of these filters, the first one installed first; return a core under it."""
    marks = flags or [0] * len(programs)
    chain = list(zip(programs, marks, strict=True))[::-1]  # as CRIU writes it
    filters = [
        SeccompFilter(program=each, previous=number - 1 if number else None, flags=mark)
        for number, (each, mark) in enumerate(chain)
    ]
    place.write("seccomp.img", Seccomp(filters))
    last = len(programs) - 1 if programs else None
    return Core(machine=1, task=task(), thread=ThreadCore(seccomp_mode=mode, seccomp_filter=last))


@pytest.mark.parametrize(
    ("chain", "mode", "needed", "refused"),
    [
        ([], 0, [], False),
        ([OWN], 2, [], False),
        ([ONE], 2, [ONE], False),
        ([ONE, OWN], 2, [ONE], False),
        ([OWN, TWO, ONE], 2, [ONE, TWO], False),
        ([], 0, [ONE], True),
        ([PROGRAM], 2, [ONE], True),
        ([ONE], 2, [ONE, TWO], True),
        ([ONE, ONE], 2, [ONE, TWO], True),
        ([ONE], 0, [ONE], True),
        ([ONE], 1, [ONE], True),
    ],
)
def test_seccomp(place: Place, chain: list[bytes], mode: int, needed: list[bytes], refused: bool) -> None:
    """A chain must have every program of PID 1's, may have more, and counts only with the mode that applies it."""
    core = chain_of(place, chain, mode)
    assert exceeds(Filters(place.fd, len(needed), needed).check, core) is refused
    filters = Filters(place.fd, len(needed), needed)
    assert filters.add(7, core) is refused
    filters.check(7, core)
    filters.write()
    written = [entry.program for entry in read_one(place.fd, "seccomp.img", Seccomp).filters]
    assert written == chain[::-1] + (needed if refused else [])
    assert Filters(place.fd, len(needed), needed).add(7, core) is False


def test_seccomp_filters_with_the_same_meaning(place: Place) -> None:
    """A program with other bytes that answers every call as PID 1's does is PID 1's filter; one that does not is not."""

    def program(*calls: int) -> bytes:
        last = len(calls) - 1
        code = [(0x20, 0, 0, 0), *((0x15, last - at + 1, 0, call) for at, call in enumerate(calls)), (0x06, 0, 0, 0x7FFF0000)]
        return b"".join(struct.pack("<HBBI", *each) for each in [*code, (0x06, 0, 0, 0x50001)])

    core = chain_of(place, [program(5, 3)])
    assert not exceeds(Filters(place.fd, 1, [program(3, 5)]).check, core)
    assert exceeds(Filters(place.fd, 1, [program(3, 6)]).check, core)


def test_seccomp_filters_are_added_once(place: Place) -> None:
    """Threads with one chain get PID 1's filters once, and first."""
    core = chain_of(place, [OWN, PROGRAM])
    assert core.thread is not None
    other = thread_of(2, core.thread.seccomp_filter)
    filters = Filters(place.fd, 2, [ONE, TWO])
    assert [filters.add(7, core), filters.add(8, other), filters.add(8, other)] == [True, True, False]
    filters.write()
    found = read_one(place.fd, "seccomp.img", Seccomp).filters
    entries = [(entry.program, entry.previous) for entry in found]
    assert entries == [(PROGRAM, None), (OWN, 0), (ONE, 3), (TWO, 1)]
    assert other.thread is not None
    assert core.thread.seccomp_filter == other.thread.seccomp_filter == 2


def thread_of(mode: int | None, last: int | None = None) -> Core:
    """Return another thread of a process."""
    return Core(machine=1, thread=ThreadCore(seccomp_mode=mode, seccomp_filter=last))


@pytest.mark.parametrize(
    ("flags", "needed", "refused"),
    [
        ([1, 1], [ONE, OWN], False),
        ([0, 1], [ONE, OWN], False),
        ([1, 0], [ONE], False),
        ([1, 0], [ONE, OWN], True),
        ([0, 0], [ONE], True),
        ([4, 2], [ONE], True),
        ([1, 1], [ONE, TWO], True),
    ],
)
def test_seccomp_of_the_whole_process(place: Place, flags: list[int], needed: list[bytes], refused: bool) -> None:
    """A thread without filters of its own has those of the first one that are installed for all threads, and no others."""
    leader = chain_of(place, [ONE, OWN], flags=flags)
    thread = thread_of(None)
    assert exceeds(Filters(place.fd, len(needed), needed).check, thread, leader) is refused


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("flags", "needed"), [([0, 0], [ONE]), ([1, 1], [ONE, TWO]), ([0, 1], [TWO])])
def test_seccomp_is_added_to_the_whole_process(place: Place, flags: list[int], needed: list[bytes], first: bool) -> None:
    """PID 1's filters reach every thread, whether it has those of its process or its own, in whatever order they come."""
    leader, thread = chain_of(place, [ONE, OWN], flags=flags), thread_of(None)
    filters = Filters(place.fd, len(needed), needed)
    for core in [leader, thread] if first else [thread, leader]:
        filters.add(7, core, None if core is leader else leader)
    filters.check(7, thread, leader)
    filters.check(7, leader)


@pytest.mark.parametrize("mode", [1, 2])
def test_seccomp_of_a_thread_and_of_the_whole_process(place: Place, mode: int) -> None:
    """A thread with filters of its own beside those for all is refused: the kernel would then give those to nobody."""
    leader = chain_of(place, [ONE, OWN], flags=[1, 1])
    with pytest.raises(Refused, match="beside those of its process") as caught:
        Filters(place.fd, 1, [ONE]).check(8, thread_of(mode, 1), leader)
    assert caught.value.reason is Reason.CORRUPT


def test_seccomp_flags(place: Place) -> None:
    """A filter that would be installed with flags that CRIU never writes is refused."""
    core = chain_of(place, [ONE], flags=[8])
    with pytest.raises(Refused, match="unknown flags 0x8"):
        Filters(place.fd, 1, [ONE]).check(7, core)


def test_seccomp_that_can_only_be_counted(place: Place) -> None:
    """Where PID 1's programs are not to be had, the number of filters counts, and none is added."""
    for chain, wrong in (([], True), ([PROGRAM], False)):
        core = chain_of(place, chain)
        filters = Filters(place.fd, 1, None)
        assert exceeds(filters.check, core) is wrong
        assert filters.add(7, core) is False


@pytest.mark.parametrize("name", ["old_seccomp_mode", "old_seccomp_filter"])
def test_seccomp_in_an_outdated_place(place: Place, name: str) -> None:
    """A mode that stands with the task, where CRIU lets it win over the thread's, is refused."""
    core = chain_of(place, [ONE])
    setattr(core.task, name, 0)
    with pytest.raises(Refused, match="outdated place"):
        Filters(place.fd, 1, [ONE]).check(7, core)


@pytest.mark.parametrize("filters", [[], [0], [1, 0], [99], [1, None, 7, 2]])
@pytest.mark.parametrize("needed", [0, 2])
def test_seccomp_chains_that_are_none(place: Place, filters: list[int | None], needed: int) -> None:
    """Filters that name each other in a circle, or one that is not there, are damaged; those nobody uses are not looked at."""
    place.write("seccomp.img", Seccomp([SeccompFilter(program=PROGRAM, previous=each) for each in filters]))
    core = Core(machine=1, thread=ThreadCore(seccomp_mode=2, seccomp_filter=0))
    if filters[2:]:
        Filters(place.fd, needed, None).check(7, core)
        return
    with pytest.raises(Refused, match="have no first one") as caught:
        Filters(place.fd, needed, None).check(7, core)
    assert caught.value.reason is Reason.CORRUPT


@pytest.mark.parametrize("program", [b"", b"x", PROGRAM + b"x", PROGRAM * 4097], ids=len)
def test_seccomp_programs_that_are_none(place: Place, program: bytes) -> None:
    """A filter that is no whole number of instructions, or too many, is damaged: CRIU would give up without a word."""
    core = chain_of(place, [program])
    with pytest.raises(Refused, match="is no program"):
        Filters(place.fd, 0, ()).check(7, core)


def test_seccomp_filters_of_a_second_entry(place: Place) -> None:
    """Only the image's first entry counts, which is all that CRIU reads."""
    place.write("seccomp.img", Seccomp([SeccompFilter(program=ONE)]), Seccomp([SeccompFilter(program=TWO)]))
    core = Core(machine=1, thread=ThreadCore(seccomp_mode=2, seccomp_filter=0))
    assert exceeds(Filters(place.fd, 1, [TWO]).check, core)


def test_no_seccomp_image(place: Place) -> None:
    """Without the image there is no filter."""
    core = Core(machine=1, thread=ThreadCore(seccomp_mode=0))
    assert exceeds(Filters(place.fd, 1, [ONE]).check, core)
    assert not exceeds(Filters(place.fd, 0, ()).check, core)


# --- the rest of the images -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "known"),
    [
        *((name, True) for name in ("files.img", "core-1.img", "pagemap-shmem-1f.img", "timens-7.img", "ids-7.img")),
        *((name, False) for name in ("mountpoints-9.img", "netdev-9.img", "userns-9.img", "core-x.img", "x.img.bak")),
        *((f"{name}-7.img", False) for name in ("creds", "rlimit", "sigacts", "itimers", "posix-timers", "signal-s", "pidfd")),
        *((f"{name}.img", False) for name in ("unixsk", "eventpoll-tfd", "inotify-wd", "fanotify-mark", "bpfmap-file")),
        *((name, False) for name in ("core-1.img\n", "CORE-1.img", "utsns-11.img", "ipcns-var-10.img", "nftables-1.img")),
    ],
)
def test_names(place: Place, name: str, known: bool) -> None:
    """Images of mounts, networks, users and other things that a capture never writes are refused."""
    (place.path / name).touch()
    if known:
        credentials.check_names(place.fd)
        return
    with pytest.raises(Refused, match="is no image that") as caught:
        credentials.check_names(place.fd)
    assert caught.value.reason is Reason.CORRUPT


@pytest.mark.parametrize("kind", ["pid", "net", "ipc", "uts", "mnt", "user"])
def test_namespaces(place: Place, kind: str) -> None:
    """A process in another namespace than the inventory's root is refused; clocks may have their own."""
    root: dict[str, Any] = {"pid": 1, "net": 2, "ipc": 3, "uts": 4, "mnt": 5, "user": 6, "time": 7}
    rest = NamespaceIds(**root).encode()
    place.write("inventory.img", Inventory(image_version=2, root_ids=NamespaceIds(**root)))
    place.write("ids-7.img", rest)
    place.write("ids-8.img", NamespaceIds(**{**root, "time": 99}))
    credentials.check_namespaces(place.fd)
    place.write("ids-8.img", NamespaceIds(**{**root, kind: 99}))
    with pytest.raises(Refused, match=f"images/ids-8.img asks for a {kind} namespace"):
        credentials.check_namespaces(place.fd)


@pytest.mark.parametrize(
    ("mode", "device"),
    [(0o100644, False), (0o010644, False), (0o020644, True), (0o060644, True), ((1 << 32) + 0o020644, True)],
)
def test_ghosts(place: Place, mode: int, device: bool) -> None:
    """A deleted file that is a device is refused, however its mode is written."""
    place.write("ghost-file-1.img", GhostFile(uid=0, gid=0, mode=mode))
    if not device:
        credentials.check_ghosts(place.fd)
        return
    with pytest.raises(Refused) as caught:
        credentials.check_ghosts(place.fd)
    assert caught.value.reason is Reason.PRIVILEGE_EXCEEDED


def entry(pid: int, *, pgid: int = 5, sid: int = 5, threads: list[int] | None = None) -> PstreeEntry:
    """Return a process."""
    return PstreeEntry(pid=pid, ppid=1, pgid=pgid, sid=sid, threads=threads or [pid])


def test_tree(place: Place) -> None:
    """The tree has the first process as its root, every process and thread, and the highest id of any kind."""
    place.write("pstree.img", entry(9, sid=77), entry(5, threads=[5, 1 << 30]))
    for number in (5, 9, 12):
        (place.path / f"core-{number}.img").touch()
    assert credentials.read_tree(place.fd) == credentials.Tree(root=9, pids=(5, 9, 12), highest=77)


@pytest.mark.parametrize(
    "entries",
    [[], [entry(0)], [entry(1 << 22)], [entry(5, pgid=1 << 22)], [entry(5, sid=1 << 31)], [entry(5), entry(0)]],
)
def test_trees_that_are_none(place: Place, entries: list[PstreeEntry]) -> None:
    """A tree without processes, or with ids that no process can have, is damaged."""
    place.write("pstree.img", *entries)
    with pytest.raises(Refused) as caught:
        credentials.read_tree(place.fd)
    assert caught.value.reason is Reason.CORRUPT


def test_a_core_with_a_number_too_long(place: Place) -> None:
    """A core image of an impossible thread is damaged, too."""
    place.write("pstree.img", entry(5))
    (place.path / "core-4194304.img").touch()
    with pytest.raises(Refused, match="out of range"):
        credentials.read_tree(place.fd)

"""Checkpoints by somebody who can write to the store: images are forged and every digest is right.

Each is refused before CRIU runs, and the container starts cold.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from chrek.artifact import FileEntry
from chrek.artifact.manifest import manifest_digest
from chrek.artifact.marker import Marker
from chrek.criu.images import Image, read_one
from chrek.criu.messages import Core, Credentials, GhostFile, NamespaceIds, Seccomp, SeccompFilter
from chrek.engine.progress import Progress
from chrek.engine.restore import Request, restore
from chrek.errors import ChrekError, Reason
from chrek.store.layout import Store
from chrek.system import procfs
from chrek.system.initstate import application
from chrek.system.mailbox import Mailbox
from containers import needs
from system import cycle
from system.cycle import Make

pytestmark = needs("containers", "criu")

Forge = Callable[[Path], None]


def rewrite(images: Path, name: str, edit: Callable[[Core], None]) -> None:
    """Edit one core image."""
    fd = os.open(images, os.O_RDONLY)
    image: Image[Core] = Image.read(fd, name)
    core = next(image.decode(Core))
    edit(core)
    image.entries[0] = core.encode()
    image.write(fd)
    os.close(fd)


def first(edit: Callable[[Core], None]) -> Forge:
    """Return a forger that changes the first task."""

    def forge(home: Path) -> None:
        rewrite(home / "images", min(path.name for path in (home / "images").glob("core-*.img")), edit)

    return forge


def credentials(change: Callable[[Credentials], None]) -> Forge:
    """Return a forger that changes the credentials of the first task."""

    def edit(core: Core) -> None:
        assert core.thread is not None
        assert core.thread.creds is not None
        change(core.thread.creds)

    return first(edit)


def all_capabilities(creds: Credentials) -> None:
    """Ask for every capability."""
    creds.permitted = creds.effective = creds.bounding = creds.inheritable = [0xFFFFFFFF, 0x1FF]


def new_privileges(creds: Credentials) -> None:
    """Ask for setuid programs to work again."""
    creds.no_new_privs = 0


def ambient(creds: Credentials) -> None:
    """Ask for an ambient CAP_SYS_ADMIN."""
    creds.ambient = [1 << 21, 0]


def label(creds: Credentials) -> None:
    """Ask for another security label."""
    creds.lsm_profile = "unconfined_t"


def no_credentials(core: Core) -> None:
    """Leave the credentials out, which would leave CRIU's own in force."""
    assert core.thread is not None
    core.thread.creds = None


def half_a_set(creds: Credentials) -> None:
    """Have a set of one word, behind whose end CRIU would read whatever is there."""
    creds.effective = creds.effective[:1]


def securebits(creds: Credentials) -> None:
    """Ask to keep capabilities when the user changes."""
    creds.securebits = 1 << 2


def few_limits(core: Core) -> None:
    """Leave all limits but the first out, which would leave CRIU's own in force."""
    assert core.task is not None
    assert core.task.rlimits is not None
    del core.task.rlimits.entries[1:]


def realtime(core: Core) -> None:
    """Ask for the processors before everybody else of the node."""
    assert core.thread is not None
    core.thread.sched_policy, core.thread.sched_priority = 1, 99


def no_filter(core: Core) -> None:
    """Ask to run without seccomp filters."""
    assert core.thread is not None
    core.thread.seccomp_mode, core.thread.seccomp_filter = 0, None


def no_filter_as_of_old(core: Core) -> None:
    """Ask for the same where CRIU once had it, and lets it win over what stands in the right place."""
    assert core.task is not None
    core.task.old_seccomp_mode = 0


def permit_all(home: Path) -> None:
    """Have as many filters as before, all of which permit everything."""
    fd = os.open(home / "images", os.O_RDONLY)
    image: Image[Seccomp] = Image.read(fd, "seccomp.img")
    filters = next(image.decode(Seccomp)).filters
    permitting = struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000)
    image.entries = [Seccomp([SeccompFilter(program=permitting, previous=each.previous) for each in filters]).encode()]
    image.write(fd)
    os.close(fd)


def image_of_old(home: Path) -> None:
    """Carry limits in an image of their own, as CRIU did before it had them in the task's."""
    (home / "images/rlimit-7.img").write_bytes(struct.pack("<II", 0x54564319, 0x57113925))


def own_namespace(home: Path) -> None:
    """Ask for a network namespace of its own."""
    name = next((home / "images").glob("ids-*.img")).name
    fd = os.open(home / "images", os.O_RDONLY)
    ids = read_one(fd, name, NamespaceIds)
    ids.net = (ids.net or 0) + 1
    image: Image[NamespaceIds] = Image.read(fd, name)
    image.entries = [ids.encode()]
    image.write(fd)
    os.close(fd)


def ghost_device(home: Path) -> None:
    """Carry a deleted file that is the host's disk."""
    ghost = GhostFile(uid=0, gid=0, mode=stat.S_IFBLK | 0o666, rdev=os.makedev(254, 0)).encode()
    magic = struct.pack("<II", 0x54564319, 0x52583605)
    (home / "images/ghost-file-7.img").write_bytes(magic + struct.pack("<I", len(ghost)) + ghost)


def mount_table(home: Path) -> None:
    """Carry a mount table for CRIU to rebuild."""
    (home / "images/mountpoints-12.img").write_bytes(struct.pack("<II", 0x54564319, 0x55554B50))


def endless_tree(home: Path) -> None:
    """Cut the process tree short in the middle of an entry."""
    path = home / "images/pstree.img"
    path.write_bytes(path.read_bytes()[:-3])


def gigantic_entry(home: Path) -> None:
    """Announce an entry of 4 GB."""
    path = home / "images/files.img"
    path.write_bytes(path.read_bytes() + struct.pack("<I", 0xFFFFFFF0) + b"x")


def other_index(home: Path) -> None:
    """Let the memory index write at an address of the kernel's half."""
    path = home / "memory/index"
    data = bytearray(path.read_bytes())
    data[-16:-8] = struct.pack("<Q", 0xFFFF800000000000)
    path.write_bytes(bytes(data))


FORGERIES: dict[str, tuple[Forge, Reason]] = {
    "all capabilities": (credentials(all_capabilities), Reason.PRIVILEGE_EXCEEDED),
    "new privileges": (credentials(new_privileges), Reason.PRIVILEGE_EXCEEDED),
    "ambient capability": (credentials(ambient), Reason.PRIVILEGE_EXCEEDED),
    "security label": (credentials(label), Reason.PRIVILEGE_EXCEEDED),
    "half a capability set": (credentials(half_a_set), Reason.CORRUPT),
    "securebits": (credentials(securebits), Reason.PRIVILEGE_EXCEEDED),
    "no credentials": (first(no_credentials), Reason.CORRUPT),
    "few limits": (first(few_limits), Reason.CORRUPT),
    "real-time priority": (first(realtime), Reason.PRIVILEGE_EXCEEDED),
    "no seccomp filter": (first(no_filter), Reason.PRIVILEGE_EXCEEDED),
    "no seccomp filter, the old way": (first(no_filter_as_of_old), Reason.CORRUPT),
    "permitting seccomp filter": (permit_all, Reason.PRIVILEGE_EXCEEDED),
    "image of an old CRIU": (image_of_old, Reason.CORRUPT),
    "own namespace": (own_namespace, Reason.CORRUPT),
    "ghost device": (ghost_device, Reason.PRIVILEGE_EXCEEDED),
    "mount table": (mount_table, Reason.CORRUPT),
    "tree cut short": (endless_tree, Reason.CORRUPT),
    "gigantic entry": (gigantic_entry, Reason.CORRUPT),
    "kernel address": (other_index, Reason.CORRUPT),
}


def seal(home: Path) -> None:
    """Compute every digest anew, as a forger would."""
    manifest = json.loads((home / "manifest.json").read_text())
    for path in home.rglob("*"):
        name = str(path.relative_to(home))
        if path.is_file() and name not in {"manifest.json", "checkpoint.done"}:
            known = manifest["files"].get(name)
            if known is None or "sha256" in known:
                entry = FileEntry.of_bytes(path.read_bytes())
                manifest["files"][name] = {"size": entry.size, "sha256": entry.sha256}
    text = json.dumps(manifest).encode()
    (home / "manifest.json").write_bytes(text)
    done = json.loads((home / "checkpoint.done").read_text())
    marker = Marker(
        checkpoint_id=done["checkpoint_id"],
        checkpoint_path=done["checkpoint_path"],
        timestamp=done["timestamp"],
        success=True,
        manifest_sha256=manifest_digest(text),
    )
    (home / "checkpoint.done").write_bytes(marker.to_sealed_json())


PROFILE = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
    "syscalls": [{"names": ["acct", "mount", "reboot"], "action": "SCMP_ACT_ERRNO"}],
}
"""Two containers with one profile have the same filter: the honest checkpoint is restored."""


def test_forgeries(container: Make, store: Store) -> None:
    """Every forgery is refused with its reason before CRIU runs; the honest one is restored."""
    source = cycle.start(container, cycle.app("beat"), seccomp=PROFILE)
    for number, name in enumerate([*FORGERIES, "honest"]):
        cycle.capture(source, store, f"forged-{number}")
        home = (Path(store.path) / f"forged-{number}").resolve()
        if name in FORGERIES:
            FORGERIES[name][0](home)
        seal(home)
    source.delete()
    for number, (name, (_, reason)) in enumerate(FORGERIES.items()):
        copy = cycle.waiting(container, cycle.app("beat"), f"forged-{number}", seccomp=PROFILE)
        with pytest.raises(ChrekError) as caught:
            cycle.restore(copy, store, f"forged-{number}")
        assert caught.value.reason is reason, (name, caught.value)
        copy.wait_for(f"chrek: start=cold reason={reason.code}")
        assert not (copy.root / "tmp/criu-restore.log").exists(), name
        copy.delete()
    copy = cycle.waiting(container, cycle.app("beat"), f"forged-{len(FORGERIES)}", seccomp=PROFILE)
    cycle.restore(copy, store, f"forged-{len(FORGERIES)}")
    copy.wait_for("chrek: start=restored")


def test_exchanged_after_the_check(container: Make, store: Store) -> None:
    """Images that are exchanged between the check and CRIU change nothing: what was checked is what is restored."""
    source = cycle.start(container, cycle.app("beat"))
    cycle.capture(source, store)
    source.delete()
    home = (Path(store.path) / "one").resolve()
    copy = cycle.waiting(container, cycle.app("beat"))

    def exchange(phase: str, done: int, total: int) -> None:
        if phase == "files":
            credentials(all_capabilities)(home)
            (home / "images/mountpoints-12.img").write_bytes(struct.pack("<II", 0x54564319, 0x55554B50))

    with Mailbox.claim(copy.pid1, by="test") as mailbox:
        request = Request(pid1=copy.pid1, mailbox=mailbox, store=store, checkpoint_id="one")
        restore(request, Progress(listener=exchange))
    assert (home / "images/mountpoints-12.img").exists()
    copy.wait_for("chrek: start=restored")
    limit, state = procfs.status(copy.pid1), procfs.status(application(copy.pid1))
    assert limit is not None
    assert state is not None
    assert state.capabilities == limit.capabilities

"""Restores that fail: the container starts cold, on its own files, and says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

import pytest

from chrek.engine import restore as restoring
from chrek.errors import ChrekError, Reason, RestoreFailed
from chrek.store.layout import Store
from chrek.system import cgroups, procfs
from chrek.system.initstate import application
from containers import Container, Mount, needs
from system import cycle
from system.cycle import Make

pytestmark = needs("containers", "criu")

RESTORER = Path(__file__).with_name("restorer.py")
APP = cycle.app("files_changed")

STEPS = [
    *("phase:open", "phase:compare", "phase:files", "phase:criu", "answer:pre-restore", "phase:fill"),
    *("answer:post-restore", "letter:ready", "answer:pre-resume", "letter:restored"),
]


@pytest.fixture
def captured(container: Make, store: Store) -> Store:
    """Return a store with a checkpoint of the application that changes files."""
    source = cycle.start(container, APP)
    cycle.capture(source, store)
    source.delete()
    return store


def cold(copy: Container) -> None:
    """Check that the application was started cold on the image's own files."""
    copy.wait_for("ready")
    copy.wait_for("chrek: start=cold")
    assert "passwd own False" in copy.log
    assert "issue True marker False" in copy.log
    assert not list(copy.root.glob(".chrek-undo*"))


def test_killed_at_every_step(container: Make, captured: Store) -> None:
    """SIGKILL of the restoring program at each step: nothing half restored is left, and the start is cold on clean files."""
    for step in STEPS:
        copy = cycle.waiting(container, APP)
        argv = [sys.executable, str(RESTORER), str(copy.pid1), captured.path, "one", step]
        assert subprocess.run(argv, check=False).returncode == -signal.SIGKILL, step
        if step == "letter:restored":
            # The tree runs already; whoever could have said so is gone, so the init does not keep it.
            copy.wait_for("start=")
        cold(copy)
        assert len(procfs.tree(application(copy.pid1))) == 1
        copy.delete()


def test_killed_with_a_volume_filled(container: Make, store: Store) -> None:
    """What a killed restore had unpacked into the container's own volumes is gone before the cold start."""
    volume = Mount.tmpfs("/var/log")
    source = cycle.start(container, cycle.app("files"), mounts=[volume])
    cycle.capture(source, store)
    source.delete()
    copy = cycle.waiting(container, cycle.app("beat"), mounts=[volume])
    argv = [sys.executable, str(RESTORER), str(copy.pid1), store.path, "one", "phase:criu"]
    assert subprocess.run(argv, check=False).returncode == -signal.SIGKILL
    copy.wait_for("chrek: start=cold")
    assert list((copy.root / "var/log").iterdir()) == []
    assert list((copy.root / "dev/shm").iterdir()) == []


def test_told_to_end_while_restoring(container: Make, captured: Store) -> None:
    """SIGTERM to the container in the middle of a restore ends it with 143; nothing of the tree is left."""
    copy = cycle.waiting(container, APP)
    argv = [sys.executable, str(RESTORER), str(copy.pid1), captured.path, "one", "phase:fill"]
    with subprocess.Popen(argv, env={**os.environ, "SIGNAL": "SIGSTOP"}) as restorer:
        os.waitid(os.P_PID, restorer.pid, os.WSTOPPED | os.WNOWAIT)
        copy.kill(signal.SIGTERM)
        assert copy.wait() == 128 + signal.SIGTERM
        restorer.send_signal(signal.SIGCONT)
        assert restorer.wait(30) == RestoreFailed.exit_code.value


def refused(copy: Container, store: Store, reason: Reason, **options: Any) -> ChrekError:
    """Check that the restore is refused for that reason and that the container then starts cold."""
    with pytest.raises(ChrekError) as caught:
        cycle.restore(copy, store, **options)
    assert caught.value.reason is reason, caught.value
    copy.wait_for(f"chrek: start=cold reason={reason.code}")
    return caught.value


def test_each_damaged_file(container: Make, captured: Store) -> None:
    """One flipped byte in any file of the checkpoint is noticed; the start is cold."""
    home = Path(captured.path) / "one"
    for path in sorted(path for path in home.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if not data:
            continue
        path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
        copy = cycle.waiting(container, APP)
        refused(copy, captured, Reason.CORRUPT)
        cold(copy)
        copy.delete()
        path.write_bytes(data)


def test_less_privilege(container: Make, store: Store) -> None:
    """A privileged application is not restored into an unprivileged container; nor root's into a user's."""
    source = cycle.start(container, APP, privileged=True)
    cycle.capture(source, store, "privileged")
    source.delete()
    error = refused(cycle.waiting(container, APP, "privileged"), store, Reason.PRIVILEGE_EXCEEDED, checkpoint_id="privileged")
    assert "capabilities" in error.message or "no_new_privs" in error.message
    source = cycle.start(container, cycle.app("beat"))
    cycle.capture(source, store, "root")
    source.delete()
    copy = cycle.waiting(container, cycle.app("beat"), "root", uid=1000)
    refused(copy, store, Reason.PRIVILEGE_EXCEEDED, checkpoint_id="root")


def test_own_user(container: Make, store: Store) -> None:
    """A user's application without any capability is captured and restored as that user, again and again."""
    source = cycle.start(container, cycle.app("queue"), uid=1000)
    cycle.capture(source, store, "one")
    source.delete()
    for now, then in (("one", "two"), ("two", "three")):
        copy = cycle.waiting(container, cycle.app("queue"), now, uid=1000)
        cycle.restore(copy, store, now)
        copy.wait_for("ok restored" if now == "one" else "start=restored")  # the application checks itself once
        for pid in procfs.tree(application(copy.pid1)):
            state = procfs.status(pid)
            assert state is not None
            assert set(state.uids) == set(state.gids) == {1000}
            assert state.capabilities["CapEff"] == 0
        cycle.capture(copy, store, then)
        copy.delete()


def test_own_user_and_group(container: Make, store: Store) -> None:
    """A user in the group of root, as images for arbitrary users have it, is captured and restored."""
    source = cycle.start(container, cycle.app("beat"), uid=1000, gid=0)
    cycle.capture(source, store)
    source.delete()
    copy = cycle.waiting(container, cycle.app("beat"), uid=1000, gid=0)
    cycle.restore(copy, store)
    copy.wait_for("ok restored")


def test_memory_limit(container: Make, store: Store) -> None:
    """A container with less memory than the application had is refused, with the number to set."""
    source = cycle.start(container, cycle.app("prefork"))
    cycle.capture(source, store)
    source.delete()
    error = refused(cycle.waiting(container, cycle.app("beat"), memory=40 << 20), store, Reason.MEMORY_LIMIT)
    assert str(40 << 20) in error.message


def test_another_image(container: Make, store: Store, tmp_path: Path) -> None:
    """A program that differs in the new container is named."""
    source = cycle.start(container, cycle.app("files"))
    cycle.capture(source, store)
    source.delete()
    layer = tmp_path / "layer/etc"
    layer.mkdir(parents=True)
    (layer / "passwd").write_text("root:x:0:0::/:/bin/sh\n")
    copy = cycle.waiting(container, cycle.app("beat"), lower=tmp_path / "layer")
    error = refused(copy, store, Reason.IMAGE_MISMATCH)
    assert "/etc/passwd" in error.message


def test_another_mount(container: Make, store: Store, tmp_path: Path) -> None:
    """A file that the application holds open on a volume that the new container lacks is named."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/table").write_text("rows")
    code = "f=open('/data/table'); print('ready', flush=True)\nimport time\nwhile 1: time.sleep(1)"
    command = [cycle.INIT, "--", "python3", "-c", code]
    source = cycle.start(container, command, mounts=[Mount.bind(tmp_path / "data", "/data")])
    cycle.capture(source, store)
    source.delete()
    error = refused(cycle.waiting(container, cycle.app("beat")), store, Reason.MOUNT_MISSING)
    assert "/data/table is missing" in error.message
    copy = cycle.waiting(container, command, mounts=[Mount.bind(tmp_path / "data", "/data")])
    cycle.restore(copy, store)


def test_volume_that_is_lacking(container: Make, store: Store) -> None:
    """A volume whose contents are in the checkpoint is unpacked into the root of a container that lacks it, with a warning."""
    source = cycle.start(container, cycle.app("files"), mounts=[Mount.tmpfs("/var/log")])
    cycle.capture(source, store)
    source.delete()
    copy = cycle.waiting(container, cycle.app("files"))
    outcome = cycle.restore(copy, store)
    copy.wait_for("ok restored")
    assert any("VOLUME_FOLDED" in warning for warning in outcome.warnings)


def test_probes_all_the_time(container: Make, store: Store) -> None:
    """Exec probes that start and end all the time disturb neither the capture nor the restore."""
    source = cycle.start(container, cycle.app("queue"))
    with probes(source):
        cycle.capture(source, store)
    source.delete()
    copy = cycle.waiting(container, cycle.app("queue"))
    with probes(copy):
        cycle.restore(copy, store)
        copy.wait_for("ok restored")


class probes:  # noqa: N801 - reads as a statement
    """Runs short programs in a container meanwhile, three at a time."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(3)]
        self.count = 0

    def _run(self) -> None:
        while not self._stop.is_set():
            self._container.exec(["true"], check=False)
            self.count += 1

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self._container.until(lambda: self.count > 0, what="a first probe")
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert self.count


def test_control_groups(container: Make, store: Store) -> None:
    """Every restored process is in the container's groups, charged to it, and not in those of the restoring program."""
    source = cycle.start(container, cycle.app("queue"))
    cycle.capture(source, store)
    source.delete()
    copy = cycle.waiting(container, cycle.app("queue"))
    cycle.restore(copy, store)
    expected = cgroups.memberships(copy.pid1)
    for pid in procfs.tree(application(copy.pid1)):
        assert cgroups.memberships(pid) == expected


def test_exit_status_and_signals(container: Make, store: Store) -> None:
    """The init of a restored application forwards signals to it and ends as it does."""
    code = "import signal,sys,time;signal.signal(15,lambda *_: sys.exit(7));print('ready',flush=True)\nwhile 1: time.sleep(.1)"
    command = [cycle.INIT, "--", "python3", "-c", code]
    source = cycle.start(container, command)
    cycle.capture(source, store)
    source.kill(signal.SIGTERM)
    assert source.wait() == 7
    copy = cycle.waiting(container, command)
    outcome = cycle.restore(copy, store)
    assert outcome.root == application_id(copy)
    copy.kill(signal.SIGTERM)
    assert copy.wait() == 7


def application_id(copy: Container) -> int:
    """Return the application's PID inside the container."""
    state = procfs.status(application(copy.pid1))
    assert state is not None
    return state.ns_pid


def test_from_inside(container: Make, store: Store, criu_bundle: Path) -> None:
    """A privileged container restores itself from a read-only mount; later signals and exit codes are the application's."""
    source = cycle.start(container, cycle.app("beat"))
    cycle.capture(source, store)
    source.delete()
    mounts = [
        Mount.bind(store.path, "/checkpoints", read_only=True),
        Mount.bind(criu_bundle, "/opt/chrek/criu", read_only=True),
        Mount.bind(cycle.APPS, "/apps", read_only=True),
    ]
    environment = {"DYN_CHECKPOINT_HASH": "one", "DYN_CHECKPOINT_PATH": "/checkpoints"}
    copy = container(cycle.app("beat"), privileged=True, env=environment, mounts=mounts)
    copy.wait_for("ok restored")
    copy.wait_for("chrek: start=restored")
    assert (copy.root / "tmp/criu-restore.log").stat().st_size > 0
    assert (copy.root / "tmp/dynamo-restored").is_file()


def test_same_checkpoint_by_two_at_once(container: Make, captured: Store) -> None:
    """Two containers are restored from one checkpoint at the same time."""
    copies = [cycle.waiting(container, APP) for _ in range(2)]
    outcomes: list[restoring.Outcome] = []
    threads = [threading.Thread(target=lambda c=copy: outcomes.append(cycle.restore(c, captured))) for copy in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for copy in copies:
        copy.wait_for("ok restored")
    assert len(outcomes) == 2

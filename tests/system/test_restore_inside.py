"""A container that restores itself: what its variables change, and what it cannot do there."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chrek.errors import Reason
from chrek.store.layout import Store
from containers import Container, Mount, needs
from system import cycle
from system.cycle import Make
from system.opens import Opens

pytestmark = needs("containers", "criu")

APP = cycle.app("beat")
PLUGIN = "cuda_plugin.so"
ALLOW_ALL = {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": []}
LOG = "tmp/criu-restore.log"

Inside = Callable[..., Container]


@pytest.fixture
def inside(container: Make, store: Store, criu_bundle: Path) -> Inside:
    """Capture an application; return what starts a privileged container that restores itself from that."""
    source = cycle.start(container, APP)
    cycle.capture(source, store)
    source.delete()

    def make(*mounts: Mount, env: dict[str, str] | None = None, **options: Any) -> Container:
        here = [
            Mount.bind(store.path, "/checkpoints", read_only=True),
            Mount.bind(criu_bundle, "/opt/chrek/criu", read_only=True),
            Mount.bind(cycle.APPS, "/apps", read_only=True),
        ]
        environment = {"DYN_CHECKPOINT_HASH": "one", **(env or {})}
        return container(APP, privileged=True, env=environment, mounts=[*here, *mounts], **options)

    return make


LARGE = """
import os, time
data = os.urandom(64 << 20)
print("ready", flush=True)
while not os.path.exists("/tmp/dynamo-restored"):
    time.sleep(0.02)
print("ok restored", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of its own."""
    place = tmp_path / "scratch"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _restored(copy: Container) -> None:
    copy.wait_for("chrek: start=")
    assert "chrek: start=restored" in copy.err, copy.err
    copy.wait_for("ok restored")


def _cold(copy: Container, reason: Reason) -> str:
    copy.wait_for("chrek: start=")
    assert f"chrek: start=cold reason={reason.code} " in copy.err, copy.err
    copy.wait_for("ready")
    assert not (copy.root / "tmp/dynamo-restored").exists()
    return copy.err


def test_work_directory_and_log_level(inside: Inside, scratch: Path) -> None:
    """CRIU's own files lie in CRIU_WORK_DIR while it works and are gone afterwards; CRIU_LOG_LEVEL says how much it writes."""
    quiet = {"CRIU_WORK_DIR": "/scratch", "CRIU_LOG_LEVEL": "1"}
    with Opens(scratch) as opens:
        copy = inside(Mount.bind(scratch, "/scratch"), env=quiet)
        _restored(copy)
    assert any("/chrek-restore-" in path for _, _, path in opens.seen), opens.seen
    assert list(scratch.iterdir()) == []
    little = (copy.root / LOG).read_text() if (copy.root / LOG).exists() else ""
    copy.delete()
    copy = inside()
    _restored(copy)
    assert len((copy.root / LOG).read_text()) > 10 * len(little)


def test_work_directory_that_is_not_there(inside: Inside) -> None:
    """A CRIU_WORK_DIR that cannot be written is named, and the start is cold."""
    assert "/no/such/place" in _cold(inside(env={"CRIU_WORK_DIR": "/no/such/place"}), Reason.KNOB_REFUSED)


@pytest.mark.parametrize("name", ["CRIU_LAZY_PAGES", "CRIU_AUTO_DEDUP"])
def test_knobs_of_classic_images(inside: Inside, name: str) -> None:
    """What CRIU can do with its own images only is refused by the variable's name, and the start is cold."""
    assert name in _cold(inside(env={name: "true"}), Reason.KNOB_REFUSED)


def test_plugin_of_criu(inside: Inside, tmp_path: Path) -> None:
    """A folder of the user's with CRIU's CUDA plugin is refused by name; one without it changes nothing."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    copy = inside(Mount.bind(folder, "/plugins", read_only=True), env={"CUDA_PLUGIN_DIR": "/plugins"})
    _restored(copy)
    copy.delete()
    (folder / PLUGIN).touch()
    copy = inside(Mount.bind(folder, "/plugins", read_only=True), env={"CUDA_PLUGIN_DIR": "/plugins"})
    assert "CUDA_PLUGIN_DIR" in _cold(copy, Reason.KNOB_REFUSED)


@pytest.mark.parametrize(("verify", "reason"), [("full", "CORRUPT"), ("off", None)])
def test_how_much_is_verified(
    container: Make, store: Store, criu_bundle: Path, verify: str, reason: str | None
) -> None:
    """CHREK_VERIFY decides whether a page that is another one is noticed; what is not compared is not noticed."""
    command = [cycle.INIT, "--", "python3", "-c", LARGE]
    source = cycle.start(container, command)
    cycle.capture(source, store)
    source.delete()
    shard = max((Path(store.path) / "one/memory").glob("shard-*"), key=lambda path: path.stat().st_size)
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    mounts = [
        Mount.bind(store.path, "/checkpoints", read_only=True),
        Mount.bind(criu_bundle, "/opt/chrek/criu", read_only=True),
    ]
    environment = {"DYN_CHECKPOINT_HASH": "one", "CHREK_VERIFY": verify}
    copy = container(command, privileged=True, env=environment, mounts=mounts)
    if reason is None:
        _restored(copy)
    else:
        assert "shard-" in _cold(copy, Reason[reason])


def test_under_a_seccomp_profile(inside: Inside) -> None:
    """Under a profile, which the restored processes would get on top of their own, nothing is restored from inside."""
    error = _cold(inside(seccomp=ALLOW_ALL), Reason.SECCOMP_INSIDE)
    assert "nvidia.com/checkpoint-restore" in error


def test_fail_instead_of_cold(inside: Inside) -> None:
    """With CHREK_ON_RESTORE_FAILURE=fail what was refused inside ends the container with 171; nothing is started."""
    copy = inside(env={"CRIU_LAZY_PAGES": "true", "CHREK_ON_RESTORE_FAILURE": "fail"})
    assert copy.wait() == 171
    assert "ready" not in copy.log


def test_crash_loop_is_given_up(inside: Inside, scratch: Path) -> None:
    """Of starts with one /dev/shm, as those of a container in a pod are, the fourth is cold after three short restored ones."""
    for _ in range(3):
        copy = inside(Mount.bind(scratch, "/dev/shm"))
        _restored(copy)
        copy.kill()
        copy.wait()
        copy.delete()
    error = _cold(inside(Mount.bind(scratch, "/dev/shm")), Reason.RESTORE_GIVEN_UP)
    assert "The last 3 restored starts" in error

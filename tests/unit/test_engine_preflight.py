"""Checks before a capture: what they take for harmless and what not; real files, sockets and watches of this process."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from chrek.engine import preflight
from chrek.engine.container import Container
from chrek.engine.preflight import Subject
from chrek.errors import Reason, Refused
from chrek.system import procfs
from chrek.system.ids import HostPid

ME = HostPid(os.getpid())
LIBC = ctypes.CDLL(None, use_errno=True)


def subject() -> Subject:
    """Return this process alone, as the application and as its container's first process."""
    return Subject(Container(ME), [ME], {ME: list(procfs.descriptors(ME))})


def refused(check: Callable[[Subject], None]) -> tuple[Reason, str] | None:
    """Return the reason and words of a refusal."""
    try:
        check(subject())
    except Refused as error:
        return error.reason, str(error)
    return None


# --- addresses --------------------------------------------------------------------------------------


def printed(text: str) -> str:
    """Return an address as /proc/net has it."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    packed = socket.inet_pton(family, text)
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(packed) // 4}I", packed))


@pytest.mark.parametrize(
    ("address", "everywhere"),
    [
        *((text, True) for text in ("0.0.0.0", "127.0.0.1", "127.200.3.4", "::", "::1", "::ffff:127.0.0.1", "::ffff:0.0.0.0")),
        *((text, False) for text in ("10.0.0.1", "1.0.0.127", "0.0.0.1", "128.0.0.1", "::2", "1::", "fe80::1", "::127.0.0.1")),
        *((text, False) for text in ("::ffff:10.0.0.1", "100::1", "::ffff:0:127.0.0.1")),
    ],
)
def test_addresses_that_are_everywhere(address: str, everywhere: bool) -> None:
    """An address is in the next pod, too, when it is any address or the loopback interface's, mapped or not."""
    assert preflight._any_or_loopback(printed(address)) is everywhere


@pytest.mark.parametrize(
    ("local", "text"),
    [
        (f"{printed('10.1.2.3')}:1F90", "10.1.2.3:8080"),
        (f"{printed('2001:db8::1')}:0050", "[2001:db8::1]:80"),
    ],
)
def test_addresses_are_shown_as_people_write_them(local: str, text: str) -> None:
    """The kernel's hexadecimal numbers are turned into an address and a port."""
    assert preflight._address(local) == text


def own_address() -> str:
    """Return an address of this machine that is not the loopback interface's; asking for the way sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but the loopback interface's")
        return str(probe.getsockname()[0])


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_waiting_at_an_own_address(kind: socket.SocketKind) -> None:
    """A socket that waits at this machine's own address is refused, naming address and descriptor."""
    with socket.socket(socket.AF_INET, kind) as waiting:
        waiting.bind((own_address(), 0))
        if kind == socket.SOCK_STREAM:
            assert refused(preflight._bound_addresses) is None  # not before it listens
            waiting.listen()
        host, port = waiting.getsockname()
        found = refused(preflight._bound_addresses)
        assert found is not None
        assert found[0] is Reason.BOUND_TO_POD_IP
        assert f"{host}:{port}" in found[1]
        assert f"descriptor {waiting.fileno()}" in found[1]


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_waiting_everywhere(address: str) -> None:
    """A server at any address or at the loopback interface is no hindrance."""
    with socket.create_server((address, 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind((address, 0))
        assert refused(preflight._bound_addresses) is None


# --- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "projected"),
    [
        ("/etc/config/..2026_01_02_03_04_05.123/key", True),
        ("/etc/config/..2026_01_02_03_04_05.123", True),
        ("/etc/config/..data/key", True),
        ("/etc/config/..data_tmp", True),
        ("/etc/config/key", False),
        ("/srv/..database/key", False),
        ("/srv/x..data/key", False),
        ("/srv/2026_01_02_03_04_05.123/key", False),
    ],
)
def test_generations_of_projected_volumes(path: str, projected: bool) -> None:
    """Files below a generation's directory of a ConfigMap, Secret or token volume are known by its name."""
    assert bool(preflight._PROJECTED.search(path)) is projected


def test_an_open_file_of_a_projected_volume(tmp_path: Path) -> None:
    """An open file of such a volume is refused."""
    directory = tmp_path / "..2026_01_02_03_04_05.123"
    directory.mkdir()
    with (directory / "key").open("w"):
        found = refused(preflight._projected_files)
    assert found is not None
    assert found[0] is Reason.WATCH_UNRESTORABLE
    assert refused(preflight._projected_files) is None


def test_deleted_files(tmp_path: Path) -> None:
    """A deleted file of the limit's size or more is refused, a smaller one and one that has its name are not."""
    file = tmp_path / "big"
    with file.open("w") as opened:
        os.truncate(opened.fileno(), preflight.GHOST_LIMIT)
        assert refused(preflight._big_deleted_files) is None
        file.unlink()
        found = refused(preflight._big_deleted_files)
        assert found is not None
        assert found[0] is Reason.DELETED_FILE_TOO_BIG
        os.truncate(opened.fileno(), preflight.GHOST_LIMIT - 1)
        assert refused(preflight._big_deleted_files) is None


def device(kind: int, major: int, minor: int) -> os.stat_result:
    """Return the status of a device node."""
    found = list(os.stat("/dev/null"))
    fields = {"st_rdev": os.makedev(major, minor)}
    found[0] = kind | 0o600
    return os.stat_result(found, fields)


@pytest.mark.parametrize(
    ("kind", "major", "minor", "target", "dumpable"),
    [
        (0o020000, 1, 3, "/dev/null", True),
        (0o020000, 1, 9, "/dev/urandom", True),
        (0o020000, 1, 11, "/dev/kmsg", False),
        (0o020000, 1, 1, "/dev/mem", False),
        (0o020000, 5, 2, "/dev/ptmx", True),
        (0o020000, 136, 0, "/dev/pts/0", True),
        (0o020000, 10, 200, "/dev/net/tun", True),
        (0o020000, 10, 229, "/dev/fuse", False),
        (0o020000, 195, 255, "/dev/nvidiactl", True),
        (0o020000, 226, 128, "/dev/dri/renderD128", True),
        (0o020000, 195, 255, "/dev/renamed", False),
        (0o060000, 8, 0, "/dev/sda", False),
        (0o060000, 1, 3, "/dev/null", False),
        (0o100000, 0, 0, "/dev/file", True),
    ],
)
def test_devices(kind: int, major: int, minor: int, target: str, dumpable: bool) -> None:
    """CRIU dumps the memory devices, terminals and tunnels, the GPU's driver its own; nothing else, and no block device."""
    assert preflight._dumpable(device(kind, major, minor), target) is dumpable


def test_open_devices() -> None:
    """Open memory devices of a real process are no hindrance."""
    with open("/dev/null", "rb"), open("/dev/urandom", "rb"):
        assert refused(preflight._devices) is None


# --- watches ----------------------------------------------------------------------------------------


def test_watches_as_the_kernel_shows_them(tmp_path: Path) -> None:
    """What is read of a watch is the inode and the device that the watched directory has."""
    fd = LIBC.inotify_init1(os.O_CLOEXEC)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert LIBC.inotify_add_watch(fd, os.fsencode(tmp_path / name), 0x100) > 0
    text = procfs.read_text(ME, f"fdinfo/{fd}") or ""
    os.close(fd)
    found = {(int(inode, 16), preflight._device(int(device, 16))) for inode, device in preflight._WATCH.findall(text)}
    assert found == {(info.st_ino, info.st_dev) for name in ("a", "b") for info in [(tmp_path / name).stat()]}


def test_device_numbers() -> None:
    """The kernel's own form of a device number, 12 bits and 20, becomes the C library's."""
    for major, minor in ((8, 1), (259, 70000), (4095, (1 << 20) - 1), (0, 44)):
        assert preflight._device(major << 20 | minor) == os.makedev(major, minor)


def test_names_of_inodes(tmp_path: Path) -> None:
    """Names are found below the root, of directories and files; links lead nowhere outside of it."""
    root = tmp_path / "root"
    (root / "a/deep").mkdir(parents=True)
    (root / "a/file").touch()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").touch()
    (root / "link").symlink_to(tmp_path / "outside")
    wanted = {
        (path.stat().st_ino, path.stat().st_dev): path
        for path in (root / "a/deep", root / "a/file", tmp_path / "outside/secret")
    }
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    search = preflight._Search(fd, set(wanted))
    assert [search.below(top) for top in ("/none", "/link", "/a", "/")] == [False] * 4
    assert {wanted[key].name: path for key, path in search.found.items()} == {"deep": "/a/deep", "file": "/a/file"}
    found = preflight._Search(fd, set(list(wanted)[:2]))
    assert found.below("/a")
    os.close(fd)


def test_the_search_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many entries the search is over, found or not."""
    for number in range(5):
        (tmp_path / f"{number}").mkdir()
    monkeypatch.setattr(preflight, "_SEARCH_LIMIT", 3)
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    assert preflight._Search(fd, {(0, 0)}).below("/")
    os.close(fd)


# --- all of them ------------------------------------------------------------------------------------


def test_namespaces_and_tracers_of_this_process() -> None:
    """A process in its container's namespaces that nobody traces passes."""
    assert refused(preflight._user_namespace) is None
    assert refused(preflight._foreign_namespaces) is None
    assert refused(preflight._machine) is None


def test_allowed_reasons_are_not_checked(tmp_path: Path) -> None:
    """A check whose reason is allowed is not made; the others are."""
    others = {reason for reason, _ in preflight.CHECKS} - {Reason.DELETED_FILE_TOO_BIG}
    with (tmp_path / "big").open("w") as opened:
        os.truncate(opened.fileno(), preflight.GHOST_LIMIT)
        (tmp_path / "big").unlink()
        with pytest.raises(Refused, match="big"):
            preflight.refuse(subject(), allow=others)
        preflight.refuse(subject(), allow={*others, Reason.DELETED_FILE_TOO_BIG})


def test_who() -> None:
    """A process is named by its number in the container and its name; one that is gone by its number."""
    state = procfs.status(ME)
    assert state is not None
    assert preflight.who(ME) == f"process {state.ns_pid} ({state.name})"
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    assert preflight.who(HostPid(pid)) == f"process {pid}"

"""Export: plain CRIU, with no part of ChReK, restores what was exported."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chrek.criu.bundle import Bundle
from chrekcli import DEADLINE, Running, chrek, chrek_json, python, until
from containers import needs

pytestmark = needs("root", "criu")

APP = """
    import hashlib, os, time
    memory = bytearray(os.urandom(1 << 20)) * 16 + bytearray(8 << 20)
    for at in range(0, len(memory), 3 * 4096):
        memory[at] ^= 1
    digest = hashlib.sha256(memory).hexdigest()
    child = os.fork()
    if not child:
        memory[5] ^= 255
        own = hashlib.sha256(memory).hexdigest()
        while True:
            assert hashlib.sha256(memory).hexdigest() == own
            time.sleep(0.05)
    number = 0
    while True:
        number += 1
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        print("tick", number, hashlib.sha256(memory).hexdigest() == digest, flush=True)
        time.sleep(0.02)
"""

CONTAINED = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(1, signal.SIGKILL, 0, 0, 0)
assert libc.unshare(0x20000000 | 0x00020000 | 0x08000000) == 0
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
libc.prctl(1, signal.SIGKILL, 0, 0, 0)
libc.mount(None, b"/", None, 0x44000, None)
assert libc.mount(b"proc", b"/proc", b"proc", 0, None) == 0
assert libc.mount(b"shm", b"/dev/shm", b"tmpfs", 0, None) == 0
# criu itself needs ids above those that it gives out.
with open("/proc/sys/kernel/ns_last_pid", "w") as file:
    file.write("5000")
criu = os.fork()
if criu == 0:
    os.setsid()
    os.execv(sys.argv[1], sys.argv[1:])
if os.waitpid(criu, 0)[1]:
    sys.exit(70)
print("criu is done", file=sys.stderr, flush=True)
while True:
    try:
        os.wait()
    except ChildProcessError:
        sys.exit(0)
"""
"""PID 1 of fresh namespaces: runs plain CRIU, then reaps. Nothing of ChReK's is in it."""


@contextmanager
def plain_criu(command: list[str], log: Path, errors: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a restore command in fresh namespaces, its standard streams pipes to files; kill all at the end."""
    with log.open("wb") as out, errors.open("wb") as err:
        cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out)
        complaints = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=err)
        restored = subprocess.Popen(
            [*python(CONTAINED), *command], stdin=subprocess.PIPE, stdout=cat.stdin, stderr=complaints.stdin
        )
        try:
            yield restored
        finally:
            restored.kill()
            restored.wait(DEADLINE)
            for process in (restored, cat, complaints):
                assert process.stdin is not None
                process.stdin.close()
                process.wait(DEADLINE)


def save(store: Path, log: Path, mode: str) -> None:
    """Checkpoint the application as ``x`` and kill it."""
    with Running(["run", "--id", "x"], python(APP), store=store, log=log) as run:
        run.await_output("tick 5 ")
        done = chrek("checkpoint", "x", "--pid", str(run.pid1), "--stop", "--mode", mode, store=store)
        assert done.returncode == 0, done.stderr
        assert run.wait() == 128 + signal.SIGKILL


@pytest.mark.parametrize("mode", ["lazy", "plain"])
def test_plain_criu_restores_it(tmp_path: Path, mode: str) -> None:
    """The command that export shows restores the application: all memory of both processes, the next number."""
    save(tmp_path / "store", tmp_path / "first.log", mode)
    exported = chrek_json("export", "x", tmp_path / "images", store=tmp_path / "store")
    words = exported["restore_command"]
    assert words[:2] == ["criu", "restore"]
    command = Bundle.find().command(*words[1:])
    log, errors = tmp_path / "second.log", tmp_path / "second.err"
    with plain_criu(command, log, errors) as restored:
        until(lambda: log.read_text().count("\n") >= 5 or restored.poll() is not None, "output")
        assert restored.poll() is None, errors.read_text()
    lines = log.read_text().splitlines()[:5]
    assert [line.split()[0::2] for line in lines] == [["tick", "True"]] * 5
    assert int(lines[0].split()[1]) >= 5


def test_all_pages_are_merged_back(tmp_path: Path) -> None:
    """The exported page images hold the shards and what CRIU kept, and no file of ours is among the images."""
    save(tmp_path / "store", tmp_path / "log", "lazy")
    exported = chrek_json("export", "x", tmp_path / "images", store=tmp_path / "store")
    pages = sum(path.stat().st_size for path in (tmp_path / "images").glob("pages-*.img"))
    memory = chrek_json("inspect", "x", store=tmp_path / "store")["memory"]
    assert pages >= exported["memory_bytes"] >= memory["stored_bytes"]
    names = {path.name for path in (tmp_path / "images").iterdir()}
    assert {name for name in names if not name.endswith(".img")} == set(exported["archives"])


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    """Damage is found before anything is written."""
    save(tmp_path / "store", tmp_path / "log", "lazy")
    shard = next((tmp_path / "store/x/memory").glob("shard-*"))
    data = bytearray(shard.read_bytes())
    data[7] ^= 1
    shard.write_bytes(data)
    done = chrek("export", "x", tmp_path / "images", store=tmp_path / "store")
    assert done.returncode == 172
    assert "CORRUPT" in done.stderr
    assert not (tmp_path / "images").exists()


def test_a_directory_with_files_in_it(tmp_path: Path) -> None:
    """Nothing that is there is overwritten."""
    save(tmp_path / "store", tmp_path / "log", "lazy")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/mine").write_text("precious")
    done = chrek("export", "x", tmp_path / "images", store=tmp_path / "store")
    assert done.returncode == 172
    assert "is no empty directory" in done.stderr
    assert os.listdir(tmp_path / "images") == ["mine"]


def test_a_full_disk(tmp_path: Path) -> None:
    """An export that does not fit is removed again, and the message says why."""
    save(tmp_path / "store", tmp_path / "log", "lazy")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "small", str(place)], check=True)
    try:
        done = chrek("export", "x", place / "images", store=tmp_path / "store")
        assert done.returncode == 1
        assert "NO_SPACE" in done.stderr
        assert not list(place.iterdir())
    finally:
        subprocess.run(["umount", str(place)], check=True)

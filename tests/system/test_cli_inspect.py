"""`chrek inspect`: what is shown of a real checkpoint."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from chrek.engine import contents
from chrek.engine.export import export_checkpoint
from chrek.errors import Refused
from chrek.store import Staging, Store, delete, open_checkpoint, write_file
from chrekcli import Running, chrek, chrek_json, python
from containers import needs

pytestmark = needs("root", "criu")

NAME = f"inspect-me-{os.getpid()}"
"""An abstract address belongs to the machine's network: another run of this test may be under way."""

APP = """
    import mmap, os, socket, threading, time
    memory = bytearray(os.urandom(1 << 20)) * 3
    shared = mmap.mmap(-1, 3 << 20)
    shared.write(os.urandom(3 << 20))
    listening = socket.create_server(("127.0.0.1", 0))
    path = socket.socket(socket.AF_UNIX)
    path.bind("\\0NAME")
    path.listen()
    log = open("/dev/shm/some.log", "w")
    event = threading.Event()
    threading.Thread(target=event.wait, daemon=True).start()
    child = os.fork()
    if not child:
        time.sleep(600)
    print("port", listening.getsockname()[1], flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return a store with the checkpoint ``x``, and the port that the application listens on."""
    home = tmp_path_factory.mktemp("inspect")
    with Running(["run", "--id", "x"], python(APP.replace("NAME", NAME)), store=home / "store", log=home / "log") as run:
        run.await_output("port ")
        done = chrek("checkpoint", "x", "--pid", str(run.pid1), store=home / "store")
        assert done.returncode == 0, done.stderr
        return home / "store", run.output().split()[1]


def test_shows_what_people_ask_for(checkpoint: tuple[Path, str]) -> None:
    """The process tree, memory by kind, sockets, open files, volumes and the waterfall are there."""
    store, port = checkpoint
    text = chrek("inspect", "x", store=store).stdout
    for section in ("Checkpoint x", "Processes", "Memory", "Sockets", "Open files", "Volumes", "Times of the capture"):
        assert f"\n{section}" in f"\n{text}"
    assert f"tcp 127.0.0.1:{port} listening" in text
    assert f"@{NAME} listening" in text
    assert "file /dev/shm/some.log" in text
    assert ", 2 threads, uid 0)" in text
    assert "/dev/shm (tmpfs)" in text
    assert "dump " in text
    assert "|###" in text


def test_json_has_the_same(checkpoint: tuple[Path, str]) -> None:
    """JSON has bytes and seconds; memory kinds add up to what the application had."""
    store, _ = checkpoint
    found = chrek_json("inspect", "x", store=store)
    root, child = found["processes"]
    assert child["ppid"] == root["pid"]
    kinds = {part["kind"]: part for part in found["memory"]["kinds"] if part["pid"] == root["pid"]}
    assert kinds["private anonymous"]["stored_bytes"] >= 3 << 20
    assert kinds["shared memory"]["mapped_bytes"] == 3 << 20
    assert sum(part["stored_bytes"] for part in found["memory"]["kinds"] if part["kind"] == "shared memory") == 3 << 20
    assert kinds["private file"]["mapped_bytes"] > kinds["private file"]["stored_bytes"]
    assert {"preflight", "dump", "frozen", "finish"} <= set(found["phases"])
    assert 0 < found["frozen_seconds"] <= found["phases"]["dump"]


def republish(store: Store, name: str, change: Callable[[bytes], bytes]) -> None:
    """Publish checkpoint ``x`` again as ``y``, one file changed, with digests that are right."""
    with open_checkpoint(store, "x") as whole, Staging.create(store, "y") as staging:
        for path in whole.manifest.files:
            folder, _, last = path.rpartition("/")
            data = whole.read(path)
            directory = staging.make_directory(folder) if folder else os.dup(staging.fd)
            try:
                write_file(directory, last, change(data) if path == name else data)
            finally:
                os.close(directory)
        files = staging.digest(workers=2)
        staging.publish(dataclasses.replace(whole.manifest, checkpoint_id="y", files=files))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda data: data[: len(data) // 2],
    "noise": lambda data: data[:8] + bytes((byte * 37 + at) % 256 for at, byte in enumerate(data[8:])),
    "flipped": lambda data: bytes(byte ^ (16 if at % 23 == 9 else 0) for at, byte in enumerate(data)),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_nonsense_with_right_digests(checkpoint: tuple[Path, str], tmp_path: Path, kind: str) -> None:
    """Images that make no sense although their digests are right are refused or shown, never a crash."""
    refused = 0
    with Store.open(checkpoint[0]) as store:
        with open_checkpoint(store, "x") as whole:
            images = [path for path in whole.manifest.files if path.startswith("images/") and "/pages-" not in path]
        for number, path in enumerate([*images, "memory/index"]):
            republish(store, path, DAMAGES[kind])
            with open_checkpoint(store, "y") as broken:
                for use in (contents.read, lambda c, n=number: export_checkpoint(c, str(tmp_path / f"{n}"))):
                    try:
                        use(broken)
                    except Refused:
                        refused += 1
        delete(store, "y")
    assert refused


def test_one_that_is_not_there(checkpoint: tuple[Path, str]) -> None:
    """An id that is not there is refused."""
    done = chrek("inspect", "none", store=checkpoint[0])
    assert done.returncode == 172
    assert "There is no checkpoint 'none'" in done.stderr

"""A GPU server in unprivileged runc containers: captured from outside, restored into another one from outside.

The container gets what a container toolkit gives to a pod: the GPU's device nodes and the driver's libraries. For the
rest it sees this machine's own /usr, where its PyTorch is.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chrek.engine import signalfile
from chrek.engine.container import Container as Seen
from chrek.store.layout import Store
from containers import Container, Mount, needs, remove_leftovers
from gpu.life import ID, rounded
from system import cycle

pytestmark = [pytest.mark.timeout(240), needs("containers", "criu")]

REPO = Path(__file__).parents[2]
INIT = ["/usr/bin/python3", "-I", "-S", "/opt/chrek/lib/chrek/entrypoint/__main__.py", "--"]
PORT = 8124
Make = Callable[..., Container]


def libraries() -> Path:
    """Return the directory of the driver's libraries."""
    ctypes.CDLL("libcuda.so.1")
    lines = Path("/proc/self/maps").read_text().splitlines()
    return Path(next(line.split()[-1] for line in lines if "/libcuda.so" in line)).parent


def bound() -> list[Mount]:
    """Return the mounts that bring PyTorch and the driver in."""
    wanted = [Path("/usr"), libraries(), Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parents[1]]
    chosen: list[Path] = []
    for path in wanted:
        if not any(path.is_relative_to(one) for one in chosen):
            chosen.append(path)
    mounts = [Mount.bind(path, str(path), read_only=True) for path in chosen]
    return [*mounts, *(Mount.bind(REPO / name, f"/repo/{name}", read_only=True) for name in ("benchmarks", "src", "tests"))]


def devices(spec: dict[str, Any]) -> None:
    """Give the container every GPU's device nodes, and leave to use them."""
    nodes = []
    for path in sorted(Path("/dev").rglob("nvidia*")):
        found = path.lstat()
        if stat.S_ISCHR(found.st_mode):
            major, minor = os.major(found.st_rdev), os.minor(found.st_rdev)
            nodes.append({"path": str(path), "type": "c", "major": major, "minor": minor, "fileMode": 0o666})
    spec["linux"]["devices"] = nodes
    allowed = [{"allow": True, "access": "rw", **{k: node[k] for k in ("type", "major", "minor")}} for node in nodes]
    spec["linux"]["resources"]["devices"] += allowed


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make GPU containers with the store; they are removed after the test."""
    remove_leftovers()
    (tmp_path / "store").mkdir()
    with contextlib.ExitStack() as stack:

        def one(mode: str, env: dict[str, str], *, read_only: bool) -> Container:
            command = [*INIT, sys.executable, "/repo/benchmarks/gpu/server.py", "--gb", "1", "--mode", mode]
            container = Container(
                command,
                env={"LD_LIBRARY_PATH": str(libraries()), "DYN_CHECKPOINT_HASH": ID, **env},
                mounts=[*bound(), Mount.bind(tmp_path / "store", "/checkpoints", read_only=read_only)],
                edit=devices,
            )
            stack.callback(container.delete)
            return container

        yield one


def ask(container: Container) -> dict[str, Any]:
    """Ask the server in the container."""
    with container.connect(PORT) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        response = http.client.HTTPResponse(connection)
        response.begin()
        answer: dict[str, Any] = json.loads(response.read())
    return answer


@pytest.mark.parametrize("mode", ["transparent", "pooled"])
def test_server(mode: str, make: Make, tmp_path: Path) -> None:
    """The contract of checkpoint jobs from start to end: ready, captured, told, ended with 0; two restored servers answer."""
    environment = {
        "DYN_CHECKPOINT_SIGNAL_FILE": "/tmp/signal",
        "DYN_CHECKPOINT_READY_FILE": "/tmp/ready",
        "DYN_CHECKPOINT_LOCATION": f"/checkpoints/{ID}",
        "DYN_CHECKPOINT_STORAGE_TYPE": "pvc",
    }
    with Store.open(tmp_path / "store") as store:
        source = make(mode, environment, read_only=False)
        source.until((source.root / "tmp/ready").exists, timeout=120, what="the ready file")
        captured = cycle.capture(source, store, ID, location=f"/checkpoints/{ID}")
        print("capture", mode, round(captured.seconds, 3), rounded(captured.phases))  # noqa: T201
        signalfile.write(Seen(source.pid1), signalfile.marker(ID, path=f"/checkpoints/{ID}"))
        assert source.wait() == 0, source.err
        source.delete()
        for _ in range(2):
            copy = make(mode, {"CHREK_AGENT_TIMEOUT": "60", "DYN_CHECKPOINT_READY_FILE": "/tmp/here"}, read_only=True)
            copy.until(lambda: cycle.mode(copy.pid1) == "waiting", what="the init to wait")  # noqa: B023 - waited for here
            restored = cycle.restore(copy, store, ID)
            print("restore", mode, round(restored.seconds, 3), rounded(restored.phases))  # noqa: T201
            copy.until((copy.root / "tmp/here").exists, timeout=60, what="the ready file")
            assert ask(copy)["exact"] is True
            assert "start=restored" in copy.err
            copy.delete()

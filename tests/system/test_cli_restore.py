"""`chrek restore`: a new start on this machine, or into a container whose init waits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from chrek.errors import Refused
from chrek.system.initstate import read_state
from chrekcli import Running, chrek, python, until
from containers import Container, needs
from containers.layout import RUNC_STATE

pytestmark = needs("root", "criu")

APP = """
    import os, time
    number = 0
    while True:
        number += 1
        print("tick", number, flush=True)
        time.sleep(0.02)
"""


def save(store: Path, log: Path) -> None:
    """Checkpoint an application as ``x`` and kill it."""
    with Running(["run", "--id", "x"], python(APP), store=store, log=log) as run:
        run.await_output("tick 5\n")
        assert chrek("checkpoint", "x", "--pid", str(run.pid1), "--stop", store=store).returncode == 0


def waits(container: Container) -> bool:
    """Return whether the container's init waits for a restore."""
    try:
        return read_state(container.pid1).mode == "waiting"
    except Refused:
        return False  # not yet an init


def test_starts_here(tmp_path: Path) -> None:
    """With a command the restored application runs in the foreground; the command itself is not run."""
    save(tmp_path, tmp_path / "first.log")
    with Running(["restore", "x"], ["false"], store=tmp_path, log=tmp_path / "second.log") as run:
        run.await_output("tick ")
        run.await_said("start=restored")


def test_never_starts_cold(tmp_path: Path) -> None:
    """Without a checkpoint nothing is started: exit code 172."""
    done = chrek("restore", "x", "--", "echo", "started", store=tmp_path)
    assert done.returncode == 172
    assert "NOT_FOUND" in done.stderr
    assert done.stdout == ""


def test_damaged_memory_is_a_failure(tmp_path: Path) -> None:
    """A restore that fails ends with 171, and nothing is started."""
    save(tmp_path, tmp_path / "first.log")
    shard = next((tmp_path / "x/memory").glob("shard-*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    done = chrek("restore", "x", "--", "echo", "started", store=tmp_path)
    assert done.returncode == 171
    assert "CORRUPT" in done.stderr
    assert done.stdout == ""


def test_nothing_waits(tmp_path: Path) -> None:
    """Without a command there must be a container that waits."""
    done = chrek("restore", "no-such-id-anywhere", store=tmp_path)
    assert done.returncode == 172
    assert "APP_NOT_FOUND" in done.stderr


def test_one_that_runs_already(tmp_path: Path) -> None:
    """An application that runs does not wait, and is left alone."""
    with Running(["run", "--id", "runs-already"], python(APP), store=tmp_path, log=tmp_path / "log") as run:
        run.await_output("tick 1\n")
        done = chrek("restore", "runs-already", store=tmp_path)
        assert done.returncode == 172
        assert "does not wait for a restore: its application runs (start: cold)" in done.stderr
        assert run.process.poll() is None


def test_a_command_and_a_container(tmp_path: Path) -> None:
    """A command and --pid contradict each other."""
    assert chrek("restore", "x", "--pid", "1", "--", "true", store=tmp_path).returncode == 2


def test_into_a_container_that_waits(tmp_path: Path, container: Callable[..., Container]) -> None:
    """A container's application is saved by runc's name for it, and goes on in another container that waits."""
    command = [
        "/usr/local/bin/restore-entrypoint",
        "--",
        "python3",
        "-c",
        "\n".join(line[4:] for line in APP.splitlines()),
    ]
    first = container(command)
    until(lambda: "tick 5\n" in first.log, "work")
    runc = {"RUNC_ROOT": str(RUNC_STATE)}
    done = chrek("checkpoint", "x", "--container", first.name, store=tmp_path, env=runc)
    assert done.returncode == 0, done.stderr
    second = container(command, env={"DYN_CHECKPOINT_HASH": "x", "DYN_CHECKPOINT_PATH": "/checkpoints"})
    until(lambda: waits(second), "the wait")
    done = chrek("restore", "x", "--container", second.name, "--json", store=tmp_path, env=runc)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pid1"] == second.pid1
    until(lambda: "tick" in second.log, "work")
    assert int(second.log.split()[1]) >= 5

"""`chrek checkpoint`: which application is meant, options, signals, the signal file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from chrekcli import CHREK, DEADLINE, Running, chrek, chrek_json, python, until
from containers import Container, needs

pytestmark = needs("root", "criu")

APP = """
    import os, time
    memory = bytearray(os.urandom(1 << 20)) * {mib}
    number = 0
    while True:
        number += 1
        print("tick", number, flush=True)
        time.sleep(0.02)
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return where the store will be."""
    return tmp_path / "store"


def app(mib: int = 4) -> list[str]:
    """Return the command of an application with that much memory."""
    return python(APP.format(mib=mib))


def goes_on(run: Running) -> None:
    """Check that the application is alive and at work."""
    before = run.output().count("tick")
    until(lambda: run.output().count("tick") > before + 2, "work")
    assert run.process.poll() is None


def test_finds_the_application_by_its_id(store: Path, tmp_path: Path) -> None:
    """The id given to `chrek run` is enough; the application runs on."""
    with Running(["run", "--id", "found-by-id"], app(), store=store, log=tmp_path / "log") as run:
        run.await_output("tick")
        done = chrek("checkpoint", "found-by-id", store=store)
        assert done.returncode == 0, done.stderr
        assert "found-by-id: " in done.stdout
        goes_on(run)


def test_finds_the_application_by_any_of_its_processes(store: Path, tmp_path: Path) -> None:
    """--pid takes the application's own pid as well as PID 1's, and any id."""
    with Running(["run", "--id", "x"], app(), store=store, log=tmp_path / "log") as run:
        run.await_output("tick")
        child = int(Path(f"/proc/{run.pid1}/task/{run.pid1}/children").read_text().split()[0])
        assert chrek_json("checkpoint", "other-id", "--pid", child, store=store)["id"] == "other-id"


def test_an_id_that_nothing_runs_under(store: Path, tmp_path: Path) -> None:
    """An unknown id is refused with a list of what runs here."""
    with Running(["run", "--id", "runs-here"], app(), store=store, log=tmp_path / "log") as run:
        run.await_output("tick")
        done = chrek("checkpoint", "does-not-run", store=store)
        assert done.returncode == 172
        assert "No application of id 'does-not-run' runs here. Others do:" in done.stderr
        assert f"--pid {run.pid1}: id runs-here, " in done.stderr


def test_an_id_that_two_run_under(store: Path, tmp_path: Path) -> None:
    """An ambiguous id is refused with the processes to choose from."""
    with Running(["run", "--id", "twice"], app(), store=store, log=tmp_path / "a.log") as one:
        one.await_output("tick")
        with Running(["run", "--id", "twice"], app(), store=store, log=tmp_path / "b.log") as two:
            two.await_output("tick")
            done = chrek("checkpoint", "twice", store=store)
            assert done.returncode == 172
            assert f"--pid {one.pid1}: " in done.stderr
            assert f"--pid {two.pid1}: " in done.stderr


def test_a_process_that_is_not_ours(store: Path) -> None:
    """A process without ChReK's init above it is refused by name."""
    done = chrek("checkpoint", "x", "--pid", os.getpid(), store=store)
    assert done.returncode == 172
    assert f"Process {os.getpid()} (" in done.stderr
    assert "does not run under ChReK's init" in done.stderr


def test_stop_kills_the_application(store: Path, tmp_path: Path) -> None:
    """--stop ends the application once its checkpoint is complete."""
    with Running(["run", "--id", "x"], app(), store=store, log=tmp_path / "log") as run:
        run.await_output("tick")
        assert chrek_json("checkpoint", "x", "--pid", run.pid1, "--stop", store=store)["stopped"]
        assert run.wait() == 128 + signal.SIGKILL


@pytest.mark.parametrize("mode", ["lazy", "plain"])
def test_both_ways_of_dumping(store: Path, tmp_path: Path, mode: str) -> None:
    """--mode chooses who copies the memory; both checkpoints come back."""
    with Running(["run", "--id", "x"], app(), store=store, log=tmp_path / "log") as run:
        run.await_output("tick")
        done = chrek("checkpoint", "x", "--pid", str(run.pid1), "--stop", "--mode", mode, store=store)
        assert done.returncode == 0, done.stderr
    assert chrek_json("inspect", "x", store=store)["memory"]["mode"] == mode
    with Running(["run", "--id", "x"], app(), store=store, log=tmp_path / "again.log") as run:
        run.await_said("start=restored")
        goes_on(run)


def interrupted(command: list[str], log: Path, number: int) -> tuple[int, str]:
    """Start a capture, send it a signal when its dump has begun; return its exit code and standard error."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as capture:
        until(lambda: log.exists() or capture.poll() is not None, "the dump")
        capture.send_signal(number)
        _, errors = capture.communicate(timeout=DEADLINE)
        return capture.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_undoes_the_capture(store: Path, tmp_path: Path, number: int) -> None:
    """^C in the middle of a capture undoes it: exit code 170, the application alive, an older checkpoint whole."""
    with Running(["run", "--id", "x"], app(512), store=store, log=tmp_path / "log") as run:
        run.await_output("tick")
        assert chrek("checkpoint", "x", "--pid", str(run.pid1), store=store).returncode == 0
        command = [*CHREK, "checkpoint", "x", "--pid", str(run.pid1), "--store", str(store)]
        code, tries = 0, 0
        while code == 0 and tries < 20:  # a capture may be over before this process has had its turn
            code, errors, tries = *interrupted(command, store / ".staging/x/dump.log", number), tries + 1
        assert code == 170, errors
        assert "CAPTURE_INTERRUPTED" in errors
        goes_on(run)
    assert not list((store / ".staging").iterdir())
    assert chrek("verify", "x", store=store).returncode == 0


def test_a_deadline_undoes_the_capture(store: Path, tmp_path: Path) -> None:
    """--timeout undoes a capture that takes too long: exit code 170, the application alive."""
    with Running(["run", "--id", "x"], app(512), store=store, log=tmp_path / "log") as run:
        run.await_output("tick")
        done = chrek("checkpoint", "x", "--pid", str(run.pid1), "--timeout", "0.05", store=store)
        assert done.returncode == 170
        assert "TIMEOUT" in done.stderr
        goes_on(run)
    assert chrek("list", "--json", store=store).stdout.strip() == "[]"


def test_writes_the_signal_file(store: Path, tmp_path: Path) -> None:
    """An application in checkpoint mode gets its signal file, after the checkpoint is complete."""
    signal_file = tmp_path / "signal.done"
    env = {"DYN_CHECKPOINT_SIGNAL_FILE": str(signal_file), "DYN_CHECKPOINT_READY_FILE": str(tmp_path / "ready")}
    shell = f"while [ ! -e {signal_file} ]; do sleep 0.02; done"
    with Running(["run", "--id", "x"], ["sh", "-c", shell], store=store, log=tmp_path / "log", env=env) as run:
        run.await_said("start=cold")
        done = chrek("checkpoint", "x", "--pid", str(run.pid1), store=store)
        assert done.returncode == 0, done.stderr
        assert run.wait() == 0
    content = json.loads(signal_file.read_text())
    assert content["success"] is True
    assert content["checkpoint_id"] == "x"
    assert content["checkpoint_path"] == f"{store}/x"


def test_writes_the_signal_file_of_a_failure(store: Path, tmp_path: Path) -> None:
    """A checkpoint that fails says so in the signal file, with the reason, and the run ends with 172 for a refusal."""
    signal_file = tmp_path / "signal.done"
    env = {"DYN_CHECKPOINT_SIGNAL_FILE": str(signal_file), "DYN_CHECKPOINT_READY_FILE": str(tmp_path / "ready")}
    code = f"""
        import fcntl, os, time
        device = os.open("/dev/kmsg", os.O_RDONLY)
        print("ready", flush=True)
        while not os.path.exists({str(signal_file)!r}):
            time.sleep(0.02)
    """
    with Running(["run", "--id", "x"], python(code), store=store, log=tmp_path / "log", env=env) as run:
        run.await_output("ready")
        done = chrek("checkpoint", "x", "--pid", str(run.pid1), store=store)
        assert done.returncode == 172
        assert "DEVICE_IN_USE" in done.stderr
        assert run.wait() == 172
    content = json.loads(signal_file.read_text())
    assert content["success"] is False
    assert content["reason"] == "DEVICE_IN_USE"
    assert "/dev/kmsg" in content["error"]


def test_a_signal_file_cannot_lead_out_of_the_container(tmp_path: Path, container: Callable[..., Container]) -> None:
    """A link in the container that points outside leads nowhere; the checkpoint itself is complete."""
    up = "../" * 12
    shell = f"ln -s {up}{tmp_path} /out; touch /ready; while :; do sleep 1; done"
    env = {
        "DYN_CHECKPOINT_SIGNAL_FILE": "/out/signal.done",
        "DYN_CHECKPOINT_READY_FILE": "/ready",
        "DYN_CHECKPOINT_HASH": "x",
        "DYN_CHECKPOINT_LOCATION": "/checkpoints/x",
        "DYN_CHECKPOINT_STORAGE_TYPE": "pvc",
    }
    source = container(["/usr/local/bin/restore-entrypoint", "--", "sh", "-c", shell], env=env)
    until((source.upper / "ready").exists, "the start")
    done = chrek("checkpoint", "x", "--pid", str(source.pid1), store=tmp_path / "store")
    assert done.returncode == 1
    assert "The checkpoint 'x' is complete, but: The signal file /out/signal.done cannot be written" in done.stderr
    assert not (tmp_path / "signal.done").exists()
    assert chrek("verify", "x", store=tmp_path / "store").returncode == 0


def test_allow_overrides_a_refusal(store: Path, tmp_path: Path) -> None:
    """--allow skips the check of that reason, and CRIU decides: a kernel log can be dumped after all."""
    code = """
        import os, time
        device = os.open("/dev/kmsg", os.O_RDONLY)
        print("ready", flush=True)
        time.sleep(60)
    """
    with Running(["run", "--id", "x"], python(code), store=store, log=tmp_path / "log") as run:
        run.await_output("ready")
        assert chrek("checkpoint", "x", "--pid", str(run.pid1), store=store).returncode == 172
        done = chrek("checkpoint", "x", "--pid", str(run.pid1), "--allow", "DEVICE_IN_USE", store=store)
        assert done.returncode == 0, done.stderr


def test_excluded_files_stay_out(store: Path, tmp_path: Path) -> None:
    """--exclude leaves files of a volume out of the checkpoint."""
    shell = "echo a > /dev/shm/kept; echo b > /dev/shm/left-out; echo ready; while :; do sleep 1; done"
    with Running(["run", "--id", "x"], ["sh", "-c", shell], store=store, log=tmp_path / "log") as run:
        run.await_output("ready")
        done = chrek("checkpoint", "x", "--pid", str(run.pid1), "--exclude", "left-out", "--stop", store=store)
        assert done.returncode == 0, done.stderr
    archive = next((store / "x/volumes").iterdir()).read_bytes()
    assert b"kept" in archive
    assert b"left-out" not in archive


def test_memory_file_systems_of_others_stay_out(store: Path, tmp_path: Path) -> None:
    """What was mounted on the machine when the application started, and is unmounted there since, is not the application's."""
    place = tmp_path / "somebody's"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "somebody", str(place)], check=True)
    try:
        (place / "secret").write_text("somebody's secret")
        with Running(["run", "--id", "x"], app(1), store=store, log=tmp_path / "log") as run:
            run.await_output("tick")
            # Where / is shared this reaches the application's mounts too; where it is not, they keep the file system.
            subprocess.run(["umount", str(place)], check=True)
            done = chrek("checkpoint", "x", "--pid", str(run.pid1), "--stop", store=store)
            assert done.returncode == 0, done.stderr
    finally:
        subprocess.run(["umount", str(place)], check=False, capture_output=True)
    manifest = json.loads((store / "x/manifest.json").read_text())
    assert [volume["path"] for volume in manifest["volumes"]] == ["/dev/shm"]
    with Running(["run", "--id", "x"], app(1), store=store, log=tmp_path / "log2") as run:
        run.await_said("start=restored")

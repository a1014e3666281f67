"""Checkpoint mode: a signal file of before, a failed checkpoint's exit code, bad values at start."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from system.pidns import INIT, Contained

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a PID namespace")

# A termination log of the container's own, as the kubelet mounts one.
TERMINATION = (
    "libc.mount(b'none', b'/dev', b'tmpfs', 0, None)\nos.mknod('/dev/null', 0o20666, os.makedev(1, 3))\n"
    "open('/dev/termination-log', 'w').write('before' * 1000)\n"
)


def job(tmp_path: Path, **env: str) -> dict[str, str]:
    """Return the environment of a checkpoint job."""
    return {
        "PATH": os.environ["PATH"],
        "DYN_CHECKPOINT_SIGNAL_FILE": str(tmp_path / "signal"),
        "DYN_CHECKPOINT_READY_FILE": str(tmp_path / "ready"),
        "DYN_CHECKPOINT_HASH": "abc",
        "DYN_CHECKPOINT_LOCATION": "/checkpoints/abc",
        "DYN_CHECKPOINT_STORAGE_TYPE": "pvc",
        **env,
    }


def test_a_job_never_restores_itself(tmp_path: Path) -> None:
    """A rerun job starts cold at once although its checkpoint is there, and says so."""
    (tmp_path / "abc").mkdir()
    (tmp_path / "abc" / "checkpoint.done").write_text("{}")
    env = job(tmp_path, DYN_CHECKPOINT_PATH=str(tmp_path), CHREK_AGENT_TIMEOUT="60")
    with Contained((*INIT, "echo", "cold"), env=env) as init:
        assert init.wait() == 0
        assert init.lines() == ["cold"]
        assert "checkpoint mode (abc): nothing is restored" in init.stderr()
        assert "start=cold reason=none" in init.stderr()


def test_a_signal_file_of_an_earlier_container_is_removed(tmp_path: Path) -> None:
    """A signal file older than the container is gone before the application starts."""
    signal = tmp_path / "signal"
    signal.write_text('{"success": true}')
    os.utime(signal, (time.time() - 60, time.time() - 60))
    with Contained((*INIT, "test", "-e", str(signal)), env=job(tmp_path)) as init:
        assert init.wait() == 1
        assert f"removed {signal}" in init.stderr()


def test_a_signal_file_of_this_container_stays(tmp_path: Path) -> None:
    """A signal file that was written since the container started is left alone."""
    signal = tmp_path / "signal"
    before = f"import time; time.sleep(0.05); open({str(signal)!r}, 'w').write('{{\"success\": true}}')"
    with Contained((*INIT, "test", "-e", str(signal)), env=job(tmp_path), before=before) as init:
        assert init.wait() == 0


def test_an_old_signal_file_that_cannot_be_removed_is_an_error(tmp_path: Path) -> None:
    """On a read-only mount the stale file would end the application at once, so nothing is started."""
    signal = tmp_path / "signal"
    signal.write_text('{"success": true}')
    os.utime(signal, (time.time() - 60, time.time() - 60))
    place = os.fsencode(tmp_path)
    before = (
        f"libc.mount({place!r}, {place!r}, None, 4096, None); libc.mount(None, {place!r}, None, 4096 | 32 | 1, None)"
    )
    with Contained((*INIT, "echo", "started"), env=job(tmp_path), before=before) as init:
        assert init.wait() == 170
        assert init.lines() == []
        assert "cannot be removed (Read-only file system)" in init.stderr()


@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        ({"success": True}, 0, ""),
        ({"success": False, "error": "no space on the store"}, 170, "checkpoint failed: no space on the store"),
        ({"success": False, "error": "io_uring", "refused": True}, 172, "checkpoint failed: io_uring"),
        ({"success": False}, 170, "checkpoint failed: the signal file gives no error"),
        (["success"], 0, ""),
        (None, 0, ""),
    ],
)
def test_a_failed_checkpoint_is_a_failed_job(tmp_path: Path, fields: object, code: int, says: str) -> None:
    """An application that exits 0 at a signal file that reports a failure ends with 170 or 172, and the reason."""
    write = "true" if fields is None else f"echo '{json.dumps(fields)}' > {tmp_path}/signal"
    command = (*INIT, "sh", "-c", f"{write}; true")
    with Contained(command, env=job(tmp_path), before=TERMINATION) as init:
        assert init.wait() == code
        assert says in init.stderr()


def test_the_application_s_own_failure_counts(tmp_path: Path) -> None:
    """An application that itself ends with a failure keeps its code."""
    command = (*INIT, "sh", "-c", f"echo '{{\"success\": false}}' > {tmp_path}/signal; exit 3")
    with Contained(command, env=job(tmp_path)) as init:
        assert init.wait() == 3


def test_the_termination_message_is_the_reason(tmp_path: Path) -> None:
    """Kubernetes is told why: the message replaces what the file held."""
    log = tmp_path / "termination-log"
    log.write_text("x" * 5000)
    before = f"{TERMINATION}libc.mount({os.fsencode(log)!r}, b'/dev/termination-log', None, 4096, None)"
    with Contained((*INIT, "no-such-command"), env=job(tmp_path), before=before) as init:
        assert init.wait() == 127
    assert log.read_text().startswith("no-such-command: command not found")
    assert len(log.read_text()) < 4097


@pytest.mark.parametrize("what", ["fifo", "directory", "link", "device"])
def test_a_termination_log_that_is_no_file_is_left_alone(tmp_path: Path, what: str) -> None:
    """A FIFO does not block the end, and nothing is followed or written."""
    victim = tmp_path / "victim"
    victim.write_text("keep")
    make = {
        "fifo": "os.mkfifo('/dev/termination-log')",
        "directory": "os.mkdir('/dev/termination-log')",
        "link": f"os.symlink({str(victim)!r}, '/dev/termination-log')",
        "device": "os.mknod('/dev/termination-log', 0o20666, os.makedev(1, 7))",
    }[what]
    before = f"{TERMINATION}os.unlink('/dev/termination-log')\n{make}"
    with Contained((*INIT, "no-such-command"), before=before) as init:
        assert init.wait() == 127
    assert victim.read_text() == "keep"


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"CHREK_BLOCK_IO_URING": "ja"}, "CHREK_BLOCK_IO_URING is 'ja'. Allowed: auto"),
        ({"DYN_CHECKPOINT_HASH": "../etc"}, "BAD_ID: DYN_CHECKPOINT_HASH is '../etc'"),
        ({"DYN_CHECKPOINT_SIGNAL_FILE": "/s"}, "DYN_CHECKPOINT_READY_FILE must be set too"),
        ({"DYN_CHECKPOINT_HASH": "a", "DYN_CHECKPOINT_STORAGE_TYPE": "s3"}, "do not exist yet"),
    ],
)
def test_a_bad_value_ends_the_container_with_2(env: dict[str, str], says: str) -> None:
    """Before anything runs, the variable, its value and what is allowed are named."""
    with Contained((*INIT, "echo", "started"), env={"PATH": os.environ["PATH"], **env}) as init:
        assert init.wait() == 2
        assert init.lines() == []
        assert says in init.stderr()


@pytest.mark.parametrize("arguments", [(), ("--bogus", "x")])
def test_usage(arguments: tuple[str, ...]) -> None:
    """No command, or an option that is not known, is a usage error."""
    with Contained((*INIT[:-1], *arguments)) as init:
        assert init.wait() == 2
        assert "usage: restore-entrypoint" in init.stderr()

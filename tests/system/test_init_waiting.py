"""Restore mode before anything is restored: what is waited for, for how long, and the engine run from inside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chrek.system.initstate import read_state
from chrekcli import until as await_condition
from system.pidns import INIT, Contained
from system.test_init_restore import StandIn, until, waiting

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a PID namespace")

COLD = (*INIT, "sh", "-c", "echo cold; exit 5")
# Out of the bounding set: the exec that follows leaves root no capability.
DROP = "for cap in range(41): libc.prctl(24, cap, 0, 0, 0)"


def pod(store: Path | str, **env: str) -> dict[str, str]:
    """Return the environment of a restore pod."""
    return {
        "PATH": os.environ["PATH"],
        "DYN_CHECKPOINT_HASH": "abc",
        "DYN_CHECKPOINT_PATH": str(store),
        "CHREK_AGENT_TIMEOUT": "600",
        **env,
    }


def put(store: Path) -> None:
    """Make what looks like a checkpoint from afar."""
    (store / "abc").mkdir()
    (store / "abc" / "checkpoint.done").write_text("{}")


def mounted(store: Path) -> str:
    """Return what makes the store a volume of the container, empty at first."""
    return f"libc.mount(b'none', {os.fsencode(store)!r}, b'tmpfs', 0, None)\n"


def test_a_mounted_store_without_the_checkpoint_is_a_cold_start_at_once(tmp_path: Path) -> None:
    """Where the container sees the store and the checkpoint is not in it, nobody is waited for."""
    with Contained(COLD, env=pod(tmp_path), before=mounted(tmp_path)) as init:
        assert init.wait() == 5  # an agent would be waited for ten minutes
        assert "start=cold reason=NOT_FOUND" in init.stderr()


def test_no_checkpoint_is_no_failure(tmp_path: Path) -> None:
    """CHREK_ON_RESTORE_FAILURE=fail is about restores that failed, not about checkpoints that do not exist."""
    env = pod(tmp_path, CHREK_ON_RESTORE_FAILURE="fail")
    with Contained(COLD, env=env, before=mounted(tmp_path)) as init:
        assert init.wait() == 5


@pytest.mark.parametrize(("wish", "code"), [("cold", 5), ("fail", 171)])
def test_a_checkpoint_that_never_comes(tmp_path: Path, wish: str, code: int) -> None:
    """WAIT_FOR_CHECKPOINT at its timeout: cold, or 171."""
    env = pod(tmp_path, WAIT_FOR_CHECKPOINT="true", RESTORE_WAIT_TIMEOUT="0.3", CHREK_ON_RESTORE_FAILURE=wish)
    with Contained(COLD, env=env) as init:
        assert init.wait() == code
        assert "NOT_FOUND: No checkpoint abc in 0.3 s." in init.stderr()


def test_a_checkpoint_that_comes_is_noticed(tmp_path: Path) -> None:
    """WAIT_FOR_CHECKPOINT goes on as soon as the checkpoint is complete."""
    env = pod(tmp_path, WAIT_FOR_CHECKPOINT="true", CHREK_AGENT_TIMEOUT="500")
    with Contained(COLD, env=env, before=DROP) as init:
        assert waiting(init).deadline == 300
        (tmp_path / "abc").mkdir()
        assert read_state(init.pid).deadline == 300
        (tmp_path / "abc" / "checkpoint.done").write_text("{}")
        await_condition(lambda: read_state(init.pid).deadline == 500, "the wait for an agent")


def test_an_agent_may_end_the_wait_for_a_checkpoint(tmp_path: Path) -> None:
    """A claim followed by a failure, as after a failed capture, ends the wait at once."""
    with Contained(COLD, env=pod(tmp_path, WAIT_FOR_CHECKPOINT="true")) as init:
        waiting(init)
        with StandIn(init, "claim", "failed"):
            assert init.wait() == 5


def _fail(store: Path) -> None:
    """Leave word that the capture failed, as the agent does."""
    folder = store / ".failed"
    folder.mkdir(exist_ok=True)
    (folder / "new").write_text('{"success": false, "reason": "NO_SPACE", "error": "NO_SPACE: 5 GB are missing."}')
    (folder / "new").rename(folder / "abc")


@pytest.mark.parametrize(("wish", "code"), [("cold", 5), ("fail", 171)])
def test_a_failed_capture_ends_the_wait(tmp_path: Path, wish: str, code: int) -> None:
    """WAIT_FOR_CHECKPOINT ends with the capture's own reason when it fails meanwhile; what failed before says nothing."""
    _fail(tmp_path)
    os.utime(tmp_path / ".failed" / "abc", (1000, 1000))
    env = pod(tmp_path, WAIT_FOR_CHECKPOINT="true", CHREK_ON_RESTORE_FAILURE=wish)
    with Contained(COLD, env=env) as init:
        assert waiting(init).deadline == 300
        _fail(tmp_path)
        assert init.wait() == code
        assert "not restored: NO_SPACE: " in init.stderr()
        assert "5 GB are missing" in init.stderr()


def test_without_privileges_it_says_so(tmp_path: Path) -> None:
    """A PID 1 that sees the checkpoint and may not restore it waits for an agent, and names the cure."""
    put(tmp_path)
    with Contained(COLD, env=pod(tmp_path, CHREK_AGENT_TIMEOUT="0.3"), before=DROP) as init:
        assert init.wait() == 5
        assert "start=cold reason=NOT_ROOT" in init.stderr()


def test_the_engine_runs_from_inside(tmp_path: Path) -> None:
    """As root with the checkpoint in sight the init starts the engine; a checkpoint that is none is a cold start."""
    put(tmp_path)
    with Contained(COLD, env=pod(tmp_path)) as init:
        assert init.wait() == 5
        assert init.lines() == ["cold"]
        assert "claimed by" not in init.stderr()
        assert "not restored: " in init.stderr()
        assert "NO_AGENT" not in init.stderr()


def test_what_an_interrupted_restore_left_is_undone(tmp_path: Path) -> None:
    """File changes of a killed engine are undone by the init before the cold start."""
    root = tmp_path / "root"
    root.mkdir()
    # The container's root is a directory with everything of the machine in it, so that its own journal is its own.
    before = (
        f"root = {os.fsencode(root)!r}\n"
        "for name in os.listdir(b'/'):\n"
        "    if os.path.islink(b'/' + name): os.symlink(os.readlink(b'/' + name), root + b'/' + name)\n"
        "    elif os.path.isdir(b'/' + name):\n"
        "        os.mkdir(root + b'/' + name); libc.mount(b'/' + name, root + b'/' + name, None, 4096 | 16384, None)\n"
        "os.chroot(root); os.chdir('/')\n"
    )
    with Contained((*INIT, "sh", "-c", "ls -a /; exit 5"), env=pod("/nowhere"), before=before) as init:
        waiting(init)
        with StandIn(init, "claim", "wait", "die") as engine:
            engine.expect("claim ok")
            _change(root)
            assert (root / "made").exists()
            engine.go()
            assert init.wait() == 5
        names = init.lines()
        assert "made" not in names
        assert not [name for name in names if "undo" in name]


def _change(root: Path) -> None:
    """Change the tree as a restore does, and leave its journal behind as a killed one would."""
    from chrek.rootfs.journal import Journal

    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    with Journal(descriptor) as journal:
        journal.note_new(b"made")
        (root / "made").write_text("by the restore")
    os.close(descriptor)


def test_states_follow_each_other(tmp_path: Path) -> None:
    """After a failed restore the published state ends as cold, with the reason."""
    reading, writing = os.pipe()
    command = (*INIT, "sh", "-c", "read line; exit 5")
    with Contained(command, env=pod(tmp_path), stdin=reading) as init:
        waiting(init)
        with StandIn(init, "claim", "failed"):
            state = until(init, "cold")
            assert (state.reason, state.mailbox, state.checkpoint_id) == ("FILL_FAILED", None, "abc")
            assert state.seconds is not None
            os.write(writing, b"\n")
            assert init.wait() == 5
    os.close(reading)
    os.close(writing)

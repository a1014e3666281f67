"""Restore mode with a real process tree handed over by a stand-in engine through the real mailbox."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

import pytest

from chrek.system.ids import HostPid
from chrek.system.initstate import application, read_state
from system.pidns import INIT, Contained

if TYPE_CHECKING:
    from chrek.system.initpublish import InitState

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a PID namespace")

ENV = {"PATH": os.environ["PATH"], "DYN_CHECKPOINT_HASH": "abc", "CHREK_AGENT_TIMEOUT": "600"}
COLD = (*INIT, "sh", "-c", "echo cold; exit 5")
HAND_OVER = ("claim", "tree", "ready", "resume", "restored")


class StandIn:
    """A running stand-in engine."""

    def __init__(self, init: Contained, *steps: str, **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "standin.py"), str(init.pid), *steps],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "CODE": "9", **env},
        )
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        self.stdout: IO[str] = self.process.stdout
        self.stdin: IO[str] = self.process.stdin

    def line(self) -> str:
        return self.stdout.readline().rstrip("\n")

    def go(self) -> None:
        """Let a `wait` step go on."""
        self.stdin.write("\n")
        self.stdin.flush()

    def expect(self, *lines: str) -> None:
        assert [self.line() for _ in lines] == list(lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Not communicate(): the tree holds the same standard output and may outlive its engine.
        self.process.kill()
        self.stdin.close()
        self.stdout.close()
        self.process.wait()


def waiting(init: Contained) -> InitState:
    """Wait until the init waits for a restore."""
    return until(init, "waiting")


def until(init: Contained, mode: str) -> InitState:
    """Wait until the init has published a mode."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            state = read_state(init.pid)
        except Exception:  # noqa: BLE001 - not yet an init
            assert init.outside.poll() is None, init.stderr()
        else:
            if state.mode == mode:
                return state
        time.sleep(0.001)  # what another process has at a descriptor gives no event
    raise AssertionError(f"{mode} did not come: {init.stderr()}")


def others(init: Contained) -> list[int]:
    """Return the host ids of all living processes of the container but its PID 1."""
    namespace = os.readlink(f"/proc/{init.pid}/ns/pid")
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and int(name) != init.pid and os.readlink(f"/proc/{name}/ns/pid") == namespace:
                state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0]
                found += [int(name)] if state != "Z" else []
        except OSError:
            continue
    return found


def test_a_tree_is_handed_over() -> None:
    """The init takes the tree over, forwards to it, and ends with its exit code."""
    with Contained(COLD, env=ENV) as init:
        assert waiting(init).deadline == 600
        with StandIn(init, *HAND_OVER, "close") as engine:
            lines = [engine.line() for _ in range(7)]
            assert sorted(lines) == sorted([*(f"{step} ok" for step in HAND_OVER), "close ok", "root up"])
            state = until(init, "restored")
            assert state.app is not None
            assert state.mailbox is None
            app = application(init.pid)
            assert os.readlink(f"/proc/{app}/ns/pid") == os.readlink(f"/proc/{init.pid}/ns/pid")
            for _ in range(3):
                init.kill(signal.SIGUSR1)
                engine.expect("got USR1")
            init.kill(signal.SIGTERM)
            engine.expect("leaving")
            assert init.wait() == 9
            assert init.lines() == []


def test_the_log_line_of_a_restore() -> None:
    """A restored container says so in the stable line."""
    with Contained(COLD, env=ENV) as init:
        waiting(init)
        with StandIn(init, *HAND_OVER):
            until(init, "restored")
            assert re.search(r"^chrek: start=restored reason=none seconds=\d+\.\d{3}$", init.stderr(), re.MULTILINE)


def test_signals_during_the_restore_reach_the_application() -> None:
    """A signal that would not end the container is kept until the tree is there."""
    with Contained(COLD, env=ENV) as init:
        waiting(init)
        with StandIn(init, "claim", "wait", "tree", "ready", "resume", "wait", "restored") as engine:
            engine.expect("claim ok")
            init.kill(signal.SIGUSR2)
            engine.go()
            engine.expect("tree ok", "ready ok", "resume ok", "root up")
            engine.go()
            assert sorted(engine.line() for _ in range(2)) == ["got USR2", "restored ok"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP])
@pytest.mark.parametrize("steps", [(), ("claim",), ("claim", "tree"), ("claim", "tree", "ready")])
def test_a_signal_ends_the_container_while_nothing_runs(number: int, steps: tuple[str, ...]) -> None:
    """SIGTERM and its like end the container at once in every phase, and a late engine is told."""
    with Contained(COLD, env=ENV) as init:
        waiting(init)
        with StandIn(init, *(steps or ("wait", "claim")), "wait", "alive") as engine:
            engine.expect(*(f"{step} ok" for step in steps))
            init.kill(number)
            assert init.wait() == 128 + number  # whatever else ends the wait starts the command, which ends with 5
            engine.go()
            assert engine.line().split()[1] in {"CLAIM_LOST", "APP_NOT_FOUND"}


def test_nobody_claims() -> None:
    """Without an agent the container starts cold after the deadline, with the reason."""
    with Contained(COLD, env={**ENV, "CHREK_AGENT_TIMEOUT": "0.2"}) as init:
        assert init.wait() == 5
        assert init.lines() == ["cold"]
        assert "not restored: NO_AGENT" in init.stderr()
        assert "start=cold reason=NO_AGENT" in init.stderr()


def test_an_agent_timeout_of_zero_does_not_wait() -> None:
    """CHREK_AGENT_TIMEOUT=0 starts cold at once, and is not taken for "not set"."""
    with Contained(COLD, env={**ENV, "CHREK_AGENT_TIMEOUT": "0"}) as init:
        assert init.wait() == 5
        assert "No agent claimed the restore in 0 s." in init.stderr()


def test_fail_instead_of_cold() -> None:
    """CHREK_ON_RESTORE_FAILURE=fail ends with 171 and starts nothing."""
    env = {**ENV, "CHREK_AGENT_TIMEOUT": "0.2", "CHREK_ON_RESTORE_FAILURE": "fail"}
    with Contained(COLD, env=env) as init:
        assert init.wait() == 171
        assert init.lines() == []


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (("claim", "failed"), "FILL_FAILED: two pages of process 7 are missing"),
        (("claim", "die"), "RESTORE_FAILED"),
        (("claim", "close"), "RESTORE_FAILED"),
        (("claim", "tree", "die"), "RESTORE_FAILED"),
        (("claim", "tree", "ready", "die"), "RESTORE_FAILED"),
        (("claim", "tree", "ready", "resume", "die"), "RESTORE_FAILED"),
        (("claim", "tree", "ready", "resume", "other"), "RESTORE_FAILED"),
    ],
    ids="-".join,
)
def test_a_failed_restore_starts_cold(steps: tuple[str, ...], reason: str) -> None:
    """Wherever the engine fails or is killed, the tree is gone before the original command starts."""
    command = (*INIT, "sh", "-c", "echo cold; read line; exit 5")
    reading, writing = os.pipe()
    with Contained(command, env=ENV, stdin=reading) as init:
        waiting(init)
        with StandIn(init, *steps):
            assert init.line() == "cold"
            until(init, "cold")
            assert others(init) == [application(init.pid)]
            assert f"not restored: {reason}" in init.stderr()
            os.write(writing, b"\n")
            assert init.wait() == 5
    os.close(reading)
    os.close(writing)


def test_a_root_that_never_becomes_a_child_is_given_up() -> None:
    """When CRIU does not end, the tree is not taken over but killed, within seconds."""
    with Contained(COLD, env=ENV) as init:
        waiting(init)
        with StandIn(init, *HAND_OVER, SLOW="1"):
            assert init.wait() == 5
            assert "is still a child of" in init.stderr()


def test_a_tree_that_ends_at_once_gives_its_status() -> None:
    """A restored application that ends before the hand-over is complete still gives the exit code."""
    with Contained(COLD, env=ENV) as init:
        waiting(init)
        steps = ("claim", "tree", "ready", "resume", "wait", "restored")
        with StandIn(init, *steps, QUICK="1", CODE="33") as engine:
            engine.expect("claim ok", "tree ok", "ready ok", "resume ok")
            while others(init):
                pass
            engine.go()
            assert init.wait() == 33


def test_the_first_claim_wins() -> None:
    """Of many that claim at once exactly one gets it; the others are told so."""
    with Contained(COLD, env=ENV) as init:
        waiting(init)
        engines = [StandIn(init, "wait", "claim", "wait", "failed") for _ in range(8)]
        for engine in engines:
            engine.go()
        answers = [engine.line() for engine in engines]
        assert sorted(answers) == ["claim CLAIM_LOST"] * 7 + ["claim ok"]
        engines[answers.index("claim ok")].go()
        assert init.wait() == 5
        assert "FILL_FAILED" in init.stderr()
        for engine in engines:
            engine.__exit__()


def test_claims_at_the_deadline_are_granted_or_refused_never_both() -> None:
    """Around the init's deadline, either the tree runs or the command does, and the engine knows which."""
    outcomes = set()
    for tenth in range(12):
        with Contained(COLD, env={**ENV, "CHREK_AGENT_TIMEOUT": "0.3"}) as init:
            waiting(init)
            with StandIn(init, "wait", *HAND_OVER, "close") as engine:
                time.sleep(0.15 + tenth * 0.02)  # the moment is what is tested
                engine.go()
                first = engine.line()
                if first == "claim ok":
                    assert "root up" in [engine.line() for _ in range(6)]
                    until(init, "restored")
                    init.kill(signal.SIGTERM)
                    assert init.wait() == 9
                    assert init.lines() == []
                else:
                    assert first.split()[1] in {"CLAIM_LOST", "APP_NOT_FOUND"}
                    assert init.wait() == 5
                    assert init.lines() == ["cold"]
                outcomes.add(first)
    assert outcomes


def test_a_foreign_token_is_not_heard() -> None:
    """A letter that was not written by the claimer changes nothing."""
    with Contained(COLD, env=ENV) as init:
        waiting(init)
        with StandIn(init, "claim", "wait", *HAND_OVER[1:]) as engine:
            engine.expect("claim ok")
            state = until(init, "claimed")
            reading = next(
                name
                for name in os.listdir(f"/proc/{init.pid}/fd")
                if _link(init.pid, name).startswith("pipe:") and int(name) > 500
            )
            pipe = os.open(f"/proc/{init.pid}/fd/{reading}", os.O_WRONLY)
            os.write(pipe, b'{"kind": "failed", "token": "guess"}\nno json\n\xff\n{"kind": 7}\n[]\n')
            os.close(pipe)
            assert state.claim not in {"", "guess"}
            engine.go()
            until(init, "restored")


def _link(pid: HostPid, name: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{name}")
    except OSError:
        return ""


@pytest.mark.slow
def test_an_engine_that_hangs_is_given_up_and_cannot_come_back() -> None:
    """Ten seconds without a heartbeat end the claim; the engine that wakes up later may not resume its tree."""
    reading, writing = os.pipe()
    with Contained((*INIT, "sh", "-c", "echo cold; read line; exit 5"), env=ENV, stdin=reading) as init:
        waiting(init)
        with StandIn(init, "claim", "wait", "tree", "ready") as engine:
            engine.expect("claim ok")
            assert init.line() == "cold"
            assert "TIMEOUT" in init.stderr()
            engine.go()
            engine.expect("tree ok", "ready CLAIM_LOST")
            os.write(writing, b"\n")
            assert init.wait() == 5
    os.close(reading)
    os.close(writing)


def test_the_log_of_criu_is_written_by_the_init() -> None:
    """What the engine sends of CRIU's log lies in /tmp/criu-restore.log of the container."""
    before = "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None); open('/tmp/criu-restore.log', 'w').write('an old one')"
    if __file__.startswith("/tmp/"):
        pytest.skip("needs a checkout outside of /tmp, which this test hides")
    command = (*INIT, "sh", "-c", "wc -c < /tmp/criu-restore.log")
    with Contained(command, env=ENV, before=before) as init:
        waiting(init)
        with StandIn(init, "claim", "log", "log", "failed"):
            assert init.line() == str(2 * 12 * 1000)


def test_debug_pauses_after_a_failed_restore() -> None:
    """With DEBUG a failed restore leaves time to look around, which SIGTERM ends."""
    with Contained(COLD, env={**ENV, "DEBUG": "yes"}) as init:
        waiting(init)
        with StandIn(init, "claim", "failed"):
            until(init, "failed")
            init.kill(signal.SIGTERM)
            assert init.wait() == 143
            assert init.lines() == []

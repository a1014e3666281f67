"""The application's three steps: real processes that wait, and the files that end their wait."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import pytest

from chrekcli import DEADLINE, until

SOURCE = Path(__file__).resolve().parents[2] / "src"
SAMPLE = Path(__file__).parent / "inputs" / "guide_sample.txt"
OLDEST = sorted(Path.home().glob(".pyenv/versions/3.9.*/bin/python3.9"))
PYTHONS = [sys.executable, *map(str, OLDEST[:1])]

APPLICATION = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from chrek.workload import CheckpointFailed, checkpoint_point
from chrek.workload.hooks import seconds_away
said = []
try:
    outcome = checkpoint_point(before=[lambda: said.append("before")], after=[lambda: said.append("after")])
    print(json.dumps([outcome.value, said]), flush=True)
except CheckpointFailed as error:
    print(json.dumps(["failed", str(error), error.reason, error.refused]), flush=True)
assert not [name for name in sys.modules if name.startswith("chrek") and not name.startswith("chrek.workload")][1:]
sys.stdin.read()
"""


class Application:
    """A program that reaches its checkpoint point in a directory of its own."""

    def __init__(
        self,
        place: Path,
        python: str = sys.executable,
        code: str = APPLICATION,
        before: Sequence[str] = (),
        **env: str,
    ) -> None:
        self.signal, self.ready, self.marker = place / "signal", place / "ready", place / "marker"
        job = {
            "DYN_CHECKPOINT_SIGNAL_FILE": str(self.signal),
            "DYN_CHECKPOINT_READY_FILE": str(self.ready),
            "DYN_RESTORE_MARKER_FILE": str(self.marker),
        }
        self.process = subprocess.Popen(
            [*before, python, "-c", code, str(SOURCE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PATH": os.environ["PATH"], **job, **env},
        )

    def until_ready(self) -> None:
        """Wait for the ready file."""
        until(lambda: self.ready.exists() or self.process.poll() is not None, "the ready file")
        assert self.process.poll() is None

    def answer(self) -> list[object]:
        """Return what the program says of its outcome."""
        assert self.process.stdout is not None
        answer = json.loads(self.process.stdout.readline())
        assert isinstance(answer, list)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=DEADLINE)


def publish(path: Path, text: str) -> None:
    """Write a file as ChReK does: whole, by a rename."""
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.rename(path)


@pytest.mark.parametrize("python", PYTHONS)
def test_without_chrek_it_is_a_cold_start(tmp_path: Path, python: str) -> None:
    """Where no signal file is named nothing is waited for, no hook runs, no file is written."""
    with Application(tmp_path, python, DYN_CHECKPOINT_SIGNAL_FILE="") as application:
        assert application.answer() == ["cold", []]
        assert not application.ready.exists()


@pytest.mark.parametrize("python", PYTHONS)
def test_the_original_learns_that_it_was_checkpointed(tmp_path: Path, python: str) -> None:
    """A good signal file ends the wait as CHECKPOINTED, without the hooks of a restore."""
    with Application(tmp_path, python) as application:
        application.until_ready()
        assert application.ready.read_text().startswith("ready\n")
        publish(application.signal, '{"success": true}')
        assert application.answer() == ["checkpointed", ["before"]]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_copy_learns_that_it_was_restored(tmp_path: Path, python: str) -> None:
    """A marker ends the wait as RESTORED, after the hooks."""
    with Application(tmp_path, python) as application:
        application.until_ready()
        publish(application.marker, "{}")
        assert application.answer() == ["restored", ["before", "after"]]


def test_the_marker_counts_before_the_signal_file(tmp_path: Path) -> None:
    """A restored process that sees the signal file of its own checkpoint serves all the same."""
    with Application(tmp_path) as application:
        application.until_ready()
        application.process.send_signal(signal.SIGSTOP)  # both files appear while it does not run, as in a restore
        os.waitid(os.P_PID, application.process.pid, os.WSTOPPED)
        publish(application.signal, '{"success": true}')
        publish(application.marker, "{}")
        application.process.send_signal(signal.SIGCONT)
        assert application.answer()[0] == "restored"


def test_a_marker_from_before_is_not_its_own(tmp_path: Path) -> None:
    """A marker that another process left is not taken for a restore; a new one of the same name is."""
    (tmp_path / "marker").write_text("{}")
    with Application(tmp_path) as application:
        application.until_ready()
        publish(application.signal, '{"success": true}')
        assert application.answer()[0] == "checkpointed"
    application.signal.unlink()
    application.ready.unlink()
    with Application(tmp_path) as application:
        application.until_ready()
        publish(application.marker, "{}")
        assert application.answer()[0] == "restored"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"success": false, "error": "no space"}', ["no space", "", False]),
        ('{"success": false, "error": "x", "reason": "NO_SPACE", "refused": true}', ["x", "NO_SPACE", True]),
    ],
)
def test_a_failed_checkpoint_raises(tmp_path: Path, text: str, says: list[object]) -> None:
    """A signal file that says the checkpoint failed raises with its reason."""
    with Application(tmp_path) as application:
        application.until_ready()
        publish(application.signal, text)
        assert application.answer() == ["failed", *says]


@pytest.mark.parametrize("text", ["", "done", "[]", "{}", '{"success": 1}'])
def test_a_signal_file_that_says_nothing_is_a_failure(tmp_path: Path, text: str) -> None:
    """Success is only what says so; half a file is given two seconds."""
    with Application(tmp_path) as application:
        application.until_ready()
        publish(application.signal, text)
        assert application.answer()[0] == "failed"


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_waiting_is_sleeping(tmp_path: Path) -> None:
    """A process that waits looks at the marker once between two sleeps, and does nothing else (figures: benchmarks)."""
    trace = tmp_path / "trace"
    watch = ["strace", "-f", "-qq", "-o", str(trace)]
    with Application(tmp_path, before=watch) as application:
        application.until_ready()
        until(lambda: trace.read_text().count("clock_nanosleep") > 40, "forty looks at the marker")
        publish(application.marker, "{}")
        assert application.answer()[0] == "restored"
    looks = trace.read_text().split('/ready"')[1].split("clock_nanosleep")[1:40]
    assert len(looks) > 30
    for look in looks:
        calls = look.splitlines()[1:-1]
        assert sum(f'"{application.marker}"' in call for call in calls) == 1, calls
        assert len(calls) <= 2, calls  # the second: a look at the signal file
    assert sum(f'"{application.signal}"' in look for look in looks) <= len(looks) // 4
    wakes = [tuple(map(int, re.findall(r"tv_(?:sec|nsec)=(\d+)", look)[:2])) for look in looks]
    gaps = [(b[0] - a[0]) * 10**9 + b[1] - a[1] for a, b in itertools.pairwise(wakes)]
    assert min(gaps) >= 10**7, gaps  # each sleep ends at a time that is ten milliseconds after the last one, or later


def test_the_pause_leaves_room_for_20_ms() -> None:
    """An application reacts to its marker within 20 ms where the machine lets it: the pause is shorter."""
    from chrek.workload import lifecycle

    assert lifecycle.POLL_SECONDS <= 0.016


@pytest.mark.parametrize(("error", "status"), [("PoolCorrupt('block 7')", 171), ("ValueError('a hook of the user')", 1)])
def test_damaged_state_asks_for_a_cold_start(tmp_path: Path, error: str, status: int) -> None:
    """A hook that finds the restored state damaged ends the process with 171; any other error is the application's own."""
    code = f"""
import sys
sys.path.insert(0, sys.argv[1])
from chrek.workload import checkpoint_point
from chrek.workload.pool import PoolCorrupt
def hook():
    raise {error}
checkpoint_point(after=[hook])
"""
    with Application(tmp_path, code=code) as application:
        application.until_ready()
        publish(application.marker, "{}")
        assert application.process.wait(DEADLINE) == status


def test_a_ready_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """Without its ready file the pod would wait for ever, so that is raised."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom chrek.workload import checkpoint_point\ncheckpoint_point()"
    )
    with Application(tmp_path, code=code, DYN_CHECKPOINT_READY_FILE=str(tmp_path / "no" / "ready")) as application:
        assert application.process.wait(DEADLINE) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("marker", "signal", "ends"), [(True, False, "served"), (True, True, "served"), (False, True, "left")]
)
def test_the_guide_s_own_sample_works_unmodified(tmp_path: Path, marker: bool, signal: bool, ends: str) -> None:
    """The sample code of the user guide, run as it stands, waits and goes on as the guide says."""
    code = (
        "import os, sys, time\nserved = []\ndef load_model(): return 1\n"
        "def run_application(): served.append(1)\n" + SAMPLE.read_text() + "\nmain()\n"
        "print('[\"served\"]' if served else '[\"left\"]', flush=True)"
    )
    with Application(tmp_path, code=code) as application:
        application.until_ready()
        if marker:
            publish(application.marker, "{}")
        if signal:
            publish(application.signal, '{"success": true}')
        assert application.answer() == [ends]


def test_the_guide_s_sample_starts_cold() -> None:
    """Without ChReK's variables the guide's sample serves at once."""
    code = (
        "import os, sys, time\ndef load_model(): return 1\n"
        "def run_application(): print('served')\n" + SAMPLE.read_text() + "\nmain()"
    )
    result = subprocess.run([sys.executable, "-c", code], env={}, capture_output=True, text=True, check=True)
    assert result.stdout == "served\n"


def test_reseeding_changes_what_is_drawn() -> None:
    """Two copies of one process draw different numbers after the hook."""
    from chrek.workload.hooks import reseed

    state = random.getstate()
    try:
        random.seed(1)
        reseed()
        first = random.random()
        random.seed(1)
        reseed()
        assert random.random() != first
    finally:
        random.setstate(state)


def test_time_away_is_wall_time_minus_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seconds a process did not exist are those the wall clock moved and its own did not."""
    from chrek.workload import hooks

    monkeypatch.setattr(hooks, "_clocks", (time.time() - 500, time.monotonic() - 20))
    assert 420 < hooks.seconds_away() < 540  # the two clocks of each pair are read one after the other


def test_the_package_stands_alone() -> None:
    """Importing it loads nothing else of ChReK, and nothing outside the standard library."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import chrek.workload\n"
        "names = {name for name in sys.modules if name.split('.')[0] == 'chrek'}\n"
        "assert all(name == 'chrek' or name.startswith('chrek.workload') for name in names), names"
    )
    for python in PYTHONS:
        subprocess.run([python, "-I", "-S", "-c", code, str(SOURCE)], check=True)

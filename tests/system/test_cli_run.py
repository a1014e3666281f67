"""`chrek run`: cold and restored starts on this machine, streams, signals, exit codes."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chrekcli import CHREK, Running, chrek, python, until
from containers import needs

pytestmark = needs("root", "criu")

COUNTER = """
    import os, sys, time
    memory = os.urandom(8 << 20)
    digest = hash(memory)
    number = 0
    while True:
        number += 1
        print("tick", number, hash(memory) == digest, flush=True)
        time.sleep(0.02)
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return where the store will be."""
    return tmp_path / "store"


def ticks(text: str) -> list[int]:
    """Return the numbers that `COUNTER` counted, in whole lines; its memory must have been right."""
    lines = [line.split() for line in text.rpartition("\n")[0].splitlines() if line.startswith("tick")]
    assert all(words[2:] == ["True"] for words in lines)
    return [int(words[1]) for words in lines]


def flip(path: Path, at: int) -> None:
    """Change one byte."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def saved(store: Path, tmp_path: Path, code: str = COUNTER, *, marker: str = "tick 5") -> Path:
    """Start an application, checkpoint it as ``x``, kill it; return its log."""
    log = tmp_path / "first.log"
    with Running(["run", "--id", "x"], python(code), store=store, log=log) as run:
        run.await_output(marker)
        done = chrek("checkpoint", "x", "--pid", str(run.pid1), "--stop", store=store)
        assert done.returncode == 0, done.stderr
        assert run.wait() == 128 + signal.SIGKILL
    return log


# --- cold -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shell", "code"), [("exit 0", 0), ("exit 42", 42), ("kill -TERM $$", 143)])
def test_ends_as_the_application_did(store: Path, shell: str, code: int) -> None:
    """The exit code is the application's own, 128+n for a signal."""
    assert chrek("run", "--id", "x", "--", "sh", "-c", shell, store=store).returncode == code


def test_a_command_that_is_not_there(store: Path) -> None:
    """A command that cannot be found ends with 127 and its name, as in a shell."""
    done = chrek("run", "--id", "x", "--", "no-such-command", store=store)
    assert done.returncode == 127
    assert "no-such-command: command not found" in done.stderr


def test_options_end_where_the_command_begins(store: Path) -> None:
    """What follows the command's name is the command's, also without --."""
    assert chrek("run", "--id", "x", "echo", "--json", "-x", store=store).stdout == "--json -x\n"


def test_streams_are_connected(store: Path) -> None:
    """Standard input reaches the application to its end; output and errors stay apart."""
    done = chrek("run", "--id", "x", "--", "sh", "-c", "cat; echo problem >&2", store=store, stdin="one\ntwo\n")
    assert done.stdout == "one\ntwo\n"
    assert "problem\n" in done.stderr


def test_writes_all_of_a_large_output(store: Path) -> None:
    """What the application wrote just before it ended is not lost."""
    done = chrek("run", "--id", "x", "--", "sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' x", store=store)
    assert len(done.stdout) == 3_000_000


def test_works_on_a_terminal(store: Path) -> None:
    """On a terminal, output appears there and typed lines reach the application."""
    ours, theirs = pty.openpty()
    command = [*CHREK, "run", "--id", "x", "--", "sh", "-c", "read line; echo got $line"]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "CHREK_STORE": str(store)}
    ) as run:
        os.close(theirs)
        os.write(ours, b"hello\n")
        text = b""
        while b"got hello" not in text:
            text += os.read(ours, 4096)
        assert run.wait(60) == 0
    os.close(ours)


def test_has_namespaces_of_its_own(store: Path) -> None:
    """PIDs, IPC and /dev/shm are the application's own; files, host name and network are the machine's."""
    shell = "cd /proc/self/ns; readlink pid ipc net uts; ls /dev/shm; cat /proc/1/comm"
    lines = chrek("run", "--id", "x", "--", "sh", "-c", shell, store=store).stdout.splitlines()
    ours = [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "ipc", "net", "uts")]
    assert lines[0] != ours[0]
    assert lines[1] != ours[1]
    assert lines[2:4] == ours[2:]
    assert len(lines) == 5  # /dev/shm is empty


def test_passes_no_other_descriptors_on(store: Path) -> None:
    """Descriptors that the caller has open beyond the standard streams do not reach the application."""
    reading, writing = os.pipe()
    command = [*CHREK, "run", "--id", "x", "--", "sh", "-c", "ls /proc/$$/fd"]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        pass_fds=(reading,),
        env={**os.environ, "CHREK_STORE": str(store)},
    )
    os.close(reading)
    os.close(writing)
    assert done.stdout.split() == ["0", "1", "2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_forwards_signals(store: Path, tmp_path: Path, number: int) -> None:
    """A signal to `chrek run` is the application's."""
    code = f"""
        import signal, sys
        signal.signal({int(number)}, lambda *_: sys.exit(9))
        print("ready", flush=True)
        signal.pause()
    """
    with Running(["run", "--id", "x"], python(code), store=store, log=tmp_path / "log") as run:
        run.await_output("ready")
        run.process.send_signal(number)
        assert run.wait() == 9


def test_a_killed_run_takes_the_application_along(store: Path, tmp_path: Path) -> None:
    """After kill -9 of `chrek run` nothing of the application is left to hold its ports."""
    with Running(["run", "--id", "x"], python(COUNTER), store=store, log=tmp_path / "log") as run:
        run.await_output("tick 1")
        pid1 = run.pid1
        run.process.kill()
        until(lambda: not Path(f"/proc/{pid1}").exists(), "the end of the init")


# --- restored ---------------------------------------------------------------------------------------


def test_goes_on_where_the_checkpoint_was(store: Path, tmp_path: Path) -> None:
    """With a checkpoint of the id the application goes on: same memory, next number, no cold start."""
    last = ticks(saved(store, tmp_path).read_text())[-1]
    with Running(["run", "--id", "x"], python(COUNTER), store=store, log=tmp_path / "second.log") as run:
        run.await_output("True\n")
        first = ticks(run.output())[0]
        assert 5 <= first <= last + 1
        run.await_said("start=restored")


def test_cycles(store: Path, tmp_path: Path) -> None:
    """A restored application can be checkpointed and restored again, any number of times."""
    saved(store, tmp_path)
    before = 5
    for generation in range(3):
        with Running(["run", "--id", "x"], python(COUNTER), store=store, log=tmp_path / f"{generation}.log") as run:
            run.await_output("True\n")
            numbers = ticks(run.output())
            assert before <= numbers[0] < before + 500
            done = chrek("checkpoint", "x", "--pid", str(run.pid1), "--stop", store=store)
            assert done.returncode == 0, done.stderr
            run.wait()
            before = numbers[-1]


def test_one_checkpoint_starts_any_number(store: Path, tmp_path: Path) -> None:
    """One checkpoint is restored again and again, also by two at once: a restore consumes nothing."""
    saved(store, tmp_path)
    with Running(["run", "--id", "x"], python(COUNTER), store=store, log=tmp_path / "a.log") as one:
        one.await_output("True\n")
        with Running(["run", "--id", "x"], python(COUNTER), store=store, log=tmp_path / "b.log") as two:
            two.await_output("True\n")
            assert ticks(one.output())[0] == ticks(two.output())[0]


@pytest.mark.parametrize("second", ["pipe", "terminal", "file", "null"])
def test_streams_may_be_others_than_at_the_checkpoint(store: Path, tmp_path: Path, second: str) -> None:
    """Whatever the streams were connected to at the checkpoint, the restored application writes to the new ones."""
    saved(store, tmp_path)  # to a file
    ends: tuple[int, int]
    if second == "pipe":
        ends = os.pipe()
    elif second == "terminal":
        ends = pty.openpty()
    elif second == "null":
        ends = (os.open("/dev/null", os.O_RDONLY), os.open("/dev/null", os.O_WRONLY))
    else:
        path = tmp_path / "new.log"
        path.write_text("before\n")
        ends = (os.open(path, os.O_RDONLY), os.open(path, os.O_WRONLY | os.O_APPEND))
    with Running(["run", "--id", "x"], python(COUNTER), store=store, log=tmp_path / "log", stdout=ends[1]) as run:
        run.await_said("start=restored")
        if second in {"pipe", "terminal"}:
            assert os.read(ends[0], 4096).startswith(b"tick ")
        if second == "file":
            until(lambda: "tick" in path.read_text(), "output")
            assert path.read_text().startswith("before\ntick ")
    os.close(ends[0])
    os.close(ends[1])


def test_on_a_terminal_that_stops_background_writers(store: Path, tmp_path: Path) -> None:
    """`stty tostop` stops neither the restore, which is no part of the foreground job, nor what it says."""
    saved(store, tmp_path)
    code = """
        import fcntl, os, sys, termios
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        settings = termios.tcgetattr(0)
        settings[3] |= termios.TOSTOP
        termios.tcsetattr(0, termios.TCSANOW, settings)
        os.execv(sys.argv[1], sys.argv[1:])
    """
    ours, theirs = pty.openpty()
    command = [*python(code), *CHREK, "run", "--id", "x", "--", "sh", "-c", "echo cold"]
    environment = {**os.environ, "CHREK_STORE": str(store)}
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    ) as run:
        os.close(theirs)
        text = b""
        try:
            while b"start=" not in text:
                text += os.read(ours, 4096)
        finally:
            run.kill()
            os.close(ours)
    assert b"start=restored" in text


def test_shared_memory_and_semaphores_come_back(store: Path, tmp_path: Path) -> None:
    """Shared memory, named semaphores and a worker process that uses them go on."""
    code = """
        import multiprocessing as mp, time
        from multiprocessing import shared_memory

        def work(name, gate, queue):
            shared = shared_memory.SharedMemory(name)
            while True:
                gate.acquire()
                shared.buf[0] = (shared.buf[0] + 1) % 256
                queue.put(shared.buf[0])

        if __name__ == "__main__":
            context = mp.get_context("fork")
            shared = shared_memory.SharedMemory(create=True, size=4096)
            gate, queue = context.Semaphore(0), context.Queue()
            context.Process(target=work, args=(shared.name, gate, queue), daemon=True).start()
            for number in range(1, 1 << 30):
                gate.release()
                assert queue.get() == number % 256
                print("tick", number, "True", flush=True)
                time.sleep(0.02)
    """
    last = ticks(saved(store, tmp_path, code).read_text())[-1]
    for name in ("one", "two"):
        with Running(["run", "--id", "x"], python(code), store=store, log=tmp_path / name) as run:
            run.await_output("True\n")
            assert ticks(run.output())[0] <= last + 1
            run.await_output(f"tick {last + 5} ")


def test_a_log_that_grew_since(store: Path, tmp_path: Path) -> None:
    """Logs that grew after the checkpoint do not stop a restore: appended ones go on, others are cut back."""
    appended, written = tmp_path / "appended", tmp_path / "written"
    code = f"""
        import time
        a, w = open({str(appended)!r}, "a", buffering=1), open({str(written)!r}, "w", buffering=1)
        for number in range(1 << 30):
            a.write(f"{{number}}\\n"); w.write(f"{{number}}\\n")
            print("tick", number, "True", flush=True)
            time.sleep(0.02)
    """
    saved(store, tmp_path, code)
    for path in (appended, written):
        with path.open("a") as file:
            file.write("after the checkpoint\n" * 1000)
    with Running(["run", "--id", "x"], python(code), store=store, log=tmp_path / "log") as run:
        run.await_output("True\n")
        run.await_said("start=restored")
        run.await_said("bytes written to")
        numbers = [int(line) for line in written.read_text().splitlines()]
        assert numbers == list(range(len(numbers)))
        assert appended.read_text().count("after the checkpoint") == 1000


def test_a_file_whose_name_is_gone(store: Path, tmp_path: Path) -> None:
    """An open file with another name than it was opened by comes back at every restore, and leaves nothing behind."""
    code = f"""
        import os, time
        os.chdir({str(tmp_path)!r})
        file = open("opened", "w+")
        file.write("content"); file.flush()
        os.link("opened", "other"); os.unlink("opened")
        number = 0
        while True:
            number += 1
            print("tick", number, os.pread(file.fileno(), 10, 0) == b"content", flush=True)
            time.sleep(0.02)
    """
    saved(store, tmp_path, code)
    for name in ("one", "two"):
        with Running(["run", "--id", "x"], python(code), store=store, log=tmp_path / name) as run:
            run.await_output("True\n")
            assert ticks(run.output())[0] > 1
    assert not list(tmp_path.glob("link_remap*"))


# --- what cannot be restored ------------------------------------------------------------------------


def test_the_marker(store: Path, tmp_path: Path) -> None:
    """The restored application finds its marker where DYN_RESTORE_MARKER_FILE says; a cold one finds none."""
    code = """
        import json, os, time
        marker = os.environ["DYN_RESTORE_MARKER_FILE"]
        assert not os.path.exists(marker)
        print("cold", flush=True)
        while not os.path.exists(marker):
            time.sleep(0.02)
        print("marker of", json.load(open(marker))["checkpoint_id"], flush=True)
        time.sleep(60)
    """
    for name in ("first", "second"):
        with Running(["run", "--id", "x", "--cold"], python(code), store=store, log=tmp_path / name) as run:
            run.await_output("cold")
            done = chrek("checkpoint", "x", "--pid", str(run.pid1), "--stop", store=store)
            assert done.returncode == 0, done.stderr
        with Running(["run", "--id", "x"], python(code), store=store, log=tmp_path / f"{name}-restored") as run:
            run.await_output("marker of x")


def test_cold_option(store: Path, tmp_path: Path) -> None:
    """`--cold` starts anew although there is a checkpoint."""
    saved(store, tmp_path)
    assert chrek("run", "--id", "x", "--cold", "--", "sh", "-c", "exit 5", store=store).returncode == 5


def test_a_damaged_manifest_means_a_cold_start(store: Path, tmp_path: Path) -> None:
    """A checkpoint that cannot be used is reported, and the command starts cold; `--on-failure fail` refuses."""
    saved(store, tmp_path)
    flip(store / "x/manifest.json", 100)
    done = chrek("run", "--id", "x", "--", "sh", "-c", "exit 5", store=store)
    assert done.returncode == 5
    assert "CORRUPT" in done.stderr
    assert "starting cold instead" in done.stderr
    done = chrek("run", "--id", "x", "--on-failure", "fail", "--", "sh", "-c", "exit 5", store=store)
    assert done.returncode == 172


def test_damaged_memory_means_a_cold_start(store: Path, tmp_path: Path) -> None:
    """Memory that is damaged is never run: what was half restored is gone and the command starts cold."""
    saved(store, tmp_path)
    shard = next((store / "x/memory").glob("shard-*"))
    flip(shard, shard.stat().st_size // 2)
    done = chrek("run", "--id", "x", "--", "sh", "-c", "exit 5", store=store)
    assert done.returncode == 5
    assert "start=cold reason=CORRUPT" in done.stderr
    done = chrek("run", "--id", "x", "--on-failure", "fail", "--", "sh", "-c", "exit 5", store=store)
    assert done.returncode == 171
    assert "CORRUPT" in done.stderr


def test_a_failed_restore_changes_no_file(store: Path, tmp_path: Path) -> None:
    """A file that was cut back for a restore has its content again when the restore fails."""
    code = f"""
        import time
        file = open({str(tmp_path / "written")!r}, "w", buffering=1)
        file.write("before\\n")
        print("tick 1 True", flush=True)
        time.sleep(60)
    """
    saved(store, tmp_path, code, marker="tick 1")
    with (tmp_path / "written").open("a") as file:
        file.write("after\n")
    shard = next((store / "x/memory").glob("shard-*"))
    flip(shard, 10)
    done = chrek("run", "--id", "x", "--on-failure", "fail", "--", "false", store=store)
    assert done.returncode == 171
    assert "CORRUPT" in done.stderr
    assert (tmp_path / "written").read_text() == "before\nafter\n"


def test_a_variable_of_the_application(store: Path, tmp_path: Path) -> None:
    """A DEBUG of the application's own neither stops a restore nor is lost at the cold start after a failed one."""
    saved(store, tmp_path)
    shard = next((store / "x/memory").glob("shard-*"))
    flip(shard, 10)
    done = chrek("run", "--id", "x", "--", "sh", "-c", "echo $DEBUG", store=store, env={"DEBUG": "app:*"})
    assert done.stdout == "app:*\n"


def test_json_says_how_it_started(store: Path, tmp_path: Path) -> None:
    """With --json the last line of standard error is an object with the start and the exit code."""
    done = chrek("run", "--id", "x", "--json", "--", "sh", "-c", "exit 3", store=store)
    assert done.stderr.splitlines()[-1] == '{"id": "x", "start": "cold", "exit_code": 3}'


KILLED_BEFORE_ITS_CLAIM = """
import os, signal, sys
def profile(frame, event, _):
    if event == "call" and frame.f_code.co_qualname == "claim":
        os.kill(os.getpid(), signal.SIGKILL)
sys.setprofile(profile)
import chrek.cli
chrek.cli.main()
"""


def test_restorer_that_dies_before_its_claim(store: Path, tmp_path: Path) -> None:
    """The init is told that nobody will come, and starts cold without waiting for its deadline."""
    saved(store, tmp_path)
    command = [sys.executable, "-c", KILLED_BEFORE_ITS_CLAIM, "run", "--id", "x", "--", "sh", "-c", "exit 7"]
    done = subprocess.run(
        command, env={**os.environ, "CHREK_STORE": str(store)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 7, done.stderr
    assert "start=cold reason=RESTORE_FAILED" in done.stderr
    assert "ended before it began (-9)" in done.stderr

"""The command line as tests use it: run to its end, or an application left running under `chrek run`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from chrek.cli import targets
from chrek.errors import Refused
from chrek.system.ids import HostPid

CHREK = (sys.executable, "-m", "chrek.cli")
PYTHON = (sys.executable, "-I", "-S")
"""The interpreter itself: what PATH calls python3 may be a shell script."""

DEADLINE = 60.0


def chrek(
    *arguments: str | int | Path, store: Path | None = None, env: Mapping[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run ``chrek`` to its end."""
    environment = {**os.environ, **(env or {})}
    if store is not None:
        environment["CHREK_STORE"] = str(store)
    command = [*CHREK, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, input=stdin, timeout=100
    )


def chrek_json(*arguments: str | int | Path, store: Path | None = None) -> Any:  # noqa: ANN401 - whatever JSON it is
    """Run ``chrek … --json``, which must end well, and return what it wrote."""
    done = chrek(*arguments, "--json", store=store)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for something of which the kernel gives no event."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"{what} has not happened in {DEADLINE} s"
        time.sleep(0.01)


def reserve_port() -> socket.socket:
    """Hold a port for a server that is yet to start, which may bind it too: neither listens yet (SO_REUSEADDR, socket(7))."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


def python(code: str) -> list[str]:
    """Return the command of an application that runs this program."""
    return [*PYTHON, "-c", textwrap.dedent(code)]


class Running:
    """An application in the foreground of a ``chrek`` verb; its output goes to a file that both ends can read."""

    def __init__(
        self,
        verb: Sequence[str | Path],
        command: Sequence[str],
        *,
        store: Path,
        log: Path,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
    ) -> None:
        """Start ``chrek VERB -- COMMAND``; *stdout* in place of the file *log*, to which output is appended."""
        self.log = log
        self._file = log.open("ab")
        self.errors = log.with_suffix(".err")
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [*CHREK, *map(str, verb), "--", *command],
                env={**os.environ, "CHREK_STORE": str(store), **(env or {})},
                stdin=stdin,
                stdout=self._file if stdout is None else stdout,
                stderr=errors,
            )

    def output(self) -> str:
        """Return what the application wrote so far."""
        return self.log.read_text()

    def said(self) -> str:
        """Return standard error so far."""
        return self.errors.read_text()

    def await_output(self, text: str) -> None:
        """Wait until the application has written something."""
        until(lambda: text in self.output() or self.process.poll() is not None, repr(text))
        assert text in self.output(), self.said()

    def await_said(self, text: str) -> None:
        """Wait until something is on standard error; the line that says how it started ends a wait for another start."""
        deadline = time.monotonic() + DEADLINE
        while text not in (said := self.said()):
            assert time.monotonic() < deadline, f"no {text!r} in {DEADLINE} s: {said!r}"
            assert self.process.poll() is None, said
            assert not (text.startswith("start=") and "start=" in said), said
            time.sleep(0.01)

    @property
    def pid1(self) -> HostPid:
        """The init, once it runs."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found: list[HostPid] = []

        def look() -> bool:
            found.clear()
            for word in children.read_text().split():
                try:
                    found.append(targets.target(HostPid(int(word))).pid1)
                except Refused:
                    continue
            return bool(found)

        until(look, "an init")
        return found[0]

    def wait(self) -> int:
        """Return the exit code."""
        return self.process.wait(DEADLINE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()  # takes the application with it
        self.process.wait(DEADLINE)
        self._file.close()

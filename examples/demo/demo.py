"""The demo: one server, started cold, checkpointed while it runs, killed, and brought back somewhere else.

The server (``image/app/server.py``) knows nothing of checkpoints. Both containers are plain runc containers without
privileges, with PID, network, mount, host name and IPC namespaces of their own; they share nothing but the image.
Exit status 0 only if the restored server's answer is the cold one's, to the last digit.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
sys.path.insert(0, str(REPO / "tests"))  # the containers are those of the system tests

from chrek.engine import capture, restore  # noqa: E402
from chrek.errors import ChrekError  # noqa: E402
from chrek.store import Store  # noqa: E402
from chrek.system.initstate import read_state  # noqa: E402
from chrek.system.mailbox import Mailbox  # noqa: E402
from containers import Container, remove_leftovers  # noqa: E402
from layer import CACHE, image_layers  # noqa: E402
from picture import Part, draw  # noqa: E402

PORT = 8000
COMMAND = ["/usr/local/bin/restore-entrypoint", "--", "/usr/bin/python3", "/app/server.py"]
ENVIRONMENT = {"PYTHONPATH": "/opt/site", "PYTHONUNBUFFERED": "1"}
PICTURE = HERE / "images/receipt.png"
ID = "demo"
PATIENCE = 120.0


def say(text: str) -> None:
    """Print one line of progress, with the seconds since the demo began."""
    print(f"[{time.monotonic() - BEGAN:6.2f} s] {text}", flush=True)


def ask(container: Container, path: str, body: bytes | None = None) -> Any:  # noqa: ANN401
    """Send one request to the server in the container; return what it answers, decoded."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT)
    connection.sock = container.connect(PORT)
    try:
        connection.request("GET" if body is None else "POST", path, body)
        response = connection.getresponse()
        text = response.read()
        if response.status != http.HTTPStatus.OK:
            raise OSError(f"{path} answered {response.status}: {text[:200]!r}")
        return json.loads(text)
    finally:
        connection.close()


def until_up(container: Container) -> None:
    """Wait until the server answers."""

    def up() -> bool:
        try:
            return bool(ask(container, "/health"))
        except OSError:
            return False

    container.until(up, timeout=PATIENCE, what="the server answered")


def read_picture(container: Container) -> list[dict[str, Any]]:
    """Send the picture; return the lines of text that the server read."""
    lines: list[dict[str, Any]] = ask(container, "/read", PICTURE.read_bytes())["lines"]
    return lines


def start(hostname: str, command: list[str], layers: list[Path], environment: dict[str, str]) -> Container:
    """Make one of the two containers: no privileges, the demo's image."""
    return Container(command, hostname=hostname, lower=layers, env={**ENVIRONMENT, **environment})


def bring_back(container: Container, store: Store) -> restore.Outcome:
    """Restore the checkpoint into a container whose init waits for it, as the agent of a node does."""

    def waits() -> bool:
        try:
            return read_state(container.pid1).mode == "waiting"
        except ChrekError:
            return False  # PID 1 has not got that far

    container.until(waits, what="the container's init waits")
    with Mailbox.claim(container.pid1, by="the demo") as mailbox:
        try:
            return restore.restore(restore.Request(pid1=container.pid1, mailbox=mailbox, store=store, checkpoint_id=ID))
        except ChrekError as error:
            mailbox.failed(error.reason, error.message)
            raise


@dataclass(frozen=True)
class Run:
    """What the demo measured; seconds."""

    cold_server: float
    cold_answer: float
    saved: capture.Outcome
    waiting: float
    restored: restore.Outcome
    restore_answer: float
    same: bool

    @property
    def cold(self) -> float:
        """From the first container's creation to its first answer."""
        return self.cold_server + self.cold_answer

    @property
    def restore(self) -> float:
        """From the second container's creation to its first answer."""
        return self.waiting + self.restored.seconds + self.restore_answer

    def sentence(self) -> str:
        """Return the demo's last line."""
        return (
            f"demo: cold {self.cold:.2f} s, checkpoint {self.saved.seconds:.2f} s (frozen "
            f"{self.saved.frozen_seconds:.2f} s), restore {self.restore:.2f} s ({self.cold / self.restore:.1f} times "
            f"faster), answers {'identical' if self.same else 'DIFFERENT'}"
        )

    def rows(self) -> list[tuple[str, list[Part]]]:
        """Return the rows of the picture."""
        before = self.saved.seconds - self.saved.frozen_seconds
        return [
            (
                "cold start",
                [Part(self.cold_server, "start, load, warm up", "load"), Part(self.cold_answer, "answer", "answer")],
            ),
            (
                "checkpoint",
                [Part(self.saved.frozen_seconds, "frozen", "frozen"), Part(before, "the server runs on", "work")],
            ),
            (
                "restore",
                [
                    Part(self.waiting, "container", "load"),
                    Part(self.restored.seconds, "restore", "work"),
                    Part(self.restore_answer, "answer", "answer"),
                ],
            ),
        ]


def demo(layers: list[Path], store: Store) -> Run:
    """Cold start, checkpoint, kill, restore, compare."""
    say("cold start in container one (host name cold-start)")
    began = time.monotonic()
    with start("cold-start", COMMAND, layers, {}) as one:
        until_up(one)
        up = time.monotonic()
        answer = read_picture(one)
        answered = time.monotonic()
        who = ask(one, "/health")
        say(f"first answer after {answered - began:.2f} s from {who['host']}, process {who['pid']}: {words(answer)}")
        say("checkpoint, while the server runs")
        saved = capture.capture(capture.Request(pid1=one.pid1, store=store, checkpoint_id=ID))
        say(
            f"{saved.memory_bytes / 1e6:.0f} MB of memory saved in {saved.seconds:.2f} s, the server frozen for "
            f"{saved.frozen_seconds:.2f} s of them, {saved.stored_bytes / 1e6:.0f} MB stored"
        )
        unharmed = read_picture(one) == answer
        say(f"the server {'answers as before' if unharmed else 'GIVES ANOTHER ANSWER'}; now it is killed")
        one.kill(signal.SIGKILL)
        one.wait()
    say("restore in container two (host name restored, no privileges)")
    created = time.monotonic()
    with start("restored", COMMAND, layers, {"DYN_CHECKPOINT_HASH": ID}) as two:
        restored = bring_back(two, store)
        running = time.monotonic()
        until_up(two)
        again = read_picture(two)
        ended = time.monotonic()
        who = ask(two, "/health")
        say(f"first answer after {ended - created:.2f} s from {who['host']}, process {who['pid']}: {words(again)}")
        engine = ended - running + restored.seconds
        say(f"(counted from the start of ChReK's restore instead of the container's: {engine:.2f} s)")
    return Run(
        cold_server=up - began,
        cold_answer=answered - up,
        saved=saved,
        waiting=running - created - restored.seconds,
        restored=restored,
        restore_answer=ended - running,
        same=unharmed and again == answer and who["host"] == "restored",
    )


def main() -> int:
    """Run the demo; return its exit status."""
    parser = argparse.ArgumentParser(description="Cold start, checkpoint, kill and restore of an inference server.")
    parser.add_argument("--picture", type=Path, help="draw the run into this SVG file")
    args = parser.parse_args()
    remove_leftovers()
    layers = image_layers()
    for left in CACHE.glob("store-*"):  # of runs that were killed
        if not Path("/proc", left.name.split("-")[1]).exists():
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=f"store-{os.getpid()}-", dir=CACHE) as folder:
        run = demo(layers, Store.open(folder))
    if args.picture:
        draw(run.rows(), args.picture)
    print(run.sentence())
    return 0 if run.same else 1


def words(lines: list[dict[str, Any]]) -> str:
    """Return the text that was read, in one line."""
    return " / ".join(line["text"] for line in lines)


BEGAN = time.monotonic()
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main())
    except ChrekError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(int(error.exit_code))
    except KeyboardInterrupt:
        print("demo: interrupted; everything is removed", file=sys.stderr)
        sys.exit(130)

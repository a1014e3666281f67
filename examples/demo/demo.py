"""The demo: one server, started cold, checkpointed while it runs, killed, and brought back somewhere else.

The server (``image/app/server.py``) knows nothing of checkpoints. Both containers are plain runc containers without
privileges, with PID, network, mount, host name and IPC namespaces of their own; they share nothing but the image.
Exit status 0 only if the restored server's answer is the cold one's, to the last digit.
"""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import sys
import tempfile
import time
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
from layer import image_layers  # noqa: E402

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


def first_answer(container: Container) -> Any:  # noqa: ANN401
    """Wait until the server answers, send the picture, return the lines it read."""

    def up() -> bool:
        try:
            return bool(ask(container, "/health"))
        except OSError:
            return False

    container.until(up, timeout=PATIENCE, what="the server answered")
    return ask(container, "/read", PICTURE.read_bytes())["lines"]


def start(hostname: str, command: list[str], layers: list[Path], environment: dict[str, str]) -> Container:
    """Make one of the two containers: no privileges, the demo's image."""
    return Container(command, hostname=hostname, lower=layers, env={**ENVIRONMENT, **environment})


def bring_back(container: Container, store: Store) -> None:
    """Restore the checkpoint into a container whose init waits for it, as the agent of a node does."""

    def waits() -> bool:
        try:
            return read_state(container.pid1).mode == "waiting"
        except ChrekError:
            return False  # PID 1 has not got that far

    container.until(waits, what="the container's init waits")
    with Mailbox.claim(container.pid1, by="the demo") as mailbox:
        try:
            restore.restore(restore.Request(pid1=container.pid1, mailbox=mailbox, store=store, checkpoint_id=ID))
        except ChrekError as error:
            mailbox.failed(error.reason, error.message)
            raise


def main() -> int:
    """Run the demo; return its exit status."""
    remove_leftovers()
    layers = image_layers()
    folder = Path(tempfile.mkdtemp(prefix="store-", dir=REPO / ".cache/demo"))
    try:
        return demo(layers, Store.open(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def demo(layers: list[Path], store: Store) -> int:
    """Cold start, checkpoint, kill, restore, compare."""
    say("cold start in container one (host name cold-start)")
    began = time.monotonic()
    with start("cold-start", COMMAND, layers, {}) as one:
        answer = first_answer(one)
        cold = time.monotonic() - began
        who = ask(one, "/health")
        say(f"first answer after {cold:.2f} s from {who['host']}, process {who['pid']}: {words(answer)}")
        say("checkpoint, while the server runs")
        outcome = capture.capture(capture.Request(pid1=one.pid1, store=store, checkpoint_id=ID))
        say(
            f"checkpoint of {outcome.memory_bytes / 1e6:.0f} MB of memory in {outcome.seconds:.2f} s, "
            f"server frozen for {outcome.frozen_seconds:.2f} s, {outcome.stored_bytes / 1e6:.0f} MB stored"
        )
        if ask(one, "/read", PICTURE.read_bytes())["lines"] != answer:
            raise SystemExit("demo: the server gave another answer after its checkpoint")
        say("the server answers as before; now it is killed")
        one.kill(signal.SIGKILL)
        one.wait()
    say("restore in container two (host name restored, no privileges)")
    began = time.monotonic()
    with start("restored", COMMAND, layers, {"DYN_CHECKPOINT_HASH": ID}) as two:
        engine = time.monotonic()
        bring_back(two, store)
        again = first_answer(two)
        ended = time.monotonic()
        who = ask(two, "/health")
        say(f"first answer after {ended - began:.2f} s from {who['host']}, process {who['pid']}: {words(again)}")
        say(f"(counted from the start of ChReK's restore instead of the container's: {ended - engine:.2f} s)")
    same = again == answer and who["host"] == "restored"
    times = cold / (ended - began)
    print(
        f"demo: cold {cold:.2f} s, checkpoint {outcome.seconds:.2f} s (frozen {outcome.frozen_seconds:.2f} s), "
        f"restore {ended - began:.2f} s ({times:.1f} times faster), answers {'identical' if same else 'DIFFERENT'}"
    )
    return 0 if same else 1


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

"""``python -m chrek.integrations.vllm serve MODEL ...``: ``vllm serve`` that can be checkpointed.

Outside a checkpoint job (no ``DYN_CHECKPOINT_SIGNAL_FILE``) this becomes ``vllm serve`` with the same
arguments, by exec, and nothing else. In one it starts the server as its child and goes the way of
every application of ChReK: wait until it answers, send a few requests (compiled code and graphs are
made by then), put it to sleep with its weights streamed to files, be ready. Restored, it wakes the
server up; that is when the server may be called ready (``/health`` answers a little earlier).

The server's environment is set so that it can be dumped: workers started by spawn and not by fork
(forked ones inherit GPU descriptors that nothing closes), and no address of this pod in it.
io_uring is blocked by the container's init.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from chrek.integrations.vllm import guard, plugin
from chrek.workload import CheckpointFailed, Outcome, checkpoint_point
from chrek.workload.lifecycle import SIGNAL_FILE

STARTUP = "CHREK_VLLM_STARTUP_SECONDS"
STARTUP_SECONDS = 1800.0
WARMUP_TOKENS = 16
WARMUPS = 3
ANSWER_SECONDS = 600.0
POLL_SECONDS = 0.05
STOP_SECONDS = 30.0
FAILED, REFUSED = 170, 172
DEFAULT_PORT = 8000

SETTINGS: Mapping[str, str] = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_SERVER_DEV_MODE": "1",
    plugin.SWITCH: "1",
}
"""What the server has to be started with; a value that the user set is kept."""


def command(arguments: Sequence[str]) -> list[str]:
    """The command line of vLLM's own program."""
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments]


def main(arguments: Sequence[str]) -> int:
    """Run; the exit status is the server's own, or ChReK's if the checkpoint failed."""
    if not os.environ.get(SIGNAL_FILE):
        os.execv(sys.executable, command(arguments))
    server = Server(arguments)
    try:
        server.wait_until_up()
        server.warm_up()
        outcome = checkpoint_point(before=[server.sleep], after=[server.wake_up])
    except CheckpointFailed as failure:
        sys.stderr.write(f"chrek: the checkpoint failed: {failure}\n")
        server.stop()
        return REFUSED if failure.refused else FAILED
    except ServerFailed as failure:
        sys.stderr.write(f"chrek: {failure}\n")
        return server.stop() or 1
    except SystemExit:
        server.stop()
        raise
    if outcome is Outcome.CHECKPOINTED:
        server.stop()
        return 0
    return server.wait()


class ServerFailed(Exception):
    """The server ended, did not come up, or refused a request."""


class WakeUpFailed(ServerFailed):
    """A restored server did not get its memory back."""

    state_unusable = True
    """See `chrek.workload.lifecycle.UNUSABLE`."""


class Server:
    """The child that serves."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._token = secrets.token_hex(16)
        self._port = port_of(arguments)
        guarded = "VLLM_SERVER_DEV_MODE" not in os.environ
        environment = {**SETTINGS, **os.environ, guard.TOKEN_VARIABLE: self._token}
        self._process = subprocess.Popen(command(complete(arguments, guarded=guarded)), env=environment)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._forward)

    def _forward(self, number: int, _frame: object) -> None:
        self._process.send_signal(number)

    def wait_until_up(self) -> None:
        """Wait for ``/health``; raises `ServerFailed` if the server ends or the time is over."""
        allowed = float(os.environ.get(STARTUP, STARTUP_SECONDS))
        deadline = time.monotonic() + allowed
        while True:
            if (status := self._process.poll()) is not None:
                raise ServerFailed(f"the server ended with status {status} before it answered")
            try:
                if self._request("GET", "/health")[0] == http.client.OK:
                    return
            except OSError:
                pass
            if time.monotonic() > deadline:
                raise ServerFailed(f"the server did not answer within {allowed:g} s ({STARTUP})")
            time.sleep(POLL_SECONDS)

    def warm_up(self) -> None:
        """Have every model generate some tokens; models that do not (embeddings) are left alone."""
        _, body = self._request("GET", "/v1/models")
        for model in json.loads(body).get("data", []):
            prompt = {"model": model["id"], "prompt": [1] * 8, "max_tokens": WARMUP_TOKENS, "ignore_eos": True}
            for _ in range(WARMUPS):
                status, answer = self._request("POST", "/v1/completions", prompt)
                if status != http.client.OK:
                    sys.stderr.write(f"chrek: no warm-up of {model['id']}: {status} {answer[:200]!r}\n")
                    break

    def sleep(self) -> None:
        """Weights to files, GPU memory free; raises `ServerFailed`."""
        self._must("/sleep?level=1")

    def wake_up(self) -> None:
        """Weights back; raises `WakeUpFailed`, the container is started cold then."""
        try:
            self._must("/wake_up")
        except (ServerFailed, OSError) as error:
            raise WakeUpFailed(str(error)) from error

    def _must(self, path: str) -> None:
        start = time.monotonic()
        status, answer = self._request("POST", path)
        if status != http.client.OK:
            raise ServerFailed(f"{path} gave {status}: {answer[:300]!r}")
        sys.stderr.write(f"chrek: {path} {time.monotonic() - start:.2f} s\n")

    def _request(self, method: str, path: str, value: Any = None) -> tuple[int, bytes]:  # noqa: ANN401 - JSON
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_SECONDS)
        headers = {"Content-Type": "application/json", "Connection": "close", "X-Chrek-Token": self._token}
        try:
            connection.request(method, path, None if value is None else json.dumps(value), headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def wait(self) -> int:
        """The server's exit status, 128 + n for a signal."""
        status = self._process.wait()
        return status if status >= 0 else 128 - status

    def stop(self) -> int:
        """End the server if it still runs; its exit status."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return self.wait()


def complete(arguments: Sequence[str], *, guarded: bool) -> list[str]:
    """The arguments with what a checkpoint needs."""
    more = [] if "--enable-sleep-mode" in arguments else ["--enable-sleep-mode"]
    if plugin.has_option():
        chosen = [argument for argument in arguments if argument.partition("=")[0] == plugin.OPTION]
        more += [] if chosen else [plugin.OPTION, plugin.NAME]
    if guarded:
        more += ["--middleware", f"{guard.__name__}.{guard.Guard.__name__}"]
    return [*arguments, *more]


def port_of(arguments: Sequence[str]) -> int:
    """The port that the server will listen on."""
    for index, argument in enumerate(arguments):
        name, sign, value = argument.partition("=")
        if name == "--port":
            return int(value if sign else arguments[index + 1])
    return DEFAULT_PORT

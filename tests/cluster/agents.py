"""An agent as a process of the node, with the test's own store: started, killed and started again in no time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.kube.processes import wait_for
from cluster.workspace import Workspace

MORTAL = Path(__file__).with_name("mortal.py")


class Agent:
    """`chrek agent` for one namespace, or for all; a context manager."""

    def __init__(self, workspace: Workspace, folder: Path, **settings: Any) -> None:
        """Prepare one with these settings; ``kubeconfig`` among them is another way into the API."""
        kubeconfig = settings.pop("kubeconfig", workspace.cluster.kubeconfig)
        self.store = Path(settings.get("store", folder / "store"))
        self.store.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._log = folder / "agent.log"
        self._config = folder / "agent.json"
        self._config.write_text(
            json.dumps({"store": str(self.store), "port": self.port, "log_format": "text", **settings})
        )
        self._arguments = [
            "--config",
            str(self._config),
            "--kubeconfig",
            str(kubeconfig),
        ]
        places = {"NODE_NAME": workspace.cluster.node, "POD_NAMESPACE": workspace.namespace}
        self._environment = {**os.environ, **places}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, until: str = "", alone: bool = False, ready: bool = True) -> None:
        """Start, and wait until it is *ready*; *until* is a step at which it dies, *alone* or not: see `mortal`."""
        program = ["-c", "import chrek.cli; chrek.cli.main()"] if not until else [str(MORTAL), until]
        environment = {**self._environment, "ALONE": ""} if alone else self._environment
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *program, "agent", *self._arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for("agent", 30, lambda: self.get("/readyz")[0] in ((200,) if ready else (200, 503)))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it by a signal, and wait for its end; return its exit status."""
        assert self._process is not None
        self._process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end; return its exit status."""
        assert self._process is not None
        status = self._process.wait(timeout=60)
        self._process = None
        return status

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def log_file(self) -> Path:
        """Where it says what it does."""
        return self._log

    @property
    def log(self) -> str:
        """What it has said."""
        return self._log.read_text(errors="replace")

    def get(self, path: str) -> tuple[int, str]:
        """Ask it over HTTP; status 0: nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metric(self, name: str, **labels: str) -> float:
        """Return one number of /metrics; 0 where it is not."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        for line in self.get("/metrics")[1].splitlines():
            head, _, value = line.rpartition(" ")
            if head.partition("{")[0] == name and all(each in head for each in wanted):
                return float(value)
        return 0.0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.stop()
        if kind is not None:
            sys.stderr.write(f"--- agent's log\n{self.log[-8000:]}\n")

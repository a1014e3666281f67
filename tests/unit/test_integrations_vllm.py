"""vLLM under checkpoints: the backend over a stand-in of vLLM's allocator, the launcher around a small server."""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from chrek.integrations.vllm import guard, launch, plugin
from chrek.workload.pool import PoolCorrupt, PoolError
from chrek.workload.pool.cuda import Cuda
from chrek.workload.pool.layout import BLOBS
from chrek.workload.pool.memory import Segment, drop, fill, reserve
from chrek.workload.pool.places import home
from chrekcli import reserve_port
from gpu import cudastandin

MIB = 1 << 20
needs_compiler = pytest.mark.skipif(cudastandin.compiler() is None, reason="needs a C compiler for the stand-in driver")

FAKE_BACKENDS = """
class CuMemBackend:
    def __init__(self): self._state, self.calls = "RUNNING", []
    def suspend(self, level=1): self.calls.append(("suspend", level))
    def resume(self, tags=None): self.calls.append(("resume", tags))
    def state(self): return self._state
class SleepModeBackendFactory:
    _registry = {"cumem": lambda: CuMemBackend}
"""
FAKE_SERVER = """
import http.server, json, os, sys
PORT = int(sys.argv[sys.argv.index("--port") + 1])
def log(text):
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(text + "\\n")
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        shown = self.headers.get("X-Chrek-Token") == os.environ.get("CHREK_VLLM_TOKEN")
        log(f"{self.command} {self.path} {shown}")
        status = {"/sleep": os.environ.get("FAKE_SLEEP"), "/wake_": os.environ.get("FAKE_WAKE")}.get(self.path[:6])
        status = int(status or 200)
        data = json.dumps({"data": [{"id": "m"}]} if self.path == "/v1/models" else {}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    do_GET = do_POST = answer
if os.environ.get("FAKE_END"):
    sys.exit(7)
names = {"spawn": "VLLM_WORKER_MULTIPROC_METHOD", "stream": "CHREK_VLLM_STREAM"}
log(json.dumps({"argv": sys.argv[1:], **{key: os.environ.get(name) for key, name in names.items()}}))
http.server.HTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
"""
Fake = Any
"""A module that stands in for vLLM's."""


# --- the backend ----------------------------------------------------------------------------------------
class Module:
    """The part of vLLM's cumem module that the plugin uses, over the stand-in driver."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._segments: dict[int, Segment] = {}
        self._held: dict[int, Any] = {}
        self.broken = ""
        instance = SimpleNamespace(pointer_to_data=self._held)
        self.CuMemAllocator = SimpleNamespace(get_instance=lambda: instance)

    def allocate(self, size: int, tag: str) -> int:
        """An allocation as vLLM's pool would make it."""
        segment = reserve(self._cuda, 0, size)
        self._segments[segment.address] = segment
        handle = (0, segment.size, segment.address, 0)
        self._held[segment.address] = SimpleNamespace(handle=handle, tag=tag, is_asleep=False)
        return segment.address

    def create_and_map(self, handle: tuple[int, int, int, int]) -> None:
        """Map memory again."""
        if self.broken == "map":
            raise RuntimeError("no memory")
        fill(self._cuda, self._segments[handle[2]])

    def unmap_and_release(self, handle: tuple[int, int, int, int]) -> None:
        """Take memory away."""
        if self.broken == "unmap" and len([s for s in self._segments.values() if s.resident]) < 3:
            self.broken = ""
            raise RuntimeError("no unmapping")
        drop(self._cuda, self._segments[handle[2]])


class QuietAllocator(plugin.Allocator):
    """Without PyTorch."""

    @staticmethod
    def synchronise() -> None:
        """Nothing is under way."""

    @staticmethod
    def trim() -> None:
        """Nothing is kept."""


class Worker:
    """A worker with two weights and a cache."""

    def __init__(self, standin: cudastandin.StandIn) -> None:
        self.module = Module(Cuda(str(standin.library)))
        self.stream = plugin.Stream(QuietAllocator(self.module), library=str(standin.library))
        chance = random.Random(1)
        self.weights = {self.module.allocate(size, "weights"): chance.randbytes(size) for size in (2 * MIB, 9 * MIB)}
        self.cache = self.module.allocate(4 * MIB, "kv_cache")
        for address, data in self.weights.items():
            ctypes.memmove(address, data, len(data))

    def intact(self) -> bool:
        """Whether the weights are what they were."""
        return all(ctypes.string_at(address, len(data)) == data for address, data in self.weights.items())


@pytest.fixture
def standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[cudastandin.StandIn]:
    """A driver, and a directory to stream to."""
    monkeypatch.setenv("CHREK_POOL_DIRECTORY", str(tmp_path / "gpu"))
    with cudastandin.machine(tmp_path) as made:
        yield made


@needs_compiler
def test_weights_go_and_come(standin: cudastandin.StandIn) -> None:
    """Asleep no GPU memory is left; awake the weights are what they were and the cache has memory."""
    worker = Worker(standin)
    worker.stream.out()
    assert (standin.live, len(worker.stream.away)) == (0, 3)
    worker.stream.back(None)
    assert (standin.live, worker.stream.away) == (3, set())
    assert worker.intact()


@needs_compiler
def test_waking_up_by_tags(standin: cudastandin.StandIn) -> None:
    """Weights and cache can come back one after the other."""
    worker = Worker(standin)
    worker.stream.out()
    worker.stream.back(["weights"])
    assert (standin.live, worker.stream.away) == (2, {worker.cache})
    assert worker.intact()
    worker.stream.back(["kv_cache"])
    assert standin.live == 3


@needs_compiler
def test_what_vllm_keeps_is_kept(standin: cudastandin.StandIn) -> None:
    """Runtime state comes back with the first waking up, whatever is asked for; scratch comes back empty."""
    worker = Worker(standin)
    state = worker.module.allocate(3 * MIB, "runtime")
    later = worker.module.allocate(2 * MIB, "a tag of tomorrow")
    worker.module.allocate(2 * MIB, "workspace")
    for address in (state, later):
        ctypes.memset(address, 7, 2 * MIB)
    worker.stream.out()
    assert standin.live == 0
    worker.stream.back(["kv_cache"])
    assert worker.stream.away == set(worker.weights)
    assert all(ctypes.string_at(address, 2 * MIB) == b"\7" * (2 * MIB) for address in (state, later))
    worker.stream.back(["weights"])
    assert worker.intact()
    assert worker.stream.away == set()


@needs_compiler
def test_what_vllm_has_discarded_is_left_to_it(standin: cudastandin.StandIn) -> None:
    """Memory that sleeps already is neither written nor unmapped again, nor mapped by us."""
    worker = Worker(standin)
    entry = worker.module.CuMemAllocator.get_instance().pointer_to_data[worker.cache]
    worker.module.unmap_and_release(entry.handle)
    entry.is_asleep = True
    worker.stream.out()
    assert worker.stream.away == set(worker.weights)
    assert worker.stream.others_sleep()
    worker.stream.back(None)
    assert (worker.intact(), worker.stream.others_sleep(), entry.is_asleep) == (True, True, True)


@needs_compiler
def test_a_failure_on_the_way_out_leaves_the_worker_awake(
    standin: cudastandin.StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room, or an allocation that cannot be unmapped: everything is mapped and intact."""
    worker = Worker(standin)
    monkeypatch.setenv("CHREK_POOL_DIRECTORY", "/proc/nowhere")
    with pytest.raises(PoolError):
        worker.stream.out()
    assert worker.intact()
    monkeypatch.undo()
    os.environ["CHREK_POOL_DIRECTORY"] = str(standin.path.parent / "gpu")
    os.environ["CHREK_STANDIN"] = str(standin.path)
    worker.module.broken = "unmap"
    with pytest.raises(RuntimeError, match="no unmapping"):
        worker.stream.out()
    assert (standin.live, worker.stream.away) == (3, set())
    assert worker.intact()


@needs_compiler
def test_a_failure_on_the_way_back_leaves_the_worker_asleep(standin: cudastandin.StandIn, tmp_path: Path) -> None:
    """A damaged file or missing memory: nothing is mapped, and another attempt works."""
    worker = Worker(standin)
    worker.stream.out()
    blob = max((tmp_path / "gpu" / home("vllm") / BLOBS).iterdir(), key=lambda path: path.stat().st_size)
    good = blob.read_bytes()
    blob.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(PoolCorrupt):
        worker.stream.back(None)
    worker.module.broken = "map"
    with pytest.raises(RuntimeError, match="no memory"):
        worker.stream.back(None)
    assert standin.live == 0
    worker.module.broken = ""
    blob.write_bytes(good)
    worker.stream.back(None)
    assert worker.intact()


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A module with the names of vLLM's sleep-mode backends."""
    package = tmp_path / "site" / "vllm"
    (package / "device_allocator").mkdir(parents=True)
    (package / "entrypoints" / "cli").mkdir(parents=True)
    for directory in (package, package / "device_allocator", package / "entrypoints", package / "entrypoints" / "cli"):
        (directory / "__init__.py").touch()
    (package / "device_allocator" / "sleep_mode_backend.py").write_text(FAKE_BACKENDS)
    (package / "entrypoints" / "cli" / "main.py").write_text(FAKE_SERVER)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield importlib.import_module(plugin.BACKENDS)
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


def test_without_the_switch_vllm_is_untouched(fake_vllm: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed plugin does nothing outside a checkpoint job."""
    monkeypatch.delenv("CHREK_VLLM_STREAM", raising=False)
    plugin.register()
    assert list(fake_vllm.SleepModeBackendFactory._registry) == ["cumem"]


def test_the_default_backend_is_taken_over_and_given_back(fake_vllm: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other levels go to vLLM's own backend, and after one round everything does."""
    monkeypatch.setenv("CHREK_VLLM_STREAM", "1")
    plugin.register()
    plugin.register()
    registry = fake_vllm.SleepModeBackendFactory._registry
    assert registry["cumem"] is registry["chrek"]
    steps: list[str] = []

    class Recorder:
        away: ClassVar[set[int]] = set()

        def out(self) -> None:
            steps.append("out")
            self.away.add(1)

        def back(self, tags: list[str] | None) -> None:
            steps.append(f"back {tags}")
            self.away.clear()

        def others_sleep(self) -> bool:
            return False

    monkeypatch.setattr(plugin, "_allocator", lambda: None)
    monkeypatch.setattr(plugin, "Stream", lambda _: Recorder())
    backend = registry["cumem"]()()
    backend.suspend(2)
    backend.suspend(1)
    assert backend.state() == "SUSPENDED"
    backend.resume(None)
    assert (steps, backend.state()) == (["out", "back None"], "RUNNING")
    backend.suspend(1)
    backend.resume(["weights"])
    assert backend.calls == [("suspend", 2), ("suspend", 1), ("resume", ["weights"])]
    assert type(backend).supports_durable_storage()


def test_a_vllm_that_can_be_told(fake_vllm: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an option for the backend the default one is left alone, and the launcher gives the option."""
    engine = Path(fake_vllm.__file__).parents[1] / "engine"
    engine.mkdir()
    (engine / "arg_utils.py").write_text('parser.add_argument("--sleep-mode-backend", type=str)')
    monkeypatch.setenv("CHREK_VLLM_STREAM", "1")
    plugin.register()
    registry = fake_vllm.SleepModeBackendFactory._registry
    assert registry["chrek"] is not registry["cumem"]
    added = launch.complete(["serve", "m"], guarded=False)
    assert added == ["serve", "m", "--enable-sleep-mode", "--sleep-mode-backend", "chrek"]
    given = ["serve", "m", "--enable-sleep-mode", "--sleep-mode-backend=cumem"]
    assert launch.complete(given, guarded=False) == given


def test_a_vllm_without_pluggable_sleep(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An older vLLM keeps its own sleep mode, and the log says so."""
    monkeypatch.setenv("CHREK_VLLM_STREAM", "1")
    monkeypatch.setitem(sys.modules, "vllm", None)
    plugin.register()
    assert "no pluggable sleep mode" in caplog.text


# --- the guard ------------------------------------------------------------------------------------------
def ask_guard(path: str, headers: list[tuple[bytes, bytes]], kind: str = "http") -> str:
    """What the guard does with a request: passed, or what it answers."""
    sent: list[MutableMapping[str, Any]] = []
    passed: list[str] = []

    async def app(scope: guard.Scope, receive: guard.Receive, send: guard.Send) -> None:
        passed.append(scope["type"])

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        return {}

    scope = {"type": kind, "path": path, "headers": headers}
    asyncio.run(guard.Guard(app)(scope, receive, send))
    return "passed" if passed else str(sent[0].get("status", sent[0]["type"]))


@pytest.mark.parametrize(
    ("path", "headers", "kind", "expected"),
    [
        ("/v1/completions", [], "http", "passed"),
        ("/health", [], "http", "passed"),
        ("/sleep", [], "http", "404"),
        ("/sleep", [(b"x-chrek-token", b"wrong")], "http", "404"),
        ("/sleep", [(b"x-chrek-token", b"secret")], "http", "passed"),
        ("/collective_rpc", [], "http", "404"),
        ("/v1../collective_rpc", [], "http", "404"),
        ("/healthy", [], "http", "404"),
        ("/own/path", [], "http", "passed"),
        ("/sleep", [], "websocket", "websocket.close"),
        ("", [], "lifespan", "passed"),
    ],
)
def test_who_may_ask_for_what(
    monkeypatch: pytest.MonkeyPatch, path: str, headers: list[tuple[bytes, bytes]], kind: str, expected: str
) -> None:
    """The ordinary API answers everyone, the paths of development only the launcher."""
    monkeypatch.setenv("CHREK_VLLM_TOKEN", "secret")
    monkeypatch.setenv("CHREK_VLLM_PATHS", "/own, ")
    assert ask_guard(path, headers, kind) == expected


def test_without_a_token_nobody_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty token opens nothing."""
    monkeypatch.delenv("CHREK_VLLM_TOKEN", raising=False)
    assert ask_guard("/sleep", [(b"x-chrek-token", b"")]) == "404"


# --- the launcher ---------------------------------------------------------------------------------------
class Job:
    """A checkpoint job around the launcher."""

    def __init__(self, directory: Path, **variables: str) -> None:
        self.directory = directory
        self.log = directory / "server.log"
        self.log.touch()
        self.held = reserve_port()
        self.port = int(self.held.getsockname()[1])
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "VLLM_", "CHREK_"))},
            "PYTHONPATH": f"{directory / 'site'}:{Path(launch.__file__).parents[3]}",
            "DYN_CHECKPOINT_SIGNAL_FILE": str(directory / "signal"),
            "DYN_CHECKPOINT_READY_FILE": str(directory / "ready"),
            "DYN_RESTORE_MARKER_FILE": str(directory / "marker"),
            "FAKE_LOG": str(self.log),
            **variables,
        }
        command = [sys.executable, "-m", "chrek.integrations.vllm", "serve", "model", "--port", str(self.port)]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def wait_for(self, name: str) -> None:
        """Wait until a file is there and not empty."""
        path = self.directory / name
        for _ in range(6000):
            if self.process.poll() is not None:
                raise AssertionError(self.end())
            if path.exists() and path.read_text():
                return
            try:
                self.process.wait(0.01)
            except subprocess.TimeoutExpired:
                continue
        raise AssertionError(f"{name} did not appear")

    def end(self) -> tuple[int, str]:
        """Exit status and standard error."""
        _, text = self.process.communicate(timeout=60)
        self.held.close()
        return self.process.returncode, text

    def asked(self) -> list[str]:
        """What the server was asked, and whether with the token; `/health` once."""
        lines = [line for line in self.log.read_text().splitlines() if not line.startswith("{")]
        return list(dict.fromkeys(lines))


ASLEEP = ["GET /health True", "GET /v1/models True", "POST /v1/completions True", "POST /sleep?level=1 True"]


def test_a_checkpoint(fake_vllm: Fake, tmp_path: Path) -> None:
    """Up, warmed up, asleep, ready; when the checkpoint is taken the server is ended and the status is 0."""
    job = Job(tmp_path)
    job.wait_for("ready")
    assert job.asked() == ASLEEP
    started = json.loads(job.log.read_text().splitlines()[0])
    assert started["argv"][:2] == ["serve", "model"]
    assert "--enable-sleep-mode" in started["argv"]
    assert "chrek.integrations.vllm.guard.Guard" in started["argv"]
    assert (started["spawn"], started["stream"]) == ("spawn", "1")
    (tmp_path / "signal").write_text('{"success": true}')
    assert job.end()[0] == 0
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(f"http://127.0.0.1:{job.port}/health", timeout=60)


def test_a_restore(fake_vllm: Fake, tmp_path: Path) -> None:
    """With the marker there the server is woken up and serves; signals reach it and its end is the launcher's."""
    job = Job(tmp_path)
    job.wait_for("ready")
    (tmp_path / "ready").unlink()
    (tmp_path / "marker").write_text('{"success": true}')
    job.wait_for("ready")
    assert job.asked() == [*ASLEEP, "POST /wake_up True"]
    with urllib.request.urlopen(f"http://127.0.0.1:{job.port}/health", timeout=60) as answer:
        assert answer.status == 200
    job.process.send_signal(signal.SIGTERM)
    assert job.end()[0] == 128 + signal.SIGTERM


def test_a_server_that_does_not_wake_up(fake_vllm: Fake, tmp_path: Path) -> None:
    """Weights that do not come back end the launcher with the status that asks for a cold start, and the server with it."""
    job = Job(tmp_path, FAKE_WAKE="500")
    job.wait_for("ready")
    (tmp_path / "marker").write_text('{"success": true}')
    code, text = job.end()
    assert (code, "/wake_up gave 500" in text) == (171, True)
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(f"http://127.0.0.1:{job.port}/health", timeout=60)


@pytest.mark.parametrize(("refused", "status"), [(False, 170), (True, 172)])
def test_a_failed_checkpoint(fake_vllm: Fake, tmp_path: Path, *, refused: bool, status: int) -> None:
    """The job fails with ChReK's status and says why."""
    job = Job(tmp_path)
    job.wait_for("ready")
    failure = {"success": False, "error": "disk on fire", "refused": refused}
    (tmp_path / "signal").write_text(json.dumps(failure))
    code, text = job.end()
    assert (code, "disk on fire" in text) == (status, True)


def test_a_server_that_does_not_come_up(fake_vllm: Fake, tmp_path: Path) -> None:
    """Its status is the launcher's; no ready file is written."""
    code, text = Job(tmp_path, FAKE_END="1").end()
    assert (code, "ended with status 7" in text) == (7, True)
    assert not (tmp_path / "ready").exists()


def test_a_server_that_cannot_sleep(fake_vllm: Fake, tmp_path: Path) -> None:
    """No ready file: a server that still holds its GPU memory is not checkpointed."""
    code, text = Job(tmp_path, FAKE_SLEEP="500").end()
    assert code != 0
    assert "/sleep?level=1 gave 500" in text
    assert not (tmp_path / "ready").exists()


def test_outside_a_job_it_is_vllm(fake_vllm: Fake, tmp_path: Path) -> None:
    """Without the contract's variables the arguments reach vLLM as they are."""
    job = Job(tmp_path, DYN_CHECKPOINT_SIGNAL_FILE="")
    job.wait_for("server.log")
    started = json.loads(job.log.read_text().splitlines()[0])
    assert started == {"argv": ["serve", "model", "--port", str(job.port)], "spawn": None, "stream": None}
    job.process.terminate()
    job.end()


@pytest.mark.parametrize(
    ("arguments", "port"), [(["serve", "m"], 8000), (["--port", "9"], 9), (["--port=10", "m"], 10)]
)
def test_the_port(arguments: list[str], port: int) -> None:
    """Both ways to write the option are read."""
    assert launch.port_of(arguments) == port

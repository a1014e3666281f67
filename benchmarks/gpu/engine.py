"""A GPU server through a whole checkpoint and restore, three ways in one run: ``engine.py --directory /mnt/t --out FILE``.

* **stock**: stock CRIU, and the driver's own calls around it;
* **transparent**: ChReK's engine, the application unchanged: the driver moves GPU memory into the process;
* **pooled**: ChReK's engine, weights in a TensorPool.

The application is ``server.py``: bf16 weights, a CUDA graph over them, an HTTP front. "To the first output" ends when the
restored process has replayed the graph; its output is compared bit for bit with that before the checkpoint, and once
more over HTTP. Everything lies in a memory file system, so storage is "page cache hot". Each of ChReK's two programs is
a fresh process, as an agent's or the command line's is; its start counts. The file of results is complete after
each size, so a run that is cut short has what it measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from core_bench.place import INIT, NAMESPACES, SOURCE_PID, TARGET_PID, Place, enter_private_mounts  # noqa: E402

if TYPE_CHECKING:
    from chrek.system.ids import HostPid

SERVER = Path(__file__).with_name("server.py")
PORT = 8124
KDAT = b"/run/criu.kdat"
STARTING = 240.0
Sample = dict[str, Any]


# --- the application -------------------------------------------------------------------------------------
class Application:
    """One model in one mode, in its own directory of the memory file system."""

    def __init__(self, directory: Path, gigabytes: float, mode: str) -> None:
        self.name = f"{gigabytes:g}-{mode}"
        self.mode = mode
        self.home = directory / self.name
        self.store = self.home / "store"
        self.images = self.home / "images"
        self.events = self.home / "events"
        self.marker = self.home / "restored"
        self.store.mkdir(parents=True)
        words = ["--gb", f"{gigabytes:g}", "--mode", mode, "--port", str(PORT), "--log", str(self.events)]
        self.command = [sys.executable, str(SERVER), *words]
        # What a process that is restored on this machine finds as its own, whatever tool restores it.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "CHREK_"))}
        self.base = {**kept, "DYN_RESTORE_MARKER_FILE": str(self.marker), "DYN_CHECKPOINT_HASH": "bench"}
        self.contract = {
            **self.base,
            "DYN_CHECKPOINT_SIGNAL_FILE": str(self.home / "signal"),
            "DYN_CHECKPOINT_READY_FILE": str(self.home / "ready"),
            "DYN_CHECKPOINT_LOCATION": str(self.store / "bench"),
            "DYN_CHECKPOINT_STORAGE_TYPE": "pvc",
        }

    @contextmanager
    def running(self) -> Iterator[tuple[Place, Sample]]:
        """Start it and wait until it is ready to be checkpointed; the place, and what it said of its start."""
        since = time.time()
        with Place([*INIT, "--", *self.command], self.contract, SOURCE_PID) as place:
            said = self.event("ready", since, STARTING)
            until((self.home / "ready").exists, 30, "the ready file")
            yield place, said

    def event(self, name: str, since: float, seconds: float) -> Sample:
        """Wait for an event that is newer than `since` (seconds of the epoch)."""
        found: list[Sample] = []

        def look() -> bool:
            lines = self.events.read_text().splitlines() if self.events.exists() else []
            every = [json.loads(line) for line in lines if line.endswith("}")]
            found[:] = [one for one in every if one["event"] == name and one["time"] >= since]
            return bool(found)

        until(look, seconds, f"{self.name}: {name}")
        return found[0]

    def output(self, since: float) -> Sample:
        """Wait for the first output after a restore; seconds from `since`, and whether every output is exact."""
        said = self.event("output", since, 120)
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", timeout=30) as answer:
            over_http = json.loads(answer.read())["exact"]
        exact = bool(said["exact"] and over_http)
        return {"to_output": round(said["time"] - since, 3), "exact": exact, "back": said.get("back")}


def until(happened: Any, seconds: float, what: str) -> None:  # noqa: ANN401
    """Wait for something that gives no event."""
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.002)


# --- stock CRIU and the driver's calls -------------------------------------------------------------------
class Stock:
    """Stock CRIU out of the bundle, with the cache of kernel features where it usually is."""

    def __init__(self, bundle: Path, scratch: Path) -> None:
        self.bundle = bundle
        self.program = scratch / "criu"
        data = (bundle / "criu").read_bytes()
        known = next(
            one for one in (b"/sys/criu.kdat", b"/proc/.no.kdat", b"criu.kdat\0\0\0\0\0", KDAT) if b"\0" + one + b"\0" in data
        )
        self.program.write_bytes(data.replace(known, KDAT.ljust(len(known), b"\0")))
        self.program.chmod(0o755)

    def _run(self, place: Place, images: Path, *words: str) -> float:
        loader = [str(self.bundle / "ld.so"), "--library-path", str(self.bundle / "lib"), str(self.program)]
        common = ["--file-locks", "--link-remap", "--ext-unix-sk", "--tcp-established", "--network-lock", "skip"]
        command = ["nsenter", "-t", str(place.pid1), *NAMESPACES, *loader, *words, "-D", str(images), *common]
        began = time.monotonic()
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            log = (images / f"{words[0]}.log").read_text(errors="replace").splitlines()[-6:]
            raise RuntimeError(f"stock CRIU: {result.stderr} {log}")
        return time.monotonic() - began

    def capture(self, application: Application, place: Place) -> Sample:
        """Save GPU state, dump, let it run on."""
        state, processes = gpu_state(place)
        application.images.mkdir()
        began = time.monotonic()
        held = state.capture(processes.values()) if state else None
        saved = time.monotonic() - began
        words = ("dump", "-t", str(place.application()), "--leave-running", "--ghost-limit", "2G", "-o", "dump.log")
        criu = self._run(place, application.images, *words)
        back = time.monotonic()
        if state and held:
            state.resume(held)
        now = time.monotonic()
        return {
            "seconds": round(now - began, 3),
            "phases": {"gpu save": saved, "criu": criu, "gpu resume": now - back},
            "processes": [pid for pid, host in processes.items() if held and host in held.pids],
            "bytes": size_of(application.images),
        }

    def restore(self, application: Application, processes: list[int]) -> Sample:
        """Restore CRIU's part, then GPU state."""
        from chrek.system import procfs
        from chrek.system.ids import HostPid

        with Place(["sleep", "infinity"], application.base, TARGET_PID) as place:
            state, _ = gpu_state(place)
            since = time.time()
            application.marker.write_text("{}")
            criu = self._run(place, application.images, "restore", "-d", "-o", "restore.log")
            began = time.monotonic()
            members = {int(ns): host for ns, host in procfs.in_namespace(procfs.members("pid", HostPid(place.pid1))).items()}
            if state:
                state.restore([members[pid] for pid in processes])
            gpu = time.monotonic() - began
            return {**application.output(since), "phases": {"criu": criu, "gpu restore": gpu}}


def gpu_state(place: Place) -> tuple[Any, dict[int, HostPid]]:
    """The driver's part and the tree's processes by the id in their namespace; no driver, no part."""
    from chrek.cuda.driver import Driver
    from chrek.cuda.sequence import GpuState
    from chrek.errors import Refused
    from chrek.system import procfs
    from chrek.system.ids import HostPid

    found = procfs.in_namespace(procfs.tree(HostPid(place.pid1)))
    processes = {int(ns): host for ns, host in found.items()}
    try:
        state = GpuState(Driver())
    except Refused:
        return None, processes
    state.driver.ready(60)
    return state, processes


# --- ChReK -----------------------------------------------------------------------------------------------
def chrek_capture(application: Application, place: Place) -> Sample:
    """One capture by a fresh process."""
    began = time.monotonic()
    result = worker(what="capture", pid1=place.pid1, store=str(application.store))
    return {**result, "seconds": round(time.monotonic() - began, 3), "bytes": size_of(application.store)}


def chrek_restore(application: Application) -> Sample:
    """One restore by a fresh process into a waiting init."""
    from chrek.errors import Refused
    from chrek.system.ids import HostPid
    from chrek.system.initstate import read_state

    def waiting(pid1: HostPid) -> bool:
        try:
            return read_state(pid1).mode == "waiting"
        except Refused:
            return False

    with Place([*INIT, "--", "false"], application.base, TARGET_PID) as place:
        until(lambda: waiting(HostPid(place.pid1)), 30, "the init to wait")
        since = time.time()
        result = worker(what="restore", pid1=place.pid1, store=str(application.store))
        output = application.output(since)
        from_engine = round(output["to_output"] - (result["began"] - since), 3)
        return {**output, "engine_to_output": from_engine, **result}


def worker(**task: object) -> Sample:
    """Run one call of the engine in a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--worker", json.dumps(task)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"ChReK: {result.stderr[-4000:]}")
    answer: Sample = json.loads(result.stdout)
    return answer


def work(task: Sample) -> Sample:
    """The worker's part."""
    began = time.time()
    from chrek.engine import capture, restore
    from chrek.store.layout import Store
    from chrek.system.ids import HostPid
    from chrek.system.mailbox import Mailbox

    pid1 = HostPid(task["pid1"])
    with Store.open(task["store"], create=True) as store:
        if task["what"] == "capture":
            taken = capture.capture(capture.Request(pid1=pid1, store=store, checkpoint_id="bench"))
            return {"engine": taken.seconds, "phases": dict(taken.phases), "frozen": taken.frozen_seconds}
        with Mailbox.claim(pid1, by="benchmark") as mailbox:
            done = restore.restore(
                restore.Request(pid1=pid1, mailbox=mailbox, store=store, checkpoint_id="bench")
            )
    return {"began": began, "engine": done.seconds, "phases": dict(done.phases), "memory": done.memory_bytes}


# --- one size ----------------------------------------------------------------------------------------------
def measure(directory: Path, gigabytes: float, ways: list[str], stock: Stock, rounds: int) -> Sample:
    """Every way for one size: the same process dumped by stock CRIU and by ChReK, another one with a pool."""
    found: Sample = {"gigabytes": gigabytes}

    def attempt(way: str, step: Any, *arguments: object) -> Sample | None:  # noqa: ANN401
        try:
            result: Sample = step(*arguments)
        except Exception as error:  # noqa: BLE001 - the other ways are still worth knowing
            found.setdefault(way, {}).setdefault("failed", []).append(f"{error!r}"[:3000])
            print(f"{gigabytes:g} GB {way}: {error!r}"[-3000:], flush=True)
            return None
        print(f"{gigabytes:g} GB {way} {step.__name__}: {json.dumps(result)}", flush=True)
        return result

    for mode, mine in (("pooled", ["pooled"]), ("transparent", ["transparent", "stock"])):
        wanted = [way for way in mine if way in ways]
        if not wanted:
            continue
        application = Application(directory, gigabytes, mode)
        try:
            with application.running() as (place, said):
                print(f"{gigabytes:g} GB {mode}: {json.dumps(said)}", flush=True)
                for way in wanted:
                    found[way] = {key: said.get(key) for key in ("cold", "out", "exact")}
                    step = chrek_capture if way != "stock" else stock.capture
                    found[way]["capture"] = attempt(way, step, application, place)
            for way in wanted:
                taken = found[way]["capture"]
                if taken is None:
                    continue
                for _ in range(1 if way == "stock" or (gigabytes > 20 and way != "pooled") else rounds):
                    if way == "stock":
                        done = attempt(way, stock.restore, application, taken["processes"])
                    else:
                        done = attempt(way, chrek_restore, application)
                    found[way].setdefault("restores", []).append(done)
                shutil.rmtree(application.images if way == "stock" else application.store)
        except Exception as error:  # noqa: BLE001 - the next size is still worth knowing
            found.setdefault("failed", []).append(f"{mode}: {error!r}"[:3000])
            print(f"{gigabytes:g} GB {mode}: {error!r}"[-3000:], flush=True)
        finally:
            shutil.rmtree(application.home, ignore_errors=True)
    return found


def size_of(directory: Path) -> int:
    """Bytes of the files below."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def link() -> Sample:
    """What the link moves, in GB/s: 1 GiB of pinned memory each way, eight times."""
    program = "import torch, bench_pool; bench_pool.link(torch)"
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{ROOT / 'src'}"}
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    if said.returncode:
        return {"failed": said.stderr[-500:]}
    return {one["way"]: one["gb_s"] for one in map(json.loads, said.stdout.splitlines())}


def machine(stock: Stock) -> Sample:
    """What stands above the results."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    smi = subprocess.run(query, capture_output=True, text=True, check=False).stdout if shutil.which(query[0]) else ""
    text = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    return {
        "gpu": smi.strip(),
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "criu": json.loads((stock.bundle / "bundle.json").read_text())["criu"],
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, help="in a memory file system")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", default="2,8,30", help="GB, for all three ways")
    parser.add_argument("--pooled", default="60", help="GB, for the pool alone; before the last of --sizes")
    parser.add_argument("--ways", default="stock,transparent,pooled")
    parser.add_argument("--rounds", type=int, default=2, help="restores of each checkpoint")
    parser.add_argument("--skip-link", action="store_true", help="do not measure the link")
    parser.add_argument("--worker", type=json.loads)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(arguments.worker)))
        return
    enter_private_mounts()
    from chrek.criu.bundle import Bundle

    directory: Path = arguments.directory / "engine-bench"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    stock = Stock(Bundle.find().path, directory)
    results: Sample = {"machine": machine(stock), "link": {} if arguments.skip_link else link(), "sizes": []}
    sizes = [(float(size), arguments.ways.split(",")) for size in filter(None, arguments.sizes.split(","))]
    sizes[-1:-1] = [(float(size), ["pooled"]) for size in filter(None, arguments.pooled.split(","))]
    if arguments.ways == "pooled":
        sizes = [(float(size), ["pooled"]) for size in f"{arguments.sizes},{arguments.pooled}".split(",") if size]
    for gigabytes, ways in sizes:
        results["sizes"].append(measure(directory, gigabytes, ways, stock, arguments.rounds))
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()

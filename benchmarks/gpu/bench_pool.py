"""How fast a pool goes out and back, beside the limits of the machine.

    python benchmarks/gpu/bench_pool.py --directory /mnt/t --sizes 2,8,30,60 [--tune 8] [--limits] [--disk DIR]

Prints one JSON object a line: the machine, the limits (link, pinning, hashing), and each round trip.
The output of the model, computed by replaying a CUDA graph, is compared bit for bit every time.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import mmap
import os
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from chrek.workload.pool import Options, TensorPool
from chrek.workload.pool.cuda import Cuda, Primary
from chrek.workload.pool.digest import Digester
from chrek.workload.pool.places import home
from gpu.graphmodel import Model

GB = 1_000_000_000
MIB = 1 << 20
Torch = Any
"""The module or a tensor: PyTorch is not installed where types are checked."""


def say(**values: object) -> None:
    """One line of results."""
    print(json.dumps(values), flush=True)


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def on_threads(count: int, work: Callable[[], object]) -> float:
    """How long `count` threads take that do the same at once."""
    threads = [threading.Thread(target=work) for _ in range(count)]

    def run() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return seconds(run)


# --- limits -------------------------------------------------------------------------------------------
def link(torch: Torch) -> None:
    """Copies of 1 GiB between pinned memory and the GPU: the limit of everything else."""
    host, device = (
        torch.empty(1 << 30, dtype=torch.uint8).pin_memory(),
        torch.empty(1 << 30, dtype=torch.uint8, device="cuda"),
    )
    for name, target, source in (("to_gpu", device, host), ("from_gpu", host, device)):
        target.copy_(source)
        torch.cuda.synchronize()

        def copies(target: Torch = target, source: Torch = source) -> None:
            for _ in range(8):
                target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()

        say(limit="link", way=name, gb_s=round(8 * (1 << 30) / GB / seconds(copies), 2))
    del host


def hashing() -> None:
    """Digests on the processor, one thread and all of them; copies of memory beside it."""
    data = os.urandom(64 * MIB)
    view = bytearray(64 * MIB)
    ways: dict[str, Callable[[], object]] = {
        "sha256": lambda: hashlib.sha256(data).digest(),
        "blake2b": lambda: hashlib.blake2b(data).digest(),
        "sha1": lambda: hashlib.sha1(data).digest(),
        "crc32": lambda: zlib.crc32(data),
        "copy": lambda: ctypes.memmove((ctypes.c_char * len(view)).from_buffer(view), data, len(data)),
    }
    cores = len(os.sched_getaffinity(0))
    for name, way in ways.items():
        one = len(data) / GB / seconds(way)
        every = cores * len(data) / GB / on_threads(cores, way)
        say(limit="processor", work=name, one_core_gb_s=round(one, 2), cores=cores, all_gb_s=round(every, 2))


def pinning(cuda: Cuda) -> None:
    """What pinned memory costs, by kind."""
    size = 256 * MIB
    library = ctypes.CDLL("libcuda.so.1")

    def host_alloc() -> None:
        address = ctypes.c_void_p()
        library.cuMemHostAlloc(ctypes.byref(address), ctypes.c_size_t(size), 1)
        library.cuMemFreeHost(address)

    def registered(*, huge: bool) -> None:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        cuda.call("cuMemHostRegister_v2", address, size, 1)
        cuda.call("cuMemHostUnregister", address)

    with Primary(cuda, 0):
        for name, way in {
            "cuMemHostAlloc": host_alloc,
            "register": lambda: registered(huge=False),
            "register huge": lambda: registered(huge=True),
        }.items():
            say(limit="pin 256 MiB", way=name, seconds=[round(seconds(way), 4) for _ in range(3)])


def mapped_files(cuda: Cuda, directory: str) -> None:
    """Pinning the page cache itself, so that nothing would be copied on the processor."""
    size = 1 << 30
    path = Path(directory, "mapped")
    with path.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(16 * MIB))
    with path.open("r+b") as file, Primary(cuda, 0):
        for flags, name in ((8, "read-only"), (0, "writable")):
            memory = mmap.mmap(file.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ | (0 if flags else mmap.PROT_WRITE))
            first = ctypes.c_char.from_buffer(memory) if not flags else None
            address = ctypes.addressof(first) if first is not None else _address(memory)
            try:
                took = seconds(lambda a=address, f=flags: cuda.call("cuMemHostRegister_v2", a, size, f))  # type: ignore[misc]
                back = seconds(lambda a=address: cuda.call("cuMemHostUnregister", a))  # type: ignore[misc]
                say(limit="register 1 GiB of a file", way=name, register_s=round(took, 3), unregister_s=round(back, 3))
            except Exception as error:  # noqa: BLE001 - a measurement, not a program
                say(limit="register 1 GiB of a file", way=name, error=str(error))
    path.unlink()


def _address(memory: mmap.mmap) -> int:
    """Where a read-only mapping lies (ctypes wants a writable buffer)."""
    buffer = ctypes.py_object(memory)
    view = (ctypes.c_byte * 80)()
    ctypes.pythonapi.PyObject_GetBuffer(buffer, ctypes.byref(view), 0)
    return ctypes.c_void_p.from_buffer(view).value or 0


def digests(torch: Torch, cuda: Cuda) -> None:
    """The digest kernel over 16 GiB."""
    memory = torch.empty(16 << 30, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    made = [0.0]
    start = time.perf_counter()
    kernel = Digester(cuda, 0)
    made[0] = time.perf_counter() - start
    blocks = [(memory.data_ptr() + offset, 8 * MIB) for offset in range(0, 16 << 30, 8 * MIB)]
    took = [round(seconds(lambda: kernel.digests(blocks)), 4) for _ in range(3)]
    kernel.close()
    say(limit="digest 16 GiB", load_s=round(made[0], 3), seconds=took, gb_s=round((16 << 30) / GB / min(took), 1))
    del memory
    torch.cuda.empty_cache()


# --- round trips --------------------------------------------------------------------------------------
def round_trips(torch: Torch, gigabytes: float, directory: str, tries: list[dict[str, Any]]) -> None:
    """A model of `gigabytes` in a pool, a CUDA graph over it, out and back once for each of `tries`."""
    pool = TensorPool()
    model = Model.of_size(torch, gigabytes, pool)
    for one in tries:
        options = dict(one)
        target = Path(options.pop("directory", directory))
        cold = options.pop("cold", False)
        keep = options.pop("keep", False)
        if "chunk" in options:
            options["chunk"] = int(options["chunk"] * MIB)
        pool.options = Options(**options)
        if not keep:
            subprocess.run(["rm", "-rf", str(target / home("weights"))], check=True)
        out = [0.0]
        report_out = pool.offload(str(target))
        out[0] = sum(report_out.seconds.values())
        if cold:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")
        start = time.perf_counter()
        report_in = pool.onload(str(target))
        model.compute()
        first_output = time.perf_counter() - start
        say(
            round_trip=gigabytes,
            **one,
            size_gb=round(pool.size / GB, 2),
            out_s=round(out[0], 3),
            out_gb_s=round(pool.size / GB / out[0], 2),
            back_to_output_s=round(first_output, 3),
            back_gb_s=round(pool.size / GB / first_output, 2),
            out={k: round(v, 3) for k, v in report_out.seconds.items()},
            back={k: round(v, 3) for k, v in report_in.seconds.items()},
            exact=model.exact,
        )
    subprocess.run(["rm", "-rf", str(Path(directory, home("weights")))], check=True)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", required=True)
    parser.add_argument("--sizes", default="")
    parser.add_argument("--limits", action="store_true")
    parser.add_argument("--tune", type=float, metavar="GB")
    parser.add_argument("--disk")
    parser.add_argument("--options", type=json.loads, default={}, help="options of --sizes, as JSON")
    arguments = parser.parse_args()
    import torch

    os.makedirs(arguments.directory, exist_ok=True)
    say(
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        cores=os.cpu_count(),
        kernel=os.uname().release,
        directory=arguments.directory,
        thp=Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip(),
        date=time.strftime("%Y-%m-%d"),
    )
    torch.zeros(1, device="cuda")
    cuda = Cuda()
    if arguments.limits:
        link(torch)
        hashing()
        pinning(cuda)
        mapped_files(cuda, arguments.directory)
        digests(torch, cuda)
    if arguments.tune:
        tries: list[dict[str, Any]] = [
            {"threads": threads, "chunk": chunk, "slots": slots, "keep": True}
            for threads in (8, 12, 16)
            for chunk in (1, 2, 4, 8)
            for slots in (2, 3)
        ]
        round_trips(torch, arguments.tune, arguments.directory, [{}, *tries])
    if arguments.disk:
        os.makedirs(arguments.disk, exist_ok=True)
        place = {"directory": arguments.disk, "keep": True}
        ways: list[dict[str, Any]] = [{}, {}, {"cold": True}]
        ways += [{"direct": "off", "cold": True}]
        round_trips(torch, 4, arguments.disk, [{**place, **way} for way in ways])
        subprocess.run(["rm", "-rf", arguments.disk], check=True)
    for size in filter(None, arguments.sizes.split(",")):
        round_trips(
            torch,
            float(size),
            arguments.directory,
            [{**arguments.options, **one} for one in ({}, {"keep": True}, {}, {"keep": True})],
        )
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

"""GPU programs for the tests: ``python workloads.py CASE``.

Each brings a GPU into one state that matters for a checkpoint, prints ``ready``, and then answers
every line on its standard input with one line: a digest of what it computes now. So a test sees
whether the program still works, and works right.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.graphmodel import Model

Answer = Callable[[], object]


def serve(answer: Answer) -> None:
    """Say ready; answer lines until the input ends."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        sys.stdout.write(f"{answer()}\n")
        sys.stdout.flush()


def plain() -> Answer:
    """One GPU, PyTorch, a few matrices."""
    import torch

    torch.manual_seed(0)
    weights = [torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(16)]

    def answer() -> object:
        x = torch.ones(8, 2048, device="cuda", dtype=torch.bfloat16)
        for weight in weights:
            x = torch.nn.functional.rms_norm(x @ weight, (2048,))
        return x.double().sum().item()

    return answer


def pinned() -> Answer:
    """Plain, with pinned host memory."""
    import torch

    memory = torch.ones(1 << 24).pin_memory()
    other = plain()
    return lambda: (other(), memory.sum().item())


def managed() -> Answer:
    """Managed (unified) memory, 64 MiB, used by a kernel."""
    import torch

    answer = plain()
    cuda = ctypes.CDLL("libcuda.so.1")
    torch.cuda.synchronize()
    address = ctypes.c_uint64()
    code = cuda.cuMemAllocManaged(ctypes.byref(address), ctypes.c_size_t(64 << 20), 1)
    if code:
        raise SystemExit(f"cuMemAllocManaged gave {code}")
    cuda.cuMemsetD8_v2(address, 7, ctypes.c_size_t(64 << 20))
    torch.cuda.synchronize()
    return lambda: (answer(), ctypes.string_at(address.value or 0, 1)[0])


def ipc_child(queue: Any, done: Any) -> None:  # noqa: ANN401 - types of torch.multiprocessing
    """The importing side of `ipc`."""
    tensor = queue.get()
    tensor.add_(1)
    import torch

    torch.cuda.synchronize()
    done.set()
    queue.get()


def ipc() -> Answer:
    """Two processes that share a tensor through CUDA IPC."""
    import torch
    import torch.multiprocessing as mp

    answer = plain()
    context = mp.get_context("spawn")
    queue, done = context.Queue(), context.Event()
    child = context.Process(target=ipc_child, args=(queue, done), daemon=True)
    child.start()
    tensor = torch.zeros(1 << 20, device="cuda")
    queue.put(tensor)
    done.wait(60)
    return lambda: (answer(), tensor.sum().item())


def forked() -> Answer:
    """A child that inherits descriptors of GPU devices by fork and uses CUDA itself."""
    import pynvml

    pynvml.nvmlInit()
    ready, ready_child = os.pipe()
    alive, alive_parent = os.pipe()
    if os.fork() == 0:
        os.close(alive_parent)
        answer = plain()
        answer()
        os.write(ready_child, b"x")
        os.read(alive, 1)  # until the parent ends
        os._exit(0)
    os.read(ready, 1)
    return plain()


def nccl_one() -> Answer:
    """NCCL with a single rank."""
    import torch
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), RANK="0", WORLD_SIZE="1")
    dist.init_process_group("nccl")
    x = torch.ones(1 << 20, device="cuda")
    dist.all_reduce(x)
    return lambda: x.sum().item()


def busy() -> Answer:
    """A kernel that runs for about eight seconds is under way after each answer."""
    import torch

    torch.zeros(1, device="cuda")
    return lambda: torch.cuda._sleep(14_000_000_000)


def pooled() -> Answer:
    """A model in a pool and a CUDA graph over it; answers offload and bring back by turns."""
    import torch

    from chrek.workload.pool import TensorPool

    pool = TensorPool()
    model = Model(torch, 32, width=4096, pool=pool)

    def answer() -> object:
        if pool.resident:
            return pool.offload()
        report = pool.onload()
        model.compute()
        return f"{model.exact} {report}"

    return answer


def cupy_plain() -> Answer:
    """One GPU, CuPy."""
    import cupy

    x = cupy.arange(1 << 22, dtype=cupy.float32)
    return lambda: float((x * 2).sum())


def jax_plain() -> Answer:
    """One GPU, JAX."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax
    import jax.numpy as jnp

    x = jnp.arange(1 << 22, dtype=jnp.float32)
    double = jax.jit(lambda y: (y * 2).sum())
    return lambda: float(double(x))


def two() -> Answer:
    """One process, two GPUs, no copy between them."""
    import torch

    x = [torch.ones(1 << 24, device=f"cuda:{device}") for device in (0, 1)]
    return lambda: [one.sum().item() for one in x]


def peer() -> Answer:
    """One process, two GPUs, a direct copy between them."""
    import torch

    answer = two()
    x = torch.ones(1 << 24, device="cuda:0")
    y = x.to("cuda:1")
    torch.cuda.synchronize(1)
    return lambda: (answer(), y.sum().item())


def nccl() -> Answer:
    """Two ranks of NCCL, one process and one GPU each; this one is rank 0 unless RANK says so."""
    import torch
    import torch.distributed as dist

    other: subprocess.Popen[bytes] | None = None
    if "RANK" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE="2", USE_LIBUV="0")
        command, environment = [sys.executable, __file__, "nccl"], {**os.environ, "RANK": "1"}
        other = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        os.environ["RANK"] = "0"
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")

    def answer() -> object:
        if other is not None and other.stdin is not None:
            other.stdin.write(b"\n")
            other.stdin.flush()
        x = torch.full((1 << 20,), float(rank + 1), device="cuda")
        dist.all_reduce(x)
        return x.sum().item()

    x = torch.ones(1, device="cuda")
    dist.all_reduce(x)
    torch.cuda.synchronize()
    return answer


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


CASES: dict[str, Callable[[], Answer]] = {
    case.__name__: case
    for case in (plain, pinned, managed, ipc, forked, nccl_one, busy, pooled, cupy_plain, jax_plain, two, peer, nccl)
}


if __name__ == "__main__":
    serve(CASES[sys.argv[1]]())

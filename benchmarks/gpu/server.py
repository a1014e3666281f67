"""A GPU server to checkpoint: bf16 weights, a CUDA graph over them, an HTTP front, the contract.

    python benchmarks/gpu/server.py --gb 30 --mode pooled --port 8124 --log /path/events

``GET /`` computes and answers ``{"exact": true, "seconds": 0.01}``: whether the output is bit for bit that of before
the checkpoint. ``--log`` gets a JSON object a line, with the wall clock: ``ready``, and ``output`` with the first
answer after a restore (``seconds`` of it for the pool). ``--mode transparent`` leaves everything to the driver.
"""

from __future__ import annotations

import argparse
import http.server
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from chrek.workload import Outcome, checkpoint_point
from chrek.workload.pool import TensorPool

WIDTH = 8192
Torch = Any
"""The module or a tensor: PyTorch is not installed where types are checked."""


def build(torch: Torch, gigabytes: float, pool: TensorPool | None) -> Callable[[], bool]:
    """Make the model; a function that computes and says whether the output is what it was."""
    torch.manual_seed(0)
    torch.zeros(1, device="cuda")
    layers = max(1, int(gigabytes * 1e9 / (WIDTH * WIDTH * 2)))

    def load() -> list[Torch]:
        return [torch.randn(WIDTH, WIDTH, device="cuda", dtype=torch.bfloat16).div_(90) for _ in range(layers)]

    if pool is None:
        weights = load()
    else:
        with pool:
            weights = load()
    x = torch.ones(16, WIDTH, device="cuda", dtype=torch.bfloat16)

    def forward(y: Torch) -> Torch:
        for weight in weights:
            y = torch.nn.functional.rms_norm(y @ weight, (WIDTH,))
        return y

    forward(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward(x)
    graph.replay()
    torch.cuda.synchronize()
    reference = result.clone()

    def compute() -> bool:
        result.zero_()
        graph.replay()
        torch.cuda.synchronize()
        return bool(torch.equal(result, reference))

    # The graph knows addresses only: without a reference its inputs would be freed, and their memory used again.
    compute.inputs = weights, x  # type: ignore[attr-defined]
    return compute


def front(compute: Callable[[], bool], port: int) -> http.server.HTTPServer:
    """The HTTP server."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            start = time.perf_counter()
            answer = {"exact": compute(), "seconds": round(time.perf_counter() - start, 4)}
            data = json.dumps(answer).encode()
            self.send_response(http.HTTPStatus.OK)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return http.server.HTTPServer(("0.0.0.0", port), Handler)


def main() -> None:
    """Load, offer the checkpoint, serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--mode", choices=("pooled", "transparent"), default="pooled")
    parser.add_argument("--port", type=int, default=8124)
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    import torch

    def event(**values: object) -> None:
        line = json.dumps({"time": time.time(), **values}) + "\n"
        sys.stdout.write(line)
        sys.stdout.flush()
        if arguments.log:
            with arguments.log.open("a") as file:
                file.write(line)

    pool = TensorPool() if arguments.mode == "pooled" else None
    compute = build(torch, arguments.gb, pool)
    server = front(compute, arguments.port)
    before = compute() and compute()
    reports: list[str] = []
    steps = [] if pool is None else [lambda: reports.append(str(pool.offload()))]
    steps.append(lambda: event(event="ready", exact=before, cold=round(time.perf_counter() - begin, 2), out=reports[-1:]))
    back = [] if pool is None else [lambda: reports.append(str(pool.onload()))]
    outcome = checkpoint_point(before=steps, after=back)
    if outcome is Outcome.CHECKPOINTED:
        return
    start = time.perf_counter()
    exact = compute()
    event(
        event="output",
        outcome=outcome.value,
        exact=exact,
        compute=round(time.perf_counter() - start, 3),
        back=reports[-1:],
    )
    server.serve_forever()


if __name__ == "__main__":
    main()

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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from chrek.workload import Outcome, checkpoint_point
from chrek.workload.pool import TensorPool
from gpu.graphmodel import Model


def front(model: Model, port: int) -> http.server.HTTPServer:
    """The HTTP server."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            start = time.perf_counter()
            model.compute()
            answer = {"exact": model.exact, "seconds": round(time.perf_counter() - start, 4)}
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
    model = Model.of_size(torch, arguments.gb, pool)
    server = front(model, arguments.port)
    model.compute()
    before = model.exact
    reports: list[str] = []
    steps = [] if pool is None else [lambda: reports.append(str(pool.offload()))]
    steps.append(lambda: event(event="ready", exact=before, cold=round(time.perf_counter() - begin, 2), out=reports[-1:]))
    back = [] if pool is None else [lambda: reports.append(str(pool.onload()))]
    outcome = checkpoint_point(before=steps, after=back)
    if outcome is Outcome.CHECKPOINTED:
        return
    start = time.perf_counter()
    model.compute()
    exact = model.exact
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

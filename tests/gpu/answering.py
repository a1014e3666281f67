"""A model on one GPU that says again and again what it computes: ``answering.py GIGABYTES [pooled]``.

The weights are random but the same in every run; a forward pass is a captured CUDA graph. Each line
``answer N DIGEST SECONDS`` is one replay: the digest must never change; SECONDS is the wall clock. ``pooled`` keeps the
weights in a pool and takes part in a checkpoint with `checkpoint_point` after the first answers.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

from chrek.workload import Outcome, checkpoint_point
from chrek.workload.pool import TensorPool


def model(gigabytes: float, pool: TensorPool | None) -> Callable[[], str]:
    """Load, capture the graph; a function that gives the digest of an answer."""
    import torch

    torch.manual_seed(0)
    width = 8192
    count = max(int(gigabytes * 1e9 / (2 * width * width)), 1)
    with pool or nullcontext():
        weights = [torch.randn(width, width, device="cuda", dtype=torch.bfloat16).div_(90) for _ in range(count)]
    given = torch.ones(16, width, device="cuda", dtype=torch.bfloat16)
    result = torch.empty_like(given)

    def forward() -> None:
        x = given
        for weight in weights:
            x = torch.nn.functional.rms_norm(x @ weight, (width,))
        result.copy_(x)

    forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()

    def answer(*, _kept: object = (weights, given)) -> str:
        # The graph knows addresses only: without a reference its inputs would be freed, and their memory used again.
        result.zero_()
        graph.replay()
        torch.cuda.synchronize()
        return hashlib.sha256(result.cpu().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]

    return answer


def main(gigabytes: float, *, pooled: bool) -> None:
    """Answer for ever."""
    pool = TensorPool() if pooled else None
    answer = model(gigabytes, pool)
    sys.stdout.write("ready\n")
    number = 0
    while True:
        number += 1
        sys.stdout.write(f"answer {number} {answer()} {time.time():.3f}\n")
        sys.stdout.flush()
        time.sleep(0.02)
        if (
            pool is not None
            and number == 5
            and checkpoint_point(before=[pool.offload], after=[pool.onload]) is Outcome.CHECKPOINTED
        ):
            pool.onload()


if __name__ == "__main__":
    main(float(sys.argv[1]), pooled=sys.argv[2:] == ["pooled"])

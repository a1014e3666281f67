"""A model on one GPU that says again and again what it computes: ``answering.py GIGABYTES [pooled]``.

The weights are random but the same in every run; a forward pass is a captured CUDA graph. Each line
``answer N DIGEST SECONDS`` is one replay: the digest must never change; SECONDS is the wall clock. ``pooled`` keeps the
weights in a pool and takes part in a checkpoint with `checkpoint_point` after the first answers.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chrek.workload import Outcome, checkpoint_point
from chrek.workload.pool import TensorPool
from gpu.graphmodel import Model


def main(gigabytes: float, *, pooled: bool) -> None:
    """Answer for ever."""
    import torch

    pool = TensorPool() if pooled else None
    model = Model.of_size(torch, gigabytes, pool)
    sys.stdout.write("ready\n")
    number = 0
    while True:
        number += 1
        model.compute()
        sys.stdout.write(f"answer {number} {model.digest()} {time.time():.3f}\n")
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

"""A model on one GPU that says again and again what it computes: ``answering.py GIGABYTES``.

The weights are random but the same in every run; a forward pass is a captured CUDA graph. Each line
``answer N DIGEST`` is one replay: the digest must never change.
"""

from __future__ import annotations

import hashlib
import sys
import time


def main(gigabytes: float) -> None:
    """Load, capture the graph, answer for ever."""
    import torch

    torch.manual_seed(0)
    width = 8192
    count = max(int(gigabytes * 1e9 / (2 * width * width)), 1)
    weights = [torch.randn(width, width, device="cuda", dtype=torch.bfloat16) / width**0.5 for _ in range(count)]
    given = torch.randn(16, width, device="cuda", dtype=torch.bfloat16)
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
    number = 0
    sys.stdout.write("ready\n")
    while True:
        graph.replay()
        torch.cuda.synchronize()
        digest = hashlib.sha256(result.cpu().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        number += 1
        sys.stdout.write(f"answer {number} {digest}\n")
        sys.stdout.flush()
        time.sleep(0.02)


if __name__ == "__main__":
    main(float(sys.argv[1]))

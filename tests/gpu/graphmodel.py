"""The model of the GPU tests and benchmarks: bf16 weights, and a CUDA graph over them.

A captured graph is what a checkpoint must get right to the last address: its kernels know their inputs by address only.
The weights are random and the same in every run, so the output can be compared bit for bit, also with another process's.
"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chrek.workload.pool import TensorPool

WIDTH = 8192
Torch = Any
"""The module or a tensor: PyTorch is not installed where types are checked."""


class Model:
    """Layers of *width* x *width* weights, in the pool if there is one; warmed up, its graph captured."""

    def __init__(self, torch: Torch, layers: int, *, width: int = WIDTH, pool: TensorPool | None = None) -> None:
        self._torch = torch
        torch.manual_seed(0)
        torch.zeros(1, device="cuda")  # the context, outside of the pool
        bf16 = {"device": "cuda", "dtype": torch.bfloat16}
        with nullcontext() if pool is None else pool:
            weights = [torch.randn(width, width, **bf16).div_(int(width**0.5)) for _ in range(layers)]
        given = torch.ones(16, width, **bf16)

        def forward() -> Torch:
            x = given
            for weight in weights:
                x = torch.nn.functional.rms_norm(x @ weight, (width,))
            return x

        forward()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = forward()
        # The graph keeps addresses: without a reference its inputs would be freed, and their memory used again.
        self._inputs = weights, given
        self.compute()
        self._reference = self._result.clone()

    @classmethod
    def of_size(cls, torch: Torch, gigabytes: float, pool: TensorPool | None = None) -> Model:
        """As many layers of the usual width as make up *gigabytes* (10^9 bytes), at least one."""
        return cls(torch, max(1, int(gigabytes * 1e9 / (WIDTH * WIDTH * 2))), pool=pool)

    def compute(self) -> None:
        """Compute the output anew and wait for it."""
        self._result.zero_()
        self._graph.replay()
        self._torch.cuda.synchronize()

    @property
    def exact(self) -> bool:
        """Whether the last output is bit for bit the first one."""
        return bool(self._torch.equal(self._result, self._reference))

    def digest(self) -> str:
        """The beginning of the SHA-256 of the last output."""
        data = self._result.cpu().view(self._torch.uint8).numpy().tobytes()
        return hashlib.sha256(data).hexdigest()[:16]

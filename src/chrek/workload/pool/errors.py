"""What can go wrong in a pool. Nothing here is lost silently: each says what happened to which memory."""

from __future__ import annotations


class PoolError(RuntimeError):
    """A pool could not do what it was asked for; the application's memory is as it was before."""


class PoolCorrupt(PoolError):
    """What was read back is not what was saved; the pool stays without contents."""

    state_unusable = True
    """See `chrek.workload.lifecycle.UNUSABLE`."""


class CudaError(PoolError):
    """A call of the CUDA driver failed."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call} failed: {name} ({code})")
        self.call = call
        self.code = code

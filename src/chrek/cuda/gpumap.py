"""Which GPU here takes the place of which GPU of the checkpoint.

The driver wants a pair for **every** GPU that it saw in the process, used or not (a map with one of
two GPUs gives error 1; `CUDA_VISIBLE_DEVICES` does not reduce it). A GPU that is there again stays
itself; the others go to free GPUs of the same model in the order of both lists, so that the choice is
the same every time. If every GPU is itself the map is empty, which also older drivers understand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from chrek.cuda.driver import GpuUuid
from chrek.errors import Reason, Refused

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A GPU as a checkpoint records it, or as it is here.

    `memory` is the whole memory in bytes; `used` what the checkpointed processes had on it; `free`
    what is free now (None where it is not known).
    """

    uuid: GpuUuid
    model: str
    memory: int
    minor: int = -1
    used: int = 0
    free: int | None = None


def plan_map(saved: Sequence[Gpu], here: Sequence[Gpu]) -> Mapping[GpuUuid, GpuUuid]:
    """A map from every saved GPU to one here; empty if each is itself.

    Raises `Refused` with `GPU_MISMATCH` if there are too few GPUs of a model, or one has too little
    free memory.
    """
    free = {gpu.uuid: gpu for gpu in here}
    chosen: dict[GpuUuid, Gpu] = {}
    for gpu in saved:
        if (same := free.get(gpu.uuid)) is not None and same.model == gpu.model:
            chosen[gpu.uuid] = free.pop(gpu.uuid)
    for gpu in saved:
        if gpu.uuid not in chosen:
            chosen[gpu.uuid] = free.pop(_substitute(gpu, tuple(free.values()), saved, here).uuid)
    for gpu in saved:
        _check_memory(gpu, chosen[gpu.uuid])
    if all(old == new.uuid for old, new in chosen.items()):
        return MappingProxyType({})
    return MappingProxyType({gpu.uuid: chosen[gpu.uuid].uuid for gpu in saved})


def check_driver(saved: str, here: str) -> None:
    """Raise `Refused` with `DRIVER_MISMATCH` unless both driver versions are the same."""
    if saved != here:
        raise Refused(Reason.DRIVER_MISMATCH, f"The checkpoint needs driver {saved}; here is {here}.")


def _substitute(gpu: Gpu, free: Sequence[Gpu], saved: Sequence[Gpu], here: Sequence[Gpu]) -> Gpu:
    for candidate in free:
        if candidate.model == gpu.model and candidate.memory >= gpu.memory:
            return candidate
    message = f"The checkpoint needs {_models(saved)}; here is {_models(here) or 'no GPU'}."
    raise Refused(Reason.GPU_MISMATCH, message)


def _check_memory(old: Gpu, new: Gpu) -> None:
    if new.free is not None and new.free < old.used:
        message = f"{new.uuid} has {new.free / GIB:.1f} GiB free; the checkpoint needs {old.used / GIB:.1f} GiB there."
        raise Refused(Reason.GPU_MISMATCH, message)


def _models(gpus: Sequence[Gpu]) -> str:
    counts: dict[str, int] = {}
    for gpu in gpus:
        counts[gpu.model] = counts.get(gpu.model, 0) + 1
    return ", ".join(f"{count} x {model}" for model, count in sorted(counts.items()))

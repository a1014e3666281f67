"""How many captures run at a time: so many on the node, so many on one GPU, and one for an id."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Slots:
    """Counts what is under way. Nobody waits in here: who gets no slot comes again."""

    def __init__(self, *, node: int, gpu: int) -> None:
        self._node = node
        self._gpu = gpu
        self._lock = threading.Lock()
        self._ids: set[str] = set()
        self._gpus: Counter[str] = Counter()
        self._waiting: set[str] = set()

    @contextmanager
    def take(self, checkpoint_id: str, gpus: frozenset[str], *, who: str) -> Iterator[bool]:
        """Hold a slot for the length of the block, if the value is true; *who* is in the queue until then."""
        taken = self._try(checkpoint_id, gpus, who)
        try:
            yield taken
        finally:
            if taken:
                with self._lock:
                    self._ids.discard(checkpoint_id)
                    self._gpus.subtract(gpus)

    def forget(self, who: str) -> None:
        """Take a pod that is gone out of the queue."""
        with self._lock:
            self._waiting.discard(who)

    def queued(self) -> int:
        """Return how many wait."""
        with self._lock:
            return len(self._waiting)

    def _try(self, checkpoint_id: str, gpus: frozenset[str], who: str) -> bool:
        with self._lock:
            free = len(self._ids) < self._node and checkpoint_id not in self._ids
            if not free or any(self._gpus[each] >= self._gpu for each in gpus):
                self._waiting.add(who)
                return False
            self._waiting.discard(who)
            self._ids.add(checkpoint_id)
            self._gpus.update(gpus)
            return True


def gpus_of(spec: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the GPU devices in an OCI runtime spec; ``/dev/nvidia0`` or a UUID, as it names them."""
    devices = (spec.get("linux") or {}).get("devices") or []
    found = {str(each.get("path")) for each in devices}
    named = {path for path in found if path.startswith("/dev/nvidia") and path[len("/dev/nvidia") :].isdigit()}
    for entry in (spec.get("process") or {}).get("env") or []:
        name, _, value = str(entry).partition("=")
        if name == "NVIDIA_VISIBLE_DEVICES" and value not in {"", "none", "void"}:
            named |= set(value.split(","))
    return frozenset(named)

"""The entry point that vLLM loads in every process, and the sleep-mode backend that it brings.

vLLM (0.25.1 and later) has pluggable backends for its sleep mode, found by name. Ours is there under the name
``chrek``; versions without ``--sleep-mode-backend`` (0.27 has none, 0.33 has it) cannot be told, so there it also takes
over the name of the default one. Nothing is registered unless ``CHREK_VLLM_STREAM`` is set, which the launcher does in
a checkpoint job only.

Sleeping (level 1) with it: memory whose contents vLLM keeps asleep goes to files, the weights by themselves and the rest
(0.33 has tags for runtime state and graph pools) by itself; then everything, the KV cache too, is unmapped by vLLM's own
allocator. Waking up: mapped at the same addresses, contents read back. Graphs, buffers and compiled code stay valid
because the addresses do. Once awake, the backend is vLLM's own again: a restored server that sleeps for its own
reasons has no checkpoint to write to.

Mapping stays with vLLM's allocator; only the copies are ours, made in the primary context of the
device, which is the one PyTorch uses.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import logging
import os
from collections.abc import Mapping
from typing import Any

from chrek.workload.pool import Index, PoolError, Region, files, load, places, save
from chrek.workload.pool import cuda as driver

SWITCH = "CHREK_VLLM_STREAM"
NAME = "chrek"
TAKEN_OVER = "cumem"
WEIGHTS = "weights"
DISPOSABLE = frozenset({"kv_cache", "workspace"})
"""Tags of memory whose contents vLLM does not keep either: all others are kept, also ones that later versions invent."""
DEFERRABLE = frozenset({"weights", "kv_cache"})
"""Tags that waking up can leave for later; all others come back with the first (vllm/device_allocator/cumem.py, 0.33)."""
OPTION = "--sleep-mode-backend"
BACKENDS = "vllm.device_allocator.sleep_mode_backend"
log = logging.getLogger("vllm.chrek")  # below vLLM's own logger, so that its settings hold


def enabled() -> bool:
    """Whether this process was started to be checkpointed."""
    return os.environ.get(SWITCH) == "1"


def has_option() -> bool:
    """Whether this vLLM can be told which sleep-mode backend to use; found without importing it, which takes 10 s."""
    package = importlib.util.find_spec("vllm")
    places = (package.submodule_search_locations or []) if package else []
    for place in places:
        try:
            with open(os.path.join(place, "engine", "arg_utils.py"), encoding="utf-8") as file:
                return f'"{OPTION}"' in file.read()
        except OSError:
            continue
    return False


def register() -> None:
    """Give vLLM the backend. Called by vLLM; more than once in one process is fine."""
    if not enabled():
        return
    try:
        module = importlib.import_module(BACKENDS)
    except ImportError:
        log.warning("This vLLM has no pluggable sleep mode (it came with 0.25): its own is used.")
        return
    registry: dict[str, Any] | None = getattr(module.SleepModeBackendFactory, "_registry", None)
    if registry is None:
        module.SleepModeBackendFactory.register_backend(NAME, __name__, "Backend")
        log.warning("This vLLM does not let its default sleep mode be replaced: choose the backend %r.", NAME)
        return
    registry[NAME] = backend_class
    if not has_option():
        registry[TAKEN_OVER] = backend_class


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a class that is made when vLLM asks for it
    if name == "Backend":
        return backend_class()
    raise AttributeError(name)


def backend_class() -> type[Any]:
    """The backend; made late, because its base class is vLLM's."""
    base: Any = importlib.import_module(BACKENDS).CuMemBackend

    class Backend(base):  # type: ignore[misc]
        """vLLM's own backend, with weights streamed to files the first time it is suspended."""

        def __init__(self) -> None:
            super().__init__()
            self._stream: Stream | None = Stream(_allocator()) if enabled() else None

        @classmethod
        def supports_durable_storage(cls) -> bool:
            return True

        def suspend(self, level: int = 1) -> None:
            if self._stream is None or level != 1:
                super().suspend(level)
                return
            self._stream.out()
            self._state = "SUSPENDED"

        def resume(self, tags: list[str] | None = None) -> None:
            if self._stream is None or not self._stream.away:
                super().resume(tags)
                return
            self._state = "RESUMING"
            self._stream.back(tags)
            if self._stream.others_sleep():
                super().resume(tags)
                self._state = "RESUMING"
            if not self._stream.away:
                self._stream, self._state = None, "RUNNING"

    return Backend


def _allocator() -> Allocator:
    return Allocator(importlib.import_module("vllm.device_allocator.cumem"))


class Allocator:
    """The part of vLLM's CuMemAllocator that is used; the one place that knows its insides."""

    def __init__(self, module: Any) -> None:  # noqa: ANN401 - vLLM has no types here
        self._module = module

    def entries(self) -> dict[int, Any]:
        """Address -> allocation (``handle`` = device, size, address, physical handle; ``tag``)."""
        found: dict[int, Any] = self._module.CuMemAllocator.get_instance().pointer_to_data
        return found

    def region(self, address: int) -> Region:
        """Where an allocation is."""
        device, size = self.entries()[address].handle[:2]
        return Region(int(device), address, int(size))

    def map(self, address: int) -> None:
        """Give an allocation memory again."""
        entry = self.entries()[address]
        self._module.create_and_map(entry.handle)
        if hasattr(entry, "is_asleep"):
            entry.is_asleep = False

    def unmap(self, address: int) -> None:
        """Take an allocation's memory away."""
        entry = self.entries()[address]
        self._module.unmap_and_release(entry.handle)
        if hasattr(entry, "is_asleep"):
            entry.is_asleep = True

    @staticmethod
    def synchronise() -> None:
        """Wait for the GPU."""
        importlib.import_module("torch").cuda.synchronize()

    @staticmethod
    def trim() -> None:
        """Give back what PyTorch keeps for later."""
        gc.collect()
        importlib.import_module("torch").cuda.empty_cache()


class Stream:
    """The contents of one worker's memory, out once and back once."""

    def __init__(self, allocator: Allocator, *, library: str = driver.LIBRARY) -> None:
        self._allocator = allocator
        self._library = library
        self._indexes: dict[str, Index] = {}
        """What was written, by the name of the pool."""
        self._base = ""
        self.away: set[int] = set()
        """Addresses without memory."""

    def out(self) -> None:
        """Write what is kept, unmap everything. Raises `PoolError`; everything is mapped then, as before."""
        self._allocator.synchronise()
        # What vLLM has discarded already has neither memory nor contents.
        entries = {at: entry for at, entry in self._allocator.entries().items() if not _is_asleep(entry)}
        self._base = places.handover_directory()
        cuda = driver.Cuda(self._library)
        for name, addresses in _kept(entries).items():
            regions = [self._allocator.region(address) for address in addresses]
            self._indexes[name], report = save(cuda, regions, self._home(name, self._base), pool=name)
            log.info("%s out: %s", name, report)
        try:
            for address in entries:
                self._allocator.unmap(address)
                self.away.add(address)
        except BaseException:
            self.back(None)
            raise
        self._allocator.trim()

    def back(self, tags: list[str] | None) -> None:
        """Map what `tags` name (None: all) and read the weights. Raises `PoolError`; still asleep then."""
        entries = self._allocator.entries()
        self.away &= set(entries)
        wanted = [address for address in sorted(self.away) if _comes_back(entries[address].tag, tags)]
        mapped = []
        try:
            for address in wanted:
                self._allocator.map(address)
                mapped.append(address)
            for name in _kept({address: entries[address] for address in wanted}):
                self._load(name)
        except BaseException:
            for address in mapped:
                self._allocator.unmap(address)
            raise
        self.away -= set(wanted)

    def others_sleep(self) -> bool:
        """Whether there is memory asleep that vLLM itself has discarded."""
        entries = self._allocator.entries()
        return any(_is_asleep(entry) and address not in self.away for address, entry in entries.items())

    def _load(self, name: str) -> None:
        if name not in self._indexes:
            raise PoolError(f"there is no {name!r} to load: the worker was never put to sleep")
        bases = places.candidates(None, self._base)
        source = files.locate(self._indexes[name], [self._home(name, base) for base in bases])
        log.info("%s back: %s", name, load(driver.Cuda(self._library), self._indexes[name], source))

    @staticmethod
    def _home(name: str, base: str) -> str:
        return os.path.join(base, places.home(name))


def _is_asleep(entry: Any) -> bool:  # noqa: ANN401 - vLLM has no types here; older versions have no such field
    return bool(getattr(entry, "is_asleep", False))


def _kept(entries: Mapping[int, Any]) -> dict[str, list[int]]:
    """Addresses of allocations whose contents are kept, by the pool they are kept in: weights and the rest.

    Two, because waking up may leave the weights for later, but nothing else.
    """
    found: dict[str, list[int]] = {}
    for address in sorted(entries):
        tag = entries[address].tag
        if tag not in DISPOSABLE:
            found.setdefault("vllm" if tag == WEIGHTS else "vllm-state", []).append(address)
    return found


def _comes_back(tag: str, tags: list[str] | None) -> bool:
    return tags is None or tag in tags or tag not in DEFERRABLE

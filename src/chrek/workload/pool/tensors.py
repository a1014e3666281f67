"""`TensorPool`: tensors whose bytes leave the GPU for a checkpoint and come back to the same addresses.

::

    pool = TensorPool()
    with pool:
        model = load_model().cuda()          # every allocation of this block belongs to the pool
    ...                                      # warm up, capture CUDA graphs, compile
    pool.offload()                           # before the ready file: bytes to files, GPU memory free
    ...                                      # the checkpoint; perhaps the restore
    pool.onload()                            # bytes back, every pointer valid

PyTorch allocates inside the block through a `MemPool` whose allocator is this class, by way of ctypes
callbacks; so there is nothing to compile. Other frameworks with an allocator hook (CuPy's
``PythonFunctionAllocator``) use `allocate` and `free`.

A failure leaves the application running with its data: memory is dropped only after every byte is in
a file, and if dropping fails half way the contents are loaded again.

Not for allocations made during a CUDA graph capture or from threads without Python: the callbacks need
Python's lock. Weights are neither.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import threading
from typing import TYPE_CHECKING, Any

from chrek.workload.pool import files, memory, places
from chrek.workload.pool.cuda import LIBRARY, Cuda, Primary
from chrek.workload.pool.errors import PoolError
from chrek.workload.pool.layout import Index, Region
from chrek.workload.pool.transfer import Options, Report, load, save

if TYPE_CHECKING:
    from collections.abc import Sequence

_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
_FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)


class TensorPool:
    """GPU memory that ChReK owns.

    `name` becomes part of a file name and has to be unique in the process. With ``contents=False`` the
    bytes are dropped and not saved (caches, workspaces): `onload` gives the addresses fresh memory of
    undefined contents. `devices` are the device ordinals that PyTorch may allocate on inside the
    ``with`` block; without it, the current device. `known` are directories of other checkpoints whose
    equal blobs are linked.
    """

    def __init__(
        self,
        name: str = "weights",
        *,
        contents: bool = True,
        devices: Sequence[int] | None = None,
        options: Options | None = None,
        known: Sequence[str] = (),
        library: str = LIBRARY,
    ) -> None:
        self.name = name
        self._home = places.home(name)
        self.contents = contents
        self.known = tuple(known)
        self.options = options or Options()
        self._devices = devices
        self._library = library
        self._loaded: Cuda | None = None
        self._lock = threading.RLock()
        self._segments: dict[int, memory.Segment] = {}
        self._index: Index | None = None
        self._directory: str | None = None
        self._torch: dict[int, Any] = {}
        self._callbacks: tuple[Any, Any] | None = None
        self._entered: list[contextlib.ExitStack] = []
        self.failures: list[str] = []

    # --- memory ---------------------------------------------------------------------------------------
    @property
    def _cuda(self) -> Cuda:
        if self._loaded is None:
            self._loaded = Cuda(self._library)
        return self._loaded

    @property
    def size(self) -> int:
        """Bytes of address space, with or without memory in it."""
        return sum(segment.size for segment in self._segments.values())

    @property
    def resident(self) -> bool:
        """Whether every address has memory (the state in which the application may use its tensors)."""
        return all(segment.resident for segment in self._segments.values())

    def allocate(self, size: int, device: int = 0) -> int:
        """Address of new GPU memory of at least `size` bytes (a multiple of 2 MiB); raises `PoolError`."""
        with self._lock, Primary(self._cuda, device):
            segment = memory.reserve(self._cuda, device, size)
            self._segments[segment.address] = segment
            return segment.address

    def free(self, address: int) -> None:
        """Give back what `allocate` gave. Raises `PoolError`.

        Waits for the GPU first, as ``cudaFree`` does: PyTorch counts on that.
        """
        with self._lock:
            if (segment := self._segments.pop(address, None)) is None:
                raise PoolError(f"{address:#x} is no allocation of pool {self.name!r}")
            with Primary(self._cuda, segment.device):
                self._cuda.call("cuCtxSynchronize")
                memory.release(self._cuda, segment)

    def _on_allocate(self, size: int, device: int, _stream: int | None) -> int:
        """PyTorch's call; 0 makes it raise its own out-of-memory error, the cause is in `failures`."""
        try:
            return self.allocate(size, device)
        except BaseException as error:  # noqa: BLE001 - nothing may be raised through a C callback
            self.failures.append(f"{size} bytes on device {device}: {error}")
            return 0

    def _on_free(self, address: int, _size: int, _device: int, _stream: int | None) -> None:
        try:
            self.free(address)
        except BaseException as error:  # noqa: BLE001 - nothing may be raised through a C callback
            self.failures.append(f"freeing {address:#x}: {error}")

    # --- PyTorch --------------------------------------------------------------------------------------
    def __enter__(self) -> TensorPool:  # noqa: PYI034 - Self is newer than Python 3.9
        torch: Any = importlib.import_module("torch")  # the application's own, and only if it uses this
        stack = contextlib.ExitStack()
        for device in self._devices or (torch.cuda.current_device(),):
            stack.enter_context(torch.cuda.use_mem_pool(self._torch_pool(torch, device), device=device))
        self._entered.append(stack)
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.pop().close()

    def _torch_pool(self, torch: Any, device: int) -> Any:  # noqa: ANN401 - torch has no types here
        if device not in self._torch:
            torch.cuda.init()
            if self._callbacks is None:
                self._callbacks = (_ALLOCATE(self._on_allocate), _FREE(self._on_free))
                # PyTorch calls `free` when the interpreter is already half gone; callbacks that stay
                # for the life of the process are harmless then, collected ones are a crash.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._callbacks))
            addresses = [ctypes.cast(callback, ctypes.c_void_p).value for callback in self._callbacks]
            allocator = torch._C._cuda_customAllocator(*addresses)  # noqa: SLF001 - the public class wants a .so
            with torch.cuda.device(device):
                self._torch[device] = torch.cuda.MemPool(allocator)
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._torch[device]))
        return self._torch[device]

    def close(self) -> None:
        """Give back the memory that no tensor uses any more; the pool is not for allocating then.

        What tensors still use stays valid for their life.
        """
        while self._torch:
            _, mempool = self._torch.popitem()
            ctypes.pythonapi.Py_DecRef(ctypes.py_object(mempool))
            del mempool

    # --- out and back ---------------------------------------------------------------------------------
    def offload(self, directory: str | None = None) -> Report:
        """Save the contents and give the GPU memory back; addresses stay.

        `directory` is by default the checkpoint's handover directory (`places.handover_directory`). Raises
        `PoolError`; the pool is as before then.
        """
        with self._lock:
            segments = [segment for segment in self._segments.values() if segment.resident]
            if len(segments) < len(self._segments):
                raise PoolError(f"pool {self.name!r} is already offloaded")
            report = Report(size=self.size)
            with report.phase("idle"):
                self._synchronise(segments)
            if self.contents:
                base = directory or places.handover_directory()
                target = os.path.join(base, self._home)
                regions = sorted(Region(s.device, s.address, s.size) for s in segments)
                index, saved = save(self._cuda, regions, target, pool=self.name, options=self.options, known=self.known)
                saved.seconds = {**report.seconds, **saved.seconds}
                report, self._index, self._directory = saved, index, base
            with report.phase("unmap"):
                self._drop(segments)
            return report

    def onload(self, directory: str | None = None) -> Report:
        """Give every address memory again and put the contents back.

        Looks in `directory`, in the one that the restore marker names, in the published checkpoint and
        where `offload` wrote, in this order. Raises `PoolError` (`PoolCorrupt` if the contents are not
        what they were); the pool stays offloaded then, and another `onload` may be tried.
        """
        with self._lock:
            gone = [segment for segment in self._segments.values() if not segment.resident]
            report = Report(size=sum(segment.size for segment in gone))
            index = self._wanted(gone)
            source = ""
            if index is not None:
                bases = places.candidates(directory, self._directory)
                source = files.locate(index, [os.path.join(base, self._home) for base in bases])
            try:
                with report.phase("map"):
                    for segment in gone:
                        with Primary(self._cuda, segment.device):
                            memory.fill(self._cuda, segment)
                if index is not None:
                    loaded = load(self._cuda, index, source, options=self.options)
                    loaded.seconds = {**report.seconds, **loaded.seconds}
                    report = loaded
            except BaseException:
                self._drop_all(gone)
                raise
            return report

    def _wanted(self, gone: Sequence[memory.Segment]) -> Index | None:
        """The saved index, less what the application has freed since."""
        if not self.contents or self._index is None or not gone:
            return None
        there = {segment.address for segment in gone}
        regions = [region for region in self._index.regions if region.address in there]
        ranges = [(region.address, region.address + region.size) for region in regions]
        blobs = [b for b in self._index.blobs if any(low <= b.blocks[0].address < high for low, high in ranges)]
        return Index(self.name, self._index.digest, regions, blobs)

    def _synchronise(self, segments: Sequence[memory.Segment]) -> None:
        for device in sorted({segment.device for segment in segments}):
            with Primary(self._cuda, device):
                self._cuda.call("cuCtxSynchronize")

    def _drop(self, segments: Sequence[memory.Segment]) -> None:
        """Drop all or none: what was dropped before a failure is loaded again."""
        try:
            for segment in segments:
                with Primary(self._cuda, segment.device):
                    memory.drop(self._cuda, segment)
        except PoolError:
            self.onload(self._directory)
            raise

    def _drop_all(self, segments: Sequence[memory.Segment]) -> None:
        """Drop what can be dropped after a failed `onload`; its failure is the one to raise."""
        for segment in segments:
            with contextlib.suppress(PoolError), Primary(self._cuda, segment.device):
                memory.drop(self._cuda, segment)
